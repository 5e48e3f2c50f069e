"""The tensors of a model, and the sizes that follow from them: the one list of names and shapes.

    model.embed_tokens.weight                      embedding    [V, D]
    model.layers.0.input_layernorm.weight          norm         [D]
                   self_attn.q_proj.weight         projection   [N, K]; all seven in PROJECTIONS
                   self_attn.q_norm.weight         norm         [E]; with QK norm
                   ...
    model.norm.weight                              norm         [D]
    lm_head.weight                                 embedding    [V, D]; where it is not tied to the first one

The names are those of transformers' BitNetForCausalLM; the QK norms are ours. Projections are named without ".weight",
because a packed file stores two tensors for each.

Dimensions: V vocabulary, D model, F ffn, E width of a head, N out-features, K in-features.
"""

import math

from bitnet.config import ModelConfig

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
# The projections of a block, in the order data flows through them.
PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def block_name(index: int) -> str:
    """The prefix of the tensors of block `index`, from 0."""
    return f"model.layers.{index}"


def projections(config: ModelConfig) -> list[str]:
    """The names of all projections, block by block."""
    return [f"{block_name(i)}.{name}" for i in range(config.num_hidden_layers) for name in PROJECTIONS]


def is_projection(name: str) -> bool:
    """Whether a name, with or without ".weight", is that of a projection."""
    return name.removesuffix(".weight").endswith(PROJECTIONS)


def is_embedding(name: str) -> bool:
    """Whether a name, with or without ".weight", is that of the embedding or the head."""
    return name.removesuffix(".weight") in (EMBEDDING, HEAD)


def projection_shape(config: ModelConfig, name: str) -> tuple[int, int]:
    """[N, K] of a projection, by its name with or without ".weight"."""
    d, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    shapes = {
        "q_proj": (d, d),
        "k_proj": (kv, d),
        "v_proj": (kv, d),
        "o_proj": (d, d),
        "gate_proj": (f, d),
        "up_proj": (f, d),
        "down_proj": (d, f),
    }
    return shapes[name.removesuffix(".weight").rpartition(".")[2]]


def block_norms(config: ModelConfig) -> dict[str, int]:
    """Name within a block and size of each norm of a block."""
    sizes = {"input_layernorm": config.hidden_size}
    if config.qk_norm:
        sizes |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    if config.sub_norms:
        sizes["self_attn.attn_sub_norm"] = config.hidden_size
    sizes["post_attention_layernorm"] = config.hidden_size
    if config.sub_norms:
        sizes["mlp.ffn_sub_norm"] = config.intermediate_size
    return sizes


def embeddings(config: ModelConfig) -> list[str]:
    """The names of the embedding and, where it is not tied, the head."""
    return [EMBEDDING] if config.tie_word_embeddings else [EMBEDDING, HEAD]


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names (with ".weight") and shapes of everything but the projections: embeddings [V, D] and norms [size]."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (config.vocab_size, config.hidden_size) for name in embeddings(config)
    }
    norms = block_norms(config)
    for i in range(config.num_hidden_layers):
        shapes |= {f"{block_name(i)}.{name}.weight": (size,) for name, size in norms.items()}
    shapes[f"{FINAL_NORM}.weight"] = (config.hidden_size,)
    return shapes


# ---- sizes and costs ---------------------------------------------------------------------------------------


def linear_parameters(config: ModelConfig) -> int:
    """Weights in the projections of all blocks: the ones that are ternary."""
    return config.num_hidden_layers * sum(math.prod(projection_shape(config, name)) for name in PROJECTIONS)


def embedding_parameters(config: ModelConfig) -> int:
    """Weights in the embedding and, if it is not tied, the head."""
    return len(embeddings(config)) * config.vocab_size * config.hidden_size


def norm_parameters(config: ModelConfig) -> int:
    """Gains of all norms."""
    return config.num_hidden_layers * sum(block_norms(config).values()) + config.hidden_size


def parameters(config: ModelConfig) -> int:
    """All trained parameters."""
    return linear_parameters(config) + embedding_parameters(config) + norm_parameters(config)


def float16_bytes(config: ModelConfig) -> int:
    """Bytes of all parameters at 16 bits each."""
    return 2 * parameters(config)


def kv_cache_bytes(config: ModelConfig, tokens: int, bytes_per_value: int = 4) -> int:
    """Bytes of keys and values for one sequence of `tokens` tokens."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * width * tokens * bytes_per_value


def flops_per_token(config: ModelConfig, context: int, *, training: bool = False) -> int:
    """Floating-point (or integer) operations a token: two a weight, attention over half the context on average.

    A training step costs three times the forward pass (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
    """
    head = config.vocab_size * config.hidden_size
    attention = 2 * config.num_hidden_layers * config.hidden_size * context  # q k^T and p v, causal: half of 4
    return (2 * (linear_parameters(config) + head) + attention) * (3 if training else 1)
