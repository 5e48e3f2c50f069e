"""The layout of packed weights on a GPU: tiles of 256 weights per row, decoded with one mask per field.

The file's layout (kernels/packing.py) puts four neighbours along K into a byte. A kernel that decodes four bytes at a
time with one shift and one mask would get every fourth k, which suits no tensor core. So K is cut into blocks of 256, a
block of a row is 64 bytes, and field s of byte j is

    k = 256 * block + 64 * s + j            fields 0..3 hold w + 1, as in the file

so that the field at shift 2s of 64 neighbouring bytes is 64 neighbouring k: `(word >> 2s) & 0x03030303` of a 32-bit
word is four int8 codes in the right order, and q is read in rows of 64 as it is stored.

    data [blocks, N, 64] uint8              block-major: the rows of one block are contiguous

Block-major because a tile of R rows of one block is then R * 64 contiguous bytes: every 16-byte load of a warp is
part of one 512-byte run, wherever K is split. K is padded to a multiple of 256 with w = 0
(no padding for any preset: hidden and ffn sizes are multiples of 256).

Codes stay unsigned (0, 1, 2) inside the kernels, which saves one subtraction per weight:

    sum_k (code - 1) * q = sum_k code * q - sum_k q

and the sum of q is one number per token, exact in int32 like everything else.

Dimensions: N out-features, K in-features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.kernels import packing

BLOCK_K = 256  # weights of a row in one block
BYTES = BLOCK_K // packing.CODES_PER_BYTE  # bytes of a row in one block: four 16-byte loads
FIELDS = packing.CODES_PER_BYTE
MAX_K = 2**20  # 32 * 128 * K / 2, the largest partial sum of kernels/gpu/gemv.py, stays below 2^31


@dataclass(frozen=True)
class GpuWeights:
    """Packed weights [n, k] in block-major tiles: data [blocks, n, 64] uint8."""

    data: Tensor
    n: int
    k: int

    @property
    def blocks(self) -> int:
        """Blocks of 256 weights in a row."""
        return self.data.shape[0]


def arrange(packed: Tensor, k: int) -> GpuWeights:
    """Rearrange a checked file image [N, ceil(k / 4)] uint8 into tiles, on its own device.

    Raises ValueError for K beyond 1,048,576.
    """
    if k > MAX_K:
        raise ValueError(f"packed weights: got K = {k}, expected at most {MAX_K}; use BITNET_BACKEND=float")
    codes = packing.unpack(packed, k)
    n, blocks = codes.shape[0], -(-k // BLOCK_K)
    fields = torch.ones(n, blocks * BLOCK_K, dtype=torch.uint8, device=packed.device)
    fields[:, :k] = (codes + 1).to(torch.uint8)
    tiles = fields.view(n, blocks, FIELDS, BYTES).permute(1, 0, 2, 3)
    data = torch.zeros(blocks, n, BYTES, dtype=torch.uint8, device=packed.device)
    for s in range(FIELDS):
        data |= tiles[:, :, s] << (2 * s)
    return GpuWeights(data, n, k)


def codes_of(weights: GpuWeights) -> Tensor:
    """The codes [N, K] int8 of arranged weights; the inverse of `arrange`, for tests and inspection."""
    fields = torch.stack([(weights.data >> (2 * s)) & 3 for s in range(FIELDS)], dim=2)
    codes = fields.permute(1, 0, 2, 3).reshape(weights.n, -1)[:, : weights.k]
    return codes.to(torch.int8) - 1
