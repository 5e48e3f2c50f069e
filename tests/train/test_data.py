"""Corpora, splits, token shards and batches: nothing lost, nothing twice, the same every time, safe when damaged."""

import gzip
import io
import json
import lzma
import math
import os
import random
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import child_process
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet.errors import BitNetError
from bitnet.text.characters import CharTokenizer
from bitnet.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from bitnet.train.data import corpus as corpus_module
from bitnet.train.data import prepare as data_module
from bitnet.train.data import sources as sources_module
from bitnet.train.data.corpus import Corpus, DataConfig, cut_after_newlines, open_corpus, split_files
from bitnet.train.data.prepare import prepare, tokenize
from bitnet.train.data.shards import Shard, Split, TokenDataset, TokenStream, open_dataset, open_tokenizer
from bitnet.train.data.sources import Source, standard_library
from bitnet.train.data.windows import Sampler, batch_for, check_lengths, eval_windows
from bitnet.train.evaluate import IGNORED

WORDS = "the quick brown fox jumps over a lazy dog while 123 birds sing in \u00e9t\u00e9 바다 세상".split()


def fresh_random() -> random.Random:
    return random.Random(random.getrandbits(32))  # from this test's seed


def some_text(lines: int, draw: random.Random | None = None) -> str:
    draw = draw or fresh_random()
    line = lambda: " ".join(draw.choices(WORDS, k=draw.randrange(0, 12)))  # noqa: E731  # used once, just here
    return "".join(line() + draw.choice(("\n", "\n", "\n\n", "\r\n")) for _ in range(lines))


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train_sentencepiece([some_text(2000, random.Random(1))], 400)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty files of different sizes in nested folders."""
    root = tmp_path / "books"
    for i in range(20):
        path = root / f"part{i % 3}" / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(some_text(20 + 10 * i), newline="")
    return root


def corpus_of(config: DataConfig, tmp_path: Path) -> Corpus:
    return open_corpus(config, spool=tmp_path / "spool")


def text_of(corpus: Corpus, split: str) -> str:
    return "".join(part.text for part in corpus.parts(split))


def documents_of(corpus: Corpus, split: str) -> list[str]:
    documents: list[str] = []
    for begins, text, _ in corpus.parts(split):
        if begins:
            documents.append(text)
        else:
            documents[-1] += text
    return documents


def contents(path: Path) -> str:
    return path.read_bytes().decode()


# ---- configuration and finding files -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"documents": "page"}, "got 'page', expected one of file, line, paragraph"),
        ({"val_fraction": 0.0}, "got 0.0, expected above 0"),
        ({"val_fraction": 1.0}, "got 1.0, expected above 0"),
        ({"val_fraction": math.nan}, "got nan, expected above 0"),
        ({"val_fraction": "0.1"}, "val_fraction: got '0.1'"),
        ({"paths": "books"}, "paths: got 'books'"),
        ({"paths": ("-",), "val_paths": ("-",)}, "more than once"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BitNetError, match="data") as caught:
        DataConfig(**settings)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_folders_globs_and_files_each_once(folder: Path, tmp_path: Path) -> None:
    everything = sorted(folder.rglob("*.txt"))
    names = (str(everything[3]), str(folder), str(folder / "part*" / "*.txt"), str(folder / "**" / "0*.txt"))
    (tmp_path / "link.txt").symlink_to(everything[5])
    corpus = corpus_of(DataConfig((*names, str(tmp_path / "link.txt"))), tmp_path)
    assert sorted(source.path for source in corpus.sources) == everything
    assert {source.name for source in corpus.sources} >= {"books/part1/04.txt", everything[3].name}


def test_what_a_folder_leaves_out(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / ".hidden.txt").write_text("hidden\n")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden\n")
    (folder / "empty.txt").write_text("")
    (folder / "image.PNG").write_bytes(b"\x89PNG\xff")
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.txt")
    with caplog.at_level("INFO", logger="bitnet"):
        corpus = corpus_of(DataConfig((str(folder),)), tmp_path)
    assert len(corpus.sources) == 20
    assert "skipped 1 hidden and 1 binary files" in caplog.text
    # Named by themselves, hidden files and binary suffixes are read.
    (folder / "text.bin").write_text("text\n")
    named = corpus_of(DataConfig((str(folder / ".hidden.txt"), str(folder / "text.bin"))), tmp_path)
    assert len(named.sources) == 2


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.xz", ".TAR"])
def test_archives_are_no_text(suffix: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    archive = folder / ("more" + suffix)
    archive.write_text("text between tar's headers\n")
    with caplog.at_level("INFO", logger="bitnet"):
        assert len(corpus_of(DataConfig((str(folder),)), tmp_path).sources) == 20
    assert "skipped 0 hidden and 1 binary files" in caplog.text
    for name in (archive, folder / "more*"):
        with pytest.raises(BitNetError, match=r"got the archive .* unpack it"):
            corpus_of(DataConfig((str(name),)), tmp_path)


def test_linked_folders_are_read_once(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "below").mkdir(parents=True)
    (outside / "below" / "linked.txt").write_text("linked\n")
    (outside / "back").symlink_to(folder)  # a circle
    (outside / "self").symlink_to(outside)
    (folder / "part0" / "up").symlink_to(folder)
    (folder / "part1" / "near").symlink_to(folder / "part2")
    (folder / "part1" / "far").symlink_to(outside)
    (folder / "zfar").symlink_to(outside)
    corpus = corpus_of(DataConfig((str(folder),)), tmp_path)
    assert len(corpus.sources) == 21
    assert "books/zfar/below/linked.txt" in {source.name for source in corpus.sources}


@pytest.mark.parametrize("name", ["no-such-file", "no-such*.txt", "no/such/folder/**"])
def test_names_that_lead_nowhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(BitNetError, match="expected"):
        corpus_of(DataConfig((str(tmp_path / name),)), tmp_path)


def test_no_text_at_all(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "empty.txt").write_text("")
    with pytest.raises(BitNetError, match="got no text for the train split"):
        corpus_of(DataConfig((str(tmp_path / "books"),)), tmp_path)


def test_pipe_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BitNetError, match="neither file nor folder"):
        corpus_of(DataConfig((str(tmp_path / "pipe"),)), tmp_path)


def test_compressed_files_read_as_plain(tmp_path: Path) -> None:
    text = some_text(3000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(text.encode()))
    for name in ("a.txt.gz", "b.txt.xz"):
        corpus = corpus_of(DataConfig((str(tmp_path / name),)), tmp_path)
        assert text_of(corpus, "train") + text_of(corpus, "val") == text
        assert corpus.size("train") is None


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_damaged_compressed_files(suffix: str, damage: str, tmp_path: Path) -> None:
    whole = (gzip if suffix == ".gz" else lzma).compress(some_text(3000).encode())
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 8]) + whole[middle + 8 :]
    path = tmp_path / ("a" + suffix)
    path.write_bytes({"cut": whole[:middle], "flip": flipped, "other": b"plain text\n"}[damage])
    with pytest.raises(BitNetError, match=r"a\.(gz|xz): got "):
        text_of(corpus_of(DataConfig((str(path),)), tmp_path), "train")


@pytest.mark.parametrize("position", [0, 1, 4095, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 1_500_000])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe9a", b"\xed\xa0\x80", b"\xf0\x9f\x98"], ids=repr)
def test_not_utf8_names_file_and_byte(position: int, bad: bytes, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    padding = ("é" * 600_000).encode() + b"xy" * 600_000  # characters of two bytes end astride the chunks
    start = position - position % 2 if position < 1_200_000 else position
    path.write_bytes(padding[:start] + bad + b" tail" * 10)
    with pytest.raises(BitNetError, match=rf"latin\.txt: got byte 0x{bad[0]:02x} at byte {start}, which is not UTF-8"):
        text_of(corpus_of(DataConfig((str(path),)), tmp_path), "train")


def test_truncated_utf8_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\n\xe2\x82")
    with pytest.raises(BitNetError, match="at byte 4, which is not UTF-8"):
        text_of(corpus_of(DataConfig((str(tmp_path / "a.txt"),)), tmp_path), "train")


def test_default_corpus_is_the_standard_library(tmp_path: Path) -> None:
    corpus = corpus_of(DataConfig(), tmp_path)
    assert 5e6 < sum(source.size for source in corpus.sources) < 20e6
    names = [source.name for source in corpus.sources]
    assert "json/decoder.py" in names
    assert not any("site-packages" in name or "/test/" in name for name in names)
    assert [source.name for source in standard_library()] == [source.name for source in standard_library()]
    assert abs(sum(s.size for s in corpus.val) / sum(s.size for s in corpus.sources) - 0.02) < 0.005
    assert len(text_of(corpus, "val")) > 100_000


# ---- splits ------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    sizes=st.lists(st.integers(1, 10_000_000), min_size=2, max_size=60),
    fraction=st.floats(0.001, 0.999),
    order=st.randoms(),
)
def test_split_by_file(sizes: list[int], fraction: float, order: random.Random) -> None:
    files = tuple(Source(Path(f"{i}"), f"{i}", size, str(i)) for i, size in enumerate(sizes))
    target = fraction * sum(sizes)
    whole = split_files(files, fraction)
    shuffled = split_files(tuple(order.sample(files, len(files))), fraction)
    if whole is None or shuffled is None:
        assert whole is shuffled
        assert fraction > 0.5 or max(sizes) > target  # small files always add up
        return
    train, val = whole
    assert train
    assert val
    assert sorted([*train, *val], key=lambda s: int(s.name)) == list(files)
    held = sum(s.size for s in val)
    assert abs(held - target) <= max(sizes)
    assert target / 3 <= held <= target * 3
    assert set(shuffled[1]) == set(val)


def test_files_split_whole_and_complete(folder: Path, tmp_path: Path) -> None:
    corpus = corpus_of(DataConfig((str(folder),), val_fraction=0.1), tmp_path)
    assert documents_of(corpus, "train") == [contents(source.path) for source in corpus.train]
    assert documents_of(corpus, "val") == [contents(source.path) for source in corpus.val]
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "books")  # the place does not matter
    same = corpus_of(DataConfig((str(moved),), val_fraction=0.1), tmp_path)
    assert [source.name for source in same.val] == [source.name for source in corpus.val]


@pytest.mark.parametrize("fraction", [0.1, 0.02, 0.5, 1 / 3])
def test_a_single_file_is_cut_at_the_exact_character(fraction: float, tmp_path: Path) -> None:
    text = some_text(40_000)  # more than one chunk, characters of one to three bytes
    (tmp_path / "one.txt").write_text(text, newline="")
    corpus = corpus_of(DataConfig((str(tmp_path / "one.txt"),), val_fraction=fraction), tmp_path)
    cut = int(len(text) * (1 - fraction))
    assert text_of(corpus, "train") == text[:cut]
    assert text_of(corpus, "val") == text[cut:]
    assert [len(documents_of(corpus, split)) for split in ("train", "val")] == [1, 1]


@pytest.mark.parametrize("sizes", [(3000, 3000), (9000, 10), (5000, 4000, 6000)], ids=str)
def test_few_files_are_cut_at_their_ends(
    sizes: tuple[int, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [some_text(1000)[:size] for size in sizes]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, newline="")
    with caplog.at_level("INFO", logger="bitnet"):
        corpus = corpus_of(DataConfig((str(tmp_path / "*.txt"),), val_fraction=0.02), tmp_path)
    assert documents_of(corpus, "train") == [text[: int(len(text) * 0.98)] for text in texts]
    assert documents_of(corpus, "val") == [text[int(len(text) * 0.98) :] for text in texts]
    assert "the end of each file is held out for validation" in caplog.text
    assert 0.015 < len(text_of(corpus, "val")) / sum(sizes) < 0.025


def test_val_paths_are_held_out(folder: Path, tmp_path: Path) -> None:
    held = folder / "part1"
    corpus = corpus_of(DataConfig((str(folder),), val_paths=(str(held),)), tmp_path)
    assert {source.path for source in corpus.val} == set(held.iterdir())
    assert {source.path for source in corpus.train} == {p for p in folder.rglob("*.txt") if p.parent != held}
    with pytest.raises(BitNetError, match="got no text for the train split"):
        corpus_of(DataConfig((str(held),), val_paths=(str(folder),)), tmp_path)


@pytest.mark.parametrize("kind", ["line", "paragraph"])
def test_lines_and_paragraphs_split_by_text(kind: str, folder: Path, tmp_path: Path) -> None:
    corpus = corpus_of(DataConfig((str(folder),), val_fraction=0.3, documents=kind), tmp_path)
    expected: list[str] = []
    for path in sorted(folder.rglob("*.txt")):
        lines = io.StringIO(contents(path), newline="\n").readlines()
        if kind == "line":
            expected += [line for line in lines if line.strip()]
        else:
            groups = [""]
            for line in lines:
                if line.strip():
                    groups[-1] += line
                else:
                    groups.append("")
            expected += [group for group in groups if group]
    train, val = documents_of(corpus, "train"), documents_of(corpus, "val")
    assert sorted(train + val) == sorted(expected)
    assert not {text.rstrip("\r\n") for text in train} & {text.rstrip("\r\n") for text in val}
    assert 0.15 < len(val) / len(expected) < 0.45


def test_equal_long_documents_land_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "CHUNK", 64)
    monkeypatch.setattr(corpus_module, "CHUNK", 64)
    draw = fresh_random()
    lines = ["".join(draw.choices("abcdef \t", k=draw.randrange(1, 400))) for _ in range(60)]
    text = "\n".join(lines * 2 + ["   " * 100, lines[0]])  # the last one without a newline
    (tmp_path / "a.txt").write_text(text)
    corpus = corpus_of(DataConfig((str(tmp_path / "a.txt"),), val_fraction=0.5, documents="line"), tmp_path)
    train, val = documents_of(corpus, "train"), documents_of(corpus, "val")
    assert not {text.rstrip("\n") for text in train} & {text.rstrip("\n") for text in val}
    kept = sorted(text.rstrip("\n") for text in train + val if text.strip())
    assert kept == sorted(line for line in [*lines * 2, lines[0]] if line.strip())


@settings(max_examples=200)
@given(text=st.text(st.sampled_from("ab\n\r\x0c\u2028"), max_size=300), data=st.data())
def test_cutting_keeps_every_character(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    pieces = list(cut_after_newlines(parts))
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces[:-1])


# ---- preparing ---------------------------------------------------------------------------------------------


def tokens(stream: TokenStream) -> list[int]:
    return [int(id) for id in stream.read(0, len(stream))]


@pytest.mark.parametrize("kind", ["file", "line", "paragraph"])
def test_shards_hold_the_text(
    kind: str,
    folder: Path,
    tmp_path: Path,
    tokenizer: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_module, "SHARD_TOKENS", 1000)
    config = DataConfig((str(folder),), val_fraction=0.2, documents=kind)
    dataset = prepare(config, tmp_path / "out", tokenizer=tokenizer, vocab_size=0)
    corpus = corpus_of(config, tmp_path)
    for split, stream in (("train", dataset.train), ("val", dataset.val)):
        documents = documents_of(corpus, split)
        assert tokens(stream) == [id for text in documents for id in [1, *tokenizer.encode(text)]]
        assert dataset.tokenizer.decode(tokens(stream)) == "".join(documents)
        assert stream.text_bytes == len("".join(documents).encode())
        assert stream.text_bytes == tokenizer.byte_lengths()[tokens(stream)].sum()
        assert stream.documents == len(documents)
    shards = dataset.manifest.train.shards
    assert [shard.tokens for shard in shards[:-1]] == [1000] * (len(shards) - 1)
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "out" / "train-00000.bin").read_bytes()[:4] == np.array(
        tokens(dataset.train)[:2], dtype="<u2"
    ).tobytes()
    open_dataset(tmp_path / "out", verify=True)


def test_reads_across_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "SHARD_TOKENS", 97)
    dataset = prepare(DataConfig((str(folder),)), tmp_path / "out", tokenizer=None, kind="char", vocab_size=0)
    everything = np.array(tokens(dataset.train))
    draw = fresh_random()
    for _ in range(300):
        start = draw.randrange(len(everything) + 1)
        n = draw.randrange(min(400, len(everything) - start) + 1)
        part = dataset.train.read(start, n)
        assert part.dtype == np.int64
        assert (part == everything[start : start + n]).all()


def test_character_split_is_that_of_nanogpt(tmp_path: Path) -> None:
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 50
    (tmp_path / "input.txt").write_text(text)
    config = DataConfig((str(tmp_path / "input.txt"),), val_fraction=0.1)
    dataset = prepare(config, tmp_path / "out", tokenizer=None, kind="char", vocab_size=0)
    cut = int(len(text) * 0.9)
    assert (len(dataset.train), len(dataset.val)) == (cut, len(text) - cut)
    assert dataset.tokenizer.decode(tokens(dataset.train)) == text[:cut]
    assert dataset.tokenizer.vocab_size == len(set(text))


def test_what_the_tokenizer_learns_from(tmp_path: Path) -> None:
    """Pieces from the training text alone; characters from all text, so that a rare one stops nothing."""
    (tmp_path / "train.txt").write_text("abc\n" * 100)
    (tmp_path / "val.txt").write_text("abd\n" * 100)
    config = DataConfig((str(tmp_path / "train.txt"),), val_paths=(str(tmp_path / "val.txt"),))
    pieces = prepare(config, tmp_path / "pieces", tokenizer=None, vocab_size=265).tokenizer
    assert pieces.to_bytes() == train_sentencepiece(["abc\n" * 100], 265).to_bytes()
    characters = prepare(config, tmp_path / "characters", tokenizer=None, kind="char", vocab_size=0).tokenizer
    assert isinstance(characters, CharTokenizer)
    assert characters.characters == "\nabcd"


def test_an_unknown_character_names_its_file(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("aa" + name + "\n")
    with pytest.raises(BitNetError, match=r"c\.txt: got the character 'c' at position 2 after 'aa', expected one of"):
        tokenize((str(tmp_path / "*.txt"),), CharTokenizer("ab\n"), tmp_path)
    with pytest.raises(BitNetError, match=r"b\.txt: got the character 'b'"):
        prepare(DataConfig((str(tmp_path / "b.txt"),)), tmp_path / "out", tokenizer=CharTokenizer("a"), vocab_size=0)
    assert sorted(path.name for path in tmp_path.glob("out*")) == []


@pytest.mark.parametrize(("documents", "count"), [("file", 1), ("line", 3), ("paragraph", 2)])
def test_tokenize_by_document(documents: str, count: int, tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    stream = tokenize((str(tmp_path / "a.txt"),), tokenizer, tmp_path, documents=documents)
    assert stream.documents == count
    assert tokens(stream).count(1) == count


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    characters = [chr(code) for code in range(0x20, 0x11000) if not 0xD800 <= code < 0xE000]
    text = "".join(characters)
    (tmp_path / "a.txt").write_text(text, newline="")
    (tmp_path / "b.txt").write_text(text[::-1], newline="")
    big = CharTokenizer(characters)
    assert big.vocab_size > 1 << 16
    paths = DataConfig((str(tmp_path / "a.txt"), str(tmp_path / "b.txt")), val_fraction=0.5)
    dataset = prepare(paths, tmp_path / "out", tokenizer=big, vocab_size=0)
    assert dataset.manifest.dtype == "uint32"
    assert sorted(tokens(dataset.train)) == list(range(big.vocab_size))


def test_same_text_same_bytes(folder: Path, tmp_path: Path) -> None:
    config = DataConfig((str(folder),))
    for out in ("one", "two"):
        prepare(config, tmp_path / out, tokenizer=None, vocab_size=300)
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()
    }


def test_prepared_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig((str(folder),))
    out = folder / "prepared"  # inside the corpus: must not become part of it
    first = prepare(config, out, tokenizer=None, vocab_size=300)
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "_write", lambda *_: pytest.fail("prepared again"))
        again = prepare(config, out, tokenizer=None, vocab_size=300)
    assert again.fingerprint == first.fingerprint
    assert not caplog.records  # unchanged: no warning
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    changes: list[Callable[[], TokenDataset]] = [
        lambda: prepare(config, out, tokenizer=None, vocab_size=301),
        lambda: prepare(config, out, tokenizer=None, kind="char", vocab_size=300),
        lambda: prepare(config, out, tokenizer=CharTokenizer("ab"), vocab_size=300),
        lambda: prepare(DataConfig((str(folder),), val_fraction=0.1), out, tokenizer=None, vocab_size=300),
    ]
    for change in changes:
        with pytest.raises(BitNetError, match=r"with other data or tokenizer settings, .* another folder \(--out\)"):
            change()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("change", ["none", "added", "touched", "emptied", "moved", "deleted", "other folder"])
def test_prepared_data_needs_its_text_no_more(
    change: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    run = lambda: prepare(DataConfig(("books",)), tmp_path / "out", tokenizer=None, vocab_size=300)  # noqa: E731
    first = run()
    path = folder / "part1" / "01.txt"
    (tmp_path / "elsewhere").mkdir()
    match change:
        case "added":
            path.write_text(contents(path) + "more\n")
        case "touched":
            os.utime(path, (1, 1))
        case "emptied":
            for file in folder.rglob("*.txt"):
                file.write_text("")
        case "moved":
            folder.rename(tmp_path / "elsewhere" / "novels")
        case "deleted":
            shutil.rmtree(folder)
        case "other folder":
            monkeypatch.chdir(tmp_path / "elsewhere")
    caplog.clear()
    again = run()
    assert again.fingerprint == first.fingerprint
    assert tokens(again.train) == tokens(first.train)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (change in ("added", "touched"))
    assert all("training uses the text as it was" in warning for warning in warnings)


def test_the_default_corpus_may_change(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when Python is upgraded between the start of a run and its resume."""
    sources = lambda *names: tuple(  # noqa: E731  # two libraries
        Source(path, path.name, path.stat().st_size, str(path)) for path in folder.rglob("*.txt") if path.name in names
    )
    for names in (("01.txt", "02.txt"), ("03.txt",), ()):
        monkeypatch.setattr(corpus_module, "standard_library", lambda names=names: sources(*names))
        dataset = prepare(DataConfig(), tmp_path / "out", tokenizer=None, kind="char", vocab_size=0)
        assert {source.name for source in dataset.manifest.sources} == {"01.txt", "02.txt"}


