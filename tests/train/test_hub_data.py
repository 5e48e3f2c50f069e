"""Data sets of `datasets`: rows are documents, tokenised once; offline, from local files.

The library is no part of a test install. A stand-in takes its place, and where the library is there the tests of what
is read run with both.
"""

import hashlib
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bitnet.cli import main
from bitnet.errors import BitNetError
from bitnet.train.data import hub as hub_data
from bitnet.train.data import sources
from bitnet.train.data.corpus import DataConfig
from bitnet.train.data.prepare import prepare
from bitnet.train.data.shards import open_dataset
from bitnet.train.runs.run import Run

WORDS = ["fade ", "bag ", "cab\nbage\n", "hedge "]


def documents(count: int) -> list[str]:
    return [f"{i} " + "".join(random.choice(WORDS) for _ in range(random.randint(1, 40))) for i in range(count)]


class StandIn(ModuleType):
    """`load_dataset` of the library, for rows that a test gives or for the builder "json" and its files."""

    def __init__(self, rows: list[Any] | None = None) -> None:
        super().__init__("datasets")
        self.rows = rows
        self.asked: list[tuple[Any, ...]] = []
        self.read = 0

    def load_dataset(
        self,
        path: str,
        name: str | None = None,
        *,
        data_files: str | None = None,
        split: str | None = None,
        streaming: bool = False,
    ) -> Iterator[dict[str, Any]]:
        self.asked.append((path, name, data_files, split, streaming))
        rows = self.rows
        if rows is None:
            assert path == "json"
            assert data_files is not None
            if not Path(data_files).exists():
                raise FileNotFoundError(f"Unable to find '{data_files}'")
            if split != "train":
                raise ValueError(f"Bad split: {split}. Available splits: ['train']")
            rows = [json.loads(line) for line in Path(data_files).read_text().splitlines()]
        return self._stream(rows)

    def _stream(self, rows: list[Any]) -> Iterator[dict[str, Any]]:
        for row in rows:
            self.read += 1
            if isinstance(row, Exception):
                raise row
            yield row


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A stand-in without rows."""
    made = StandIn([])
    monkeypatch.setitem(sys.modules, "datasets", made)
    return made


@pytest.fixture
def rows(library: StandIn) -> list[str]:
    """Texts of the stand-in's rows."""
    made = documents(80)
    library.rows = [{"id": number, "text": text} for number, text in enumerate(made)]
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


@pytest.mark.usefixtures("without_pictures")
def test_a_run_resumes_without_the_data_set(rows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_mistakes_in_a_name(name: str, library: StandIn, tmp_path: Path) -> None:
    with pytest.raises(BitNetError, match="expected"):
        hub_data.spool_rows(name, tmp_path / "spool")
    assert not library.asked


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of it fails
    with pytest.raises(BitNetError, match=r"pip install '\.\[datasets\]'"):
        hub_data.spool_rows("datasets:x", tmp_path / "spool")


# ---- what the library is asked for, and what is done with its rows -----------------------------------------


def spooled(name: str, folder: Path) -> list[str]:
    """What lies in the spool behind a name, its size and digest checked."""
    spool = folder / "spool"
    size, digest = hub_data.spool_rows(name, spool)
    assert (size, digest) == (spool.stat().st_size, hashlib.sha256(spool.read_bytes()).hexdigest())
    return [json.loads(line) for line in spool.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("datasets:some/thing", ("some/thing", None, None, "train", True)),
        ("hf://datasets/some/thing", ("some/thing", None, None, "train", True)),
        ("hf://datasets/some/thing?config=10BT&split=test", ("some/thing", "10BT", None, "test", True)),
        ("datasets:json?data_files=a/b.jsonl&split=train", ("json", None, "a/b.jsonl", "train", True)),
    ],
)
def test_what_the_library_is_asked_for(
    name: str, asked: tuple[Any, ...], library: StandIn, rows: list[str], tmp_path: Path
) -> None:
    assert spooled(name, tmp_path) == rows
    assert library.asked == [asked]  # once, and as a stream


@pytest.mark.parametrize(("count", "read"), [(0, 80), (1, 1), (7, 7), (80, 80), (81, 80)])
def test_no_more_rows_are_read_than_asked_for(
    count: int, read: int, library: StandIn, rows: list[str], tmp_path: Path
) -> None:
    assert spooled(f"datasets:x?rows={count}", tmp_path) == rows[:read]
    assert library.read == read


def test_texts_arrive_as_they_are_and_empty_ones_are_left_out(library: StandIn, tmp_path: Path) -> None:
    texts = ['two\nlines\r\n and a "quote"', "", "\u00fc\U0001f989\u2028 \\n", " ", "{}"]
    library.rows = [{"text": number, "story": text} for number, text in enumerate(texts)]
    assert spooled("datasets:x?column=story", tmp_path) == [text for text in texts if text]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None, "title": "a"}, r"got NoneType in column 'text' of row 2, .* the columns are text, title"),
        ({"text": ["a"], "title": "a"}, "got list in column 'text' of row 2"),
        ({"title": "a"}, "got NoneType in column 'text' of row 2, .* the columns are title"),
        (OSError("no\n network"), "cannot be loaded: no network"),
        (ValueError("not JSON"), "cannot be loaded: not JSON"),
        (RuntimeError("Dataset scripts are no longer supported"), "cannot be loaded: Dataset scripts"),
    ],
    ids=["none", "list", "missing", "network", "damaged", "script"],
)
def test_what_is_no_text_is_named(row: Any, message: str, library: StandIn, tmp_path: Path) -> None:
    library.rows = [{"text": "a"}, {"text": "b"}, row, {"text": "d"}]
    with pytest.raises(BitNetError, match=f"^data: datasets:x: {message}"):
        hub_data.spool_rows("datasets:x", tmp_path / "spool")
    assert spooled("datasets:x?rows=2", tmp_path) == ["a", "b"]


needs_library = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="from a clone: pip install '.[datasets]'"
)


@pytest.mark.parametrize("kind", ["stand-in", pytest.param("library", marks=needs_library)])
@pytest.mark.filterwarnings("ignore")  # the library's own
def test_a_local_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in does what the library does."""
    if kind == "stand-in":
        monkeypatch.setitem(sys.modules, "datasets", StandIn())
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = documents(30)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(made)))
    name = f"datasets:json?data_files={tmp_path / 'd.jsonl'}"
    assert spooled(name, tmp_path) == made
    assert spooled(f"{name}&rows=7", tmp_path) == made[:7]
    with pytest.raises(BitNetError, match=r"got int in column 'n' of row 0, .* are text, n \(\?column=\.\.\.\)"):
        hub_data.spool_rows(f"{name}&column=n", tmp_path / "spool")
    with pytest.raises(BitNetError, match="cannot be loaded: Unable to find"):
        hub_data.spool_rows(f"datasets:json?data_files={tmp_path / 'nothing.jsonl'}", tmp_path / "spool")
    with pytest.raises(BitNetError, match="cannot be loaded: Bad split: test"):
        hub_data.spool_rows(f"{name}&split=test", tmp_path / "spool")
