"""The definition of the packed layout: four ternary codes in a byte.

A weight w in {-1, 0, +1} is stored as the two-bit code w + 1; code 3 is invalid and refused.
Four neighbours along the input dimension share a byte, the first in the lowest bits:

    packed[n, j]    bit  7 6     5 4     3 2     1 0
                        k=4j+3  k=4j+2  k=4j+1  k=4j

    codes [N, K] int8  <->  packed [N, ceil(K / 4)] uint8

A row whose K is not a multiple of four is padded with w = 0, so that a kernel that reads whole bytes adds nothing, and
a packed tensor has exactly one valid byte image (pack(unpack(p)) == p). This is the layout of files; backends rearrange
it for their kernels when they load.

Dimensions: N out-features, K in-features.
"""

import torch
from torch import Tensor

LAYOUT_ID = "k4-lsb"  # written into every packed file; another layout would need another name
CODES_PER_BYTE = 4
_ZERO_BYTE = 0b01010101  # four codes of w = 0
_SHIFTS = (0, 2, 4, 6)


def packed_width(k: int) -> int:
    """Bytes in a packed row of `k` weights."""
    return -(-k // CODES_PER_BYTE)


def pack(codes: Tensor) -> Tensor:
    """Pack ternary codes at two bits per weight.

    codes: [N, K] int8 with values -1, 0, +1. Returns [N, ceil(K / 4)] uint8 on the same device.
    Raises TypeError for another dtype, ValueError for another rank or a value outside {-1, 0, +1}.
    """
    if codes.dtype != torch.int8:
        raise TypeError(f"pack: got {codes.dtype} codes, expected torch.int8")
    if codes.dim() != 2:
        raise ValueError(f"pack: got {codes.dim()} dimensions {tuple(codes.shape)}, expected [N, K]")
    if codes.numel() and (int(codes.min()) < -1 or int(codes.max()) > 1):
        got = f"{int(codes.min())}..{int(codes.max())}"
        raise ValueError(f"pack: got codes in {got}, expected -1, 0 or +1; quantise the weights first")
    n, k = codes.shape
    fields = torch.full((n, packed_width(k) * CODES_PER_BYTE), 1, dtype=torch.uint8, device=codes.device)
    fields[:, :k] = (codes + 1).to(torch.uint8)
    packed = fields[:, 0::4].clone()
    for i in (1, 2, 3):
        packed |= fields[:, i::4] << _SHIFTS[i]
    return packed


def unpack(packed: Tensor, k: int) -> Tensor:
    """Unpack two-bit codes, the inverse of `pack`.

    packed: [N, ceil(k / 4)] uint8. Returns codes [N, k] int8 in {-1, 0, +1}.
    Raises TypeError / ValueError for another dtype or shape, for code 3 and for padding that is not zero.
    """
    check(packed, k)
    n, width = packed.shape
    codes = torch.empty(n, width, CODES_PER_BYTE, dtype=torch.int8, device=packed.device)
    for i, shift in enumerate(_SHIFTS):
        codes[:, :, i] = ((packed >> shift) & 3).to(torch.int8) - 1
    return codes.view(n, width * CODES_PER_BYTE)[:, :k].contiguous()


def check(packed: Tensor, k: int) -> None:
    """Raise, as `unpack` does, for a tensor that is not a valid packed image of [N, k] codes."""
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed weights: got {packed.dtype}, expected torch.uint8")
    if k < 1 or packed.dim() != 2 or packed.shape[1] != packed_width(k):
        raise ValueError(
            f"packed weights: got shape {tuple(packed.shape)}, expected [N, {packed_width(k)}] for K = {k}"
        )
    # Code 3 has both bits set: find low bits whose high neighbour is set as well.
    invalid = packed & (packed >> 1) & _ZERO_BYTE
    if bool(invalid.any()):
        row, byte = (int(i) for i in invalid.nonzero()[0])
        raise ValueError(
            f"packed weights: got code 3 in row {row}, byte {byte}; only 0, 1 and 2 exist: the data is damaged"
        )
    used = k % CODES_PER_BYTE
    if used:
        fill = packed[:, -1] >> (2 * used)
        expected = _ZERO_BYTE >> (2 * used)
        if bool((fill != expected).any()):
            raise ValueError(f"packed weights: the fill behind K = {k} is not zero: wrong K or damaged data")
