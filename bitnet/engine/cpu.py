"""The C++ engine: a packed model on a CPU, the whole forward step in kernels/cpu/, behind the Engine protocol.

The weights are rearranged once, at load; the embedding (and a head in bf16) is read from the mapped file, so that a
loaded model takes its file's pages plus one copy of the projections.

Dimensions: B batch, T time, V vocabulary, E width of a head.
"""

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.engine.base import (
    BatchEntry,
    check_entries,
    check_ids,
    check_length,
    check_prefill,
    check_room,
    check_sequence,
)
from bitnet.engine.sampling import Sampling
from bitnet.engine.stream import stream
from bitnet.errors import BitNetError
from bitnet.files.tensors import PROJECTIONS
from bitnet.kernels import native
from bitnet.layers import rotary_table
from bitnet.text.tokenizer import Tokenizer
from bitnet.threads import default_threads

CACHES = ("fp32", "bf16", "int8")
HEADS = ("file", "int8", "int4")
_HEAD_BITS = {"file": 0, "int8": 8, "int4": 4}
_NORMS = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


def why_not(config: ModelConfig) -> str | None:
    """Why a model of this config cannot run in the C++ engine here; None where it can."""
    if config.linear == "float":
        return "the C++ engine runs ternary and binary models, this one has plain linears"
    return native.why_not()


class CpuEngine:
    """A packed model in C++. Removes each tensor from `tensors` (names: bitnet/files/packed.py) once it is loaded.

    head: "file" (as stored, exact), "int8" (a scale a row) or "int4" (a scale for 32 weights, 4.5 bits each).
    cache: what keys and values are kept in, "fp32" (exact), "bf16" or "int8". README says what rounding costs.
    threads: 1 to 1,024; default: torch's, at most the cores this process may use.
    progress: called after each layer with its number.
    Raises BitNetError for a config it cannot run and for unknown options; ValueError for a BITNET_CPU it cannot have
    and for threads that it cannot.
    """

    name = "cpu"

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, Tensor],
        *,
        head: str = "file",
        cache: str = "fp32",
        threads: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        reason = why_not(config)
        if reason:
            raise BitNetError(f"engine: {reason}")
        for option, value, known in (("head", head, HEADS), ("cache", cache, CACHES)):
            if value not in known:
                raise BitNetError(f"{option}: got '{value}', expected one of {', '.join(known)}")
        self.tokenizer: Tokenizer | None = None  # carried for the caller; an engine sees ids only
        self.config, self.cache = config, cache
        self.instruction_set = native.select()
        self._growing = threading.Lock()
        self._positions = config.context
        cos, sin = self._rotary(self._positions)
        self._engine: Any = native.module().Engine(
            isa=self.instruction_set,
            threads=default_threads() if threads is None else threads,
            vocab=config.vocab_size,
            width=config.hidden_size,
            ffn=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            squared_relu=config.hidden_act == "relu2",
            sub_norms=config.sub_norms,
            qk_norm=config.qk_norm,
            eps=config.rms_norm_eps,
            cos=cos,
            sin=sin,
        )
        for index in range(config.num_hidden_layers):
            self._load_layer(index, tensors)
            if progress:
                progress(index)
        self._load_tables(tensors, head)

    def _load_layer(self, index: int, tensors: dict[str, Tensor]) -> None:
        prefix = f"model.layers.{index}."
        parts = []
        for name in PROJECTIONS:
            scale = float(tensors.pop(f"{prefix}{name}.weight_scale"))
            parts.append((tensors.pop(f"{prefix}{name}.weight").numpy(), scale))
        norms = {key: tensors.pop(f"{prefix}{name}.weight", None) for key, name in _NORMS.items()}
        self._engine.layer(index, parts, **{key: None if x is None else x.numpy() for key, x in norms.items()})

    def _load_tables(self, tensors: dict[str, Tensor], head: str) -> None:
        embedding = _table(tensors, "model.embed_tokens")
        own_head = embedding if self.config.tie_word_embeddings else _table(tensors, "lm_head")
        final_norm = tensors.pop("model.norm.weight").numpy()
        self._engine.tables(*embedding, *own_head, final_norm, head_bits=_HEAD_BITS[head])

    def _rotary(self, positions: int) -> tuple[Any, Any]:
        half = self.config.head_dim // 2
        return tuple(table[:, :half].contiguous().numpy() for table in rotary_table(self.config, positions, _CPU))  # type: ignore[return-value]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the rearranged projections."""
        return int(self._engine.weight_bytes)

    @property
    def head_bytes(self) -> int:
        """Bytes of the head, which a decoded token reads whole."""
        return int(self._engine.head_bytes)

    def session(self, batch: int = 1, limit: int | None = None) -> "CpuSession":
        """Start `batch` sequences of at most `limit` tokens (default: the model's context)."""
        return CpuSession(self, batch, self._room(batch, limit))

    def slots(self, count: int, limit: int | None = None) -> "CpuSequenceBatch":
        """`count` empty slots of `limit` tokens each (default: the model's context)."""
        return CpuSequenceBatch(self, count, self._room(count, limit))

    def _room(self, batch: int, limit: int | None) -> int:
        limit = self.config.context if limit is None else limit
        check_room(batch, limit)
        with self._growing:  # beyond the context: rotary tables in powers of two
            if limit > self._positions:
                positions = 1 << (limit - 1).bit_length()
                self._engine.rotary(*self._rotary(positions))
                self._positions = positions
        return limit

    def logits(self, ids: Tensor) -> Tensor:
        """ids: [T] or [B, T] int64. Returns [T, V] or [B, T, V] fp32."""
        ids = check_ids(torch.as_tensor(ids), self.config)
        rows = torch.atleast_2d(ids)
        scores = self.session(*rows.shape).score(rows)
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


