"""The GPU engine: packed weights, Triton kernels, and one CUDA graph for a decode step.

Same protocol and same ids as `TorchEngine`. What differs is what is in memory and what is launched: the projections are
two bits a weight in the kernels' own tiles and nowhere else, embedding and head stay as the file has them (bf16 or
int8), and a decode step is nine kernels a layer (kernels/gpu/decode.py) recorded once into a CUDA graph and replayed
with new ids. Positions and ids are in fixed device buffers; everything between lives in the graph's own memory.
The sequences of a batch share one step that always has a row for each of them, so that kernels choose the same tiles
and a sequence gets the same bits whatever runs beside it; prompts that arrive in pieces are read on their own.

Prefill runs the same kernels on all rows of the prompt, int8 tensor cores for the products and torch's attention, in
chunks of a few thousand rows, so that a long prompt takes no more memory than a short one (gpu_sessions.py).

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

from bitnet.device import indexed
from bitnet.engine.base import check_ids
from bitnet.engine.gpu_sessions import MAX_BATCH, TritonSequenceBatch, TritonSession
from bitnet.engine.sampling import Sampling
from bitnet.engine.stream import stream
from bitnet.errors import BitNetError
from bitnet.kernels import packing
from bitnet.kernels.gpu import device as gpu
from bitnet.kernels.gpu import layout, steps
from bitnet.layers import rotary_table

if TYPE_CHECKING:
    from bitnet.files.packed import PackedModel
    from bitnet.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Layer:
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
        device = indexed(device)
        reason = gpu.why_not(device)
        if reason:
            raise BitNetError(f"triton engine: {reason}; use --device cpu or BITNET_BACKEND=float")
        if packed.config.linear == "float":
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

        def layer(i: int) -> Layer:
            at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            heads = steps.Heads(
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                put(f"{at}.q_norm.weight"),
                put(f"{at}.k_norm.weight"),
                config.rms_norm_eps,
            )
            return Layer(
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

    def session(self, batch: int = 1, limit: int | None = None) -> TritonSession:
        """Start `batch` (1 to 64) sequences of at most `limit` tokens (default: the model's context)."""
        return TritonSession(self, batch, self.config.context if limit is None else limit)

    def slots(self, count: int, limit: int | None = None) -> TritonSequenceBatch:
        """`count` (1 to 64) empty slots of `limit` tokens each (default: the model's context)."""
        return TritonSequenceBatch(self, count, self.config.context if limit is None else limit)

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
        """Continue `ids`; see `bitnet.engine.stream.stream`. Returns the new ids only."""
        return list(stream(self, ids, max_new_tokens, sampling, stop, limit))
