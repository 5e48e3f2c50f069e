"""Engines: token ids in, token ids out. They know no text and no files.

`Engine` is the protocol that every way of running a model follows; `TorchEngine` is the readable truth, on any
device. An engine holds the weights; a `Session` holds the keys and values of a batch of sequences of one length, and
`Slots` those of sequences that come and go, each of a length of its own.

Dimensions: B batch, T time, V vocabulary, L layers, G key/value heads, S cached time, E width of a head.
"""

from collections.abc import Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.layers import PackedLinear, keep_codes
from bitnet.model import Transformer
from bitnet.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from bitnet.tokenizer import Tokenizer


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
class Part:
    """Ids that go behind what a slot holds; `every`: logits of each of them are wanted, not of the last alone."""

    slot: int
    ids: Sequence[int]
    every: bool = False


class Slots(Protocol):
    """Sequences that come and go, each with a position of its own."""

    count: int
    limit: int

    def length(self, slot: int) -> int:
        """Tokens the slot holds."""

    def truncate(self, slot: int, length: int) -> None:
        """Keep the slot's first `length` tokens; 0 empties it. Raises BitNetError for more than there are."""

    def forward(self, parts: Sequence[Part]) -> list[Tensor]:
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

    def slots(self, count: int, limit: int | None = None) -> Slots:
        """`count` empty slots of `limit` tokens each (default: the model's context)."""

    def logits(self, ids: Tensor) -> Tensor:
        """Score: ids [T] or [B, T] int64 -> logits [T, V] or [B, T, V] fp32 on the CPU, from an empty cache."""


class KVCache:
    """Keys and values of a batch of sequences, allocated once: per layer [B, G, S, E]."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        limit: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (2, config.num_hidden_layers, batch, config.num_key_value_heads, limit, config.head_dim)
        self._store = torch.empty(shape, device=device, dtype=dtype)
        self.position = 0
        self.layers = [_LayerView(self, i) for i in range(config.num_hidden_layers)]

    def sequence(self, number: int) -> "KVCache":
        """One of the sequences as a cache of its own, with a position of its own, in the same memory."""
        view = copy(self)
        view._store = self._store[:, :, number : number + 1]
        view.layers = [_LayerView(view, i) for i in range(len(self.layers))]
        return view

    def store(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as they are kept, [B, G, S, E] each, the unused end included."""
        keys, values = self._store[:, layer]
        return keys, values


class _LayerView:
    def __init__(self, cache: KVCache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self._cache.position, self._cache.position + k.shape[2]
        keys, values = self._cache._store[:, self._layer]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        return keys[:, :, :end], values[:, :, :end]


class TorchEngine:
    """The model as PyTorch modules: packed (`bitnet.load`) or a training model in fp32."""

    name = "torch"

    def __init__(self, model: Transformer) -> None:
        self.tokenizer: Tokenizer | None = None  # carried for the caller; an engine sees ids only
        self.model = model.eval()
        self.config = model.config
        self.device = model.model.norm.weight.device
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.prepare(keep_packed=False)

    def session(self, batch: int = 1, limit: int | None = None) -> "TorchSession":
        """Start `batch` sequences of at most `limit` tokens (default: the model's context)."""
        return TorchSession(self, batch, self.config.context if limit is None else limit)

    def slots(self, count: int, limit: int | None = None) -> "SessionSlots":
        """`count` empty slots of `limit` tokens each (default: the model's context)."""
        return SessionSlots(self, count, self.config.context if limit is None else limit)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """ids: [T] or [B, T] int64. Returns [T, V] or [B, T, V] fp32 on the CPU."""
        ids = check_ids(torch.as_tensor(ids), self.config)
        with keep_codes(self.model):
            scores: Tensor = self.model(torch.atleast_2d(ids).to(self.device)).float().cpu()
        return scores if ids.dim() == 2 else scores[0]

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Collection[int] = (),
        limit: int | None = None,
    ) -> list[int]:
        """Continue `ids`; see `stream`. Returns the new ids only."""
        return list(stream(self, ids, max_new_tokens, sampling, stop, limit))


