"""A corpus: its split into training and validation, and its documents as a stream of text.

Memory stays at about twice CHUNK characters, however large a file is. A corpus is read once for the tokenizer and once
for each split. The split of a document depends on its name or text alone, not on the order or the machine, so the same
files give the same split everywhere.
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

SPLIT_TOLERANCE = 3  # whole files may miss data.val_fraction by this factor; beyond it, files are cut
SPLIT_SALT = b"bitnet-split-1"  # another value would change the validation split of every corpus

_log = logging.getLogger("bitnet")


@dataclass(frozen=True)
class DataConfig:
    """The text to train on.

    paths: files, folders (searched recursively), globs, "-" for standard input, or "datasets:NAME" (see hub.py); if
        empty, the Python standard library.
    val_paths: the same, for validation; all of `paths` is then for training.
    documents: what a document is: a "file", a "line", a "paragraph" (separated by blank lines), or a "row", which only
        data sets have.
    val_fraction: fraction of the text held out for validation, between 0 and 1, both excluded; unused with val_paths.
        Whole documents are held out, chosen by a hash. If no choice of whole files comes within a factor of three of
        the fraction (a single file, two equal ones, one that outweighs the rest), it is the end of each file instead.
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
            raise BitNetError(
                "data.paths: got '-' more than once, expected it once; standard input can be read only once"
            )


def check_documents(paths: tuple[str, ...], documents: str) -> None:
    """Raise BitNetError for documents "row" with files, or any other kind with data sets."""
    if documents == "row" and not (paths and all(is_dataset(path) for path in paths)):
        raise BitNetError(
            "data.documents: got 'row' for files, expected file, line or paragraph; only data sets have rows"
        )
    if documents != "row" and (named := [path for path in paths if is_dataset(path)]):
        raise BitNetError(f"data.documents: got '{documents}' for {named[0]}, expected 'row' (--documents row)")


class TextPart(NamedTuple):
    """A part of a document, of at most about CHUNK characters."""

    begins: bool  # whether it is the first of its document
    text: str
    name: str  # of the source


@dataclass(frozen=True)
class Corpus:
    """Sources and their split. text_split: `train` and `val` are the same sources, and their text is split."""

    config: DataConfig
    train: tuple[Source, ...]
    val: tuple[Source, ...]
    text_split: bool

    def parts(self, split: str) -> Iterator[TextPart]:
        """The documents of "train" or "val" in order, cut after newlines where possible."""
        for source in self.train if split == "train" else self.val:
            if not self.text_split:
                yield from _documents(source, self.config.documents)
            elif self.config.documents == "file":
                yield from _parts(_between(read_text(source), *self._range(source, split)), source.name)
            else:
                yield from self._hashed(source, split)

    def size(self, split: str) -> int | None:
        """Approximate bytes of text in a split; None if compressed files make it unknown."""
        sources = self.train if split == "train" else self.val
        if any(source.path.suffix in COMPRESSED for source in sources):
            return None
        fraction = self.config.val_fraction if split == "val" else 1 - self.config.val_fraction
        return int(sum(source.size for source in sources) * (fraction if self.text_split else 1))

    @property
    def sources(self) -> tuple[Source, ...]:
        """All sources, each once."""
        return self.train if self.text_split else self.train + self.val

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings and of the name, size and stamp of every source: equal means unchanged."""
        files = [[(source.name, source.size, source.stamp) for source in split] for split in (self.train, self.val)]
        return hashlib.sha256(json.dumps([asdict(self.config), files]).encode()).hexdigest()

    @cached_property
    def _characters(self) -> dict[Source, int]:
        return {source: sum(len(text) for text in read_text(source)) for source in self.train}

    def _range(self, source: Source, split: str) -> tuple[int, int]:
        """(start, end) of the characters of a file in a split; exactly the first int(n * (1 - fraction)) train."""
        n = self._characters[source]
        cut = int(n * (1 - self.config.val_fraction))
        return (0, cut) if split == "train" else (cut, n)

    def _hashed(self, source: Source, split: str) -> Iterator[TextPart]:
        in_split = False
        for part in _documents(source, self.config.documents):
            if part.begins:
                in_split = _is_val(part.text, self.config.val_fraction) == (split == "val")
            if in_split:
                yield part


def open_corpus(config: DataConfig, *, spool: Path, skip: frozenset[Path] = frozenset()) -> Corpus:
    """Find the sources of a configuration and split them.

    spool: the file that standard input is copied to. skip: folders that are not searched.
    Raises BitNetError for a path that does not exist and for an empty split.
    """
    train = find_sources(config.paths, spool, skip) if config.paths else standard_library()
    if config.val_paths:
        val = find_sources(config.val_paths, spool, skip)
        held_back = {source.stamp for source in val}
        rest = tuple(source for source in train if source.stamp not in held_back)
        if len(rest) < len(train):
            _log.info(
                "data: %d files are in both paths and val_paths; they are held out from training",
                len(train) - len(rest),
            )
        corpus = Corpus(config, rest, val, text_split=False)
    else:
        whole = split_files(train, config.val_fraction) if config.documents == "file" else None
        if config.documents == "file" and whole is None and len(train) > 1:
            _log.info(
                "data: no choice of whole files fits val_fraction; the end of each file is held out for validation"
            )
        corpus = Corpus(config, *(whole or (train, train)), text_split=whole is None)
    for split, sources in (("train", corpus.train), ("val", corpus.val)):
        if not sources:
            raise BitNetError(
                f"got no text for the {split} split, expected at least one non-empty file; name more files"
            )
    return corpus


def split_files(sources: tuple[Source, ...], fraction: float) -> tuple[tuple[Source, ...], tuple[Source, ...]] | None:
    """(train, val) of whole files with about `fraction` of the bytes in val; None if there is no such choice.

    Files are ranked by a hash of name and size, and each is taken if it brings val closer to its target.
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
    """The same text in parts that end after a newline; a line longer than CHUNK is cut anywhere."""
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


