"""Engines: token ids in, token ids out. They know no text; load.py alone opens files.

An `Engine` holds the weights of one model. A `Session` holds the keys and values of a batch of sequences of one length;
a `SequenceBatch` those of sequences that join and leave, each of its own length (continuous batching).

Dimensions: B batch, T time, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.engine.sampling import Sampler, Sampling
from bitnet.errors import BitNetError

if TYPE_CHECKING:
    from bitnet.text.tokenizer import Tokenizer


class Session(Protocol):
    """A batch of sequences of one length, being read and continued."""

    @property
    def position(self) -> int:
        """Tokens held so far."""

    @property
    def limit(self) -> int:
        """Tokens that fit."""

    def prefill(self, ids: Tensor) -> Tensor:
        """Append ids [B, T] int64, T >= 1. Returns the logits of the last position, [B, V] fp32."""

    def decode(self, ids: Tensor) -> Tensor:
        """Append one id to each sequence, [B] int64. Returns logits [B, V] fp32; the next call may overwrite them."""

    def score(self, ids: Tensor) -> Tensor:
        """Append ids [B, T] int64, T >= 1. Returns the logits of every position, [B, T, V] fp32."""

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of every sequence. Raises BitNetError for more than there are."""


@dataclass(frozen=True)
class BatchEntry:
    """Ids to append to one sequence of a batch; `every`: return logits of each of them, not of the last alone."""

    sequence: int
    ids: Sequence[int]
    every: bool = False


class SequenceBatch(Protocol):
    """Sequences, numbered from 0, that join and leave, each of its own length."""

    count: int
    limit: int

    def length(self, sequence: int) -> int:
        """Tokens the sequence holds."""

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the sequence's first `length` tokens; 0 empties it. Raises BitNetError for more than there are."""

    def forward(self, entries: Sequence[BatchEntry]) -> list[Tensor]:
        """One pass over all entries, each of a different sequence.

        Returns fp32 logits for each entry: [V], or [T, V] for `every`. They do not depend on the other entries.
        Raises BitNetError, and changes nothing, for an unknown or repeated sequence, for no ids, for ids outside the
        vocabulary, and where a sequence is full.
        """


