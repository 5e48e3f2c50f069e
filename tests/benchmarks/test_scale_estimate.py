"""The formulas of the estimate of a large run, against counts made by hand and by walking through a tiny model."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bitnet.config import ModelConfig
from bitnet.model import Transformer
from bitnet.train.muon import orthogonalise

GPUS, MICRO = 4, 3


def script() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "scale_estimate.py"
    spec = importlib.util.spec_from_file_location("scale_estimate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = script()
# Two blocks of q, o [8, 8], k, v [4, 8], gate, up [12, 8], down [8, 12]: 128 + 64 + 288 = 480 weights each, 960 in all.
# The rest: a table [16, 8], gains of two times 8 + 8 + 8 + 12 (no QK norm) and of the last 8: 128 + 72 + 8 = 208.
TINY = ModelConfig(16, 8, 12, 2, 2, 1, 32, linear="ternary", qk_norm=False, tie_word_embeddings=True)
BLOCK, MATRICES, REST = 480, 960, 208


def test_the_tiny_shape_is_what_was_counted() -> None:
    sizes = {name: p.numel() for name, p in Transformer(TINY).named_parameters()}
    assert sum(size for name, size in sizes.items() if "_proj" in name) == MATRICES
    assert sum(size for name, size in sizes.items() if "_proj" not in name) == REST


def ring(numbers: float, size: float) -> float:
    """Bytes that one of GPUS sends to gather, or to sum and scatter, so many numbers: piece by piece to the next."""
    return sum(numbers / GPUS * size for _ in range(GPUS - 1))


def exchanged(size: float) -> float:
    """Bytes that a GPU sends in the two all-to-alls of Muon's matrices, on average over GPUs."""
    sent = 0.0
    for name, matrix in Transformer(TINY).named_parameters():
        if "_proj" in name:
            piece = matrix.numel() / GPUS * size
            sent += (GPUS - 1) * piece  # to the matrix's owner, by all others
            sent += (GPUS - 1) * piece  # from its owner, to all others
    return sent / GPUS


@pytest.mark.parametrize(
    ("way", "recompute", "forward", "backward"),
    [
        ("fsdp", False, 4.0, 0.0),
        ("fsdp", True, 4.0, 4.0),
        ("fsdp-twice", False, 4.0, 4.0),
        ("fsdp-int8", False, 1.0, 0.0),
        ("fsdp-int8", True, 1.0, 1.0),
        ("fsdp-2bit", False, 0.25, 0.0),
    ],
)
def test_bytes_sent_are_those_of_the_collectives_of_a_step(
    way: str, recompute: bool, forward: float, backward: float
) -> None:
    """The list of collectives is the one that tests/train/test_scale.py counts in a real step."""
    collectives = []
    for _ in range(MICRO):
        collectives += [(REST, 4.0), (BLOCK, forward), (BLOCK, forward)]  # gathered on the way there
        collectives += [(BLOCK, backward), (BLOCK, backward)]  # and back
        collectives += [(BLOCK, 4.0), (BLOCK, 4.0), (REST, 4.0)]  # gradients scattered
    sent = made.bytes_sent(TINY, GPUS, way, MICRO, recompute)
    assert sum(sent.values()) == sum(ring(*collective) for collective in collectives) + exchanged(2)
    assert sent["matrices_backward"] == MICRO * ring(MATRICES, backward)
    assert sent["tables_and_gains"] == MICRO * ring(REST, 4)  # never as codes


def test_bytes_sent_with_the_whole_model_everywhere() -> None:
    """A sum that all have is one that is scattered, and gathered; once a step."""
    assert made.bytes_sent(TINY, GPUS, "ddp", MICRO, False) == {"gradients": 2 * ring(MATRICES + REST, 4)}


