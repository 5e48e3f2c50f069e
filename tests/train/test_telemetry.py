"""Telemetry against an independent count on weights with obvious codes; trackers against recording modules."""

import builtins
import importlib.machinery
import math
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.layers import BitLinear
from bitnet.model import Transformer
from bitnet.train.config import TrainConfig
from bitnet.train.report.telemetry import Telemetry, summary
from bitnet.train.report.trackers import make_trackers

LEVELS = torch.tensor([-1.0, -0.1, 0.0, 0.1, 1.0])  # with a third of ones or more, 1 is a code and 0.1 is none


def draw(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Weights with obvious codes: |w| = 1 is +-1, the rest is 0, as long as 0.2 < mean |w| < 2."""
    weight = LEVELS[torch.randint(0, 5, shape, generator=rng)]
    weight[:, ::2] = torch.where(torch.rand(weight[:, ::2].shape, generator=rng) < 0.5, -1.0, 1.0)
    return weight


def codes(weight: Tensor) -> list[int]:
    return [0 if abs(w) < 0.5 else int(math.copysign(1, w)) for w in weight.flatten().tolist()]


def counted(rng: torch.Generator) -> nn.ModuleDict:
    layers = {name: BitLinear(k, n, bias=False) for name, n, k in (("a", 7, 13), ("b", 1, 5), ("c", 33, 64))}
    model = nn.ModuleDict({**layers, "other": nn.Linear(3, 3)})
    for layer in layers.values():
        layer.weight.data = draw(layer.weight.shape, rng)
    return model


def test_zeros_flips_and_scale_are_what_a_count_gives(rng: torch.Generator) -> None:
    model = counted(rng)
    telemetry = Telemetry(model)
    last: dict[str, list[int]] = {}
    for _ in range(4):
        rows = {row["layer"]: row for row in telemetry.report()}
        assert list(rows) == ["a", "b", "c"]  # quantised layers only
        for name, row in rows.items():
            weight = model[name].weight.detach()
            now = codes(weight)
            assert row["zeros"] == pytest.approx(now.count(0) / len(now), rel=2**-23)
            mean = math.fsum(abs(w) for w in weight.flatten().tolist()) / weight.numel()
            assert row["scale"] == pytest.approx(mean, rel=2**-20)  # row sums of up to 64 terms in fp32
            if name in last:
                flipped = sum(x != y for x, y in zip(now, last[name], strict=True))
                assert row["flips"] == pytest.approx(flipped / len(now), rel=2**-23)
            else:
                assert row["flips"] is None
            last[name] = now
            fresh = draw(weight.shape, rng)
            keep = torch.rand(weight.shape, generator=rng) < random.random()
            model[name].weight.data = torch.where(keep, weight, fresh)


def test_no_change_is_no_flip(rng: torch.Generator) -> None:
    telemetry = Telemetry(counted(rng))
    telemetry.report()
    assert [row["flips"] for row in telemetry.report()] == [0.0, 0.0, 0.0]


def test_layers_of_a_transformer_by_name() -> None:
    config = ModelConfig(16, 8, 12, 2, 1, 1, 8, linear="binary")
    model = Transformer(config)
    model.init_weights(0)
    rows = Telemetry(model).report()
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert [row["layer"].rpartition(".")[2] for row in rows] == [*kinds, *kinds]
    assert rows[0]["layer"] == "0.self_attn.q_proj"
    assert all(row["zeros"] == 0.0 for row in rows)  # there is no zero among binary codes


def test_a_float_baseline_has_nothing_to_report() -> None:
    model = Transformer(ModelConfig(16, 8, 12, 1, 1, 1, 8, linear="float"))
    assert Telemetry(model).report() == []
    assert summary([]) == ""


def test_summary_names_the_extremes() -> None:
    rows: list[Any] = [
        {"layer": "a", "zeros": 0.31, "flips": 0.0123, "scale": 1.0},
        {"layer": "b", "zeros": 0.42, "flips": 0.0456, "scale": 1.0},
    ]
    assert summary(rows) == "zeros 31%-42%, flips ≤ 4.56%"
    for row in rows:
        row["flips"] = None
    assert summary(rows) == "zeros 31%-42%"


# ---- trackers ----------------------------------------------------------------------------------------------

ROWS = [
    {"step": 3, "loss": 2.5, "lr": 1, "tokens": 77},
    {"step": 4, "skipped": "loss nan"},
    {
        "step": 5,
        "telemetry": [
            {"layer": "0.q", "zeros": 0.25, "flips": None, "scale": 0.5},
            {"layer": "0.k", "zeros": 0.5, "flips": 0.125, "scale": 1.5},
        ],
    },
    {"step": 6, "val_loss": 2.0, "val_bits_per_byte_error": None},
]
NUMBERS = {
    (3, "loss", 2.5), (3, "lr", 1.0), (3, "tokens", 77.0), (5, "zeros/0.q", 0.25), (5, "scale/0.q", 0.5),
    (5, "zeros/0.k", 0.5), (5, "flips/0.k", 0.125), (5, "scale/0.k", 1.5), (6, "val_loss", 2.0),
}  # fmt: skip


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__dict__.update(content)
    return made


def test_tensorboard_gets_every_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[int, str, float]] = []
    folders: list[str] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            folders.append(folder)

        def add_scalar(self, key: str, value: float, step: int) -> None:
            seen.append((step, key, value))

        def close(self) -> None:
            folders.append("closed")

    fake = module("torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    (tracker,) = make_trackers(TrainConfig(tensorboard=True), tmp_path)
    for row in ROWS:
        tracker.log(row)
    tracker.close()  # or the last two minutes would never reach the disk
    assert folders == [str(tmp_path / "tensorboard"), "closed"]
    assert len(seen) == len(NUMBERS)
    assert set(seen) == NUMBERS


def test_wandb_gets_every_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[int, str, float]] = []
    asked: list[dict[str, Any]] = []

    class FakeRun:
        def log(self, numbers: dict[str, float], step: int) -> None:
            seen.extend((step, key, value) for key, value in numbers.items())

        def finish(self) -> None:
            asked.append({"finished": True})

    def init(**settings: Any) -> FakeRun:
        asked.append(settings)
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=init))
    (tracker,) = make_trackers(TrainConfig(wandb=True), tmp_path / "my run")
    for row in ROWS:
        tracker.log(row)
    tracker.close()
    assert asked[1:] == [{"finished": True}]
    assert asked[0]["name"] == "my run"
    assert asked[0]["resume"] == "allow"  # a resumed run logs to the same run
    assert len(seen) == len(NUMBERS)
    assert set(seen) == NUMBERS


@pytest.mark.parametrize(("setting", "package"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_tracker_says_what_to_install(
    setting: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BitNetError, match=f"pip install {setting}"):
        make_trackers(TrainConfig(**{setting: True}), tmp_path)


def test_no_tracker_unless_asked_for(tmp_path: Path) -> None:
    assert make_trackers(TrainConfig(), tmp_path) == []
