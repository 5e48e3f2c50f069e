"""The model that comes with the package: small enough, whole, the one its card speaks of, and there without a word."""

import json
import re
from pathlib import Path

import child_process
import pytest
import torch

import bitnet
from bitnet.cli import main
from bitnet.files.packed import read_packed
from bitnet.included import BOOKS

CARD = (BOOKS.parent / "README.md").read_text(encoding="utf-8")
Captured = pytest.CaptureFixture[str]


def test_size() -> None:
    size = BOOKS.stat().st_size
    assert size <= 16_000_000
    assert f"{size / 1e6:.2f} MB" in CARD


def test_it_is_whole_and_ternary() -> None:
    packed = read_packed(BOOKS)
    assert packed.config.linear == "ternary"
    assert packed.tokenizer is not None
    assert packed.info.keys() >= {"steps", "tokens", "val_bits_per_byte"}
    assert f"{packed.info['tokens'] / 1e6:.1f}M tokens" in CARD
    assert f"{packed.info['val_bits_per_byte']:.4f}" in CARD


def test_no_place_of_a_machine_is_in_it() -> None:
    assert not re.search(rb"/(tmp|home|work|root|Users)/", BOOKS.read_bytes()[:65_536])


@pytest.mark.parametrize("verb", ["generate", "inspect"])
def test_verbs_take_it_without_a_word(verb: str, capsys: Captured) -> None:
    assert main([verb, "--json", *(["-p", "It was", "-n", "12", "-s", "1"] if verb == "generate" else [])]) == 0
    report = json.loads(capsys.readouterr().out)
    if verb == "inspect":
        assert report["file_bytes"] == BOOKS.stat().st_size
    else:
        assert report["tokens"] == 12


def test_eval_takes_it_without_a_word(tmp_path: Path, capsys: Captured) -> None:
    """It has learnt English: worlds better than a uniform guess, or than the same letters backwards."""
    text = "It was a dark night, and the wind blew from the sea. She looked at him, but he did not say a word.\n" * 4
    scores = []
    for name, words in (("text", text), ("backwards", text[::-1])):
        (tmp_path / name).write_text(words)
        assert main(["eval", "--json", "--data", str(tmp_path / name)]) == 0
        scores.append(json.loads(capsys.readouterr().out)["bits_per_byte"])
    assert scores[0] < 2.5 < scores[1]


def test_load_takes_it_without_a_word() -> None:
    model = bitnet.load()
    assert model.tokenizer is not None
    logits = model.logits(torch.tensor(model.tokenizer.encode("He opened the")))
    assert logits.shape[1] == model.config.vocab_size
    assert torch.isfinite(logits).all()


@pytest.mark.slow
def test_figure_of_the_card(shared: Path, tmp_path: Path, capsys: Captured) -> None:
    """The beginnings of the validation books score as the card says, within five standard errors of so little text."""
    child_process.run(["sh", shared / "unpack.sh", tmp_path, "val"])
    beginnings = tmp_path / "beginnings"
    beginnings.mkdir()
    for book in sorted((tmp_path / "val").iterdir()):
        (beginnings / book.name).write_bytes(book.read_bytes()[:8192].decode(errors="ignore").encode())
    assert main(["eval", "--json", "--data", str(beginnings)]) == 0
    report = json.loads(capsys.readouterr().out)
    said = re.search(r"^\| `val`.*\| ([\d.]+) ± ([\d.]+) \|", CARD, re.MULTILINE)
    assert said
    assert abs(report["bits_per_byte"] - float(said[1])) < 5 * report["bits_per_byte_error"]
