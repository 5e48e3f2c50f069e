"""Ternary codes in the byte layouts of other tools, bit by bit; a code is stored as w + 1: 0, 1 or 2, never 3.

    TQ2_0  256 weights, 66 bytes: qs[64], fp16 d. Byte 32j + m holds weights 128j + m + {0, 32, 64, 96}, lowest bits
           first. llama.cpp, CPU.
    TQ1_0  256 weights, 54 bytes: qs[48], qh[4], fp16 d. Five weights a byte as a number in base 3, the first one most
           significant, stored as ceil(x * 256 / 243) so that a multiplication reads it back.
           qs[0:32] byte m: weights m + 32n; qs[32:48]: 160 + m + 16n; qh: 240 + m + 4n, four of them, times 3.
    Q2_0   64 weights, 18 bytes: fp16 d, qs[16], four neighbours a byte, lowest bits first. llama.cpp of 2026, CUDA.
    I2_S   128 weights, 32 bytes: byte m holds weights m + {0, 32, 64, 96}, highest bits first; one fp32 scale after
           the last block, padded to 32 bytes. bitnet.cpp on x86. Two other layouts share its number: never written.
    HF     transformers' pack_weights: byte [r, c] holds weights [r + {0, R, 2R, 3R}, c], R = N / 4, lowest bits first.

The GGUF types carry a scale in every block. A model of ours has one scale per tensor: it is written into every block,
and a file whose blocks have different scales is refused.

Dimensions: N out-features, K in-features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.kernels.reference import EPS, WeightCodes

Bytes = NDArray[np.uint8]
_SMALLEST_SCALE = 2.0**-14  # fp16 loses bits below it
_LARGEST_SCALE = 65_504.0
_I2_S_TAIL = 32  # bytes after the blocks: the scale, and padding


def check_scale(kind: str, scale: Tensor) -> None:
    """Raise BitNetError for a weight scale [] that fp16 cannot hold, or only as a subnormal number."""
    if not _SMALLEST_SCALE <= float(scale) <= _LARGEST_SCALE:
        raise BitNetError(
            f"{kind}: got a weight scale of {float(scale):.3g}, expected {_SMALLEST_SCALE:.3g} "
            f"to {_LARGEST_SCALE:,.0f}, the range of 16 bits; export as f32"
        )


@dataclass(frozen=True)
class Blocks:
    """A block type of GGUF: `size` weights in `bytes` bytes."""

    name: str
    size: int
    bytes: int
    pack: Callable[[Bytes], Bytes]  # codes + 1 [B, size] -> [B, bytes - 2]
    unpack: Callable[[Bytes], Bytes]  # the inverse; 3 for bytes that `pack` does not give
    scale_first: bool = False

    def encode(self, weights: WeightCodes) -> Bytes:
        """The bytes [N, K / size * bytes] of codes [N, K]. Raises BitNetError for a K or scale it cannot hold."""
        n, k = weights.codes.shape
        if k % self.size:
            raise BitNetError(
                f"{self.name}: got rows of {k} weights, expected a multiple of {self.size}; "
                "export as f16, or train a model with such sizes"
            )
        check_scale(self.name, weights.scale)
        fields = (weights.codes + 1).to(torch.uint8).numpy().reshape(-1, self.size)
        packed = self.pack(fields)
        d = np.broadcast_to(np.frombuffer(np.float16(float(weights.scale)).tobytes(), np.uint8), (len(packed), 2))
        parts = (d, packed) if self.scale_first else (packed, d)
        return np.concatenate(parts, axis=1).reshape(n, -1)

    def decode(self, data: Bytes, n: int, k: int, where: str) -> WeightCodes:
        """The inverse of `encode`, for bytes from anywhere; where: their name in errors.

        Raises BitNetError for bytes that are not codes and for blocks with different scales.
        """
        blocks = data.reshape(-1, self.bytes)
        packed, tail = (blocks[:, 2:], blocks[:, :2]) if self.scale_first else (blocks[:, :-2], blocks[:, -2:])
        fields = self.unpack(np.ascontiguousarray(packed))
        _check_codes(fields, where)
        d = np.ascontiguousarray(tail).view(np.float16).reshape(-1)
        used = d[(fields != 1).any(axis=1)]  # the scale of a block of zeros does not matter
        if not used.size:
            used = d[d > 0]
        scale = float(used[0]) if used.size else EPS
        if not (np.isfinite(scale) and scale > 0):
            raise BitNetError(
                f"{where}: got a block scale of {scale}, expected a finite one above 0: the file is damaged"
            )
        if (used != used[0]).any() if used.size else False:
            low, high = float(np.nanmin(used)), float(np.nanmax(used))
            raise BitNetError(
                f"{where}: got block scales from {low:.4g} to {high:.4g}, expected one for the whole tensor: the model "
                "was quantised block by block and is not a BitNet b1.58 model; use the tool it was made for"
            )
        return WeightCodes(_as_codes(fields, n, k), torch.tensor(scale))


def _pack_tq2(fields: Bytes) -> Bytes:
    quarters = fields.reshape(-1, 2, 4, 32)  # j, which bits, m
    return _join_pairs(quarters[:, :, 0], quarters[:, :, 1], quarters[:, :, 2], quarters[:, :, 3]).reshape(-1, 64)


def _unpack_tq2(packed: Bytes) -> Bytes:
    return np.stack(_split_pairs(packed.reshape(-1, 2, 32)), axis=2).reshape(-1, 256)


def _pack_q2(fields: Bytes) -> Bytes:
    return _join_pairs(*(fields[:, i::4] for i in range(4)))


def _unpack_q2(packed: Bytes) -> Bytes:
    return np.stack(_split_pairs(packed), axis=2).reshape(-1, 64)


def _join_pairs(a: Bytes, b: Bytes, c: Bytes, d: Bytes) -> Bytes:
    return a | b << np.uint8(2) | c << np.uint8(4) | d << np.uint8(6)


def _split_pairs(packed: Bytes) -> list[Bytes]:
    return [packed >> np.uint8(shift) & np.uint8(3) for shift in (0, 2, 4, 6)]


_POWERS = np.array([81, 27, 9, 3, 1], dtype=np.uint8)
_STORED = ((np.arange(243) * 256 + 242) // 243).astype(np.uint8)  # number -> byte
_DIGITS = np.full((256, 5), 3, dtype=np.uint8)  # byte -> digits; 3 where no number is stored as that byte
_DIGITS[_STORED] = np.arange(243)[:, None] // _POWERS % 3


def _pack_tq1(fields: Bytes) -> Bytes:
    five, rest, four = fields[:, :160], fields[:, 160:240], fields[:, 240:]
    numbers = [
        (five.reshape(-1, 5, 32) * _POWERS[:, None]).sum(axis=1, dtype=np.uint8),
        (rest.reshape(-1, 5, 16) * _POWERS[:, None]).sum(axis=1, dtype=np.uint8),
        (four.reshape(-1, 4, 4) * _POWERS[:4, None]).sum(axis=1, dtype=np.uint8),
    ]
    return _STORED[np.concatenate(numbers, axis=1)]


def _unpack_tq1(packed: Bytes) -> Bytes:
    digits = _DIGITS[packed]  # B, 52, 5
    last = digits[:, 48:].swapaxes(1, 2)
    last = np.where(last[:, 4:] == 0, last[:, :4], 3)  # the fifth digit of a qh byte is not a weight and always 0
    parts = (digits[:, :32].swapaxes(1, 2), digits[:, 32:48].swapaxes(1, 2), last)
    return np.concatenate([part.reshape(len(packed), -1) for part in parts], axis=1)


TQ2_0 = Blocks("TQ2_0", 256, 66, _pack_tq2, _unpack_tq2)
TQ1_0 = Blocks("TQ1_0", 256, 54, _pack_tq1, _unpack_tq1)
Q2_0 = Blocks("Q2_0", 64, 18, _pack_q2, _unpack_q2, scale_first=True)


def i2_s_bytes(n: int, k: int) -> int:
    """Bytes of an I2_S tensor of n * k weights."""
    return n * k // 4 + _I2_S_TAIL


def decode_i2_s(data: Bytes, n: int, k: int, where: str) -> WeightCodes:
    """Codes [N, K] and the one scale of an I2_S tensor in bitnet.cpp's x86 layout. Raises BitNetError as `decode`."""
    if n * k % 128:
        raise BitNetError(f"{where}: got {n} x {k} weights as I2_S, expected a multiple of 128: the file is damaged")
    size = n * k // 4
    scale = float(np.ascontiguousarray(data[size : size + 4]).view(np.float32)[0])
    if not (np.isfinite(scale) and scale > 0):
        raise BitNetError(f"{where}: got a scale of {scale}, expected a finite one above 0: not I2_S as x86 writes it")
    fields = np.stack(_split_pairs(data[:size].reshape(-1, 32))[::-1], axis=1)  # the highest bits come first
    _check_codes(fields, where)
    return WeightCodes(_as_codes(fields, n, k), torch.tensor(scale))


def pack_hf(codes: Tensor) -> Tensor:
    """transformers' packing [N / 4, K] uint8 of codes [N, K] int8. Raises BitNetError where 4 does not divide N."""
    if codes.shape[0] % 4:
        raise BitNetError(f"hf-packed: got {codes.shape[0]} rows, expected a multiple of 4; export as hf instead")
    quarters = (codes + 1).to(torch.uint8).chunk(4)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def unpack_hf(packed: Tensor, where: str) -> Tensor:
    """Codes [4R, K] int8 of transformers' packing [R, K] uint8. Raises BitNetError for code 3."""
    if bool((packed & packed >> 1 & 0b01010101).any()):
        raise BitNetError(f"{where}: got code 3, expected 0, 1 or 2 in every pair of bits: the file is damaged")
    return torch.cat([(packed >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)])


def _check_codes(fields: Bytes, where: str) -> None:
    if (fields == 3).any():
        raise BitNetError(f"{where}: got a byte that holds code 3, expected codes 0, 1 and 2: the file is damaged")


def _as_codes(fields: Bytes, n: int, k: int) -> Tensor:
    return torch.from_numpy(fields.reshape(n, k).view(np.int8)) - 1
