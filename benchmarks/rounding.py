"""Our forward pass with a choice of roundings, to measure what each of llama.cpp's does. Used by `interop.py`.

For models with sub-norms and SiLU, which a `bitnet` GGUF holds.

Dimensions: T tokens, H heads, K in-features, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.files.source import Source
from bitnet.files.tensors import dense_shapes, projections

BLOCK = 256  # activations that share a scale in llama.cpp (Q8_K)


def by_token(x: Tensor) -> Tensor:
    """Values [T, K] quantised to int8 with a scale per token, as our engines do, and dequantised."""
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * scale).round().clamp(-128, 127) / scale


def by_block(x: Tensor) -> Tensor:
    """Values [T, K] quantised to int8 with a scale per 256 values, as llama.cpp's Q8_K does, and dequantised.

    The largest value of a block becomes -127.
    """
    blocks = x.unflatten(-1, (-1, BLOCK))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = -127 / torch.where(largest == 0, torch.ones_like(largest), largest)
    return ((blocks * scale).round().clamp(max=127) / scale).flatten(-2)


def exact(x: Tensor) -> Tensor:
    """The values themselves."""
    return x


def half(x: Tensor) -> Tensor:
    """Values rounded to fp16."""
    return x.half().float()


class Rounded:
    """Logits of a model under chosen roundings."""

    def __init__(
        self,
        source: Source,
        activations: Callable[[Tensor], Tensor] = by_token,
        *,
        cache: Callable[[Tensor], Tensor] = exact,
        head: Callable[[Tensor], Tensor] = exact,
        scales: Callable[[Tensor], Tensor] = exact,
    ) -> None:
        """activations: into projections. cache: queries, keys, values, attention. head: into it. scales: of weights."""
        self._config = source.config
        self._activations, self._cache, self._head = activations, cache, head
        self._dense = {name: source.dense(name).float() for name in dense_shapes(source.config)}
        self._weights = {}
        for name in projections(source.config):
            codes, scale = source.codes(name)
            self._weights[name] = codes.float().T.contiguous(), scales(scale)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [T, V] of ids [T]."""
        x = self._dense["model.embed_tokens.weight"][ids]
        for i in range(self._config.num_hidden_layers):
            layer = f"model.layers.{i}."
            x = x + self._attention(layer, self._norm(x, f"{layer}input_layernorm"))
            h = self._norm(x, f"{layer}post_attention_layernorm")
            gate, up = self._project(h, f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj")
            h = self._norm(F.silu(gate) * up, f"{layer}mlp.ffn_sub_norm")
            x = x + self._project(h, f"{layer}mlp.down_proj")[0]
        return self._head(self._norm(x, "model.norm")) @ self._dense["model.embed_tokens.weight"].T

    def _attention(self, layer: str, x: Tensor) -> Tensor:
        config, tokens = self._config, len(x)
        projected = self._project(x, *(f"{layer}self_attn.{name}_proj" for name in "qkv"))
        q, k, v = (y.view(tokens, -1, config.head_dim) for y in projected)  # T, H, width of a head
        q, k, v = self._cache(self._rotate(q)), self._cache(self._rotate(k)), self._cache(v)
        k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for y in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / config.head_dim**0.5
        scores = scores + torch.full((tokens, tokens), float("-inf")).triu(1)
        y = torch.einsum("hts,shd->thd", self._cache(scores.softmax(-1)), v).reshape(tokens, -1)
        return self._project(self._norm(y, f"{layer}self_attn.attn_sub_norm"), f"{layer}self_attn.o_proj")[0]

    def _project(self, x: Tensor, *names: str) -> list[Tensor]:
        x = self._activations(x)
        return [(x @ self._weights[name][0]) * self._weights[name][1] for name in names]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return (
            x
            * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._config.rms_norm_eps)
            * self._dense[f"{name}.weight"]
        )

    def _rotate(self, x: Tensor) -> Tensor:
        width = self._config.head_dim
        rates = self._config.rope_theta ** (-torch.arange(0, width, 2).double() / width)
        angles = (torch.arange(len(x)).double()[:, None] * rates).float()
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., : width // 2], x[..., width // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
