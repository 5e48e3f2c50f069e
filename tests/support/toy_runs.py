"""A run of seconds, for tests of training: its model, text and configuration, and a call that trains it."""

import random
from pathlib import Path
from typing import Any

import torch

from bitnet.train.config import RunConfig
from bitnet.train.pretrain import Outcome, pretrain
from bitnet.train.report.display import Display

CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}


def words(count: int) -> str:
    """Random text of so many words over the letters a to h, which takes its draws from `random`."""
    return "".join(random.choice(["fade ", "bag ", "cabbage\n", "hedge "]) for _ in range(count))


def toy_config(text: Path, *, model: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    """Six steps of a one-block model on the characters of a file, in fp32. train: settings of [train]."""
    settings = {"steps": 6, "batch_size": 4, "dtype": "fp32", "eval_every": 0, "save_every": 1000, "report_every": 1000}
    return RunConfig().override(
        {
            "model": {**SHAPE, **(model or {})},
            "tokenizer": {"kind": "char"},
            "data": {"paths": (str(text),), "val_fraction": 0.1},
            "train": {**settings, **train},
        }
    )


def train(config: RunConfig, out: Path, display: Display | None = None) -> Outcome:
    """Train in this process, on the CPU."""
    return pretrain(config, out, CPU, display or Display(quiet=True))
