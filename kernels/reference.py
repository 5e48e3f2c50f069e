"""The numerical reference of every op, in plain torch, exact in int32; backends are tested against it.

One linear layer of BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764; rounding and clamping as in Microsoft's
"The Era of 1-bit LLMs: Training Tips, Code and FAQ"):

    weights       s_w = clamp(mean |W|, 1e-5)          c = clamp(round(W / s_w), -1, +1)        per tensor
    activations   inv_x = 127 / clamp(max |x|, 1e-5)   q = round(x * inv_x)                     per token
    product       acc = sum_k c[n, k] * q[m, k]        an integer, |acc| <= 127 * K
    output        y = acc * (s_w / inv_x)

`round` is half-to-even, and everything before the integer product is fp32. Scales are applied after the integer sum,
never before: that is why training, packed files and all kernels agree to the last bit.

Dimensions: M rows (tokens), N out-features, K in-features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bitnet.kernels import packing

EPS = 1e-5  # lower clamp of mean |W| and of max |x|, as in the FAQ; keeps all-zero tensors finite
Q_MAX = 127  # symmetric int8: -128 is never produced


class WeightCodes(NamedTuple):
    """Quantised weights: `codes` [N, K] int8 in {-1, 0, +1}, `scale` [] fp32, W ~ codes * scale."""

    codes: Tensor
    scale: Tensor


class ActivationCodes(NamedTuple):
    """Quantised activations: `codes` [..., K] int8 in -127..127, `inv_scale` [..., 1] fp32, x ~ codes / inv_scale."""

    codes: Tensor
    inv_scale: Tensor


def ternary_weights(weight: Tensor) -> WeightCodes:
    """Absmean quantisation to {-1, 0, +1} per tensor (b1.58, equations 1-3). weight: [N, K] float."""
    weight = weight.float()
    scale = _mean_abs(weight)
    codes = (weight * scale.reciprocal()).round_().clamp_(-1, 1).to(torch.int8)
    return WeightCodes(codes, scale)


def binary_weights(weight: Tensor) -> WeightCodes:
    """Sign quantisation to {-1, +1} around the mean (BitNet, arXiv 2310.11453, equations 1-3). weight: [N, K]."""
    weight = weight.float()
    mean = (_sum(weight) / weight.numel()).float()
    codes = (weight > mean).to(torch.int8).mul_(2).sub_(1)
    return WeightCodes(codes, _mean_abs(weight))


def _mean_abs(weight: Tensor) -> Tensor:
    return (_sum(weight.abs()) / weight.numel()).float().clamp_(min=EPS)


def _sum(weight: Tensor) -> Tensor:
    # Row sums in fp32, their sum in fp64: the number of threads cannot change the result, at a tenth of the time of a
    # sum that is fp64 throughout. torch gives whole rows to threads, unless there is only one: then add a second.
    if weight.shape[0] == 1:
        weight = torch.cat((weight, torch.zeros_like(weight)))
    return weight.sum(dim=-1).sum(dtype=torch.float64)


def quantize_activations(x: Tensor) -> ActivationCodes:
    """Absmax quantisation to int8 per token (b1.58, section 2). x: [..., K] float; K >= 1."""
    x = x.float()
    # The reciprocal, then times 127: two fp32 roundings, the same as of `127 / tensor` in torch (and transformers).
    inv_scale = x.abs().amax(dim=-1, keepdim=True).clamp_(min=EPS).reciprocal_() * Q_MAX
    # No clamp: |x| * (127 / max |x|) is at most 127 (1 + 2^-22), which rounds to 127.
    return ActivationCodes((x * inv_scale).round_().to(torch.int8), inv_scale)


def matmul(q: Tensor, codes: Tensor) -> Tensor:
    """Integer product. q: [M, K] int8, codes: [N, K] int8. Returns [M, N] int32, exact for K < 2^24."""
    return q.to(torch.int32) @ codes.to(torch.int32).T


def packed_matmul(q: Tensor, packed: Tensor) -> Tensor:
    """Integer product with packed weights. q: [M, K] int8, packed: [N, ceil(K / 4)] uint8. Returns [M, N] int32."""
    return matmul(q, packing.unpack(packed, q.shape[-1]))


def scale_output(acc: Tensor, weight_scale: Tensor, inv_scale: Tensor) -> Tensor:
    """y = acc * (s_w / inv_x). acc: [M, N] int32, weight_scale: [] or [N], inv_scale: [M, 1]. Returns [M, N] fp32."""
    return acc.float().mul_(weight_scale / inv_scale)  # in place: a quarter of the time is memory traffic
