"""The GPU engine: packed weights, Triton kernels, and one CUDA graph for a decode step.

Same protocol and same ids as `TorchEngine`. What differs is what is in memory and what is launched: the projections are
two bits a weight in the kernels' own tiles and nowhere else, embedding and head stay as the file has them (bf16 or
int8), and a decode step is nine kernels a layer (kernels/gpu/decode.py) recorded once into a CUDA graph and replayed
with new ids. Positions and ids are in fixed device buffers; everything between lives in the graph's own memory.

Prefill runs the same kernels on all rows of the prompt, int8 tensor cores for the products and torch's attention, in
chunks of at most `_CHUNK` rows, so that a long prompt costs no more memory than a short one.

Keys and values are kept in fp32 by default, as in the torch engine: the ids are then the same but for near ties.
kv_dtype=torch.bfloat16 halves the cache and lets prefill use flash attention. pdl=True overlaps the launches of a step
(programmatic dependent launch, compute capability 9.0 or more).

Where there is no GPU, TRITON_INTERPRET=1 runs all of it on the CPU, without the graph: slow, for tests.

Dimensions: B batch, T time, M rows, V vocabulary, D model, H heads, G key/value heads, E width of a head.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitnet.engine import KVCache, SessionSlots, check_ids, check_length, check_prefill, stream
from bitnet.errors import BitNetError
from bitnet.kernels import packing
from bitnet.kernels.gpu import device as gpu
from bitnet.kernels.gpu import layout, steps
from bitnet.layers import attend, rotary_table, rotate
from bitnet.sampling import Sampling

if TYPE_CHECKING:
    from bitnet.packed import PackedModel
    from bitnet.tokenizer import Tokenizer

MAX_BATCH = 64
_CHUNK = 4096  # rows of a prefill chunk: past that the GEMMs gain nothing, and sums of 2 * 6912 columns are 226 MB
_LOGIT_BYTES = 2**30  # of logits made at once when scoring


@dataclass(frozen=True)
class _Layer:
    """One block's weights and gains on the device."""

    input_gain: Tensor
    qkv: steps.Projection
    heads: steps.Heads
    attention_gain: Tensor | None
    o: steps.Projection
    ffn_gain: Tensor
    gate_up: steps.Projection
    down_gain: Tensor | None
    down: steps.Projection


class TritonEngine:
    """Runs a packed ternary or binary model on an NVIDIA GPU.

    kv_dtype: of the cache, torch.float32 or torch.bfloat16. pdl: overlap launches; None: no. graph: record the decode
    step; None: on a GPU. Raises BitNetError for a model or a device it cannot run.
    """

    name = "triton"

    def __init__(
        self,
        packed: "PackedModel",
        device: torch.device,
        *,
        kv_dtype: torch.dtype = torch.float32,
        pdl: bool = False,
        graph: bool | None = None,
    ) -> None:
        reason = gpu.why_not(device)
        if reason:
            raise BitNetError(f"triton engine: {reason}; use --device cpu or BITNET_BACKEND=float")
        if packed.config.linear == "plain":
            raise BitNetError("triton engine: got a model with plain linears, expected packed ones; use TorchEngine")
        if kv_dtype not in (torch.float32, torch.bfloat16):
            raise BitNetError(f"triton engine: got kv_dtype {kv_dtype}, expected torch.float32 or torch.bfloat16")
        if pdl and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0)):
            raise BitNetError("triton engine: got pdl=True, expected a GPU of compute capability 9.0 or more for it")
        self.tokenizer: Tokenizer | None = packed.tokenizer
        self.config, self.device, self.kv_dtype, self.pdl = packed.config, device, kv_dtype, pdl
        self.graph = device.type == "cuda" if graph is None else graph
        self._load(packed)

    def _load(self, packed: "PackedModel") -> None:
        config, tensors = packed.config, packed.tensors

        def put(name: str) -> Tensor | None:
            return tensors[name].to(self.device) if name in tensors else None

        def need(name: str) -> Tensor:
            return tensors[name].to(self.device)

        def table(name: str) -> steps.Table:
            scale = put(f"{name}.scale")
            return steps.Table(need(f"{name}.weight"), None if scale is None else scale.reshape(-1))

        def projection(prefix: str, names: Iterable[str], k: int) -> steps.Projection:
            keys = [f"{prefix}.{name}_proj" for name in names]
            merged = torch.cat([need(f"{key}.weight") for key in keys])
            packing.check(merged, k)
            scales = torch.cat([need(f"{key}.weight_scale") for key in keys])
            return steps.Projection(layout.arrange(merged, k), scales)

        def layer(i: int) -> _Layer:
            at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            heads = steps.Heads(
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                put(f"{at}.q_norm.weight"),
                put(f"{at}.k_norm.weight"),
                config.rms_norm_eps,
            )
            return _Layer(
                need(f"model.layers.{i}.input_layernorm.weight"),
                projection(at, "qkv", config.hidden_size),
                heads,
                put(f"{at}.attn_sub_norm.weight"),
                projection(at, "o", config.hidden_size),
                need(f"model.layers.{i}.post_attention_layernorm.weight"),
                projection(mlp, ("gate", "up"), config.hidden_size),
                put(f"{mlp}.ffn_sub_norm.weight"),
                projection(mlp, ("down",), config.intermediate_size),
            )

        self.embedding = table("model.embed_tokens")
        self.head = self.embedding if config.tie_word_embeddings else table("lm_head")
        self.layers = [layer(i) for i in range(config.num_hidden_layers)]
        self.norm = need("model.norm.weight")
        self._rotary: tuple[Tensor, Tensor] | None = None

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """Rotary tables of at least `length` positions, fp32 on the device."""
        if self._rotary is None or self._rotary[0].shape[0] < length:
            cos, sin = rotary_table(self.config, max(length, self.config.context), self.device)
            self._rotary = cos.contiguous(), sin.contiguous()
        return self._rotary

    def weight_bytes(self) -> int:
        """Bytes of everything a decode step reads of the model: packed projections, head, gains, scales."""
        total = self.head.rows.nbytes + (0 if self.head.scale is None else self.head.scale.nbytes) + self.norm.nbytes
        for layer in self.layers:
            for part in (layer.qkv, layer.o, layer.gate_up, layer.down):
                total += part.weights.data.nbytes + part.scales.nbytes
            gains = (layer.input_gain, layer.attention_gain, layer.ffn_gain, layer.down_gain)
            total += sum(gain.nbytes for gain in gains if gain is not None)
        return total

    def session(self, batch: int = 1, limit: int | None = None) -> "TritonSession":
        """Start `batch` (1 to 64) sequences of at most `limit` tokens (default: the model's context)."""
        return TritonSession(self, batch, self.config.context if limit is None else limit)

    def slots(self, count: int, limit: int | None = None) -> SessionSlots:
        """`count` empty slots of `limit` tokens each (default: the model's context), read one after the other."""
        return SessionSlots(self, count, self.config.context if limit is None else limit)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """ids: [T] or [B, T] int64. Returns [T, V] or [B, T, V] fp32 on the CPU."""
        ids = check_ids(torch.as_tensor(ids), self.config)
        rows = torch.atleast_2d(ids)
        scores = torch.cat([self.session(*part.shape).score(part) for part in rows.split(MAX_BATCH)])
        return scores if ids.dim() == 2 else scores[0]

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Collection[int] = (),
        limit: int | None = None,
    ) -> list[int]:
        """Continue `ids`; see `bitnet.engine.stream`. Returns the new ids only."""
        return list(stream(self, ids, max_new_tokens, sampling, stop, limit))


