"""The C++ engine: a packed model on a CPU, with the forward pass of all layers in kernels/cpu/.

Weights are rearranged once, at load. The embedding, and a head in bf16, are read from the mapped file, so that a loaded
model takes the pages of its file plus one copy of the projections.

Dimensions: B batch, T time, V vocabulary, E width of a head.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.engine.base import BatchEntry, Engine, check_entries, check_length, check_prefill, check_sequence
from bitnet.errors import BitNetError
from bitnet.files.tensors import PROJECTIONS, norm_parameters
from bitnet.kernels import native
from bitnet.layers import rotary_table
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
        return "the C++ engine runs ternary and binary models, this one has float linears"
    return native.why_not()


class CpuEngine(Engine):
    """A packed model in C++. Removes each tensor from `tensors` (named as in files/packed_layout.py) once it is loaded.

    head: "file" (as stored, exact), "int8" (one scale per row) or "int4" (one scale per 32 weights: 4.5 bits each).
    cache: dtype of keys and values, "fp32" (exact), "bf16" or "int8". docs/engines.md says what the rounding costs.
    threads: 1 to 1,024; default: torch's, at most the cores this process may use.
    progress: called with the number of each layer that is loaded.
    Raises BitNetError for a config it cannot run and for unknown options; ValueError for a BITNET_CPU, or a number of
    threads, that cannot be had.
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
        _check_options(config, head, cache)
        self.config, self.cache = config, cache
        self.instruction_set = native.select()
        self._rotary_lock = threading.Lock()
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
        self._load_embeddings(tensors, head)

    def _load_layer(self, index: int, tensors: dict[str, Tensor]) -> None:
        prefix = f"model.layers.{index}."
        projections = []
        for name in PROJECTIONS:
            scale = float(tensors.pop(f"{prefix}{name}.weight_scale"))
            projections.append((tensors.pop(f"{prefix}{name}.weight").numpy(), scale))
        norms = {key: tensors.pop(f"{prefix}{name}.weight", None) for key, name in _NORMS.items()}
        self._engine.layer(index, projections, **{key: None if x is None else x.numpy() for key, x in norms.items()})

    def _load_embeddings(self, tensors: dict[str, Tensor], head: str) -> None:
        embedding = _embedding(tensors, "model.embed_tokens")
        own_head = embedding if self.config.tie_word_embeddings else _embedding(tensors, "lm_head")
        final_norm = tensors.pop("model.norm.weight").numpy()
        self._engine.embeddings(*embedding, *own_head, final_norm, head_bits=_HEAD_BITS[head])

    def _rotary(self, positions: int) -> tuple[Any, Any]:
        half = self.config.head_dim // 2
        cos, sin = rotary_table(self.config, positions, torch.device("cpu"))
        return cos[:, :half].contiguous().numpy(), sin[:, :half].contiguous().numpy()

    @property
    def weight_bytes(self) -> int:
        """See `Engine.weight_bytes`."""
        return int(self._engine.projection_bytes + self._engine.head_bytes) + 4 * norm_parameters(self.config)

    def _session(self, batch: int, limit: int) -> "CpuSession":
        return CpuSession(self, batch, self._with_rotary(limit))

    def _sequence_batch(self, count: int, limit: int) -> "CpuSequenceBatch":
        return CpuSequenceBatch(self, count, self._with_rotary(limit))

    def _with_rotary(self, limit: int) -> int:
        """`limit`, with rotary tables for as many positions; beyond the context these grow in powers of two."""
        with self._rotary_lock:
            if limit > self._positions:
                positions = 1 << (limit - 1).bit_length()
                self._engine.rotary(*self._rotary(positions))
                self._positions = positions
        return limit

    def _logits(self, ids: Tensor) -> Tensor:
        return self.session(*ids.shape).score(ids)


class CpuSession:
    """Keys and values of a batch of sequences, in C++; see `bitnet.engine.base.Session`."""

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
        """Append one id to each sequence, [B] int64. Returns logits [B, V] fp32."""
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
    """Sequences that join and leave, in C++: one pass over all entries; see `bitnet.engine.base.SequenceBatch`."""

    def __init__(self, engine: CpuEngine, count: int, limit: int) -> None:
        self.count, self.limit, self._config = count, limit, engine.config
        self._session: Any = native.module().Session(engine._engine, count, limit, engine.cache)

    def length(self, sequence: int) -> int:
        """Tokens the sequence holds."""
        check_sequence(sequence, self.count)
        return int(self._session.position(sequence))

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the sequence's first `length` tokens; 0 empties it. Raises BitNetError for more than there are."""
        check_length(length, self.length(sequence))
        self._session.truncate(sequence, length)

    def forward(self, entries: Sequence[BatchEntry]) -> list[Tensor]:
        """See `SequenceBatch.forward`."""
        rows = check_entries(entries, self, self._config)
        counts = [len(ids) for ids in rows]
        wanted = [n if entry.every else 1 for entry, n in zip(entries, counts)]
        out = torch.empty(sum(wanted), self._config.vocab_size)
        sequences, every = [entry.sequence for entry in entries], [entry.every for entry in entries]
        self._session.extend(sequences, counts, every, torch.cat(rows).numpy(), out.numpy())
        return [logits if entry.every else logits[0] for entry, logits in zip(entries, out.split(wanted))]


def _check_options(config: ModelConfig, head: str, cache: str) -> None:
    reason = why_not(config)
    if reason:
        raise BitNetError(f"engine: {reason}")
    for option, value, known in (("head", head, HEADS), ("cache", cache, CACHES)):
        if value not in known:
            raise BitNetError(f"{option}: got '{value}', expected one of {', '.join(known)}")


def _embedding(tensors: dict[str, Tensor], name: str) -> tuple[Any, Any]:
    """An embedding as the file holds it, bf16 viewed as uint16, and its scales where it is int8."""
    weight, scale = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.scale", None)
    values = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
    return values.numpy(), None if scale is None else scale.flatten().numpy()
