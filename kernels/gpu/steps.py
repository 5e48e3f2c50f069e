"""Wrappers of the kernels in kernels/gpu/decode.py: they check, allocate and launch.

They exchange two types: `Codes`, the input of a product, and `Sums`, its result: integers that are not scaled yet.
pdl, of all of them: start while the kernel before this one still runs (programmatic dependent launch).

Dimensions: M rows, B sequences, T new positions, D model, F ffn, H heads, G key/value heads, E width of a head,
S cached positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bitnet.kernels.gpu import decode, products, quantize
from bitnet.kernels.gpu.common import EXACT, PDL_LAUNCH
from bitnet.kernels.gpu.device import INTERPRET, multiprocessors
from bitnet.kernels.gpu.layout import GpuWeights

BLOCK_S = 32  # positions an attention program takes at a time: 64 numbers per thread for four heads of 128
_MAX_PARTS = 32  # spans that the positions are split into: at 4,096 positions four blocks each
# The attention and head kernels may fuse multiply and add: they round nothing to integers.
_FUSED = {"enable_fp_fusion": True}


class Codes(NamedTuple):
    """Int8 rows: codes [M, blocks * 256] (zero after K), inverse scales [M] fp32, sums [M] int32."""

    codes: Tensor
    inv_scale: Tensor
    sums: Tensor


class Sums(NamedTuple):
    """The result of a product: acc [splits, M, N] int32 and the inverse scales [M] fp32 of the rows it read."""

    acc: Tensor
    inv_scale: Tensor


@dataclass(frozen=True)
class Projection:
    """Packed weights of one or more matrices that share their input, and their scales [1..3] fp32."""

    weights: GpuWeights
    scales: Tensor

    def __call__(self, rows: Codes, pdl: bool = False) -> Sums:
        """The integer product of rows and weights."""
        return Sums(products.partial_sums(rows.codes, rows.sums, self.weights, pdl=pdl), rows.inv_scale)


@dataclass(frozen=True)
class Embedding:
    """Embedding or head: rows [V, D] in bf16, or in int8 with a scale [V] fp32."""

    rows: Tensor
    scale: Tensor | None


def _new_codes(M: int, K: int, device: torch.device) -> Codes:
    return Codes(
        torch.empty(M, quantize.padded(K), dtype=torch.int8, device=device),
        torch.empty(M, dtype=torch.float32, device=device),
        torch.empty(M, dtype=torch.int32, device=device),
    )


def _row_options(width: int, pdl: bool) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "PDL": pdl, "num_warps": quantize.row_warps(block)} | EXACT | PDL_LAUNCH[pdl]


def enter(ids: Tensor, embedding: Embedding, gain: Tensor, eps: float, pdl: bool = False) -> tuple[Tensor, Codes]:
    """Embed ids [M] int64: the residual stream x [M, D] fp32, and its codes after the first norm.

    An id outside the vocabulary gives a row of NaN.
    """
    (M,), (V, D) = ids.shape, embedding.rows.shape
    assert ids.dtype == torch.int64, f"enter: got ids {ids.dtype}, expected int64"
    x, out = torch.empty(M, D, dtype=torch.float32, device=ids.device), _new_codes(M, D, ids.device)
    decode.enter_kernel[(M,)](
        ids,
        embedding.rows,
        gain if embedding.scale is None else embedding.scale,
        gain,
        x,
        *out,
        V,
        D,
        out.codes.shape[1],
        eps,
        SCALED=embedding.scale is not None,
        **_row_options(out.codes.shape[1], pdl),
    )
    return x, out


def add(x: Tensor, sums: Sums, scales: Tensor, gain: Tensor, eps: float, pdl: bool = False) -> Codes:
    """Add a product, scaled, to the residual stream x [M, D] in place. Returns the codes of RMSNorm(x)."""
    out = _new_codes(x.shape[0], x.shape[1], x.device)
    _add(x, sums, scales, gain, eps, out, out.codes.shape[1], False, pdl)
    return out


def last(x: Tensor, sums: Sums, scales: Tensor, gain: Tensor, eps: float, pdl: bool = False) -> Tensor:
    """RMSNorm(x + the scaled product) as three bf16 terms [3, M, D], the input of `head`."""
    terms = torch.empty(3, *x.shape, dtype=torch.bfloat16, device=x.device)
    unused = sums.inv_scale
    _add(x, sums, scales, gain, eps, Codes(terms, unused, unused), quantize.padded(x.shape[1]), True, pdl)
    return terms


def _add(
    x: Tensor, sums: Sums, scales: Tensor, gain: Tensor, eps: float, out: Codes, width: int, is_last: bool, pdl: bool
) -> None:
    M, D = x.shape
    assert sums.acc.shape[1:] == (M, D), f"add: got sums {tuple(sums.acc.shape)}, expected [splits, {M}, {D}]"
    decode.add_kernel[(M,)](
        x,
        *sums,
        scales,
        gain,
        *out,
        M,
        D,
        width,
        eps,
        SPLITS=sums.acc.shape[0],
        LAST=is_last,
        **_row_options(width, pdl),
    )


def gate(sums: Sums, scales: Tensor, gain: Tensor | None, eps: float, squared_relu: bool, pdl: bool = False) -> Codes:
    """Codes of norm(act(gate) * up) from the sums [splits, M, 2 F] of gate and up; no norm without a gain [F]."""
    M, F = sums.acc.shape[1], sums.acc.shape[2] // 2
    out = _new_codes(M, F, sums.acc.device)
    decode.gate_kernel[(M,)](
        *sums,
        scales,
        scales if gain is None else gain,
        *out,
        M,
        F,
        out.codes.shape[1],
        eps,
        SPLITS=sums.acc.shape[0],
        SQUARED_RELU=squared_relu,
        NORM=gain is not None,
        **_row_options(out.codes.shape[1], pdl),
    )
    return out


def rows(x: Tensor, gain: Tensor | None, eps: float) -> Codes:
    """Codes of norm(x) for x [M, K] float; no norm without a gain [K]."""
    out = quantize.quantize_rows(x, gain, eps, quantize.padded(x.shape[1]))
    return Codes(out.codes, out.inv_scale, out.sums)


class Heads(NamedTuple):
    """Shape and gains of attention: query heads, key heads, their width, QK-norm gains [E] fp32 or None."""

    query: int
    key: int
    width: int
    q_gain: Tensor | None
    k_gain: Tensor | None
    eps: float


def attend(
    sums: Sums,
    scales: Tensor,
    heads: Heads,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    sequences: Tensor,
    gain: Tensor | None,
    eps: float,
    pdl: bool = False,
) -> Codes:
    """One new position of B sequences: from the sums [splits, B, (H + 2 G) E] to the codes that o_proj reads.

    rotary: cosines and sines [limit, E] fp32; keys, values: [N, G, limit, E] fp32 of N sequences. sequences: [B] int64
    on the device, all different, the sequence that each row continues; positions: [B] int64 on the device, below limit,
    its length, which is where the new key and value are written. gain: [H E] fp32 of the sub-norm, or None.
    """
    B, D = sums.acc.shape[1], heads.query * heads.width
    limit, device = keys.shape[2], keys.device
    assert keys.shape == values.shape == (len(keys), heads.key, limit, heads.width), (
        f"attend: got keys {tuple(keys.shape)}"
    )
    assert positions.shape == sequences.shape == (B,), f"attend: got positions {tuple(positions.shape)}, rows {B}"
    assert positions.dtype == sequences.dtype == torch.int64, f"attend: got {positions.dtype} and {sequences.dtype}"
    assert keys.is_contiguous(), f"attend: got keys of strides {keys.stride()}, expected them contiguous"
    assert values.is_contiguous(), f"attend: got values of strides {values.stride()}, expected them contiguous"
    assert min(table.shape[0] for table in rotary) >= limit, f"attend: got rotary tables {tuple(rotary[0].shape)}"
    parts = _parts(B * heads.key, limit, device)
    out = torch.empty(B, heads.query, parts, heads.width, dtype=torch.float32, device=device)
    top, weight = torch.empty(2, B, heads.query, parts, dtype=torch.float32, device=device)
    repeat, norm = heads.query // heads.key, heads.q_gain is not None
    decode.attend_kernel[(B * heads.key, parts)](
        *sums,
        scales,
        heads.q_gain if heads.q_gain is not None else scales,
        heads.k_gain if heads.k_gain is not None else scales,
        *rotary,
        keys,
        values,
        positions,
        sequences,
        out,
        top,
        weight,
        B,
        heads.key,
        limit,
        heads.eps,
        heads.width**-0.5,
        P=parts,
        REPEAT=repeat,
        HEADS=triton.next_power_of_2(repeat),
        HALF=heads.width // 2,
        HALF_BLOCK=triton.next_power_of_2(heads.width // 2),
        BLOCK_S=BLOCK_S,
        SPLITS=sums.acc.shape[0],
        QK_NORM=norm,
        PDL=pdl,
        num_warps=8,
        **_FUSED,
        **PDL_LAUNCH[pdl],
    )
    codes = _new_codes(B, D, device)
    decode.merge_kernel[(B,)](
        out,
        top,
        weight,
        positions,
        weight if gain is None else gain,
        *codes,
        D,
        codes.codes.shape[1],
        eps,
        P=parts,
        E=heads.width,
        BLOCK_S=BLOCK_S,
        NORM=gain is not None,
        **_row_options(codes.codes.shape[1], pdl),
    )
    return codes


def _parts(groups: int, limit: int, device: torch.device) -> int:
    # Enough programs for two on every multiprocessor; no part is shorter than two blocks.
    return max(1, min(2 * multiprocessors(device) // groups, triton.cdiv(limit, 2 * BLOCK_S), _MAX_PARTS))


def head(terms: Tensor, embedding: Embedding, pdl: bool = False) -> Tensor:
    """Logits [M, V] fp32 of states given as three bf16 terms [3, M, D]."""
    _, M, D = terms.shape
    V = embedding.rows.shape[0]
    out = torch.empty(M, V, dtype=torch.float32, device=terms.device)
    # For few tokens reading the embedding takes all the time: 128 x 64 bf16 are 16 KB a stage, three in flight, two
    # programs per multiprocessor. For scoring, more tokens share a read.
    block_m = 16 if M <= 16 else 64
    block_v, block_d = (64, 32) if INTERPRET else (128, 64)
    decode.head_kernel[(triton.cdiv(V, block_v), triton.cdiv(M, block_m))](
        terms,
        embedding.rows,
        embedding.rows if embedding.scale is None else embedding.scale,
        out,
        M,
        V,
        D,
        BLOCK_M=block_m,
        BLOCK_V=block_v,
        BLOCK_D=block_d,
        EVEN_D=D % block_d == 0,
        SCALED=embedding.scale is not None,
        PDL=pdl,
        num_warps=4 if block_m == 16 else 8,
        num_stages=4 if block_m == 16 else 3,
        **_FUSED,
        **PDL_LAUNCH[pdl],
    )
    return out
