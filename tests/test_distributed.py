"""Two processes on one machine against one process with the same global batch."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.checkpoint import latest_save
from bitnet.train.distributed import Processes

SETTINGS = [
    "--linear", "plain", "--dtype", "fp32", "--tokenizer", "char", "--steps", "5", "--optimizer", "adamw", "--lr", "0.001",
    "--set", "train.table_lr=0.001", "--set", "model.hidden_size=32", "--set", "model.intermediate_size=44",
    "--set", "model.num_hidden_layers=1", "--set", "model.num_attention_heads=2", "--set", "model.num_key_value_heads=1",
    "--set", "model.max_position_embeddings=16", "--set", "data.val_fraction=0.1", "--set", "train.eval_every=2",
]  # fmt: skip


def run(launcher: list[str], out: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    corpus = out.parent / "toy.txt"
    args = ["train", "--data", str(corpus), "--out", str(out), *SETTINGS, *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, *args], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    text = "".join(random.choice(["fade ", "bag ", "cabbage\n", "hedge "]) for _ in range(900))
    (tmp_path / "toy.txt").write_text(text)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "bitnet.cli"]
    two = run(torchrun, tmp_path / "two", "--batch-size", "2", "--set", "train.accumulate=2", "--json")
    assert two.returncode == 0, two.stderr
    one = run(["-m", "bitnet.cli"], tmp_path / "one", "--batch-size", "8", "--json")
    assert one.returncode == 0, one.stderr

    wanted, got = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["step"] for row in got] == [row["step"] for row in wanted]
    for a, b in zip(wanted, got, strict=True):
        assert a.keys() == b.keys()
        for key in {"loss", "grad_norm", "val_loss"} & a.keys():
            # The same 128 losses and gradients added in another order: 128 * 2^-24 = 8e-6 a step. AdamW turns noise
            # in a tiny gradient into part of a step of 1e-3, so that weights and norms drift a little further.
            assert b[key] == pytest.approx(a[key], rel=1e-5 if key != "grad_norm" else 1e-3), (a["step"], key)
        for key in {"lr", "tokens", "val_tokens", "val_whole"} & a.keys():
            assert a[key] == b[key]
    assert all(math.isfinite(row["loss"]) for row in got if "loss" in row)

    # One product on stdout and one file of everything: only the first process writes.
    assert json.loads(two.stdout)["steps"] == 5
    assert "2 processes" in two.stderr
    assert two.stderr.count("GFLOP/s") == 1
    assert (tmp_path / "two" / "samples.txt").read_text().count("--- step 5") == 1
    save = latest_save(tmp_path / "two" / "saves")
    assert save is not None
    assert save.step == 5
    assert not [name for name in save.tensors("model") if name.startswith("module.")]


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    model = torch.nn.Linear(2, 2)
    with Processes(torch.device("cpu")) as processes:
        assert (processes.size, processes.rank, processes.first) == (1, 0, True)
        assert processes.wrap(model) is model
        assert float(processes.mean(torch.tensor(2.5))) == 2.5
        assert processes.largest(15) == 15
        processes.barrier()
