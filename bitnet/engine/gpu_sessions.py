"""Sessions and slots of the GPU engine: the KV cache, prefill in pieces, and the decode step that a CUDA graph replays.

Dimensions: B batch, T time, M rows, V vocabulary, D model, H heads, G key/value heads, E width of a head, N slots.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from bitnet.engine.base import BatchEntry, check_entries, check_length, check_prefill, check_sequence
from bitnet.engine.cache import KVCache
from bitnet.errors import BitNetError
from bitnet.kernels.gpu import device as gpu
from bitnet.kernels.gpu import steps
from bitnet.layers import attend, rotate

if TYPE_CHECKING:
    from bitnet.engine.gpu import Layer, TritonEngine

MAX_BATCH = 64
_CHUNK = 4096  # rows of a prefill chunk: past that the GEMMs gain nothing, and sums of 2 * 6912 columns are 226 MB
_LOGIT_BYTES = 2**30  # of logits made at once when scoring


class _HasEngine(Protocol):
    _engine: "TritonEngine"


S = TypeVar("S", bound=_HasEngine)
P = ParamSpec("P")
R = TypeVar("R")


def _on_device(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that launches kernels, with the engine's GPU as the current one."""

    @functools.wraps(method)
    def inner(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with gpu.current(self._engine.device):
            return method(self, *args, **kwargs)

    return inner


class TritonSession:
    """A KV cache, and the decode step over it.

    cache: where its sequences are kept; None: in one of its own.
    """

    def __init__(self, engine: "TritonEngine", batch: int, limit: int, cache: KVCache | None = None) -> None:
        _check_batch(batch, limit)
        self._engine, self._batch, self._limit = engine, batch, limit
        self._cache = cache or KVCache(engine.config, batch, limit, engine.device, engine.kv_dtype)
        self._rotary = engine.rotary(limit)
        self._step = _DecodeStep(engine, self._cache, batch)

    @property
    def position(self) -> int:
        """Tokens held so far."""
        return self._cache.position

    @property
    def limit(self) -> int:
        """Tokens that fit."""
        return self._limit

    @_on_device
    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Append ids [B, T] int64, T >= 1. Returns the logits of the last position, [B, V] fp32."""
        ids = check_prefill(ids, self._engine.config, self._batch, self.position, self.limit)
        terms = self.states(ids.to(self._engine.device), last_only=True)
        return steps.head(terms, self._engine.head)

    @_on_device
    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """Append one id a sequence, [B] int64. Returns logits [B, V] fp32, overwritten by the next call.

        Ids that are on the device already are not read back: one outside the vocabulary gives logits of NaN.
        """
        if ids.device.type == "cpu":
            ids = check_prefill(ids[:, None], self._engine.config, self._batch, self.position, self.limit)[:, 0]
        elif ids.shape != (self._batch,) or ids.dtype != torch.int64 or self.position >= self.limit:
            raise BitNetError(
                f"decode: got {ids.dtype} {tuple(ids.shape)} after {self.position} of {self.limit} tokens, expected "
                f"int64 [{self._batch}] and room for one more"
            )
        logits = self._step(ids)
        self._cache.position += 1
        return logits

    @_on_device
    @torch.inference_mode()
    def score(self, ids: Tensor) -> Tensor:
        """Append ids [B, T] int64, T >= 1. Returns the logits of every position, [B, T, V] fp32, on the CPU."""
        engine = self._engine
        ids = check_prefill(ids, engine.config, self._batch, self.position, self.limit)
        terms = self.states(ids.to(engine.device))
        scores = torch.empty(terms.shape[1], engine.config.vocab_size)
        step = max(1, _LOGIT_BYTES // (4 * engine.config.vocab_size))
        for m in range(0, terms.shape[1], step):
            scores[m : m + step] = steps.head(terms[:, m : m + step].contiguous(), engine.head).cpu()
        return scores.view(*ids.shape, -1)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of every sequence. Raises BitNetError for more than there are."""
        check_length(length, self.position)
        self._move(length)

    def advance(self) -> None:
        """Count a token that a step over the shared cache has appended."""
        self._move(self.position + 1)

    def _move(self, length: int) -> None:
        self._cache.position = length
        self._step.positions.fill_(length)

    def states(self, ids: Tensor, *, last_only: bool = False) -> Tensor:
        """Append ids [B, T] on the device. Returns the normed states [3, M, D] of all rows, or of the last ones."""
        engine, (B, T) = self._engine, ids.shape
        chunk = max(1, _CHUNK // B)
        parts = []
        for start in range(0, T, chunk):
            part = ids[:, start : start + chunk]
            x, sums, scales = self._prefill_rows(part)
            ends = start + chunk >= T
            if last_only and not ends:
                continue
            if last_only:
                newest = torch.arange(1, B + 1, device=x.device) * part.shape[1] - 1
                x, sums = x[newest], steps.Sums(sums.acc[:, newest], sums.inv_scale[newest])
            terms = steps.last(x, sums, scales, engine.norm, engine.config.rms_norm_eps)
            parts.append(terms.view(3, B, -1, terms.shape[-1]))
        self._move(self.position)
        return torch.cat(parts, dim=2).flatten(1, 2)

    def _prefill_rows(self, ids: Tensor) -> tuple[Tensor, steps.Sums, Tensor]:
        """All blocks over ids [B, T]: residual stream [M, D], and the last product, not added yet."""
        engine, config, eps = self._engine, self._engine.config, self._engine.config.rms_norm_eps
        start = self.position
        end = start + ids.shape[1]
        rotary = self._rotary[0][start:end], self._rotary[1][start:end]
        layers = engine.layers
        x, rows = steps.enter(ids.reshape(-1), engine.embedding, layers[0].input_gain, eps)
        for i, layer in enumerate(layers):
            y = self._prefill_attention(layer, layer.qkv(rows), ids.shape, rotary, i)
            rows = steps.rows(y, layer.attention_gain, eps)
            rows = steps.add(x, layer.o(rows), layer.o.scales, layer.ffn_gain, eps)
            rows = steps.gate(
                layer.gate_up(rows), layer.gate_up.scales, layer.down_gain, eps, config.hidden_act == "relu2"
            )
            sums = layer.down(rows)
            if i + 1 < len(layers):
                rows = steps.add(x, sums, layer.down.scales, layers[i + 1].input_gain, eps)
        self._cache.position = end
        return x, sums, layers[-1].down.scales

    def _prefill_attention(
        self, layer: "Layer", sums: steps.Sums, shape: torch.Size, rotary: tuple[Tensor, Tensor], i: int
    ) -> Tensor:
        (B, T), heads = shape, layer.heads
        E, sizes = heads.width, (heads.query * heads.width, heads.key * heads.width, heads.key * heads.width)
        acc = sums.acc[0] if sums.acc.shape[0] == 1 else sums.acc.sum(dim=0, dtype=torch.int32)
        q, k, v = (
            (part.float() * (scale / sums.inv_scale[:, None])).view(B, T, -1, E).transpose(1, 2)
            for part, scale in zip(acc.split(sizes, dim=1), layer.qkv.scales, strict=True)
        )
        if heads.q_gain is not None and heads.k_gain is not None:
            q = torch.nn.functional.rms_norm(q, (E,), heads.q_gain, heads.eps)
            k = torch.nn.functional.rms_norm(k, (E,), heads.k_gain, heads.eps)
        dtype = self._engine.kv_dtype
        q, k, v = rotate(q, rotary).to(dtype), rotate(k, rotary).to(dtype), v.to(dtype)
        k, v = self._cache.layers[i].extend(k, v)
        return attend(q, k, v).transpose(1, 2).reshape(B * T, -1).float()


class _DecodeStep:
    """One new token for each of B rows, recorded into a CUDA graph where there is one.

    positions, sequences: [B] int64 on the device: the length of each row's sequence, which every step raises by one,
    and its number in the cache.
    """

    def __init__(self, engine: "TritonEngine", cache: KVCache, rows: int) -> None:
        self._engine, self._cache = engine, cache
        self._rotary = engine.rotary(cache.store(0)[0].shape[2])
        self._ids, self.positions = torch.zeros(2, rows, dtype=torch.int64, device=engine.device)
        self.sequences = torch.arange(rows, device=engine.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None  # where the graph writes
        self._warm = False

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [B] int64. Returns logits [B, V] fp32 on the device, overwritten by the next call."""
        self._ids.copy_(ids, non_blocking=True)
        # The first step runs as it is: it compiles kernels and picks tiles, which a capture may not.
        if not self._engine.graph or not self._warm:
            self._warm = True
            return self._run()
        if self._graph is None:
            torch.cuda.synchronize(self._engine.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._run()
            self._graph = graph
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _run(self) -> Tensor:
        engine, config, pdl = self._engine, self._engine.config, self._engine.pdl
        eps, layers = config.rms_norm_eps, engine.layers
        x, rows = steps.enter(self._ids, engine.embedding, layers[0].input_gain, eps)
        for i, layer in enumerate(layers):
            rows = steps.attend(
                layer.qkv(rows, pdl),
                layer.qkv.scales,
                layer.heads,
                self._rotary,
                *self._cache.store(i),
                self.positions,
                self.sequences,
                layer.attention_gain,
                eps,
                pdl,
            )
            rows = steps.add(x, layer.o(rows, pdl), layer.o.scales, layer.ffn_gain, eps, pdl)
            rows = steps.gate(
                layer.gate_up(rows, pdl), layer.gate_up.scales, layer.down_gain, eps, config.hidden_act == "relu2", pdl
            )
            sums = layer.down(rows, pdl)
            if i + 1 < len(layers):
                rows = steps.add(x, sums, layer.down.scales, layers[i + 1].input_gain, eps, pdl)
        terms = steps.last(x, sums, layers[-1].down.scales, engine.norm, eps, pdl)
        logits = steps.head(terms, engine.head, pdl)
        self.positions.add_(1)
        return logits


class TritonSequenceBatch:
    """Sequences that come and go in one cache: single ids in one decode step, longer pieces one by one."""

    def __init__(self, engine: "TritonEngine", count: int, limit: int) -> None:
        _check_batch(count, limit)
        self.count, self.limit, self._engine = count, limit, engine
        # A row that has nothing to do in a step writes behind its sequence, for which a full one needs room.
        self._cache = KVCache(engine.config, count, limit + 1, engine.device, engine.kv_dtype)
        self._sessions = [TritonSession(engine, 1, limit, self._cache.sequence(i)) for i in range(count)]
        self._step = _DecodeStep(engine, self._cache, count)

    def length(self, slot: int) -> int:
        """Tokens the slot holds."""
        check_sequence(slot, self.count)
        return self._sessions[slot].position

    def truncate(self, slot: int, length: int) -> None:
        """Keep the slot's first `length` tokens; 0 empties it. Raises BitNetError for more than there are."""
        check_sequence(slot, self.count)
        self._sessions[slot].truncate(length)

    @_on_device
    @torch.inference_mode()
    def forward(self, parts: Sequence[BatchEntry]) -> list[Tensor]:
        """See `SequenceBatch.forward`. Logits of single ids are on the device, and their own."""
        rows = check_entries(parts, self, self._engine.config)
        single = [len(ids) == 1 and not part.every for part, ids in zip(parts, rows, strict=True)]
        step = self._decode({p.slot: int(ids) for p, ids, one in zip(parts, rows, single, strict=True) if one})
        return [
            step[part.slot] if one else self._read(part, ids[None])
            for part, ids, one in zip(parts, rows, single, strict=True)
        ]

    def _decode(self, ids: dict[int, int]) -> Tensor:
        """One step: slot -> id. Returns logits [count, V]; those of other slots mean nothing."""
        if not ids:
            return torch.empty(0)
        lengths = [session.position for session in self._sessions]
        self._step.positions.copy_(torch.tensor(lengths), non_blocking=True)
        logits = self._step(torch.tensor([ids.get(slot, 0) for slot in range(self.count)])).clone()
        for slot in ids:
            self._sessions[slot].advance()
        return logits

    def _read(self, part: BatchEntry, ids: Tensor) -> Tensor:
        session = self._sessions[part.slot]
        return session.score(ids)[0] if part.every else session.prefill(ids)[0]


def _check_batch(batch: int, limit: int) -> None:
    if not 1 <= batch <= MAX_BATCH or limit < 1:
        raise BitNetError(
            f"session: got batch {batch} and limit {limit}, expected a batch of 1 to {MAX_BATCH} and a limit of 1 or "
            "more"
        )
