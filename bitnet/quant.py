"""Training with quantised weights and activations: exact integer forward pass, straight-through backward pass.

The formulas are in `bitnet.kernels.reference`; this module gives them a gradient. For a fully quantised linear layer

    forward     y  = acc * (s_w / inv_x),  acc = sum_k codes * q            the integers that every engine computes
    backward    dx = dy @ (codes * s_w)                                      straight-through estimator: identity,
                dW = dy^T @ (q / inv_x)                                      no clipping, none through the scales

(Bengio et al. 2013, arXiv 1308.3432; b1.58 training tips.) Computing with codes, instead of multiplying fake-quantised
floats, has three advantages: the forward sum is exact whatever the autocast dtype, it runs as an int8 product (four
times the rate of fp32 on a CPU with VNNI), and the input is kept for the backward pass at one byte per element. Linears
that share an input (q/k/v, gate/up) share its quantisation and one product.

During quantisation warm-up, the first part of a run, operands move from the floats x, W to their quantised values
x' = q / inv_x, W' = codes * s_w. With a share e that rises from 0 to 1

    forward     y  = (x + e (x' - x)) @ (W + e (W' - W))^T          one float product
    backward    through that product to the mixed operands, and from them to x and W as if e were 0

No packed file holds such a layer: evaluation, and every step after warm-up, computes with the integers.

Dimensions: M rows (tokens), N out-features, K in-features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.kernels import ops, reference
from bitnet.kernels.reference import WeightCodes

_FUSED_MATRICES = 3  # q/k/v, gate/up: the most that one fused product takes


class Precision(NamedTuple):
    """How the quantised linears of one forward pass, and of its backward pass, compute.

    quantised: share of the quantised operands [] fp32 during quantisation warm-up, None for all of them. A tensor,
    because torch.compile would make a new graph for every number.
    int8_dx, int8_dw: on a GPU, take the gradients of inputs and of weights from int8 products, at twice the rate and
    with the errors stated in kernels/gpu/training.py. No training run has shown yet that the loss holds.
    """

    quantised: Tensor | None = None
    int8_dx: bool = False
    int8_dw: bool = False


QUANTISED = Precision()  # the layer that packed files hold and engines run


def training_precision(share: float, int8_gradients: str = "none", device: str | torch.device = "cpu") -> Precision:
    """The precision of a training step on `device`.

    share: of the quantised operands, 0 to 1. int8_gradients: "none", "dx" or "all".
    Raises BitNetError for int8 gradients on a device without kernels for them.
    """
    device = torch.device(device)
    if int8_gradients != "none" and not ops.trains_fused(device):
        raise BitNetError(
            f"train.int8_gradients: got '{int8_gradients}' on {device.type}, expected an NVIDIA GPU with Triton; "
            "leave it 'none'"
        )
    quantised = torch.full((), share, device=device) if share < 1 else None
    return Precision(quantised, int8_gradients in ("dx", "all"), int8_gradients == "all")


def trains_fused(device: torch.device) -> bool:
    """Whether quantised layers on `device` train through the fused GPU operators, which keep less for backward."""
    return ops.trains_fused(device)


QUANTIZERS = {"ternary": reference.ternary_weights, "binary": reference.binary_weights}


def quantize_weight(weight: Tensor, linear: str) -> WeightCodes:
    """Codes [N, K] int8 and scale [] fp32 of a weight [N, K] float; linear: "ternary" or "binary"."""
    if linear == "ternary" and ops.trains_fused(weight.device):
        from bitnet.kernels.gpu import training

        return WeightCodes(*training.ternary_weights(weight.detach()))
    return QUANTIZERS[linear](weight.detach())


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension (arXiv 1910.07467). x: [..., K] float, gain: [K] fp32.

    Returns [..., K] fp32: a quantiser that follows needs all of its bits.
    """
    x = x.float()
    if torch.is_grad_enabled():
        return F.rms_norm(x, gain.shape, gain, eps)
    # Engines sum the squares in fp64 and round once. The last bit of an fp32 sum depends on the order of its terms, and
    # that bit would occasionally flip an int8 activation from one engine to the next.
    mean_square = x.double().square().mean(dim=-1, keepdim=True).float()
    return x * (mean_square + eps).sqrt().reciprocal() * gain


