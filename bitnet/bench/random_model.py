"""Packed models of random ternary weights: any shape to measure, without training it."""

import json
from pathlib import Path

import torch
from torch import Tensor

from bitnet import packed
from bitnet.checkpoint import replacing, write_tensors
from bitnet.config import ModelConfig
from bitnet.kernels import packing
from bitnet.model import in_features

ZEROS = 0.4  # of the weights: trained models have 33 to 42 %, and zeros are what a kernel might skip
_ROWS = 1024  # made at once: what is drawn in fp32 on the way to two bits stays small


def random_codes(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Codes [n, k] int8, 40 % zeros, +1 and -1 alike."""
    draws = torch.rand(n, k, generator=generator)
    return (draws > ZEROS).to(torch.int8) * (1 - 2 * (draws > (1 + ZEROS) / 2).to(torch.int8))


def write_random(config: ModelConfig, path: Path, seed: int = 0) -> None:
    """Write a packed file whose layers keep the size of their input, without a tokenizer.

    Takes about as much memory as the file is long.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (size, dtypes) in packed.expected_tensors(config).items():
        if torch.uint8 in dtypes:
            k = in_features(config, name)
            tensors[name] = torch.cat([packing.pack(random_codes(n, k, generator)) for n in _parts(size[0])])
            tensors[f"{name}_scale"] = torch.tensor([((1 - ZEROS) * k) ** -0.5])
        elif torch.bfloat16 in dtypes:
            rows = [torch.randn(n, size[1], generator=generator).mul_(0.02).bfloat16() for n in _parts(size[0])]
            tensors[name] = torch.cat(rows)
        elif name not in tensors:
            tensors[name] = torch.ones(size)
    metadata = {
        "format": packed.FORMAT,
        "version": str(packed.VERSION),
        "layout": packing.LAYOUT_ID,
        "config": json.dumps(config.to_dict()),
        "tokenizer": "none",
        "info": "{}",
    }
    metadata["sha256"] = packed.content_digest(metadata, tensors)
    with replacing(path) as work:
        write_tensors(work, tensors, metadata)


def _parts(rows: int) -> list[int]:
    return [min(_ROWS, rows - start) for start in range(0, rows, _ROWS)]