def _documents(source: Source, kind: str) -> Iterator[TextPart]:
    if source.rows:
        return _rows(source)
    if kind == "file":
        return _parts(read_text(source), source.name)
    return _lines(source) if kind == "line" else _paragraphs(source)


def _parts(parts: Iterable[str], name: str) -> Iterator[TextPart]:
    begins = True
    for text in cut_after_newlines(parts):
        yield TextPart(begins, text, name)
        begins = False


def _rows(source: Source) -> Iterator[TextPart]:
    with source.path.open(encoding="utf-8") as file:
        for line in file:
            yield from _parts([json.loads(line)], source.name)


def _lines(source: Source) -> Iterator[TextPart]:
    """Each line, with its newline, is a document; blank lines are not."""
    blank = False  # whether a line that comes in several parts was blank so far
    for begins, text in _line_parts(source):
        starts = begins or blank
        blank = starts and not text.strip()
        if not blank:
            yield TextPart(starts, text, source.name)


def _paragraphs(source: Source) -> Iterator[TextPart]:
    """Lines between blank lines are a document; blank lines belong to none."""
    held: list[str] = []
    size = 0
    begins = True
    for line_begins, text in _line_parts(source):
        if line_begins and not text.strip():
            if held:
                yield TextPart(begins, "".join(held), source.name)
            held, size, begins = [], 0, True
            continue
        held.append(text)
        size += len(text)
        if size >= CHUNK:
            yield TextPart(begins, "".join(held), source.name)
            held, size, begins = [], 0, False
    if held:
        yield TextPart(begins, "".join(held), source.name)


def _line_parts(source: Source) -> Iterator[tuple[bool, str]]:
    """(whether it starts a line, text including the newline); only a line longer than CHUNK comes in several parts."""
    starts = True
    for chunk in cut_after_newlines(read_text(source)):
        for line in io.StringIO(chunk, newline="\n"):  # str.splitlines also splits at form feeds
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
    """Whether a document is held out. Equal documents always agree, because the first part has CHUNK characters."""
    return int.from_bytes(_hash(text[:CHUNK].rstrip("\r\n"))) < fraction * 2**64


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8, key=SPLIT_SALT).digest()