class Normed(NamedTuple):
    """An RMSNorm that is not computed yet: `bit_linear` fuses it with the quantiser where a kernel does both.

    x: [..., K] float, gain: [K] fp32.
    """

    x: Tensor
    gain: Tensor
    eps: float

    def compute(self) -> Tensor:
        """The normed values [..., K] fp32."""
        return rms_norm(*self)


def bit_linear(
    x: Tensor | Normed, weights: Sequence[Tensor], codes: Sequence[WeightCodes], precision: Precision = QUANTISED
) -> tuple[Tensor, ...]:
    """Apply quantised linears that share the input x, one output each.

    x: [..., K] float; weights: masters [N_i, K], which receive the gradient; codes: their quantised form.
    Returns [..., N_i] in the autocast dtype if autocast is on, else in x's dtype (after a norm: fp32).
    """
    fused = precision.quantised is None and len(codes) <= _FUSED_MATRICES
    rows, norm = (x.x, (x.gain, x.eps)) if isinstance(x, Normed) else (x, None)
    if fused and ops.trains_fused(rows.device):
        return _fused_linear(rows, norm, weights, codes, precision)
    x = x.compute() if isinstance(x, Normed) else x
    dtype = _output_dtype(x)
    if precision.quantised is not None:
        return _warmup_linear(x, weights, codes, precision.quantised, dtype)
    outputs: tuple[Tensor, ...] = _BitLinear.apply(x, *_merged(codes), dtype, *weights)
    return outputs


def _output_dtype(x: Tensor) -> torch.dtype:
    autocast = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def _merged(codes: Sequence[WeightCodes]) -> tuple[Tensor, Tensor]:
    """The rows [sum N_i, K] of several matrices as one, and their scales [S]."""
    merged = codes[0].codes if len(codes) == 1 else torch.cat([c.codes for c in codes])
    return merged, torch.stack([c.scale for c in codes])


def _fused_linear(
    x: Tensor,
    norm: tuple[Tensor, float] | None,
    weights: Sequence[Tensor],
    codes: Sequence[WeightCodes],
    precision: Precision,
) -> tuple[Tensor, ...]:
    """`bit_linear` on a GPU: norm, quantiser and product in two kernels."""
    from bitnet.kernels.gpu import training

    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = _output_dtype(x) if autocast or norm is None else torch.float32
    int8 = precision.int8_dx, precision.int8_dw
    with torch.autocast(x.device.type, enabled=False):
        rows = x.reshape(-1, x.shape[-1])
        outputs = training.bit_linear(rows, *_merged(codes), weights, dtype, norm, int8)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def _warmup_linear(
    x: Tensor, weights: Sequence[Tensor], codes: Sequence[WeightCodes], share: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """`bit_linear` during quantisation warm-up: one float product of mixed operands for each matrix.

    At a share of 0 a float layer, at 1 `bit_linear` up to float rounding; gradients are those of a float layer with the
    mixed operands (straight-through estimator).
    """
    q, inv_scale = reference.quantize_activations(x.detach())
    mixed_x = _mix(x.float(), q.float() / inv_scale, share).to(dtype)
    mixed_weights = (_mix(weight, c.codes * c.scale, share) for weight, c in zip(weights, codes, strict=True))
    return tuple(F.linear(mixed_x, weight.to(dtype)) for weight in mixed_weights)


def _mix(value: Tensor, quantised: Tensor, share: Tensor) -> Tensor:
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
            # Codes are exact in every float dtype, so the scale is applied to the gradient.
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
