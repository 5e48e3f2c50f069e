"""Names and shapes of the tensors of a model."""

from bitnet.config import ModelConfig
from bitnet.model import in_features

PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def projections(config: ModelConfig) -> list[str]:
    """The names of all projections, block by block."""
    return [f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in PROJECTIONS]


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters besides the projections: tables and norms."""
    d, f, table = config.hidden_size, config.intermediate_size, (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (d,)
        if config.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (config.head_dim,)
        if config.sub_norms:
            shapes[f"{layer}.self_attn.attn_sub_norm.weight"] = (d,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (d,)
        if config.sub_norms:
            shapes[f"{layer}.mlp.ffn_sub_norm.weight"] = (f,)
    shapes["model.norm.weight"] = (d,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = table
    return shapes


def projection_shape(config: ModelConfig, name: str) -> tuple[int, int]:
    """[N, K] of a projection."""
    d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    kind = name.rpartition(".")[2]
    rows = {"k_proj": kv, "v_proj": kv, "gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
    return rows.get(kind, d), in_features(config, name)
