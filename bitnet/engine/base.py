"""Engines: token ids in, token ids out. They know no text and no files.

`Engine` is the protocol that every way of running a model follows; `TorchEngine` is the readable truth, on any
device. An engine holds the weights; a `Session` holds the keys and values of a batch of sequences of one length, and
`SequenceBatch` those of sequences that come and go, each of a length of its own.

Dimensions: B batch, T time, V vocabulary, L layers, G key/value heads, S cached time, E width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError

if TYPE_CHECKING:
    pass


class Session(Protocol):
    """A batch of sequences being read and continued."""

    @property
    def position(self) -> int:
        """Tokens held so far."""

    @property
    def limit(self) -> int:
        """Tokens that fit."""

    def prefill(self, ids: Tensor) -> Tensor:
        """Append ids [B, T] int64, T >= 1. Returns the logits of the last position, [B, V] fp32."""

    def decode(self, ids: Tensor) -> Tensor:
        """Append one id a sequence, [B] int64. Returns logits [B, V] fp32."""

    def score(self, ids: Tensor) -> Tensor:
        """Append ids [B, T] int64, T >= 1. Returns the logits of every position, [B, T, V] fp32."""

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of every sequence. Raises BitNetError for more than there are."""


@dataclass(frozen=True)
class BatchEntry:
    """Ids that go behind what a slot holds; `every`: logits of each of them are wanted, not of the last alone."""

    slot: int
    ids: Sequence[int]
    every: bool = False


class SequenceBatch(Protocol):
    """Sequences that come and go, each with a position of its own."""

    count: int
    limit: int

    def length(self, slot: int) -> int:
        """Tokens the slot holds."""

    def truncate(self, slot: int, length: int) -> None:
        """Keep the slot's first `length` tokens; 0 empties it. Raises BitNetError for more than there are."""

    def forward(self, parts: Sequence[BatchEntry]) -> list[Tensor]:
        """One pass over all parts, of different slots. Returns for each its logits: [V], or [T, V] for `every`; fp32.

        What a slot gets does not depend on the others. Raises BitNetError, with nothing changed, for an unknown or
        repeated slot, for no ids, for ids the model does not have, and where a slot is full.
        """


class Engine(Protocol):
    """Runs one model."""

    name: str
    config: ModelConfig

    def session(self, batch: int = 1, limit: int | None = None) -> Session:
        """Start `batch` sequences of at most `limit` tokens (default: the model's context)."""

    def slots(self, count: int, limit: int | None = None) -> SequenceBatch:
        """`count` empty slots of `limit` tokens each (default: the model's context)."""

    def logits(self, ids: Tensor) -> Tensor:
        """Score: ids [T] or [B, T] int64 -> logits [T, V] or [B, T, V] fp32 on the CPU, from an empty cache."""


class SessionBatch:
    """SequenceBatch of any engine: a session each, one after the other."""

    def __init__(self, engine: Engine, count: int, limit: int) -> None:
        check_room(count, limit)
        self.count, self.limit, self._config = count, limit, engine.config
        self._sessions = [engine.session(1, limit) for _ in range(count)]

    def length(self, slot: int) -> int:
        """Tokens the slot holds."""
        check_sequence(slot, self.count)
        return self._sessions[slot].position

    def truncate(self, slot: int, length: int) -> None:
        """Keep the slot's first `length` tokens; 0 empties it. Raises BitNetError for more than there are."""
        check_sequence(slot, self.count)
        self._sessions[slot].truncate(length)

    def forward(self, parts: Sequence[BatchEntry]) -> list[Tensor]:
        """See `SequenceBatch.forward`."""
        rows = check_entries(parts, self, self._config)
        return [self._read(part, ids[None]) for part, ids in zip(parts, rows)]

    def _read(self, part: BatchEntry, ids: Tensor) -> Tensor:
        session = self._sessions[part.slot]
        if part.every:
            return session.score(ids)[0]
        logits = session.decode(ids[0]) if ids.shape[1] == 1 else session.prefill(ids)  # decoding may be a graph
        return logits[0].clone()  # a session may overwrite what it returned


def common_length(held: Sequence[int], ids: Sequence[int]) -> int:
    """Tokens at the beginning of `ids` that a slot holds already."""
    for i, (a, b) in enumerate(zip(held, ids, strict=False)):
        if a != b:
            return i
    return min(len(held), len(ids))


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


def check_room(batch: int, limit: int) -> None:
    """Refuse a session of no size."""
    if batch < 1 or limit < 1:
        raise BitNetError(f"session: got batch {batch} and limit {limit}, expected 1 or more of both")


def check_length(length: int, position: int) -> None:
    """Refuse to keep more tokens than there are."""
    if not 0 <= length <= position:
        raise BitNetError(f"truncate: got {length} tokens to keep, expected 0 to {position}")


def check_sequence(slot: int, count: int) -> None:
    """Refuse a slot that is not there."""
    if not 0 <= slot < count:
        raise BitNetError(f"slot: got {slot}, expected 0 to {count - 1}")


def check_entries(parts: Sequence[BatchEntry], slots: SequenceBatch, config: ModelConfig) -> list[Tensor]:
    """The ids of each part, [T] int64. Raises BitNetError for parts that `slots` cannot take."""
    taken = [part.slot for part in parts]
    if not parts or len(set(taken)) < len(taken):
        raise BitNetError(f"forward: got parts of slots {taken}, expected one part or more, each of another slot")
    rows = []
    for part in parts:
        check_sequence(part.slot, slots.count)
        ids = torch.tensor(part.ids, dtype=torch.int64)[None]
        rows.append(check_prefill(ids, config, 1, slots.length(part.slot), slots.limit)[0])
    return rows


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
