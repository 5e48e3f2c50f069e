"""A corpus: its split into training and validation, and its documents in pieces.

Nothing here holds more than about two pieces of CHUNK characters, whatever the size of a file. A corpus is read
once for the tokenizer and once for each split; the split of a document depends on its name or text alone, never on
order or on the machine, so the same files give the same split everywhere.
"""

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from bitnet.errors import BitNetError
from bitnet.schema import check_choice, check_types
from bitnet.train.data.hub import is_dataset
from bitnet.train.data.sources import (
    CHUNK,
    COMPRESSED,
    STANDARD_INPUT,
    Source,
    find_sources,
    read_text,
    standard_library,
)

SPLIT_TOLERANCE = 3  # validation on whole files may be off its share by this factor; beyond it, files are cut
SPLIT_SALT = b"bitnet-split-1"  # a new value would give every corpus another validation split

_log = logging.getLogger("bitnet")


@dataclass(frozen=True)
class DataConfig:
    """What to learn from.

    paths: files, folders (all files below), globs, "-" for standard input, "datasets:NAME" (bitnet/train/hub_data.py);
        none means the Python standard library.
    val_paths: the same, for validation; then all of `paths` trains.
    documents: what one document is: a "file", a "line", a "paragraph" (between blank lines), or, of data sets only, a
        "row".
    val_fraction: share of the text held back for validation, above 0 and below 1; unused with val_paths. Documents are
        held back whole, drawn by a hash. Where no choice of whole files comes within a factor of three of the share
        (one file, two equal ones, one that outweighs the rest), the last val_fraction of each file is held back.
    """

    paths: tuple[str, ...] = ()
    val_paths: tuple[str, ...] = ()
    val_fraction: float = 0.02
    documents: str = "file"

    def __post_init__(self) -> None:
        check_types(self, "data")
        check_choice(self, "data", "documents", ("file", "line", "paragraph", "row"))
        if not 0 < self.val_fraction < 1:
            raise BitNetError(
                f"data.val_fraction: got {self.val_fraction}, expected above 0 and below 1; 0.02 suits most corpora"
            )
        check_documents(self.paths + self.val_paths, self.documents)
        if (self.paths + self.val_paths).count(STANDARD_INPUT) > 1:
            raise BitNetError("data.paths: got '-' more than once, expected it once; standard input ends only once")


def check_documents(paths: tuple[str, ...], documents: str) -> None:
    """Raise BitNetError where rows are asked of files, or other documents of a data set."""
    if documents == "row" and not (paths and all(is_dataset(path) for path in paths)):
        raise BitNetError("data.documents: got 'row' for files, expected file, line or paragraph: data sets have rows")
    if documents != "row" and (named := [path for path in paths if is_dataset(path)]):
        raise BitNetError(f"data.documents: got '{documents}' for {named[0]}, expected 'row' (--documents row)")


class Piece(NamedTuple):
    """A part of a document: at most about CHUNK characters."""

    begins: bool  # the document's first part
    text: str
    name: str  # of its source


@dataclass(frozen=True)
class Corpus:
    """Sources and their split. `text_split` tells that train and val are the same sources, divided by text."""

    config: DataConfig
    train: tuple[Source, ...]
    val: tuple[Source, ...]
    text_split: bool

    def pieces(self, split: str) -> Iterator[Piece]:
        """The documents of "train" or "val", in order, in pieces that end after a newline where there is one."""
        for source in self.train if split == "train" else self.val:
            if not self.text_split:
                yield from _documents(source, self.config.documents)
            elif self.config.documents == "file":
                yield from _whole(_between(read_text(source), *self._range(source, split)), source.name)
            else:
                yield from self._chosen(source, split)

    def size(self, split: str) -> int | None:
        """About how many bytes of text a split holds; None when compressed files hide it."""
        sources = self.train if split == "train" else self.val
        if any(source.path.suffix in COMPRESSED for source in sources):
            return None
        share = self.config.val_fraction if split == "val" else 1 - self.config.val_fraction
        return int(sum(source.size for source in sources) * (share if self.text_split else 1))

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every source once."""
        return self.train if self.text_split else self.train + self.val

    @property
    def fingerprint(self) -> str:
        """Hex digest of the settings and of every source's path, size and time: equal means unchanged."""
        files = [[(source.name, source.size, source.stamp) for source in part] for part in (self.train, self.val)]
        return hashlib.sha256(json.dumps([asdict(self.config), files]).encode()).hexdigest()

    @cached_property
    def _characters(self) -> dict[Source, int]:
        return {source: sum(len(text) for text in read_text(source)) for source in self.train}

    def _range(self, source: Source, split: str) -> tuple[int, int]:
        """The characters of a file that belong to a split: exactly the first int(n * (1 - fraction)) train."""
        n = self._characters[source]
        cut = int(n * (1 - self.config.val_fraction))
        return (0, cut) if split == "train" else (cut, n)

    def _chosen(self, source: Source, split: str) -> Iterator[Piece]:
        chosen = False
        for piece in _documents(source, self.config.documents):
            if piece.begins:
                chosen = _is_val(piece.text, self.config.val_fraction) == (split == "val")
            if chosen:
                yield piece


