"""Text to token shards.

prepare() writes everything into `OUT.tmp`, syncs and renames it: a folder with a manifest is complete, and whatever a
kill leaves is not mistaken for one.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import BitNetError
from bitnet.files.checkpoint import sync
from bitnet.machine import usable_cores
from bitnet.text.characters import train_char
from bitnet.text.sentencepiece import train_sentencepiece
from bitnet.text.tokenizer import Tokenizer
from bitnet.train.data.corpus import Corpus, DataConfig, TextPart, open_corpus
from bitnet.train.data.hub import is_dataset
from bitnet.train.data.shards import (
    MANIFEST,
    TOKENIZER,
    VERSION,
    Manifest,
    NamedSize,
    Shard,
    Split,
    TokenDataset,
    TokenStream,
    dtype_for,
    is_prepared,
    open_dataset,
    shard_name,
    work_folder,
)
from bitnet.train.data.sources import CHUNK, STANDARD_INPUT, find_sources

SHARD_TOKENS = 1 << 26  # 128 MiB as uint16: quick to copy and check, and few files even for 10 G tokens
LISTED_SOURCES = 1000  # named in the manifest; its count covers all
SPOOL = "standard-input"
OURS = re.compile(rf"(train|val)-\d{{5}}\.bin|{re.escape(TOKENIZER)}|{re.escape(MANIFEST)}|{SPOOL}(-[0-9a-f]{{16}})?")

Report = Callable[[str, int, int | None], None]  # stage, bytes done, bytes in all or None
_log = logging.getLogger("bitnet")


def prepare(
    config: DataConfig,
    out: Path,
    *,
    tokenizer: Tokenizer | None,
    kind: str = "sentencepiece",
    vocab_size: int,
    report: Report | None = None,
) -> TokenDataset:
    """Tokenise text into a dataset in `out`, or verify and open the one that is there, made with the same settings.

    An existing dataset does not need its text any more, which may have moved or changed; standard input is not read.
    tokenizer: the one to use; None trains a new one of `kind`: "sentencepiece", with `vocab_size` ids or as many as the
    training split supports, or "char", with all characters of both splits.
    report: called with (stage, bytes done, total bytes or None); stages are "tokenizer", "train" and "val".
    Raises BitNetError for unreadable or missing text, an empty split, a damaged dataset or one with other settings, any
    other content in `out`, and a full disk.
    """
    if tokenizer is None and kind not in ("sentencepiece", "char"):
        raise BitNetError(f"got tokenizer kind {kind!r}, expected 'sentencepiece' or 'char'; correct the kind")
    out = out.resolve()
    work = work_folder(out)
    made_with = _made_with(tokenizer, kind, vocab_size)
    settings = _digest(asdict(config), made_with)
    if is_prepared(out):
        return _reuse(out, config, settings, made_with)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BitNetError(f"{out}: got a file or folder with other content, expected a new folder; name another")
    try:
        with _workspace(work):
            corpus = _open_corpus(config, out, work)
            fingerprint = _digest(corpus.fingerprint, made_with)
            tokenizer = tokenizer or _train(corpus, kind, vocab_size, report)
            _write(work, corpus, settings, fingerprint, tokenizer, report)
            work.rename(out)
            sync(out.parent)
    except OSError as error:
        where = error.filename or out
        raise BitNetError(f"{where}: {error.strerror}; check permissions and free space, then try again") from error
    return open_dataset(out)


def tokenize(
    paths: tuple[str, ...],
    tokenizer: Tokenizer,
    folder: Path,
    report: Report | None = None,
    *,
    documents: str = "file",
) -> TokenStream:
    """Tokenise all text that `paths` lead to as one stream, written into an existing `folder`.

    documents: what a document is, as in DataConfig. Raises BitNetError for missing, unreadable or empty text and for
    text that the tokenizer cannot encode.
    """
    config = DataConfig(paths, documents=documents)
    sources = find_sources(paths, folder / SPOOL)
    if not sources:
        raise BitNetError(f"data: got no text in {', '.join(paths)}, expected at least one file that is not empty")
    corpus = Corpus(config, sources, sources, text_split=False)
    dtype = dtype_for(tokenizer.vocab_size)
    split = _write_split(folder, corpus, "train", tokenizer, dtype, report)
    return TokenStream(folder, split, dtype, tokenizer.vocab_size, tokenizer.bos_id)


def _reuse(out: Path, config: DataConfig, settings: str, made_with: list[str]) -> TokenDataset:
    dataset = open_dataset(out, verify=True)
    if dataset.manifest.settings != settings:
        raise BitNetError(
            f"{out}: got a dataset made with other data or tokenizer settings, expected those asked for; keep the "
            "old settings, or choose another folder (--out)"
        )
    named = config.paths + config.val_paths
    if not any(path == STANDARD_INPUT or is_dataset(path) for path in named):  # those can be read only once
        try:
            corpus = _open_corpus(config, out, work_folder(out))
        except (BitNetError, OSError):
            return dataset  # the text is no longer there
        if _digest(corpus.fingerprint, made_with) != dataset.fingerprint:
            _log.warning("%s: text files changed since they were prepared; training uses the text as it was", out)
    return dataset


def _open_corpus(config: DataConfig, out: Path, work: Path) -> Corpus:
    return open_corpus(config, spool=work / SPOOL, skip=frozenset({out, work}))


def _made_with(tokenizer: Tokenizer | None, kind: str, vocab_size: int) -> list[str]:
    if tokenizer is not None:
        return [tokenizer.kind, hashlib.sha256(tokenizer.to_bytes()).hexdigest()]
    return [kind, str(vocab_size) if kind == "sentencepiece" else ""]


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()


@contextmanager
def _workspace(work: Path) -> Iterator[None]:
    """An empty work folder, locked against a second writer; removed afterwards unless it was renamed."""
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BitNetError(f"{work}: got in use by another run, expected one writer; wait for it to end") from error
        leftovers = list(
            work.iterdir()
        )  # of a killed run; raises FileNotFoundError if another run has just renamed the folder
        if not all(OURS.fullmatch(path.name) for path in leftovers):
            raise BitNetError(f"{work}: got a folder with other files, expected none; move it or name another output")
        for path in leftovers:
            path.unlink()
        try:
            yield
        finally:
            if work.exists() and os.path.samestat(work.stat(), os.fstat(descriptor)):
                shutil.rmtree(work)
    finally:
        os.close(descriptor)


def _train(corpus: Corpus, kind: str, vocab_size: int, report: Report | None) -> Tokenizer:
    # As in nanoGPT, characters of both splits: one that is only in the validation text could not be encoded.
    splits = ("train", "val") if kind == "char" else ("train",)
    texts = (part.text for part in _reported(corpus, splits, "tokenizer", report))
    return train_char(texts) if kind == "char" else train_sentencepiece(texts, vocab_size)


def _write(
    work: Path, corpus: Corpus, settings: str, fingerprint: str, tokenizer: Tokenizer, report: Report | None
) -> None:
    model = tokenizer.to_bytes()
    (work / TOKENIZER).write_bytes(model)
    dtype = dtype_for(tokenizer.vocab_size)
    manifest = Manifest(
        settings=settings,
        fingerprint=fingerprint,
        tokenizer_kind=tokenizer.kind,
        tokenizer_sha256=hashlib.sha256(model).hexdigest(),
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        train=_write_split(work, corpus, "train", tokenizer, dtype, report),
        val=_write_split(work, corpus, "val", tokenizer, dtype, report),
        source_count=len(corpus.sources),
        source_bytes=sum(source.size for source in corpus.sources),
        sources=tuple(NamedSize(source.name, source.size) for source in corpus.sources[:LISTED_SOURCES]),
    )
    (work / MANIFEST).write_text(manifest.to_json())
    for spool in work.glob(f"{SPOOL}*"):
        spool.unlink()
    sync(work / TOKENIZER)
    sync(work / MANIFEST)
    sync(work)


def _write_split(
    work: Path, corpus: Corpus, split: str, tokenizer: Tokenizer, dtype: str, report: Report | None
) -> Split:
    documents = text_bytes = 0
    writer = _ShardWriter(work, split, dtype)
    try:
        for batch in _batches(_reported(corpus, (split,), split, report)):
            documents += sum(part.begins for part in batch)
            text_bytes += sum(len(part.text.encode()) for part in batch)
            writer.write(_encode(batch, tokenizer, dtype))
    finally:
        writer.close()
    if not text_bytes:
        raise BitNetError(
            f"got no text for the {split} split, expected some; change data.val_fraction or name data.val_paths"
        )
    return Split(documents, sum(shard.tokens for shard in writer.shards), text_bytes, tuple(writer.shards))


def _encode(batch: list[TextPart], tokenizer: Tokenizer, dtype: str) -> NDArray[Any]:
    """The ids of a batch with BOS before each document, little-endian [n]."""
    try:
        ids = tokenizer.encode_batch([part.text for part in batch], threads=usable_cores())
    except BitNetError:
        for part in batch:  # again one by one, to find the file
            try:
                tokenizer.encode(part.text)
            except BitNetError as error:
                raise BitNetError(f"{part.name}: {error}") from error
        raise
    if tokenizer.bos_id is not None:
        for part, part_ids in zip(batch, ids, strict=True):
            if part.begins:
                part_ids.insert(0, tokenizer.bos_id)
    count = sum(len(part_ids) for part_ids in ids)
    return np.fromiter(chain.from_iterable(ids), np.dtype(dtype).newbyteorder("<"), count)


def _batches(parts: Iterable[TextPart]) -> Iterator[list[TextPart]]:
    """Parts in batches of about CHUNK characters, because a part may be as short as a line."""
    batch: list[TextPart] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= CHUNK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _reported(corpus: Corpus, splits: tuple[str, ...], stage: str, report: Report | None) -> Iterator[TextPart]:
    """The parts of some splits, with a call of `report` about every CHUNK bytes."""
    parts = chain.from_iterable(corpus.parts(split) for split in splits)
    if report is None:
        yield from parts
        return
    sizes = [corpus.size(split) for split in splits]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    done = reported = 0
    for part in parts:
        yield part
        done += len(part.text.encode())
        if done - reported >= CHUNK:
            report(stage, done, total)
            reported = done
    report(stage, done, done)


@dataclass
class _ShardWriter:
    """Appends tokens to numbered files of at most SHARD_TOKENS each, and hashes them."""

    folder: Path
    split: str
    dtype: str
    shards: list[Shard] = field(default_factory=list)
    _file: BinaryIO | None = None
    _tokens: int = 0
    _digest: Any = None

    def write(self, tokens: NDArray[Any]) -> None:
        while len(tokens):
            if self._file is None:
                self._file = (self.folder / shard_name(self.split, len(self.shards))).open("wb")
                self._tokens, self._digest = 0, hashlib.sha256()
            part, tokens = np.split(tokens, [SHARD_TOKENS - self._tokens])
            data = part.tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._tokens += len(part)
            if self._tokens == SHARD_TOKENS:
                self.close()

    def close(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        with file:
            file.flush()
            os.fsync(file.fileno())
        size = self._tokens * np.dtype(self.dtype).itemsize
        name = shard_name(self.split, len(self.shards))
        self.shards.append(Shard(name, self._tokens, size, self._digest.hexdigest()))