class CpuSession:
    """Keys and values of a batch of sequences, in C++."""

    def __init__(self, engine: CpuEngine, batch: int, limit: int) -> None:
        self._config, self._batch, self._limit = engine.config, batch, limit
        self._session: Any = native.module().Session(engine._engine, batch, limit, engine.cache)

    @property
    def position(self) -> int:
        """Tokens held so far."""
        return int(self._session.position(0))

    @property
    def limit(self) -> int:
        """Tokens that fit."""
        return self._limit

    def prefill(self, ids: Tensor) -> Tensor:
        """Append ids [B, T] int64, T >= 1. Returns the logits of the last position, [B, V] fp32."""
        return self._forward(ids, False)

    def decode(self, ids: Tensor) -> Tensor:
        """Append one id a sequence, [B] int64. Returns logits [B, V] fp32."""
        return self._forward(ids[:, None], False)

    def score(self, ids: Tensor) -> Tensor:
        """Append ids [B, T] int64. Returns the logits of every position, [B, T, V] fp32."""
        return self._forward(ids, True).view(*ids.shape, -1)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of every sequence. Raises BitNetError for more than there are."""
        check_length(length, self.position)
        for sequence in range(self._batch):
            self._session.truncate(sequence, length)

    def _forward(self, ids: Tensor, every: bool) -> Tensor:
        ids = check_prefill(ids, self._config, self._batch, self.position, self._limit)
        rows = ids.numel() if every else self._batch
        out = torch.empty(rows, self._config.vocab_size)
        self._session.forward(ids.cpu().contiguous().numpy(), every, out.numpy())
        return out


class CpuSequenceBatch:
    """Sequences that come and go, in C++: one pass over all parts."""

    def __init__(self, engine: CpuEngine, count: int, limit: int) -> None:
        self.count, self.limit, self._config = count, limit, engine.config
        self._session: Any = native.module().Session(engine._engine, count, limit, engine.cache)

    def length(self, slot: int) -> int:
        """Tokens the slot holds."""
        check_sequence(slot, self.count)
        return int(self._session.position(slot))

    def truncate(self, slot: int, length: int) -> None:
        """Keep the slot's first `length` tokens; 0 empties it. Raises BitNetError for more than there are."""
        check_length(length, self.length(slot))
        self._session.truncate(slot, length)

    def forward(self, parts: Sequence[BatchEntry]) -> list[Tensor]:
        """See `bitnet.engine.base.SequenceBatch.forward`."""
        rows = check_entries(parts, self, self._config)
        counts = [len(ids) for ids in rows]
        wanted = [n if part.every else 1 for part, n in zip(parts, counts)]
        out = torch.empty(sum(wanted), self._config.vocab_size)
        every = [part.every for part in parts]
        self._session.extend([part.slot for part in parts], counts, every, torch.cat(rows).numpy(), out.numpy())
        return [rows if part.every else rows[0] for part, rows in zip(parts, out.split(wanted))]


_CPU = torch.device("cpu")


def _table(tensors: dict[str, Tensor], name: str) -> tuple[Any, Any]:
    """The table as the file holds it, bf16 seen as uint16, and its scales where it is int8."""
    weight, scale = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.scale", None)
    values = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
    return values.numpy(), None if scale is None else scale.flatten().numpy()