@pytest.mark.parametrize(
    ("way", "recompute", "wanted"),
    [
        # Masters and gradients of 1,168, momentum of 960, two moments of 208: 9,344 + 3,840 + 1,664; mixtures of
        # 960 in bf16: 1,920.
        ("ddp", False, 9_344 + 3_840 + 1_664 + 1_920),
        # (9,344 + 3,840 + 1,664) / 4 = 3,712; mixtures 1,920; 208 masters, gradients and what is sent of them: 2,496;
        # two blocks of 480, each twice in fp32: 7,680.
        ("fsdp", False, 3_712 + 1_920 + 2_496 + 7_680),
        ("fsdp-2bit", False, 3_712 + 1_920 + 2_496 + 7_680),
        ("fsdp-twice", False, 3_712 + 1_920 + 2_496 + 2 * 7_680),
        ("fsdp", True, 3_712 + 960 + 2_496 + 2 * 7_680),
    ],
)
def test_bytes_held(way: str, recompute: bool, wanted: int) -> None:
    assert made.bytes_held(TINY, GPUS, way, recompute) == wanted


def test_operations_of_muon_are_those_of_its_products(rng: torch.Generator) -> None:
    with FlopCounterMode(display=False) as counter:
        for name, matrix in Transformer(TINY).named_parameters():
            if "_proj" in name:
                orthogonalise(torch.randn(matrix.shape, generator=rng))
    assert made.muon_operations(TINY) == counter.get_total_flops()


def options(**changes: Any) -> argparse.Namespace:
    settings = {"tokens": 6e6, "batch_tokens": 6e3, "micro_tokens": 500, "recompute": False, "price": 2.0}
    return argparse.Namespace(**settings | changes)


def test_hours_and_money() -> None:
    row = made.estimate(TINY, options(), GPUS, "fsdp", 0.5)
    assert row["micro_batches"] == MICRO  # 6,000 tokens on 4 GPUs, 500 at a time
    # A token: six operations for each of 960 + 128 weights, and 2 layers x 32 positions x 8 x 2, three times: 9,600.
    products, muon = 1_500 * 9_600, made.muon_operations(TINY) / GPUS
    compute = (products + muon) / (made.PEAK * 0.5)
    sending = sum(made.bytes_sent(TINY, GPUS, "fsdp", MICRO, False).values()) / (made.NVLINK * made.REACHED)
    assert row["compute_seconds_a_step"] == pytest.approx(compute)
    assert row["communication_seconds_a_step"] == pytest.approx(sending)
    hours = [1_000 * max(compute, sending) / 3600, 1_000 * (compute + sending) / 3600]  # of a thousand steps
    assert row["hours"] == pytest.approx(hours)
    assert row["gpu_hours"] == pytest.approx([4 * hour for hour in hours])
    assert row["dollars"] == pytest.approx([8 * hour for hour in hours])


@pytest.mark.parametrize("rate", [[], ["--rate", "50000"]], ids=["published", "measured"])
def test_the_document_says_what_it_rests_on(
    rate: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scale_estimate.py", *rate])
    made.main()
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document["command"] == " ".join(["python", "benchmarks/scale_estimate.py", *rate])
    assert len(document["date"]) == 10
    assert document["measured"] is False  # figures of a run that nobody made
    source = document["assumptions"]["utilisation"]
    assert source in out.splitlines()[1]
    assert source.startswith("measured: 50000" if rate else "assumed: published for other training loops")
    assert {row["gpus"] for row in document["rows"]} == {8, 64}
    assert {row["way"] for row in document["rows"]} == {"ddp", *made.GATHERS}
    for row in document["rows"]:
        low, high = row["hours"]
        assert low <= high <= 2 * low


def test_gain_of_each_way_to_gather() -> None:
    """A step of 10 s with 4 s of sending: without 2 s of it, nothing if it is hidden, and a seventh if it is not."""
    rows = [
        {"gpus": 8, "way": way, "compute_seconds_a_step": 10.0, "communication_seconds_a_step": sending}
        | {"hours": [max(10.0, sending), 10.0 + sending]}
        for way, sending in zip(made.GATHERS, (4.0, 11.0, 2.0, 1.0), strict=True)
    ]
    first, twice, int8, _, decision = made.answers(rows)
    assert "40% of" in first
    assert "+10.0% where all" in twice
    assert "+50.0% where none" in twice
    assert "+0.0% where all" in int8
    assert "-14.3% where none" in int8
    assert decision == made.DECISION
