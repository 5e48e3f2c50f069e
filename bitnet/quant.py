"""Training with quantised weights and activations: exact integer forward, straight-through backward.

The formulas live in `bitnet.kernels.reference`; this module puts a gradient on them. For a linear layer whose
quantisers are all in (those that come in by and by are at the end of this text)

    forward     y  = acc * (s_w / inv_x),  acc = sum_k codes * q            the integers every engine computes
    backward    dx = dy @ (codes * s_w)                                      straight-through estimator: identity,
                dW = dy^T @ (q / inv_x)                                      no clipping, none through the scales

(Bengio et al. 2013, arXiv 1308.3432; b1.58 training tips.) Writing it as one function of codes instead of a
float product of fake-quantised operands has three gains: the forward sum is exact whatever the autocast dtype,
it runs as int8 products (four times the rate of fp32 on a CPU with VNNI), and the input is kept for the
backward pass at one byte an element. Linears that share an input (q/k/v, gate/up) share its quantisation and
one product.

A run begins with float operands x, W and moves them to the quantised ones in the first part of its steps; with
x' = q / inv_x, W' = codes * s_w and a share e from 0 to 1

    forward     y  = (x + e (x' - x)) @ (W + e (W' - W))^T          one float product (`eased_linear`)
    backward    through that product to the mixed operands, and from them to x and W as if e were 0

What it learns so far is no packed file's; evaluation, and the steps behind that part, run the integers.

Dimensions: M rows (tokens), N out-features, K in-features.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.kernels import ops, reference
from bitnet.kernels.reference import WeightCodes

_FUSED_MATRICES = 3  # q/k/v, gate/up: what one fused product takes
# On a GPU: whether the gradients of a layer's input and of its weight come from int8 gradients, at twice the rate and
# with the errors that kernels/gpu/training.py states. Off until a training run has shown that the loss holds.
int8_gradients = SimpleNamespace(dx=False, dw=False)


def trains_fused(device: torch.device) -> bool:
    """Whether quantised linears on `device` train through the GPU's fused operators, which keep less for backward."""
    return ops.trains_fused(device)


def use_int8_gradients(kind: str, device: torch.device) -> None:
    """Choose for this process: "none", "dx" or "all". Raises BitNetError where `device` has no kernels for it."""
    if kind != "none" and not ops.trains_fused(device):
        raise BitNetError(
            f"train.int8_gradients: got '{kind}' on {device.type}, expected an NVIDIA GPU with Triton; leave it 'none'"
        )
    int8_gradients.dx, int8_gradients.dw = kind in ("dx", "all"), kind == "all"


QUANTIZERS = {"ternary": reference.ternary_weights, "binary": reference.binary_weights}


def quantize_weight(weight: Tensor, linear: str) -> WeightCodes:
    """Codes [N, K] int8 and scale [] fp32 of a weight [N, K]; linear: "ternary" or "binary"."""
    if linear == "ternary" and ops.trains_fused(weight.device):
        from bitnet.kernels.gpu import training

        return WeightCodes(*training.ternary_weights(weight.detach()))
    return QUANTIZERS[linear](weight.detach())


class Norm(NamedTuple):
    """An RMSNorm in front of a linear layer: gain [K] fp32 and epsilon."""

    gain: Tensor
    eps: float


def bit_linear(
    x: Tensor, weights: Sequence[Tensor], codes: Sequence[WeightCodes], norm: Norm | None = None
) -> tuple[Tensor, ...]:
    """Apply quantised linears that share the input x, one output each.

    x: [..., K] float; weights: masters [N_i, K], which receive the gradient; codes: their quantised form; norm: an
    RMSNorm to apply first, which a GPU does in the kernel that quantises.
    Returns [..., N_i] in the autocast dtype if autocast is on, else in x's dtype (behind a norm: fp32).
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    plain = x.dtype if norm is None else torch.float32
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else plain
    scales = torch.stack([c.scale for c in codes])
    merged = codes[0].codes if len(codes) == 1 else torch.cat([c.codes for c in codes])
    if len(codes) <= _FUSED_MATRICES and ops.trains_fused(x.device):
        from bitnet.kernels.gpu import training

        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            parts = training.bit_linear(
                rows, merged, scales, weights, dtype, norm, (int8_gradients.dx, int8_gradients.dw)
            )
            return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in parts)
    if norm is not None:
        x = F.rms_norm(x.float(), norm.gain.shape, norm.gain, norm.eps)
    outputs: tuple[Tensor, ...] = _BitLinear.apply(x, merged, scales, dtype, *weights)
    return outputs


def eased_linear(
    x: Tensor, weights: Sequence[Tensor], codes: Sequence[WeightCodes], share: Tensor
) -> tuple[Tensor, ...]:
    """Apply linears whose operands are part quantised, part float: one float product each, that of the mixture.

    At a share of 0 a float layer, at 1 `bit_linear` up to float rounding; gradients are those of a float layer with
    the mixed operands (straight-through estimator).

    x: [..., K] float; weights, codes: as of `bit_linear`; share: [] fp32, of the quantised operands.
    Returns [..., N_i] in the autocast dtype if autocast is on, else in x's dtype.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    q, inv_scale = reference.quantize_activations(x.detach())
    x = _mixed(x.float(), q.float() / inv_scale, share).to(dtype)
    mixed = (_mixed(weight, c.codes * c.scale, share) for weight, c in zip(weights, codes, strict=True))
    return tuple(F.linear(x, weight.to(dtype)) for weight in mixed)


def _mixed(value: Tensor, quantised: Tensor, share: Tensor) -> Tensor:
    return value + share * (quantised - value.detach())


class _BitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        q, inv_scale = reference.quantize_activations(rows)
        acc = ops.codes_matmul(q, codes)
        sizes = [weight.shape[0] for weight in weights]
        ctx.save_for_backward(q, inv_scale, codes, scales)
        ctx.sizes, ctx.x_dtype, ctx.x_shape = sizes, x.dtype, x.shape
        ctx.weight_dtypes = [weight.dtype for weight in weights]
        outputs = (
            reference.scale_output(part, scale, inv_scale).to(dtype)
            for part, scale in zip(acc.split(sizes, dim=1), scales, strict=True)
        )
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, inv_scale, codes, scales = ctx.saved_tensors
        dy = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dtype = dy[0].dtype
        dx = None
        if ctx.needs_input_grad[0]:
            # Codes are exact in every float dtype, so the scale goes onto the gradient.
            scaled = [grad * scale.to(dtype) for grad, scale in zip(dy, scales, strict=True)]
            merged = scaled[0] if len(scaled) == 1 else torch.cat(scaled, dim=1)
            dx = (merged @ codes.to(dtype)).to(ctx.x_dtype).view(ctx.x_shape)
        dw: list[Tensor | None] = [None] * len(dy)
        if any(ctx.needs_input_grad[4:]):
            x = q.float().mul_(inv_scale.reciprocal()).to(dtype)
            merged = dy[0] if len(dy) == 1 else torch.cat(dy, dim=1)
            parts = (merged.T @ x).split(ctx.sizes)
            dw = [part.to(weight_dtype) for part, weight_dtype in zip(parts, ctx.weight_dtypes, strict=True)]
        return dx, None, None, None, *dw


class _RoundToBf16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def round_to_bf16(weight: Tensor) -> Tensor:
    """The bf16 value nearest to each weight, in the weight's own dtype; the gradient passes straight through."""
    rounded: Tensor = _RoundToBf16.apply(weight)
    return rounded