@pytest.mark.parametrize("name", ["train-00000.bin", "val-00000.bin", "tokenizer.model"])
def test_altered_data_is_not_trained_on(name: str, folder: Path, tmp_path: Path) -> None:
    config = DataConfig((str(folder),))
    prepare(config, tmp_path / "out", tokenizer=None, kind="char", vocab_size=0)
    path = tmp_path / "out" / name
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(BitNetError, match=rf"{name}: got .* restore it, or delete the folder"):
        prepare(config, tmp_path / "out", tokenizer=None, kind="char", vocab_size=0)


def test_other_peoples_folders_are_left_alone(folder: Path, tmp_path: Path) -> None:
    config = DataConfig((str(folder),))
    for name in ("out", "out2.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diary.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("out", "out2", "file"):
        with pytest.raises(BitNetError, match=r"got a (file or )?folder with other"):
            prepare(config, tmp_path / name, tokenizer=None, vocab_size=300)
    assert (tmp_path / "out2.tmp" / "diary.txt").exists()
    (tmp_path / "empty").mkdir()
    prepare(config, tmp_path / "empty", tokenizer=None, vocab_size=300)


@pytest.mark.parametrize("at", range(8))
def test_interrupted_prepare_leaves_nothing_behind(
    at: int, folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop at any file synced or renamed, as by SIGINT; then a run that succeeds."""
    calls = 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > at:
            raise KeyboardInterrupt

    config = DataConfig((str(folder),))
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", stop)
        patch.setattr(data_module, "sync", stop)
        patch.setattr(data_module, "SHARD_TOKENS", 1000)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, tmp_path / "out", tokenizer=tokenizer, vocab_size=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["books"]
    prepare(config, tmp_path / "out", tokenizer=tokenizer, vocab_size=0)


def test_killed_prepare_is_started_over(folder: Path, tmp_path: Path) -> None:
    """kill -9 in the middle: the work folder stays, is not taken for a dataset, and the next run clears it."""
    script = (
        "import os, sys, pathlib\n"
        "from bitnet.train.data import prepare as data\n"
        "data.sync = lambda path: os.kill(os.getpid(), 9)\n"
        "data.prepare(data.DataConfig((sys.argv[1],)), pathlib.Path(sys.argv[2]),"
        " tokenizer=None, kind='char', vocab_size=0)\n"
    )
    out = tmp_path / "out"
    code = child_process.run([sys.executable, "-c", script, folder, out], check=False).returncode
    assert code == -9
    assert not out.exists()
    assert (tmp_path / "out.tmp" / "manifest.json").exists()  # the last file was written: still not a dataset
    with pytest.raises(BitNetError, match="got no manifest"):
        open_dataset(out)
    prepare(DataConfig((str(folder),)), out, tokenizer=None, vocab_size=300)
    assert not (tmp_path / "out.tmp").exists()


def test_two_writers(folder: Path, tmp_path: Path) -> None:
    config = DataConfig((str(folder),))
    seen: list[str] = []

    def second(stage: str, done: int, total: int | None) -> None:
        with pytest.raises(BitNetError, match="in use by another run"):
            prepare(config, tmp_path / "out", tokenizer=None, vocab_size=300)
        seen.append(stage)

    prepare(config, tmp_path / "out", tokenizer=None, vocab_size=300, report=second)
    assert seen == ["tokenizer", "train", "val"]


def test_report_adds_up(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(some_text(200_000), newline="")
    calls: list[tuple[str, int, int | None]] = []
    dataset = prepare(
        DataConfig((str(tmp_path / "a.txt"),), val_fraction=0.5),
        tmp_path / "out",
        tokenizer=None,
        kind="char",
        vocab_size=0,
        report=lambda *call: calls.append(call),
    )
    train, val = dataset.train.text_bytes, dataset.val.text_bytes
    for stage, size in (("tokenizer", train + val), ("train", train), ("val", val)):
        done = [call[1] for call in calls if call[0] == stage]
        assert done == sorted(done)
        assert len(done) > 1
        assert done[-1] == size
        total = next(call[2] for call in calls if call[0] == stage)
        assert total == pytest.approx(size, rel=0.05)


def test_full_disk_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BitNetError, match="No space left on device; check permissions and free space"):
        prepare(DataConfig((str(folder),)), tmp_path / "out", tokenizer=None, kind="char", vocab_size=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["books"]


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = some_text(500)

    def run(content: str) -> TokenDataset:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        return prepare(DataConfig(("-",)), tmp_path / "out", tokenizer=None, vocab_size=300)

    first = run(text)
    assert first.train.text_bytes + first.val.text_bytes == len(text.encode())
    monkeypatch.setattr("sys.stdin", None)  # prepared: not read again
    again = prepare(DataConfig(("-",)), tmp_path / "out", tokenizer=None, vocab_size=300)
    assert again.fingerprint == first.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "standard-input").exists()
    assert first.manifest.sources[0].name == "standard input"


def test_empty_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line only\n")
    with pytest.raises(BitNetError, match=r"got no text for the (train|val) split"):
        prepare(
            DataConfig((str(tmp_path / "a.txt"),), documents="line"),
            tmp_path / "o",
            tokenizer=None,
            kind="char",
            vocab_size=0,
        )
    with pytest.raises(BitNetError, match="got tokenizer kind 'word'"):
        prepare(DataConfig(), tmp_path / "o", tokenizer=None, kind="word", vocab_size=0)


@pytest.mark.slow
@pytest.mark.parametrize("newlines", [True, False])
def test_memory_stays_bounded(newlines: bool, tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    line = "abcdefgh ijkl" * 20 + ("\n" if newlines else " ")
    with path.open("w") as file:
        for _ in range(120):
            file.write(line * 1000)
    size = path.stat().st_size
    assert size > 30e6
    tracemalloc.start()
    for kind in ("file", "line", "paragraph"):
        corpus = corpus_of(DataConfig((str(path),), documents=kind), tmp_path)
        assert sum(len(part.text) for split in ("train", "val") for part in corpus.parts(split)) == size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * sources_module.CHUNK  # StringIO alone takes four bytes a character


# ---- damaged folders ---------------------------------------------------------------------------------------


@pytest.fixture
def prepared(folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer) -> Path:
    prepare(DataConfig((str(folder),)), tmp_path / "out", tokenizer=tokenizer, vocab_size=0)
    return tmp_path / "out"


def test_missing_and_altered_files(prepared: Path) -> None:
    for name in ("train-00000.bin", "val-00000.bin", "tokenizer.model", "manifest.json"):
        path = prepared / name
        whole = path.read_bytes()
        for damaged in (None, b"", whole[:-1], whole + b"\0\0"):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(BitNetError) as caught:
                open_dataset(prepared)
            assert "\n" not in str(caught.value)
            path.write_bytes(whole)
    open_dataset(prepared, verify=True)


def test_altered_tokens_are_found(prepared: Path) -> None:
    path = prepared / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[1] ^= 0x80  # the first id is now far above the vocabulary
    path.write_bytes(data)
    dataset = open_dataset(prepared)  # sizes are right
    with pytest.raises(BitNetError, match="got altered bytes"):
        open_dataset(prepared, verify=True)
    with pytest.raises(BitNetError, match="got the token id"):
        dataset.train.read(0, 10)


def test_the_tokenizer_opens_without_shards(prepared: Path, tokenizer: SentencePieceTokenizer) -> None:
    for path in prepared.glob("*.bin"):
        path.unlink()
    assert open_tokenizer(prepared).to_bytes() == tokenizer.to_bytes()
    path = prepared / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BitNetError, match=r"tokenizer\.model: got another file"):
        open_tokenizer(prepared)
    path.unlink()
    with pytest.raises(BitNetError, match=r"tokenizer\.model: FileNotFoundError"):
        open_tokenizer(prepared)
    with pytest.raises(BitNetError, match=r"got no manifest\.json"):
        open_tokenizer(prepared / "nowhere")


VALUES: list[object] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    10**40,
    1.5,
    float("nan"),
    "",
    "x",
    "../../etc/passwd",
    [],
    {},
    [[]],
    "\ud800",
]


def test_mutated_manifests(prepared: Path) -> None:
    """Any value of any field replaced, removed or added: a BitNetError, or a dataset that reads."""
    path = prepared / "manifest.json"
    original = path.read_text()
    draw = fresh_random()

    def places(node: object) -> list[tuple[dict | list, object]]:  # type: ignore[type-arg]
        if isinstance(node, dict):
            return [(node, key) for key in node] + [p for value in node.values() for p in places(value)]
        if isinstance(node, list):
            return [(node, i) for i in range(len(node))] + [p for value in node for p in places(value)]
        return []

    refused = 0
    count = len(places(json.loads(original)))
    for trial in range(count * 6):
        content = json.loads(original)
        node, key = places(content)[trial % count]
        match draw.randrange(5):
            case 0:
                del node[key]  # type: ignore[arg-type]
            case 1 if isinstance(node, dict):
                node["extra"] = draw.choice(VALUES)
            case _:
                node[key] = draw.choice(VALUES)  # type: ignore[call-overload]
        path.write_text(json.dumps(content))
        refused += is_refused(prepared)
    assert refused > count * 4
    for _ in range(500):
        data = bytearray(original.encode())
        for _ in range(draw.choice((1, 3))):
            at = draw.randrange(len(data))
            data[at : at + draw.randrange(4)] = draw.randbytes(draw.randrange(3))
        path.write_bytes(data)
        is_refused(prepared)
    for junk in (b"[" * 100_000, b"null", b"1" * 10_000, b"\xff", b"[]", b'{"format": 1}'):
        path.write_bytes(junk)
        assert is_refused(prepared)


def is_refused(path: Path) -> bool:
    try:
        dataset = open_dataset(path)
    except BitNetError:
        return True
    assert len(dataset.train.read(0, len(dataset.train))) == len(dataset.train)
    return False


# ---- batches -----------------------------------------------------------------------------------------------


def stream_of(ids: np.ndarray, tmp_path: Path, bos_id: int | None = None) -> TokenStream:
    ids.astype("<u4").tofile(tmp_path / "train-00000.bin")
    shard = Shard("train-00000.bin", len(ids), 4 * len(ids), "")
    return TokenStream(tmp_path, Split(1, len(ids), 1, (shard,)), "uint32", int(ids.max()) + 1, bos_id)


@pytest.mark.parametrize(
    ("length", "context"), [(2, 1), (9, 8), (15, 8), (16, 8), (17, 8), (1000, 7), (4096, 64), (10_007, 63)]
)
def test_an_epoch_visits_each_window_once(length: int, context: int, tmp_path: Path) -> None:
    sampler = Sampler(stream_of(np.arange(length), tmp_path), context, seed=random.randrange(1 << 40))
    offsets = set()
    orders = []
    for epoch in range(8):
        inputs, targets = sampler.windows(epoch * sampler.windows_per_epoch, sampler.windows_per_epoch)
        assert inputs.shape == targets.shape == (sampler.windows_per_epoch, context)
        assert inputs.dtype == targets.dtype == torch.int64
        assert (targets == inputs + 1).all()  # the stream counts up: next-token targets
        starts = inputs[:, 0].sort().values
        assert (starts.diff() == context).all()  # neither overlap nor gap
        assert int(targets.max()) < length
        assert length - inputs.numel() <= 2 * context
        offsets.add(int(starts[0]))
        orders.append(inputs[:, 0].tolist())
    if length > 500:
        assert len(offsets) > 1
        assert len({tuple(np.argsort(order)) for order in orders}) == 8


def test_samples_depend_on_their_number_alone(tmp_path: Path) -> None:
    stream = stream_of(np.random.default_rng(random.getrandbits(32)).integers(0, 50_000, 5003), tmp_path)
    straight = Sampler(stream, 16, seed=3)
    count = straight.windows_per_epoch
    inputs, targets = straight.windows(0, 3 * count)  # three epochs in one call
    draw = fresh_random()
    for _ in range(50):
        first = draw.randrange(3 * count - 1)
        n = draw.randrange(1, min(40, 3 * count - first) + 1)
        resumed = Sampler(stream, 16, seed=3).windows(first, n)
        assert torch.equal(resumed[0], inputs[first : first + n])
        assert torch.equal(resumed[1], targets[first : first + n])
    ranks = [Sampler(stream, 16, seed=3).windows(20 + 5 * rank, 5)[0] for rank in range(4)]
    assert torch.equal(torch.cat(ranks), inputs[20:40])
    assert not torch.equal(Sampler(stream, 16, seed=4).windows(0, count)[0], inputs[:count])
    assert straight.windows(7, 0)[0].shape == (0, 16)


def test_sampler_order_is_frozen(tmp_path: Path) -> None:
    """These numbers must not change between releases or NumPy versions: saved runs resume by them."""
    sampler = Sampler(stream_of(np.arange(101), tmp_path), 10, seed=1337)
    assert sampler.windows(0, 9)[0][:, 0].tolist() == FROZEN[0]
    assert sampler.windows(9, 9)[0][:, 0].tolist() == FROZEN[1]


def test_sampler_refuses(tmp_path: Path) -> None:
    stream = stream_of(np.arange(8), tmp_path)
    with pytest.raises(BitNetError, match="got 8 tokens of training text, expected at least 9"):
        Sampler(stream, 8, seed=0)
    for context, seed in ((0, 0), (4, -1)):
        with pytest.raises(BitNetError, match="expected context >= 1 and seed >= 0"):
            Sampler(stream, context, seed)


def test_splits_too_short_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 10)

    def prepared_with(val_fraction: float) -> TokenDataset:
        config = DataConfig((str(tmp_path / "a.txt"),), val_fraction=val_fraction)
        out = tmp_path / str(val_fraction)
        return prepare(config, out, tokenizer=None, kind="char", vocab_size=0)

    dataset = prepared_with(0.5)
    check_lengths(dataset, 49)
    with pytest.raises(BitNetError, match="got 50 tokens of training text, expected at least 51"):
        check_lengths(dataset, 50)
    check_lengths(prepared_with(0.02), 8)
    with pytest.raises(BitNetError, match="got 1 tokens of validation text, expected at least 2"):
        check_lengths(prepared_with(0.01), 8)


@pytest.mark.parametrize(
    ("context", "vocab_size", "expected"),
    [(1, 1, 32), (64, 65, 32), (512, 8192, 3), (1000, 16_001, 1), (4096, 128_256, 1)],
)
def test_scored_batches_fit_in_memory(context: int, vocab_size: int, expected: int) -> None:
    assert batch_for(context, vocab_size) == expected
    assert expected == 1 or 4 * expected * context * vocab_size <= 64e6


@pytest.mark.parametrize("length", [2, 8, 9, 10, 63, 64, 65, 1000])
@pytest.mark.parametrize("limit", [None, 1, 7, 8, 9, 500])
def test_evaluation_predicts_each_token_once(length: int, limit: int | None, tmp_path: Path) -> None:
    ids = np.random.default_rng(random.getrandbits(32)).integers(2, 100, length)
    ids[:: random.randrange(2, 9)] = 1
    stream = stream_of(ids, tmp_path, bos_id=1)
    seen: list[int] = []
    for inputs, targets in eval_windows(stream, 8, batch_size=3, limit_tokens=limit):
        assert inputs.shape == targets.shape
        assert inputs.shape[0] <= 3
        assert inputs.shape[1] == 8
        flat = inputs.flatten().tolist()
        for i, target in enumerate(targets.flatten().tolist()):
            position = len(seen)
            if position + 1 >= min(length, length if limit is None else limit + 1):
                assert target == IGNORED
                continue
            assert flat[i] == ids[position]
            assert target == (IGNORED if ids[position + 1] == 1 else ids[position + 1])
            seen.append(target)
    assert len(seen) == min(length - 1, limit or length)


def test_evaluation_counts_all_bytes(prepared: Path) -> None:
    dataset = open_dataset(prepared)
    lengths = torch.from_numpy(dataset.tokenizer.byte_lengths())
    kept = torch.cat([t[t != IGNORED] for _, t in eval_windows(dataset.val, 16)])
    assert int(lengths[kept].sum()) == dataset.val.text_bytes  # BOS comes first, so no text goes unpredicted


def test_evaluation_refuses(tmp_path: Path) -> None:
    for length, context, batch, limit in ((1, 8, 1, None), (9, 0, 1, None), (9, 8, 0, None), (9, 8, 1, 0)):
        with pytest.raises(BitNetError, match="expected at least 2 tokens and 1 of each"):
            next(
                eval_windows(stream_of(np.zeros(length, int), tmp_path), context, batch_size=batch, limit_tokens=limit)
            )


FROZEN = ([43, 3, 53, 63, 73, 33, 83, 13, 23], [19, 59, 29, 69, 49, 39, 79, 89, 9])
