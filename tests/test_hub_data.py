"""Data sets of `datasets`: rows are documents, tokenised once; offline, from a local file."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

from bitnet.cli import main
from bitnet.errors import BitNetError
from bitnet.train import hub_data, sources
from bitnet.train.corpus import DataConfig
from bitnet.train.data import open_dataset, prepare
from bitnet.train.run import Run

WORDS = ["fade ", "bag ", "cab\nbage\n", "hedge "]


def documents(count: int) -> list[str]:
    return [f"{i} " + "".join(random.choice(WORDS) for _ in range(random.randint(1, 40))) for i in range(count)]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The library's part played by a list."""
    made = documents(80)
    monkeypatch.setattr(hub_data, "_texts", lambda name: iter(made))
    return made


def test_every_row_is_a_document_of_one_split(rows: list[str], tmp_path: Path) -> None:
    config = DataConfig(("datasets:x",), documents="row", val_fraction=0.2)
    data = prepare(config, tmp_path / "data", tokenizer=None, kind="sentencepiece", vocab_size=280)
    bos, found = data.tokenizer.bos_id, {}
    for name, stream in (("train", data.train), ("val", data.val)):
        ids = stream.read(0, len(stream)).tolist()
        starts = [i for i, id in enumerate(ids) if id == bos]
        assert starts[0] == 0
        found[name] = [
            data.tokenizer.decode(ids[a + 1 : b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)
        ]
    assert sorted(found["train"] + found["val"]) == sorted(rows)
    assert [text for text in rows if text in set(found["train"])] == found["train"]
    assert 0 < len(found["val"]) < 40
    assert not list((tmp_path / "data").glob("standard-input*"))  # the spool is gone


def test_a_run_goes_on_without_the_data_set(rows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.train.pretrain.plot_run", lambda *args: [])
    shape = "hidden_size=32 intermediate_size=44 num_hidden_layers=1 num_attention_heads=2 num_key_value_heads=1"
    sets = [f"model.{s}" for s in (*shape.split(), "max_position_embeddings=16")]
    sets += ["train.eval_every=0", "data.val_fraction=0.2"]
    args = ["train", "--data", "hf://datasets/some/thing", "--documents", "row", "--out", str(tmp_path / "run"), "-q"]
    args += ["--tokenizer", "char", "--batch-size", "2", *[part for s in sets for part in ("--set", s)]]
    assert main([*args, "--steps", "3"]) == 0
    fingerprint = open_dataset(tmp_path / "run" / "data").fingerprint
    monkeypatch.setattr(sources, "spool_rows", lambda *args: pytest.fail("it is tokenised already"))
    assert main([*args, "--steps", "5"]) == 0
    assert open_dataset(tmp_path / "run" / "data").fingerprint == fingerprint
    assert [row["step"] for row in Run(tmp_path / "run").metrics() if "loss" in row] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("paths", "kind"), [(("datasets:x",), "file"), (("a.txt",), "row"), ((), "row")])
def test_rows_and_files_are_not_confused(paths: tuple[str, ...], kind: str) -> None:
    with pytest.raises(BitNetError, match="row"):
        DataConfig(paths, documents=kind)


@pytest.mark.parametrize("name", ["datasets:x?lines=3", "datasets:", "datasets:x?rows=many"])
def test_mistakes_in_a_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(BitNetError, match="expected"):
        hub_data.spool_rows(name, tmp_path / "spool")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="pip install 'bitnet-ternary[datasets]'")
@pytest.mark.filterwarnings("ignore")  # the library's own
def test_the_library_reads_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = documents(30)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(made)))
    name = f"datasets:json?data_files={tmp_path / 'd.jsonl'}"
    size, _ = hub_data.spool_rows(name, tmp_path / "spool")
    assert size == (tmp_path / "spool").stat().st_size
    assert [json.loads(line) for line in (tmp_path / "spool").read_text().splitlines()] == made
    hub_data.spool_rows(f"{name}&rows=7", tmp_path / "spool")
    assert [json.loads(line) for line in (tmp_path / "spool").read_text().splitlines()] == made[:7]
    with pytest.raises(BitNetError, match=r"column=\.\.\."):
        hub_data.spool_rows(f"{name}&column=n", tmp_path / "spool")
    with pytest.raises(BitNetError, match="cannot be loaded"):
        hub_data.spool_rows(f"datasets:json?data_files={tmp_path / 'nothing.jsonl'}", tmp_path / "spool")
