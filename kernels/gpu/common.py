"""Shared by the kernel modules: whether to use inline PTX, exact rounding, argument checks.

Triton's interpreter (TRITON_INTERPRET=1, set before the first import of a kernel) runs the same kernels on the CPU in
NumPy. The `triton` backend then runs on a CPU, which is how tests compare every kernel with the reference on a machine
without a GPU. The interpreter has no inline PTX: kernels that use it have the same arithmetic in plain Triton, chosen
by the compile-time flag ASM.

Rounding. The reference rounds half to even after one fp32 product. Adding and subtracting 1.5 * 2^23 does that
for |x| < 2^22 on any IEEE machine, provided the product is not fused into the addition: kernels that round are compiled
with `enable_fp_fusion=False`, so that the PTX says `mul.rn` and `add.rn`, and divide by `div_rn` (plain `/` is an
approximation on NVIDIA).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet.kernels.gpu.device import INTERPRET

INTERPRETED: tl.constexpr = tl.constexpr(INTERPRET)
ASM: tl.constexpr = tl.constexpr(not INTERPRET)  # whether kernels may use inline PTX
EXACT = {"enable_fp_fusion": False}  # launch option of every kernel that rounds; see above
PDL_LAUNCH: dict[bool, dict[str, bool]] = {False: {}, True: {"launch_pdl": True}}  # programmatic dependent launch


def check_matrix(name: str, x: Tensor, dtype: torch.dtype, width: int | None = None) -> None:
    """Raises ValueError unless `x` is a matrix [*, width] of this dtype whose rows are contiguous."""
    shape = f"[*, {'*' if width is None else width}]"
    if x.dim() != 2 or x.dtype != dtype or (width is not None and x.shape[1] != width):
        raise ValueError(f"{name}: got {x.dtype} {tuple(x.shape)}, expected {dtype} {shape}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"{name}: got strides {x.stride()}, expected contiguous rows; call .contiguous()")


@triton.jit
def round_even(x):
    """Nearest integer of an fp32 |x| < 2^22, halves to even, as fp32."""
    magic = 12582912.0  # 1.5 * 2^23: the last bit of the sum is worth one
    return (x + magic) - magic


@triton.jit
def narrow(x, kind: tl.constexpr):
    """fp32 rounded to the float dtype `kind`, halves to even; the interpreter's own conversion to bf16 truncates."""
    if INTERPRETED and kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(kind)


@triton.jit
def scaled(acc, scale_ptr, inv_scale, rows, first, start1, start2, SEGMENTS: tl.constexpr, ALIGNED: tl.constexpr):
    """reference.scale_output of a tile [M, N]: acc * (scale / inv_scale[m]), int32 -> fp32, with its three roundings.

    Up to three matrices that share their input (q/k/v, gate/up) are one product with a scale each: scale_ptr
    [SEGMENTS] fp32, columns from `start1` take the second scale, from `start2` the third. `rows` are the tile's
    columns of the output, `first` the lowest. ALIGNED: no tile holds a boundary, so one scale serves a tile; otherwise
    a factor is chosen for every sum, which costs a register each (and spills tiles of 128 x 256).
    """
    if SEGMENTS == 1 or ALIGNED:
        segment = 0
        if SEGMENTS > 1:
            segment += (first >= start1).to(tl.int32)
        if SEGMENTS > 2:
            segment += (first >= start2).to(tl.int32)
        return acc.to(tl.float32) * tl.div_rn(tl.load(scale_ptr + segment), inv_scale)[:, None]
    factor = tl.div_rn(tl.load(scale_ptr), inv_scale)[:, None]
    factor = tl.where((rows >= start1)[None, :], tl.div_rn(tl.load(scale_ptr + 1), inv_scale)[:, None], factor)
    if SEGMENTS > 2:
        third = tl.div_rn(tl.load(scale_ptr + 2), inv_scale)[:, None]
        factor = tl.where((rows >= start2)[None, :], third, factor)
    return acc.to(tl.float32) * factor


MAX_SEGMENTS = 3


def starts(sizes: Sequence[int]) -> tuple[int, int]:
    """First columns of the second and third segment, for `scaled`. Raises ValueError for more than three."""
    if not 1 <= len(sizes) <= MAX_SEGMENTS:
        raise ValueError(f"segments: got {len(sizes)} matrices in one product, expected 1 to {MAX_SEGMENTS}")
    return sizes[0], sum(sizes[:2])
