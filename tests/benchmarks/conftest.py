"""Fixtures of the benchmarks' tests."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_fakes import TINY
from compare_runs import train

from bitnet.benchmarks.bench.random_model import write_random
from bitnet.benchmarks.compare.pair import Pair


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed file of TINY with random weights."""
    path = tmp_path_factory.mktemp("bench") / "tiny.safetensors"
    write_random(TINY, path, seed=random.SystemRandom().randrange(2**31))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a ternary run and its float baseline, one step each."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setattr("bitnet.train.pretrain.plot_run", lambda *args: [])
    for linear in ("ternary", "float"):
        train(folder, f"toy-{linear}", "--linear", linear)
    yield folder
    patch.undo()


@pytest.fixture
def pair(runs: Path) -> Pair:
    """Those two runs."""
    return Pair(runs / "toy-ternary", runs / "toy-float")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A small text to train on."""
    path = tmp_path / "toy.txt"
    path.write_text("".join(random.choice(["fade ", "bag ", "cabbage\n", "hedge "]) for _ in range(700)))
    return path
