"""The training path as torch operators, with fake kernels and autograd, so that torch.compile traces through them.

    bitnet::ternary_weights   W -> codes, scale                              two launches, no wait for the device
    bitnet::bit_linear        [RMSNorm,] int8, product, scales -> y          two launches for up to three matrices
    bitnet::norm_backward     gradients of the norm that was fused away      one launch and a small sum
    bitnet::int8_dx           dx from int8 gradients                         two launches, by option
    bitnet::int8_dw           dW from int8 gradients                         two launches and two transposes, by option

    forward     y  = (q . codes) * (s / inv)            the integers and the roundings of kernels/reference.py
    backward    dx = dy . (codes * s)                   s in dy's dtype, so codes * s is exact there; cuBLAS
                dW = dy^T . (q / inv)                   cuBLAS
                through the norm, if it is fused        kernels/gpu/quantize.py

The backward pass needs q, one byte per element, and for a fused norm its input, which the residual stream keeps anyway,
and one number per row.

dx and dW run in cuBLAS: in bf16 they are plain products, which cost the float baseline the same. A ternary step saves
time in the forward product, which is int8; it adds quantising (memory-bound, kernels/gpu/quantize.py), codes to bf16 (3
bytes per weight) and q to bf16 (3 bytes per activation). At 65,536 tokens x 768 -> 2048 on an H200 (790 Tops bf16): 261
us per product in bf16, 131 us in int8; 35 us to quantise with the norm fused; 35 us for q to bf16.
As an option both run in int8, at twice the rate; no training run has shown yet that the loss holds:

    int8_dx     dy * s, quantised row by row       |error of dx| <= max_n |dy s| / 254 * sum_n |codes|
    int8_dw     dy / inv, quantised by out-feature |error of dW| <= max_m |dy / inv| / 254 * sum_m |q|

For dW the scales of the activations are folded into the gradient, so that q enters as the integers it is. Its sums run
over tokens: |sum| <= 127^2 M stays in int32 for up to 133,144 of them; more are refused.

Dimensions: M rows (tokens), N out-features of all matrices together, K in-features.
"""

# ruff: noqa: ARG001 - fake kernels and backward functions take the arguments of their operators

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitnet.kernels.gpu import quantize
from bitnet.kernels.gpu.device import current
from bitnet.kernels.gpu.int8_gemm import int8_gemm

_INT32_TOKENS = (2**31 - 1) // 127**2


@torch.library.custom_op("bitnet::ternary_weights", mutates_args=())
def ternary_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Absmean codes [N, K] int8 and scale [] fp32 of a weight [N, K] float."""
    with current(weight.device):
        return quantize.ternary_weights(weight)


@ternary_weights.register_fake
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty((), dtype=torch.float32)


@torch.library.custom_op("bitnet::bit_linear", mutates_args=())
def _bit_linear(
    x: Tensor,
    gain: Tensor | None,
    eps: float,
    codes: Tensor,
    scales: Tensor,
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    int8_dx: bool,
    int8_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = [weight.shape[0] for weight in weights]
    with current(x.device):
        rows = quantize.quantize_rows(x.contiguous(), gain, eps)
        y = int8_gemm(rows.codes, codes, rows.inv_scale, scales, dtype, sizes)
    return y, rows.codes, rows.inv_scale, rows.rstd


@_bit_linear.register_fake
def _(
    x: Tensor,
    gain: Tensor | None,
    eps: float,
    codes: Tensor,
    scales: Tensor,
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    int8_dx: bool,
    int8_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M = x.shape[0]
    return (
        x.new_empty((M, codes.shape[0]), dtype=dtype),
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((M,), dtype=torch.float32),
        x.new_empty((0 if gain is None else M,), dtype=torch.float32),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gain, _, codes, scales, weights, _, *int8 = inputs
    _, q, inv_scale, rstd = output
    ctx.save_for_backward(q, inv_scale, codes, scales, *(() if gain is None else (x, gain, rstd)))
    ctx.mark_non_differentiable(q, inv_scale, rstd)
    ctx.x_dtype, ctx.sizes, ctx.int8 = x.dtype, [weight.shape[0] for weight in weights], int8
    ctx.weight_dtypes = [weight.dtype for weight in weights]
    ctx.wants_x = x.requires_grad or (gain is not None and gain.requires_grad)


def _backward(ctx: Any, dy: Tensor, *unused: Tensor | None) -> tuple[Any, ...]:
    q, inv_scale, codes, scales, *norm = ctx.saved_tensors
    dtype, dx, dgain = dy.dtype, None, None
    int8_x, int8_w = ctx.int8
    if ctx.wants_x:
        columns = torch.cat([scale.expand(size) for scale, size in zip(scales, ctx.sizes, strict=True)])
        if int8_x:
            dx = int8_dx((dy * columns).contiguous(), codes)
        else:
            dx = dy @ (codes.to(dtype) * columns.to(dtype)[:, None])
        if norm:
            dx, dgain = norm_backward(dx, *norm)
        else:
            dx = dx.to(ctx.x_dtype)
    inverse = inv_scale.reciprocal()[:, None]
    merged = int8_dw(dy * inverse, q) if int8_w else dy.T @ (q * inverse).to(dtype)
    parts = merged.split(ctx.sizes)
    dw = [part.to(weight_dtype) for part, weight_dtype in zip(parts, ctx.weight_dtypes, strict=True)]
    return dx, dgain, None, None, None, dw, None, None, None


_bit_linear.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("bitnet::norm_backward", mutates_args=())
def norm_backward(dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients dx [M, K] in x's dtype and dgain [K] fp32 of RMSNorm."""
    with current(x.device):
        return quantize.norm_backward(dy, x, gain, rstd)