class Engine(ABC):
    """Runs one model.

    tokenizer: the one of the model's file, kept for the caller; an engine computes with ids only.
    """

    name: str
    config: ModelConfig
    tokenizer: "Tokenizer | None" = None

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of weights that decoding one token reads: projections as the engine holds them, head and norm gains."""

    @abstractmethod
    def _session(self, batch: int, limit: int) -> Session:
        """`session`, with arguments in range."""

    @abstractmethod
    def _sequence_batch(self, count: int, limit: int) -> SequenceBatch:
        """`sequence_batch`, with arguments in range."""

    @abstractmethod
    def _logits(self, ids: Tensor) -> Tensor:
        """`logits` of valid ids [B, T] int64: [B, T, V]."""

    max_batch: int | None = None  # sequences in one session or batch; None: no limit

    def session(self, batch: int = 1, limit: int | None = None) -> Session:
        """Start `batch` sequences of at most `limit` tokens (default: the model's context).

        Raises BitNetError for a batch or a limit below 1, and for a batch above the engine's largest.
        """
        return self._session(batch, self._check_room("session", batch, limit))

    def sequence_batch(self, count: int, limit: int | None = None) -> SequenceBatch:
        """`count` empty sequences of at most `limit` tokens each (default: the context); errors as `session`."""
        return self._sequence_batch(count, self._check_room("sequence batch", count, limit))

    def _check_room(self, what: str, batch: int, limit: int | None) -> int:
        limit = self.config.context if limit is None else limit
        if not (1 <= batch <= (self.max_batch or batch) and limit >= 1):
            most = (
                "1 or more" if self.max_batch is None else f"a batch of 1 to {self.max_batch} and a limit of 1 or more"
            )
            both = " of both" if self.max_batch is None else ""
            raise BitNetError(f"{what}: got batch {batch} and limit {limit}, expected {most}{both}")
        return limit

    def logits(self, ids: Tensor) -> Tensor:
        """Score ids [T] or [B, T] int64 from an empty cache. Returns [T, V] or [B, T, V] fp32 on the CPU.

        Raises BitNetError for another dtype or shape, for no ids and for ids outside the vocabulary.
        """
        ids = check_ids(torch.as_tensor(ids), self.config)
        scores = self._logits(torch.atleast_2d(ids)).float().cpu()
        return scores if ids.dim() == 2 else scores[0]

    def stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Collection[int] = (),
        limit: int | None = None,
    ) -> Iterator[int]:
        """Continue `ids`, one id at a time, until `max_new_tokens` are made or one of `stop` is drawn.

        limit: tokens the cache holds (default: the model's context). A text that outgrows it continues from the last
        half of that many tokens, read again from position 0, so that no position lies beyond `limit`.
        Raises BitNetError for an empty prompt and for ids outside the vocabulary.
        """
        limit = self.config.context if limit is None else limit
        history = list(ids)
        if not history:
            raise BitNetError("generate: got an empty prompt, expected at least one token; give a text or a BOS token")
        if max_new_tokens < 0:
            raise BitNetError(f"generate: got {max_new_tokens} new tokens, expected 0 or more")
        sampler = Sampler(sampling or Sampling())
        session: Session | None = None
        for _ in range(max_new_tokens):
            if session is not None and session.position < session.limit:
                logits = session.decode(torch.tensor(history[-1:]))
            else:
                fits = session is None and len(history) <= limit
                session = self.session(1, limit)
                logits = session.prefill(torch.tensor([history if fits else history[-max(1, limit // 2) :]]))
            token = int(sampler.draw(logits))
            if token in stop:
                return
            history.append(token)
            yield token

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Collection[int] = (),
        limit: int | None = None,
    ) -> list[int]:
        """The new ids of `stream`, as a list."""
        return list(self.stream(ids, max_new_tokens, sampling, stop, limit))


class SessionBatch:
    """A SequenceBatch on any engine: one session per sequence, run one after the other."""

    def __init__(self, engine: Engine, count: int, limit: int) -> None:
        self.count, self.limit, self._config = count, limit, engine.config
        self._sessions = [engine.session(1, limit) for _ in range(count)]

    def length(self, sequence: int) -> int:
        """Tokens the sequence holds."""
        check_sequence(sequence, self.count)
        return self._sessions[sequence].position

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the sequence's first `length` tokens; 0 empties it. Raises BitNetError for more than there are."""
        check_sequence(sequence, self.count)
        self._sessions[sequence].truncate(length)

    def forward(self, entries: Sequence[BatchEntry]) -> list[Tensor]:
        """See `SequenceBatch.forward`."""
        rows = check_entries(entries, self, self._config)
        return [read_entry(self._sessions[entry.sequence], entry, ids) for entry, ids in zip(entries, rows)]


def read_entry(session: Session, entry: BatchEntry, ids: Tensor) -> Tensor:
    """Append the checked ids [T] of an entry to a session of one sequence. Returns the entry's logits."""
    if entry.every:
        return session.score(ids[None])[0]
    if len(ids) > 1:
        return session.prefill(ids[None])[0]
    return session.decode(ids)[0].clone()  # the next step may overwrite what this one returned


def common_length(held: Sequence[int], ids: Sequence[int]) -> int:
    """Tokens at the beginning of `ids` that a sequence which holds `held` need not read again."""
    for i, (a, b) in enumerate(zip(held, ids, strict=False)):
        if a != b:
            return i
    return min(len(held), len(ids))


# ---- checks ------------------------------------------------------------------------------------------------


def check_ids(ids: Tensor, config: ModelConfig) -> Tensor:
    """Token ids [T] or [B, T] as int64. Raises BitNetError for another dtype or shape and for ids out of range."""
    if ids.dtype not in (torch.int64, torch.int32) or ids.numel() == 0 or ids.dim() not in (1, 2):
        raise BitNetError(f"ids: got {ids.dtype} of shape {tuple(ids.shape)}, expected int64 [T] or [B, T], T >= 1")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab_size:
        raise BitNetError(
            f"ids: got {low}..{high}, expected 0..{config.vocab_size - 1}; was the text tokenised for another model?"
        )
    return ids.long()


def check_prefill(ids: Tensor, config: ModelConfig, batch: int, position: int, limit: int) -> Tensor:
    """Ids [batch, T] as int64 that fit after `position`. Raises BitNetError for others."""
    ids = check_ids(ids, config)
    if ids.dim() != 2 or ids.shape[0] != batch:
        raise BitNetError(f"prefill: got ids of shape {tuple(ids.shape)}, expected [{batch}, T]")
    if position + ids.shape[1] > limit:
        raise BitNetError(
            f"context is full: got {ids.shape[1]} tokens after {position}, expected at most {limit} in all; "
            "shorten the prompt or raise the limit (-c)"
        )
    return ids


def check_length(length: int, position: int) -> None:
    """Raise BitNetError for a number of tokens to keep that is not 0 to `position`."""
    if not 0 <= length <= position:
        raise BitNetError(f"truncate: got {length} tokens to keep, expected 0 to {position}")


def check_sequence(sequence: int, count: int) -> None:
    """Raise BitNetError for a sequence that a batch of `count` does not have."""
    if not 0 <= sequence < count:
        raise BitNetError(f"sequence: got {sequence}, expected 0 to {count - 1}")


def check_entries(entries: Sequence[BatchEntry], batch: SequenceBatch, config: ModelConfig) -> list[Tensor]:
    """The ids of each entry, [T] int64. Raises BitNetError for entries that `batch` cannot take."""
    taken = [entry.sequence for entry in entries]
    if not entries or len(set(taken)) < len(taken):
        raise BitNetError(
            f"forward: got entries of sequences {taken}, expected one entry or more, each of another sequence"
        )
    rows = []
    for entry in entries:
        check_sequence(entry.sequence, batch.count)
        ids = torch.tensor(entry.ids, dtype=torch.int64)[None]
        rows.append(check_prefill(ids, config, 1, batch.length(entry.sequence), batch.limit)[0])
    return rows
