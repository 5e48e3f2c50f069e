"""Data for training: prepare() turns text into token shards, Sampler and eval_windows() cut them into batches.

prepare() writes everything into `OUT.tmp`, syncs and renames: a folder with a manifest is whole, and a kill at any
moment leaves nothing that is picked up. Shapes: B windows, T tokens of context.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet.checkpoint import sync
from bitnet.errors import BitNetError
from bitnet.tokenizer import Tokenizer, train_char, train_sentencepiece
from bitnet.train.corpus import Corpus, DataConfig, Piece, open_corpus
from bitnet.train.shards import (
    VERSION,
    Manifest,
    NamedSize,
    Shard,
    Split,
    TokenDataset,
    TokenStream,
    dtype_for,
    open_dataset,
    shard_name,
)
from bitnet.train.sources import CHUNK, STANDARD_INPUT, find_sources

# The rest of the trainer needs this module alone.
__all__ = [
    "DataConfig", "Sampler", "TokenDataset", "TokenStream", "eval_windows", "open_dataset", "prepare",
]  # fmt: skip

SHARD_TOKENS = 1 << 26  # 128 MiB as uint16: small enough to copy and to check, few files even for 10 G tokens
LISTED_SOURCES = 1000  # names kept in the manifest; the count is complete
IGNORED = -100  # target that the loss leaves out, as torch's cross_entropy does by default
SPOOL = "standard-input"
OURS = re.compile(r"(train|val)-\d{5}\.bin|tokenizer\.model|manifest\.json|" + SPOOL)

Report = Callable[[str, int, int | None], None]  # stage, bytes done, bytes in all or None
_log = logging.getLogger("bitnet")


# ---- writing -----------------------------------------------------------------------------------------------


def prepare(
    config: DataConfig,
    out: Path,
    *,
    tokenizer: Tokenizer | None,
    kind: str = "sentencepiece",
    vocab_size: int,
    report: Report | None = None,
) -> TokenDataset:
    """Text to a dataset in `out`; a folder already made from the same text and settings is opened as it is.

    tokenizer: one to use; None trains a new one of `kind` ("sentencepiece" or "char") on the training split, where
    `vocab_size` is the wanted number of SentencePiece ids. report: called with (stage, bytes done, bytes in all or
    None), the stages being "tokenizer", "train" and "val".
    Raises BitNetError for unreadable or missing text, an empty split, an `out` that holds anything else, a full disk.
    """
    if tokenizer is None and kind not in ("sentencepiece", "char"):
        raise BitNetError(f"got tokenizer kind {kind!r}, expected 'sentencepiece' or 'char'; correct the kind")
    out = out.resolve()
    work = out.with_name(out.name + ".tmp")
    there = (out / "manifest.json").exists()
    if not there and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BitNetError(f"{out}: got a file or folder with other content, expected a new folder; name another")
    spools = STANDARD_INPUT in config.paths + config.val_paths
    try:
        with _workspace(work) if spools or not there else nullcontext():
            corpus = open_corpus(config, spool=work / SPOOL, skip=frozenset({out, work}))
            made_from = _fingerprint(corpus, tokenizer, kind, vocab_size)
            if there:
                return _reuse(out, made_from)
            _write(work, corpus, made_from, tokenizer or _train(corpus, kind, vocab_size, report), report)
            work.rename(out)
            sync(out.parent)
    except OSError as error:
        where = error.filename or out
        raise BitNetError(f"{where}: {error.strerror}; check rights and free space, then prepare again") from error
    return open_dataset(out)


def tokenize(paths: tuple[str, ...], tokenizer: Tokenizer, folder: Path, report: Report | None = None) -> TokenStream:
    """All text behind `paths` as one stream of tokens, a document a file, written into an existing `folder`.

    Raises BitNetError for missing, unreadable or empty text and for text the tokenizer cannot hold.
    """
    sources = find_sources(paths, folder / SPOOL)
    if not sources:
        raise BitNetError(f"data: got no text in {', '.join(paths)}, expected at least one file that is not empty")
    corpus = Corpus(DataConfig(paths), sources, sources, text_split=False)
    dtype = dtype_for(tokenizer.vocab_size)
    split = _write_split(folder, corpus, "train", tokenizer, dtype, report)
    return TokenStream(folder, split, dtype, tokenizer.vocab_size, tokenizer.bos_id)


def _reuse(out: Path, made_from: str) -> TokenDataset:
    dataset = open_dataset(out)
    if dataset.fingerprint != made_from:
        raise BitNetError(
            f"{out}: got a dataset made from other text or settings (fingerprint {dataset.fingerprint[:12]}), expected "
            f"{made_from[:12]}; name another folder, or delete this one to prepare it again"
        )
    _log.info("%s: text and settings unchanged, used as it is", out)
    return dataset


def _fingerprint(corpus: Corpus, tokenizer: Tokenizer | None, kind: str, vocab_size: int) -> str:
    if tokenizer is not None:
        made_with = [tokenizer.kind, hashlib.sha256(tokenizer.to_bytes()).hexdigest()]
    else:
        made_with = [kind, str(vocab_size) if kind == "sentencepiece" else ""]
    return hashlib.sha256(json.dumps([VERSION, corpus.fingerprint, made_with]).encode()).hexdigest()


@contextmanager
def _workspace(work: Path) -> Iterator[None]:
    """An empty folder of ours, locked against a second writer and gone afterwards unless it was renamed."""
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BitNetError(f"{work}: got in use by another run, expected one writer; wait for it to end") from error
        leftovers = list(work.iterdir())  # of a killed run; FileNotFoundError if the run before has just renamed it
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
    texts = (piece.text for piece in _watched(corpus, "train", "tokenizer", report))
    return train_char(texts) if kind == "char" else train_sentencepiece(texts, vocab_size)


def _write(work: Path, corpus: Corpus, made_from: str, tokenizer: Tokenizer, report: Report | None) -> None:
    model = tokenizer.to_bytes()
    (work / "tokenizer.model").write_bytes(model)
    dtype = dtype_for(tokenizer.vocab_size)
    manifest = Manifest(
        fingerprint=made_from,
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
    (work / "manifest.json").write_text(manifest.to_json())
    (work / SPOOL).unlink(missing_ok=True)
    sync(work / "tokenizer.model")
    sync(work / "manifest.json")
    sync(work)


def _write_split(
    work: Path, corpus: Corpus, split: str, tokenizer: Tokenizer, dtype: str, report: Report | None
) -> Split:
    documents = text_bytes = 0
    writer = _ShardWriter(work, split, dtype)
    try:
        for batch in _batches(_watched(corpus, split, split, report)):
            documents += sum(piece.begins for piece in batch)
            text_bytes += sum(len(piece.text.encode()) for piece in batch)
            writer.write(_encode(batch, tokenizer, dtype))
    except BitNetError as error:
        raise BitNetError(f"{split} split: {error}") from error
    finally:
        writer.close()
    if not text_bytes:
        raise BitNetError(
            f"got no text for the {split} split, expected some; change data.val_fraction or name data.val_paths"
        )
    return Split(documents, sum(shard.tokens for shard in writer.shards), text_bytes, tuple(writer.shards))


def _encode(batch: list[Piece], tokenizer: Tokenizer, dtype: str) -> NDArray[Any]:
    """The ids of a batch with BOS before each document, little-endian [n]."""
    ids = tokenizer.encode_batch([piece.text for piece in batch], threads=os.cpu_count() or 1)
    if tokenizer.bos_id is not None:
        for piece, piece_ids in zip(batch, ids, strict=True):
            if piece.begins:
                piece_ids.insert(0, tokenizer.bos_id)
    count = sum(len(piece_ids) for piece_ids in ids)
    return np.fromiter(chain.from_iterable(ids), np.dtype(dtype).newbyteorder("<"), count)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces together until they make about CHUNK characters: a line a document is common."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= CHUNK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _watched(corpus: Corpus, split: str, stage: str, report: Report | None) -> Iterator[Piece]:
    """The pieces of a split, with a report for each CHUNK bytes or so."""
    if report is None:
        yield from corpus.pieces(split)
        return
    total = corpus.size(split)
    done = told = 0
    for piece in corpus.pieces(split):
        yield piece
        done += len(piece.text.encode())
        if done - told >= CHUNK:
            report(stage, done, total)
            told = done
    report(stage, done, done)


@dataclass
class _ShardWriter:
    """Appends tokens to numbered files of at most SHARD_TOKENS, hashing as it goes."""

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


# ---- batches -----------------------------------------------------------------------------------------------


class Sampler:
    """Training windows by number, with no state but a cache: resuming at sample n is asking for sample n.

    Each epoch cuts the stream into windows of `context` tokens that do not overlap, from an offset of its own, and
    visits each once in an order of its own. Offset and order come from (seed, epoch) alone, through PCG64's raw
    output, which NumPy promises never to change (it makes no such promise for permutation()).
    """

    def __init__(self, stream: TokenStream, context: int, seed: int) -> None:
        if context < 1 or seed < 0:
            raise BitNetError(f"got context {context} and seed {seed}, expected context >= 1 and seed >= 0")
        if len(stream) < context + 1:
            raise BitNetError(
                f"got {len(stream)} tokens of training text, expected at least {context + 1} for a context of "
                f"{context}; name more text or shorten the context"
            )
        self.stream, self.context, self.seed = stream, context, seed
        # One window fewer than fits leaves room for any offset below T, with the same count in every epoch.
        self.windows_per_epoch = max(1, len(stream) // context - 1)
        self._slack = min(context - 1, len(stream) - 1 - self.windows_per_epoch * context)
        self._epoch = -1
        self._starts: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def windows(self, first: int, n: int) -> tuple[Tensor, Tensor]:
        """Samples first .. first + n - 1 of the endless run: inputs and next tokens, both int64 [n, T].

        A rank of a larger run asks for its own slice of the global batch.
        """
        assert min(first, n) >= 0, (first, n)
        tokens = np.empty((n, self.context + 1), dtype=np.int64)
        for row in range(n):
            tokens[row] = self.stream.read(self._start(first + row), self.context + 1)
        windows = torch.from_numpy(tokens)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _start(self, sample: int) -> int:
        epoch, i = divmod(sample, self.windows_per_epoch)
        if epoch != self._epoch:
            raw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.windows_per_epoch + 1)
            offset = int(raw[0] % np.uint64(self._slack + 1))
            self._starts = offset + self.context * np.argsort(raw[1:], kind="stable")
            self._epoch = epoch
        return int(self._starts[i])


def eval_windows(
    stream: TokenStream,
    context: int,
    *,
    batch_size: int = 8,
    limit_tokens: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, int64 [B, T], that predict every token but the first exactly once, in order.

    B is `batch_size`, less in the last batch. Targets are IGNORED (-100) where they carry no text: at BOS and in the
    padding of the last window (whose inputs are 0). limit_tokens: stop after so many predictions.
    Bits per byte = summed loss in nats / ln 2 / bytes of the targets: `stream.text_bytes` without a limit, otherwise
    the sum of tokenizer.byte_lengths() over the targets.
    """
    count = len(stream) - 1 if limit_tokens is None else min(limit_tokens, len(stream) - 1)
    if count < 1 or context < 1 or batch_size < 1:
        raise BitNetError(
            f"got {len(stream)} tokens, context {context}, batch size {batch_size} and limit {limit_tokens}, "
            "expected at least 2 tokens and 1 of each; name more validation text or correct the settings"
        )
    for start in range(0, count, batch_size * context):
        n = min(batch_size * context, count - start)
        rows = -(-n // context)
        tokens = torch.from_numpy(stream.read(start, n + 1))
        inputs = torch.zeros(rows * context, dtype=torch.int64)
        targets = torch.full((rows * context,), IGNORED, dtype=torch.int64)
        inputs[:n] = tokens[:-1]
        targets[:n] = tokens[1:]
        if stream.bos_id is not None:
            targets[targets == stream.bos_id] = IGNORED
        yield inputs.view(rows, context), targets.view(rows, context)
