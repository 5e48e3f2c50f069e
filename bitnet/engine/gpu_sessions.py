"""Sessions of the GPU engine: the KV cache, prefill in chunks, and the decode step that a CUDA graph replays.

Dimensions: B batch, T time, M rows (tokens), V vocabulary, D model, E width of a head.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.engine.base import BatchEntry, check_entries, check_length, check_prefill, check_sequence, read_entry
from bitnet.engine.cache import KVCache
from bitnet.engine.gpu_model import GpuModel, Layer
from bitnet.errors import BitNetError
from bitnet.kernels.gpu import device as gpu
from bitnet.kernels.gpu import steps
from bitnet.layers import attend, rotate

_CHUNK = 4096  # rows of a prefill chunk: GEMMs gain nothing beyond, and sums of 2 * 6912 columns are 226 MB
_LOGIT_BYTES = 2**30  # of logits that scoring makes at once


class _HasModel(Protocol):
    _model: GpuModel


S = TypeVar("S", bound=_HasModel)
P = ParamSpec("P")
R = TypeVar("R")


def _on_device(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that launches kernels, with the model's GPU as the current one."""

    @functools.wraps(method)
    def inner(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with gpu.current(self._model.device):
            return method(self, *args, **kwargs)

    return inner


class TritonSession:
    """A KV cache and the decode step over it; see `bitnet.engine.base.Session`.

    cache: where its sequences are kept; default: in one of its own. graph: see `_DecodeStep`.
    """

    def __init__(self, model: GpuModel, batch: int, limit: int, *, graph: bool, cache: KVCache | None = None) -> None:
        self._model, self._batch, self._limit = model, batch, limit
        self._cache = cache or KVCache(model.config, batch, limit, model.device)
        self._rotary = model.rotary(limit)
        self._step = _DecodeStep(model, self._cache, batch, graph=graph)

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
        ids = check_prefill(ids, self._model.config, self._batch, self.position, self.limit)
        return self._model.head_logits(self._states(ids.to(self._model.device), last_only=True))

    @_on_device
    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """Append one id to each sequence, [B] int64. Returns logits [B, V] fp32, overwritten by the next call.

        Ids that are on the device already are not read back: one outside the vocabulary gives logits of NaN.
        """
        if ids.device.type == "cpu":
            ids = check_prefill(ids[:, None], self._model.config, self._batch, self.position, self.limit)[:, 0]
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
        model = self._model
        ids = check_prefill(ids, model.config, self._batch, self.position, self.limit)
        states = self._states(ids.to(model.device))
        scores = torch.empty(states.shape[1], model.config.vocab_size)
        step = max(1, _LOGIT_BYTES // (4 * model.config.vocab_size))
        for m in range(0, states.shape[1], step):
            scores[m : m + step] = model.head_logits(states[:, m : m + step].contiguous()).cpu()
        return scores.view(*ids.shape, -1)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of every sequence. Raises BitNetError for more than there are."""
        check_length(length, self.position)
        self.move(length)

    def move(self, length: int) -> None:
        """Set the number of tokens held, on the host and on the device."""
        self._cache.position = length
        self._step.positions.fill_(length)

    def _states(self, ids: Tensor, *, last_only: bool = False) -> Tensor:
        """Append ids [B, T] on the device. Returns the states [3, M, D] of all rows, or of each sequence's last one."""
        (B, T), model = ids.shape, self._model
        chunk = max(1, _CHUNK // B)
        found = []
        for start in range(0, T, chunk):
            part = ids[:, start : start + chunk]
            x, sums = self._prefill_chunk(part)
            is_last = start + chunk >= T
            if last_only and not is_last:
                continue
            if last_only:
                newest = torch.arange(1, B + 1, device=x.device) * part.shape[1] - 1
                x, sums = x[newest], steps.Sums(sums.acc[:, newest], sums.inv_scale[newest])
            found.append(model.states(x, sums).view(3, B, -1, x.shape[-1]))
        self.move(self.position)
        return torch.cat(found, dim=2).flatten(1, 2)

    def _prefill_chunk(self, ids: Tensor) -> tuple[Tensor, steps.Sums]:
        """`GpuModel.forward` of ids [B, T], with torch's attention over the cache."""
        end = self.position + ids.shape[1]
        cos, sin = (table[self.position : end] for table in self._rotary)

        def attention(i: int, layer: Layer, sums: steps.Sums) -> steps.Codes:
            y = self._prefill_attention(i, layer, sums, ids.shape, (cos, sin))
            return steps.rows(y, layer.attention_gain, self._model.config.rms_norm_eps)

        x, sums = self._model.forward(ids.reshape(-1), attention)
        self._cache.position = end
        return x, sums

    def _prefill_attention(
        self, i: int, layer: Layer, sums: steps.Sums, shape: torch.Size, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        (B, T), heads = shape, layer.heads
        E, sizes = heads.width, (heads.query * heads.width, heads.key * heads.width, heads.key * heads.width)
        acc = sums.acc[0] if sums.acc.shape[0] == 1 else sums.acc.sum(dim=0, dtype=torch.int32)
        q, k, v = (
            (part.float() * (scale / sums.inv_scale[:, None])).view(B, T, -1, E).transpose(1, 2)
            for part, scale in zip(acc.split(sizes, dim=1), layer.qkv.scales, strict=True)
        )
        if heads.q_gain is not None and heads.k_gain is not None:
            q = F.rms_norm(q, (E,), heads.q_gain, heads.eps)
            k = F.rms_norm(k, (E,), heads.k_gain, heads.eps)
        k, v = self._cache.layers[i].extend(rotate(k, rotary), v)
        return attend(rotate(q, rotary), k, v).transpose(1, 2).reshape(B * T, -1)


class _DecodeStep:
    """One new token for each of B rows. graph: record the step into a CUDA graph, and replay that from then on.

    positions, sequences: [B] int64 on the device: the length of each row's sequence, which every step raises by one,
    and its number in the cache.
    """

    def __init__(self, model: GpuModel, cache: KVCache, rows: int, *, graph: bool) -> None:
        self._model, self._cache, self._has_graph = model, cache, graph
        self._rotary = model.rotary(cache.store(0)[0].shape[2])
        self._ids, self.positions = torch.zeros(2, rows, dtype=torch.int64, device=model.device)
        self.sequences = torch.arange(rows, device=model.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None  # where the graph writes
        self._is_warm = False

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [B] int64. Returns logits [B, V] fp32 on the device, overwritten by the next call."""
        self._ids.copy_(ids, non_blocking=True)
        # The first step runs without a graph: it compiles kernels and picks tiles, which a capture may not.
        if not self._has_graph or not self._is_warm:
            self._is_warm = True
            return self._run()
        if self._graph is None:
            torch.cuda.synchronize(self._model.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._run()
            self._graph = graph
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _run(self) -> Tensor:
        model, pdl = self._model, self._model.pdl

        def attention(i: int, layer: Layer, sums: steps.Sums) -> steps.Codes:
            return steps.attend(
                sums,
                layer.qkv.scales,
                layer.heads,
                self._rotary,
                *self._cache.store(i),
                self.positions,
                self.sequences,
                layer.attention_gain,
                model.config.rms_norm_eps,
                pdl,
            )

        x, sums = model.forward(self._ids, attention, pdl=pdl)
        logits = model.head_logits(model.states(x, sums, pdl=pdl), pdl=pdl)
        self.positions.add_(1)
        return logits


class TritonSequenceBatch:
    """Sequences that join and leave in one cache: single ids in one decode step, longer entries one by one.

    See `bitnet.engine.base.SequenceBatch`.
    """

    def __init__(self, model: GpuModel, count: int, limit: int, *, graph: bool) -> None:
        self.count, self.limit, self._model = count, limit, model
        # A row that is idle in a step writes after the end of its sequence: a full one needs room for that.
        self._cache = KVCache(model.config, count, limit + 1, model.device)
        self._sessions = [
            TritonSession(model, 1, limit, graph=graph, cache=self._cache.sequence(i)) for i in range(count)
        ]
        self._step = _DecodeStep(model, self._cache, count, graph=graph)

    def length(self, sequence: int) -> int:
        """Tokens the sequence holds."""
        check_sequence(sequence, self.count)
        return self._sessions[sequence].position

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the sequence's first `length` tokens; 0 empties it. Raises BitNetError for more than there are."""
        check_sequence(sequence, self.count)
        self._sessions[sequence].truncate(length)

    @_on_device
    @torch.inference_mode()
    def forward(self, entries: Sequence[BatchEntry]) -> list[Tensor]:
        """See `SequenceBatch.forward`. Logits of single ids stay on the device."""
        rows = check_entries(entries, self, self._model.config)
        single = {e.sequence: int(ids) for e, ids in zip(entries, rows) if len(ids) == 1 and not e.every}
        step = self._decode(single)
        return [
            step[entry.sequence] if entry.sequence in single else read_entry(self._sessions[entry.sequence], entry, ids)
            for entry, ids in zip(entries, rows)
        ]

    def _decode(self, ids: dict[int, int]) -> Tensor:
        """One step: sequence -> id. Returns logits [count, V]; the rows of other sequences mean nothing."""
        if not ids:
            return torch.empty(0)
        lengths = [session.position for session in self._sessions]
        self._step.positions.copy_(torch.tensor(lengths), non_blocking=True)
        logits = self._step(torch.tensor([ids.get(sequence, 0) for sequence in range(self.count)])).clone()
        for sequence in ids:
            self._sessions[sequence].move(lengths[sequence] + 1)
        return logits
