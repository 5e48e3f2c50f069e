"""Packed models of random ternary weights: any shape to measure, without training it."""

import json
from pathlib import Path

import torch

from bitnet import packed
from bitnet.checkpoint import replacing, write_tensors
from bitnet.config import ModelConfig, preset
from bitnet.kernels import packing

ZEROS = 0.4  # of the weights: trained models have 33 to 42 %, and zeros are what a kernel might skip

# The shape of the anchors' 110M model: GPT-2 small's width and depth, LLaMA's block.
SHAPES = {"110m": preset("small").replace(vocab_size=32768, num_key_value_heads=12, qk_norm=False)}


def shape(name: str) -> ModelConfig:
    """A preset or one of SHAPES."""
    return SHAPES.get(name) or preset(name)


def random_codes(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Codes [n, k] int8, 40 % zeros, +1 and -1 alike."""
    draws = torch.rand(n, k, generator=generator)
    return (draws > ZEROS).to(torch.int8) * (1 - 2 * (draws > (1 + ZEROS) / 2).to(torch.int8))


def write_random(config: ModelConfig, path: Path, seed: int = 0) -> None:
    """Write a packed file whose layers keep the size of their input, without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (size, dtypes) in packed.expected_tensors(config).items():
        if torch.uint8 in dtypes:
            k = packed.in_features(config, name)
            tensors[name] = packing.pack(random_codes(size[0], k, generator))
            tensors[f"{name}_scale"] = torch.tensor([((1 - ZEROS) * k) ** -0.5])
        elif torch.bfloat16 in dtypes:
            tensors[name] = (torch.randn(size, generator=generator) * 0.02).to(torch.bfloat16)
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
