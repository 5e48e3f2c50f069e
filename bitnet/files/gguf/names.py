"""What a model of ours is called in a GGUF file: its architecture, its tensors and their types, the order of its rows.

    our model                      architecture       in llama.cpp
    no sub-norms, SiLU             llama              rotates neighbours: rows of q and k are reordered
    sub-norms, SiLU, tied head     bitnet             rotates halves, as we do
    sub-norms, ReLU^2              bitnet-b1.58       bitnet.cpp only; read, never written

Mainline llama.cpp computes SiLU for every `bitnet` file, and no key changes that: it would run a ReLU^2 model without a
warning and give wrong text, so writing one is refused.

Dimensions: N out-features, K in-features.
"""

import re

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.files import ternary

BLOCKS = {blocks.name: blocks for blocks in (ternary.TQ2_0, ternary.TQ1_0, ternary.Q2_0)}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}


def gguf_name(name: str) -> str:
    """ "model.layers.3.mlp.up_proj" as "blk.3.ffn_up"; a ".weight" at its end stays."""
    stem = name.removesuffix(".weight")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    theirs = f"blk.{layer[1]}.{_GGUF_NAMES[layer[2]]}" if layer else _GGUF_NAMES[stem]
    return theirs + name[len(stem) :]


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name for a model of this shape."""
    return "bitnet" if config.sub_norms else "llama"


def _reordered_heads(name: str, config: ModelConfig) -> int | None:
    """Heads of a projection whose rows `llama` files hold in another order; None for all others."""
    if config.sub_norms:
        return None
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])


def reorder(weight: Tensor, name: str, config: ModelConfig) -> Tensor:
    """A projection [N, K] as a `llama` file holds it: the rows of q and k in the order for rotating neighbours."""
    heads = _reordered_heads(name, config)
    return weight if heads is None else weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def restore(weight: Tensor, name: str, config: ModelConfig) -> Tensor:
    """The inverse of `reorder`."""
    heads = _reordered_heads(name, config)
    return weight if heads is None else weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
