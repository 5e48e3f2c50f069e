"""Packed models of random ternary weights: a model of any shape, to be measured without training it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.files.packed import write_file
from bitnet.files.packed_layout import expected_tensors
from bitnet.files.tensors import projection_shape
from bitnet.kernels import packing

ZEROS = 0.4  # of the weights: trained models have 33 to 42 %, and zeros are what a kernel might skip
_ROWS = 4096  # made at once, so that what is drawn in wider types stays small
_DRAWS = 2**16  # equally likely bytes of four weights each; enough that rounding their number does not show


def random_codes(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Codes [n, k] int8: 40 % zeros, as many +1 as -1."""
    draws = torch.rand(n, k, generator=generator)
    return (draws > ZEROS).to(torch.int8) * (1 - 2 * (draws > (1 + ZEROS) / 2).to(torch.int8))


def random_packed(n: int, k: int, rng: np.random.Generator) -> Tensor:
    """Packed codes [n, ceil(k / 4)] uint8 of the same distribution, drawn a byte at a time, thirty times as fast."""
    one = np.array([(1 - ZEROS) / 2, ZEROS, (1 - ZEROS) / 2])  # of the codes 0, 1, 2: -1, 0, +1
    chances = np.einsum("a,b,c,d->abcd", one, one, one, one).reshape(-1)
    fields = np.indices((3, 3, 3, 3)).reshape(4, -1)
    images = (fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6).astype(np.uint8)
    places = (np.cumsum(chances) * _DRAWS).round().astype(int)
    table = np.repeat(images, np.diff(places, prepend=0))
    out = np.empty((n, packing.packed_width(k)), np.uint8)
    for start in range(0, n, _ROWS):
        rows = out[start : start + _ROWS]
        np.take(table, rng.integers(0, _DRAWS, rows.shape, np.uint16), out=rows)
    if k % packing.CODES_PER_BYTE:  # unused codes of the last byte are zero
        held = (1 << 2 * (k % packing.CODES_PER_BYTE)) - 1
        zeros = int(packing.pack(torch.zeros(1, packing.CODES_PER_BYTE, dtype=torch.int8))[0, 0])
        out[:, -1] = out[:, -1] & held | zeros & ~held
    return torch.from_numpy(out)


def random_embedding(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Embedding or head [rows, width] bf16, normal with deviation 0.02."""
    out = torch.empty(rows, width, dtype=torch.bfloat16)
    for start in range(0, rows, _ROWS):
        part = out[start : start + _ROWS]
        part.copy_(torch.randn(part.shape, generator=generator).mul_(0.02))
    return out


def write_random(config: ModelConfig, path: Path, seed: int = 0) -> None:
    """Write a packed file without a tokenizer, its layers scaled so that they preserve the size of their input.

    Needs about as much memory as the file has bytes.
    """
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    for name, (size, dtypes) in expected_tensors(config).items():
        if torch.uint8 in dtypes:
            k = projection_shape(config, name)[1]
            tensors[name] = random_packed(size[0], k, rng)
            tensors[f"{name}_scale"] = torch.tensor([((1 - ZEROS) * k) ** -0.5])
        elif torch.bfloat16 in dtypes:
            tensors[name] = random_embedding(size[0], size[1], generator)
        elif name not in tensors:
            tensors[name] = torch.ones(size)
    write_file(path, config, tensors.items())