@norm_backward.register_fake
def _(dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(gain)


@torch.library.custom_op("bitnet::int8_dx", mutates_args=())
def int8_dx(dy: Tensor, codes: Tensor) -> Tensor:
    """dy [M, N] float, quantised row by row to int8, times codes [N, K]. Returns [M, K] in dy's dtype."""
    one = torch.ones(1, dtype=torch.float32, device=dy.device)
    with current(dy.device):
        rows = quantize.quantize_rows(dy)
        return int8_gemm(rows.codes, codes.T.contiguous(), rows.inv_scale, one, dy.dtype)


@int8_dx.register_fake
def _(dy: Tensor, codes: Tensor) -> Tensor:
    return dy.new_empty((dy.shape[0], codes.shape[1]))


@torch.library.custom_op("bitnet::int8_dw", mutates_args=())
def int8_dw(dy: Tensor, q: Tensor) -> Tensor:
    """dy [M, N] float, quantised column by column to int8, transposed, times q [M, K] int8. Returns [N, K] fp32.

    Raises ValueError for more rows than int32 sums hold.
    """
    if dy.shape[0] > _INT32_TOKENS:
        raise ValueError(f"int8 dW: got {dy.shape[0]} tokens in one product, expected at most {_INT32_TOKENS}")
    one = torch.ones(1, dtype=torch.float32, device=dy.device)
    with current(dy.device):
        columns = quantize.quantize_rows(dy.T.contiguous())
        return int8_gemm(columns.codes, q.T.contiguous(), columns.inv_scale, one, torch.float32)


@int8_dw.register_fake
def _(dy: Tensor, q: Tensor) -> Tensor:
    return q.new_empty((dy.shape[1], q.shape[1]), dtype=torch.float32)


def bit_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    norm: tuple[Tensor, float] | None = None,
    int8: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, ...]:
    """y_i [M, N_i] in `dtype` of x [M, K] float through up to three matrices that share it.

    codes: [sum N_i, K] int8, scales: [S] fp32, weights: masters [N_i, K], which receive the gradient; norm: gain [K]
    fp32 and eps of an RMSNorm in front; int8: whether dx and dW come from int8 gradients. Raises ValueError for wrong
    shapes.
    """
    gain, eps = norm or (None, 0.0)
    y, _, _, _ = _bit_linear(x, gain, eps, codes, scales, list(weights), dtype, *int8)
    return y.split([weight.shape[0] for weight in weights], dim=1)