class TritonSession:
    """A KV cache, and the graph of one decode step over it."""

    def __init__(self, engine: TritonEngine, batch: int, limit: int) -> None:
        if not 1 <= batch <= MAX_BATCH or limit < 1:
            raise BitNetError(
                f"session: got batch {batch} and limit {limit}, expected a batch of 1 to {MAX_BATCH} and a limit of "
                "1 or more"
            )
        self._engine, self._batch, self._limit = engine, batch, limit
        device = engine.device
        self._cache = KVCache(engine.config, batch, limit, device, engine.kv_dtype)
        self._rotary = engine.rotary(limit)
        self._ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self._device_position = torch.zeros((), dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None  # where the graph writes
        self._warm = False

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
        ids = check_prefill(ids, self._engine.config, self._batch, self.position, self.limit)
        terms = self.states(ids.to(self._engine.device), last_only=True)
        return steps.head(terms, self._engine.head)

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
        self._ids.copy_(ids, non_blocking=True)
        logits = self._replay() if self._engine.graph else self._step()
        self._cache.position += 1
        return logits

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
        self._cache.position = length
        self._device_position.fill_(length)

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
        self._device_position.fill_(self.position)
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
        self, layer: _Layer, sums: steps.Sums, shape: torch.Size, rotary: tuple[Tensor, Tensor], i: int
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

    def _step(self) -> Tensor:
        """One decode step of the ids in the buffer: everything the graph records. Returns logits [B, V]."""
        engine, config, pdl = self._engine, self._engine.config, self._engine.pdl
        eps, layers = config.rms_norm_eps, engine.layers
        x, rows = steps.enter(self._ids, engine.embedding, layers[0].input_gain, eps)
        for i, layer in enumerate(layers):
            keys, values = self._cache.store(i)
            rows = steps.attend(
                layer.qkv(rows, pdl),
                layer.qkv.scales,
                layer.heads,
                self._rotary,
                keys,
                values,
                self._device_position,
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
        self._device_position.add_(1)
        return logits

    def _replay(self) -> Tensor:
        # The first step of a session runs as it is: it compiles kernels and picks tiles, which a capture may not.
        if not self._warm:
            self._warm = True
            return self._step()
        if self._graph is None:
            torch.cuda.synchronize(self._engine.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._step()
            self._graph = graph
        self._graph.replay()
        assert self._logits is not None
        return self._logits