def open_corpus(config: DataConfig, *, spool: Path, skip: frozenset[Path] = frozenset()) -> Corpus:
    """Finds the sources and splits them.

    spool: where standard input is copied to, if it is asked for. skip: folders that are not searched.
    Raises BitNetError when a name leads nowhere, or nothing is left to train or to validate on.
    """
    train = find_sources(config.paths, spool, skip) if config.paths else standard_library()
    if config.val_paths:
        val = find_sources(config.val_paths, spool, skip)
        held_back = {source.stamp for source in val}
        rest = tuple(source for source in train if source.stamp not in held_back)
        if len(rest) < len(train):
            _log.info("%d files of paths are also in val_paths: held back from training", len(train) - len(rest))
        corpus = Corpus(config, rest, val, text_split=False)
    else:
        whole = split_files(train, config.val_fraction) if config.documents == "file" else None
        if config.documents == "file" and whole is None and len(train) > 1:
            _log.info("no choice of whole files fits data.val_fraction: the end of each of them is for validation")
        corpus = Corpus(config, *(whole or (train, train)), text_split=whole is None)
    for split, sources in (("train", corpus.train), ("val", corpus.val)):
        if not sources:
            raise BitNetError(
                f"got no text for the {split} split, expected at least one non-empty file; name more files"
            )
    return corpus


def split_files(sources: tuple[Source, ...], fraction: float) -> tuple[tuple[Source, ...], tuple[Source, ...]] | None:
    """(train, val) of whole files with about `fraction` of the bytes in val; None where that is not possible.

    Files are ranked by a hash of name and size, and taken in that order whenever one brings val closer to its share.
    """
    ranked = sorted(sources, key=lambda source: _hash(f"{source.name}\0{source.size}"))
    target = fraction * sum(source.size for source in sources)
    taken: list[Source] = []
    held = 0
    for source in ranked:
        if source.size < 2 * (target - held):
            taken.append(source)
            held += source.size
    if not taken and ranked:
        taken = [min(ranked, key=lambda source: source.size)]
        held = taken[0].size
    if len(taken) == len(sources) or not target / SPLIT_TOLERANCE <= held <= target * SPLIT_TOLERANCE:
        return None
    val = set(taken)
    return tuple(s for s in sources if s not in val), tuple(s for s in sources if s in val)


def cut_after_newlines(parts: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that end after a newline; a line longer than CHUNK is cut by size."""
    rest = ""
    for part in parts:
        head, newline, tail = part.rpartition("\n")
        if newline:
            yield rest + head + newline
            rest = tail
        else:
            rest += part
        if len(rest) >= CHUNK:
            yield rest
            rest = ""
    if rest:
        yield rest


def _documents(source: Source, kind: str) -> Iterator[Piece]:
    if source.rows:
        return _rows(source)
    if kind == "file":
        return _whole(read_text(source), source.name)
    return _lines(source) if kind == "line" else _paragraphs(source)


def _whole(parts: Iterable[str], name: str) -> Iterator[Piece]:
    begins = True
    for text in cut_after_newlines(parts):
        yield Piece(begins, text, name)
        begins = False


def _rows(source: Source) -> Iterator[Piece]:
    with source.path.open(encoding="utf-8") as file:
        for line in file:
            yield from _whole([json.loads(line)], source.name)


def _lines(source: Source) -> Iterator[Piece]:
    """Each line with its newline; blank lines are no documents."""
    blank = False  # a long line goes on: it was blank so far
    for begins, text in _line_parts(source):
        starts = begins or blank
        blank = starts and not text.strip()
        if not blank:
            yield Piece(starts, text, source.name)


def _paragraphs(source: Source) -> Iterator[Piece]:
    """Runs of lines that are not blank; the blank lines between them belong to no document."""
    held: list[str] = []
    size = 0
    begins = True
    for line_begins, text in _line_parts(source):
        if line_begins and not text.strip():
            if held:
                yield Piece(begins, "".join(held), source.name)
            held, size, begins = [], 0, True
            continue
        held.append(text)
        size += len(text)
        if size >= CHUNK:
            yield Piece(begins, "".join(held), source.name)
            held, size, begins = [], 0, False
    if held:
        yield Piece(begins, "".join(held), source.name)


def _line_parts(source: Source) -> Iterator[tuple[bool, str]]:
    """(starts a line, text up to and with its newline); only a line longer than CHUNK comes in several parts."""
    starts = True
    for chunk in cut_after_newlines(read_text(source)):
        for line in io.StringIO(chunk, newline="\n"):  # str.splitlines would also split at form feeds and the like
            yield starts, line
            starts = line.endswith("\n")


def _between(parts: Iterable[str], start: int, end: int) -> Iterator[str]:
    position = 0
    for part in parts:
        yield part[max(start - position, 0) : max(end - position, 0)]
        position += len(part)
        if position >= end:
            return


def _is_val(text: str, fraction: float) -> bool:
    """Equal documents answer alike: wherever they are cut, their first CHUNK characters are in the first piece."""
    return int.from_bytes(_hash(text[:CHUNK].rstrip("\r\n"))) < fraction * 2**64


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8, key=SPLIT_SALT).digest()
