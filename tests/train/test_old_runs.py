"""Runs written by earlier versions, under the names that settings had then: they resume, load and pack."""

import logging
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import toy_config, train, words

from bitnet.cli import main
from bitnet.files import checkpoint
from bitnet.files.packed import read_packed
from bitnet.train.config import RunConfig
from bitnet.train.report.display import Display
from bitnet.train.runs.run import Run

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def corpus(tmp_path: Path, seed: int) -> Path:
    path = tmp_path / "toy.txt"
    path.write_text(words(700))
    return path


class StopAtStep(Display):
    def __init__(self, step: int) -> None:
        super().__init__(quiet=True)
        self._at = step

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] == self._at:
            signal.raise_signal(signal.SIGTERM)


def as_written_then(run: Path, config: RunConfig) -> None:
    """Rewrite a run as an earlier version did: old names, and the configuration as requested instead of resolved."""
    text = config.to_toml()
    renamed = {"quant_warmup": "ease", "embedding_lr": "table_lr", 'linear = "float"': 'linear = "plain"'}
    for new, old in renamed.items():
        text = text.replace(new, old)
    text = re.sub(r"(?m)(\[tokenizer\]\nkind = .*\n)vocab_size = .*\n", r"\1", text)
    assert "ease = " in text
    assert "table_lr = " in text
    Run(run).config_file.write_text(text)
    save = checkpoint.latest_save(run / "saves")
    assert save is not None
    model = dict(save.state["model"])
    model["linear"] = "plain" if model["linear"] == "float" else model["linear"]
    tensors = {group: save.tensors(group) for group in ("model", "optimizer", "random")}
    checkpoint.write_save(run / "saves", save.step, tensors, {**save.state, "model": model})


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in Run(run).metrics() if "loss" in row]


@pytest.mark.parametrize("linear", ["ternary", "float"])
def test_a_run_with_old_names_resumes(
    linear: str, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = toy_config(corpus, model={"linear": linear}, steps=8, quant_warmup=0.5, embedding_lr=0.01)
    train(config, tmp_path / "straight")
    old = tmp_path / "old"
    train(config, old, StopAtStep(5))
    as_written_then(old, config)
    with caplog.at_level(logging.INFO, logger="bitnet"):
        assert main(["train", "--out", str(old), "-q"]) == 0
        assert Run(old).config() == Run(tmp_path / "straight").config()  # written again under the new names
        Run(old).load()
    assert losses(old) == losses(tmp_path / "straight")


def test_old_names_are_noted(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = toy_config(corpus, model={"linear": "float"}, steps=2)
    train(config, tmp_path / "old")
    as_written_then(tmp_path / "old", config)
    with caplog.at_level(logging.INFO, logger="bitnet"):
        read = Run(tmp_path / "old").config()
    assert read == config
    assert "train.ease is called train.quant_warmup now" in caplog.messages
    assert "train.table_lr is called train.embedding_lr now" in caplog.messages


def test_a_run_with_old_names_packs(corpus: Path, tmp_path: Path) -> None:
    config = toy_config(corpus, steps=3, quant_warmup=0.0)
    train(config, tmp_path / "run")
    packed = {}
    for name in ("new", "old"):
        if name == "old":
            as_written_then(tmp_path / "run", config)
        file = tmp_path / f"{name}.safetensors"
        assert main(["pack", str(tmp_path / "run"), "-o", str(file)]) == 0
        packed[name] = read_packed(file).tensors
    assert packed["old"].keys() == packed["new"].keys()
    assert all(torch.equal(value, packed["new"][name]) for name, value in packed["old"].items())


def test_a_plain_run_is_a_float_baseline(corpus: Path, tmp_path: Path) -> None:
    """The configuration in its saves is read under the new name too."""
    config = toy_config(corpus, model={"linear": "float"}, steps=2)
    train(config, tmp_path / "old")
    as_written_then(tmp_path / "old", config)
    model, save = Run(tmp_path / "old").load()
    assert save.state["model"]["linear"] == "plain"
    assert model.config.linear == "float"
