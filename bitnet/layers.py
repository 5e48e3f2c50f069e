"""The layers of a BitNet b1.58 block: BitLinear, PackedLinear, RMSNorm, rotary attention, gated feed-forward.

Dimensions: B batch, T time, S cached time, D model, F ffn, H heads, G key/value heads, E width of a head,
M rows (tokens), N out-features, K in-features.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bitnet import quant
from bitnet.config import ModelConfig
from bitnet.kernels import ops, reference
from bitnet.kernels.reference import WeightCodes
from bitnet.quant import QUANTISED, Normed, Precision


class BitLinear(nn.Linear):
    """A linear layer that multiplies by ternary (b1.58) or binary weights and int8 activations, and trains.

    A drop-in for nn.Linear: same arguments, same fp32 master `weight` [N, K] in the state dict, any leading dimensions.
    `linear` is "ternary" or "binary". There is no norm inside: BitNet normalises before the layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        linear: str = "ternary",
    ) -> None:
        if linear not in quant.QUANTIZERS:
            raise ValueError(f"BitLinear: got linear='{linear}', expected one of {', '.join(quant.QUANTIZERS)}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.linear = linear
        self._kept_codes: WeightCodes | None = None  # not None inside `keep_codes` only

    def quantized_weight(self) -> WeightCodes:
        """The codes [N, K] int8 and scale [] fp32 this layer multiplies by."""
        return self._kept_codes or quant.quantize_weight(self.weight, self.linear)

    def forward(self, x: Tensor, precision: Precision = QUANTISED) -> Tensor:
        """x: [..., K] float. Returns [..., N] in the autocast dtype if autocast is on, else in x's dtype."""
        (y,) = _bit_linears(x, [self], precision)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # bf16 under autocast, as nn.Linear

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, linear={self.linear}"


def _bit_linears(x: Tensor | Normed, layers: Sequence[BitLinear], precision: Precision) -> tuple[Tensor, ...]:
    weights, codes = [layer.weight for layer in layers], [layer.quantized_weight() for layer in layers]
    return quant.bit_linear(x, weights, codes, precision)


class keep_codes:  # noqa: N801 - a context manager, used like a function
    """Quantise the weights of every BitLinear in `model` once for the duration of the block.

    For gradient accumulation and evaluation. The masters must not change inside the block.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, BitLinear)]
        self._before: list[WeightCodes | None] = []

    def __enter__(self) -> None:
        self._before = [layer._kept_codes for layer in self._layers]
        for layer in self._layers:
            layer._kept_codes = layer.quantized_weight()

    def __exit__(self, *exc: object) -> None:
        for layer, before in zip(self._layers, self._before, strict=True):
            layer._kept_codes = before


class PackedLinear(nn.Module):
    """A linear layer that runs from packed two-bit weights; inference only.

    Buffers: `packed` [N, ceil(K / 4)] uint8, `weight_scale` [1] fp32. The weights are rearranged for the selected
    backend on first use, or by `prepare()`, which can drop the packed copy.
    """

    packed: Tensor | None
    weight_scale: Tensor

    def __init__(self, packed: Tensor, weight_scale: Tensor, in_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, packed.shape[0]
        self.register_buffer("packed", packed)
        self.register_buffer("weight_scale", weight_scale)
        self._prepared: ops.Prepared | None = None

    @classmethod
    def from_bit_linear(cls, layer: BitLinear) -> "PackedLinear":
        """Pack a trained layer at two bits per weight. Raises ValueError for one with a bias."""
        if layer.bias is not None:
            raise ValueError("PackedLinear: got a BitLinear with a bias; packed layers have none, pass bias=False")
        codes, scale = layer.quantized_weight()
        return cls(ops.packing.pack(codes), scale.reshape(1), layer.in_features)

    def prepare(self, *, keep_packed: bool = True) -> ops.Prepared:
        """The weights in the layout of their device's backend; rearranged once."""
        if self._prepared is None:
            assert self.packed is not None
            self._prepared = ops.prepare(self.packed, self.in_features)
        if not keep_packed:
            self.packed = None
        return self._prepared

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] float. Returns [..., N] in x's dtype."""
        return packed_linear(x, [self])[0]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def packed_linear(x: Tensor, layers: Sequence[PackedLinear]) -> tuple[Tensor, ...]:
    """Apply packed linears that share the input x [..., K]: it is quantised once. Returns [..., N_i] each."""
    q, inv_scale = reference.quantize_activations(x.reshape(-1, x.shape[-1]))
    outputs = (
        reference.scale_output(ops.packed_matmul(q, layer.prepare()), layer.weight_scale, inv_scale) for layer in layers
    )
    return tuple(y.to(x.dtype).view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def project(x: Tensor | Normed, *layers: nn.Module, precision: Precision = QUANTISED) -> tuple[Tensor, ...]:
    """Apply bias-free linears that share the input x [..., K] (q/k/v, gate/up), one output [..., N_i] each.

    The input is quantised once for all of them, and its norm, if it has one, is fused with the quantiser where a kernel
    does both.
    """
    bit_layers = [layer for layer in layers if isinstance(layer, BitLinear)]
    if len(bit_layers) == len(layers):
        return _bit_linears(x, bit_layers, precision)
    x = x.compute() if isinstance(x, Normed) else x
    packed_layers = [layer for layer in layers if isinstance(layer, PackedLinear)]
    if len(packed_layers) == len(layers):
        return packed_linear(x, packed_layers)
    return tuple(layer(x, precision) if isinstance(layer, BitLinear) else layer(x) for layer in layers)


def make_linear(config: ModelConfig, in_features: int, out_features: int) -> nn.Linear:
    """The projection that `config.linear` asks for, without bias."""
    if config.linear == "float":
        return nn.Linear(in_features, out_features, bias=False)
    return BitLinear(in_features, out_features, bias=False, linear=config.linear)


class Embedding(nn.Module):
    """Embedding or head: a matrix `weight` [V, D], used at the values that a packed file can hold.

    Training keeps fp32 masters and rounds them to bf16 in every forward pass, so that packing loses nothing.
    exact: the weights are those of a file already (an int8 row times its scale is no bf16 value) and used as they are.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, exact: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.exact = exact

    def values(self) -> Tensor:
        """The rows in use, [V, D]."""
        return self.weight if self.exact else quant.round_to_bf16(self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 (see `quant.rms_norm`)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size] float. Returns [..., size] fp32."""
        return quant.rms_norm(x, self.weight, self.eps)


class PreNorm(RMSNorm):
    """An RMSNorm whose result goes into `project` and nowhere else, which computes it: fused, where a kernel can."""

    def forward(self, x: Tensor) -> Normed:  # type: ignore[override]
        """x: [..., size] float."""
        return Normed(x, self.weight, self.eps)


def rotary_table(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, E] of rotary position embedding (arXiv 2104.09864), half-split, in fp32."""
    # Outside inference mode: tables that sampling makes serve the next training step too.
    with torch.inference_mode(False):
        # fp64 angles: at position 100,000 the third digit of an fp32 angle is wrong.
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        angle = torch.outer(torch.arange(length, dtype=torch.float64), config.rope_theta**-exponent)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each head by the angle of its position. x: [B, heads, T, E], cosines and sines: [T, E]."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class LayerCache(Protocol):
    """Keys and values of one layer."""

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [B, G, T, E]; returns all of them [B, G, S, E]."""


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; optional QK norm and sub-norm before o_proj."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = make_linear(config, d, d)
        self.k_proj = make_linear(config, d, kv)
        self.v_proj = make_linear(config, d, kv)
        self.o_proj = make_linear(config, d, d)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.attn_sub_norm = PreNorm(d, config.rms_norm_eps) if config.sub_norms else nn.Identity()
        self.head_dim = config.head_dim

    def forward(
        self,
        x: Tensor | Normed,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | None = None,
        precision: Precision = QUANTISED,
    ) -> Tensor:
        """x: [B, T, D] float, rotary: cosines and sines [T, E] of its positions. Returns [B, T, D]."""
        q, k, v = (
            rearrange(y, "b t (h e) -> b h t e", e=self.head_dim)
            for y in project(x, self.q_proj, self.k_proj, self.v_proj, precision=precision)
        )
        q, k = (rotate(norm(y), rotary).to(v.dtype) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        if cache is not None:
            k, v = cache.extend(k, v)
        y = rearrange(attend(q, k, v), "b h t e -> b t (h e)")
        return project(self.attn_sub_norm(y), self.o_proj, precision=precision)[0]


# Up to this context, bf16 training on a CPU computes attention as two batched products: torch's flash attention takes
# twice as long, forward and backward (a quarter of the step at 12 x 64 tokens, a twelfth at 8 x 256). Not so in fp32.
SHORT = 512


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of T queries that are the last of S positions. q: [B, H, T, E], k, v: [B, G, S, E]."""
    t, s = q.shape[2], k.shape[2]
    if t == s <= SHORT and q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled():
        return _attend_by_products(q, k, v)
    # is_causal covers a square, and a single newest query sees everything: only the cases between need a mask.
    mask = causal_mask(t, s, q.device) if 1 < t < s else None
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=t == s, enable_gqa=grouped)


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, repeats = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1).flatten(0, 1) for x in (k, v))
    future = torch.zeros(t, t, dtype=q.dtype).masked_fill_(~causal_mask(t, t, q.device), -torch.inf)
    scores = torch.baddbmm(future, q.flatten(0, 1), k.mT, alpha=q.shape[-1] ** -0.5)
    return (scores.softmax(dim=-1) @ v).view_as(q)


def causal_mask(t: int, s: int, device: torch.device) -> Tensor:
    """Mask [t, s] bool for t queries that are the last of s positions: true where a query may attend."""
    return torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)


class FeedForward(nn.Module):
    """Gated feed-forward: down(norm(act(gate(x)) * up(x))) with ReLU^2 (arXiv 2402.03804) or SiLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = make_linear(config, d, f)
        self.up_proj = make_linear(config, d, f)
        self.down_proj = make_linear(config, f, d)
        self.ffn_sub_norm = PreNorm(f, config.rms_norm_eps) if config.sub_norms else nn.Identity()
        self.squared_relu = config.hidden_act == "relu2"

    def forward(self, x: Tensor | Normed, precision: Precision = QUANTISED) -> Tensor:
        """x: [B, T, D] float. Returns [B, T, D]."""
        gate, up = project(x, self.gate_proj, self.up_proj, precision=precision)
        h = (F.relu(gate).square() if self.squared_relu else F.silu(gate)) * up
        return project(self.ffn_sub_norm(h), self.down_proj, precision=precision)[0]
