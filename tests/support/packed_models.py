"""Small trained models for packed files, and changes to the content of such files."""

from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.files import packed_layout
from bitnet.files.checkpoint import write_tensors
from bitnet.model import Transformer

CHARACTERS = [chr(ord("0") + i) for i in range(61)]
CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=42,  # 42 % 4 = 2: the rows of down_proj are filled up
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    initializer_range=0.2,
)
VARIANTS = {
    "ternary": {},
    "binary": {"linear": "binary"},
    "float": {"linear": "float"},
    "untied-silu": {"tie_word_embeddings": False, "hidden_act": "silu", "qk_norm": False},
    "bare": {"sub_norms": False, "qk_norm": False, "num_key_value_heads": 1},
}


def trained(seed: int, **changes: object) -> Transformer:
    """A model a few optimiser steps away from its initial weights, so that nothing in it is special."""
    model = Transformer(CONFIG.replace(**changes))
    model.init_weights(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        ids = torch.randint(CONFIG.vocab_size, (2, 16))
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


Content = tuple[dict[str, str], dict[str, Tensor]]


def content(path: Path) -> Content:
    with safetensors.safe_open(path, framework="pt") as opened:
        return dict(opened.metadata()), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def rewrite(path: Path, change: Callable[[dict[str, str], dict[str, Tensor]], object]) -> Path:
    """Write a file with a change and a checksum that matches it: what remains are the checks of the content."""
    metadata, tensors = content(path)
    change(metadata, tensors)
    metadata["sha256"] = packed_layout.content_digest(metadata, tensors)
    write_tensors(path, tensors, metadata)
    return path