class TorchSession:
    """A KV cache and the model that fills it."""

    def __init__(self, engine: TorchEngine, batch: int, limit: int) -> None:
        check_room(batch, limit)
        self._model, self._device, self._limit = engine.model, engine.device, limit
        self._cache = KVCache(engine.config, batch, limit, engine.device)
        self._batch, self._config = batch, engine.config

    @property
    def position(self) -> int:
        """Tokens held so far."""
        return self._cache.position

    @property
    def limit(self) -> int:
        """Tokens that fit."""
        return self._limit

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Append ids [B, T] int64, T >= 1. Returns the logits of the last position, [B, V] fp32."""
        return self._model.logits(self._append(ids)[:, -1]).float()

    def decode(self, ids: Tensor) -> Tensor:
        """Append one id a sequence, [B] int64. Returns logits [B, V] fp32."""
        return self.prefill(ids[:, None])

    @torch.inference_mode()
    def score(self, ids: Tensor) -> Tensor:
        """Append ids [B, T] int64, T >= 1. Returns the logits of every position, [B, T, V] fp32."""
        return self._model.logits(self._append(ids)).float()

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of every sequence. Raises BitNetError for more than there are."""
        check_length(length, self.position)
        self._cache.position = length

    def _append(self, ids: Tensor) -> Tensor:
        ids = check_prefill(ids, self._config, self._batch, self.position, self.limit)
        hidden = self._model.hidden(ids.to(self._device), self.position, self._cache.layers)
        self._cache.position += ids.shape[1]
        return hidden


class SessionSlots:
    """Slots of any engine: a session each, one after the other."""

    def __init__(self, engine: Engine, count: int, limit: int) -> None:
        check_room(count, limit)
        self.count, self.limit, self._config = count, limit, engine.config
        self._sessions = [engine.session(1, limit) for _ in range(count)]

    def length(self, slot: int) -> int:
        """Tokens the slot holds."""
        check_slot(slot, self.count)
        return self._sessions[slot].position

    def truncate(self, slot: int, length: int) -> None:
        """Keep the slot's first `length` tokens; 0 empties it. Raises BitNetError for more than there are."""
        check_slot(slot, self.count)
        self._sessions[slot].truncate(length)

    def forward(self, parts: Sequence[Part]) -> list[Tensor]:
        """See `Slots.forward`."""
        rows = check_parts(parts, self, self._config)
        return [self._read(part, ids[None]) for part, ids in zip(parts, rows)]

    def _read(self, part: Part, ids: Tensor) -> Tensor:
        session = self._sessions[part.slot]
        if part.every:
            return session.score(ids)[0]
        logits = session.decode(ids[0]) if ids.shape[1] == 1 else session.prefill(ids)  # decoding may be a graph
        return logits[0].clone()  # a session may overwrite what it returned


def stream(
    engine: Engine,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
    limit: int | None = None,
) -> Iterator[int]:
    """Continue `ids` on any engine, one id at a time; ends after `max_new_tokens` or an id in `stop`.

    limit: tokens the cache holds (default: the model's context). A text that outgrows it goes on from the last
    half of what it has, read again from position 0: the model never sees a position it was not trained for.
    Raises BitNetError for an empty prompt and for ids the model does not have.
    """
    limit = limit or engine.config.context
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
            kept = history if len(history) <= limit and session is None else history[-max(1, limit // 2) :]
            session = engine.session(1, limit)
            logits = session.prefill(torch.tensor([kept]))
        token = int(sampler.draw(logits))
        if token in stop:
            return
        history.append(token)
        yield token


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


def check_slot(slot: int, count: int) -> None:
    """Refuse a slot that is not there."""
    if not 0 <= slot < count:
        raise BitNetError(f"slot: got {slot}, expected 0 to {count - 1}")


def check_parts(parts: Sequence[Part], slots: Slots, config: ModelConfig) -> list[Tensor]:
    """The ids of each part, [T] int64. Raises BitNetError for parts that `slots` cannot take."""
    taken = [part.slot for part in parts]
    if not parts or len(set(taken)) < len(taken):
        raise BitNetError(f"forward: got parts of slots {taken}, expected one part or more, each of another slot")
    rows = []
    for part in parts:
        check_slot(part.slot, slots.count)
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
