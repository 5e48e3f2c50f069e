"""A packed model on the GPU: its weights in the kernels' layout, and one pass of its layers, for prefill and decode.

Projections are two bits per weight, in the kernels' tiles and nowhere else; embedding and head stay as the file has
them (bf16 or int8).

Dimensions: M rows (tokens), V vocabulary, D model, E width of a head.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.kernels import packing
from bitnet.kernels.gpu import layout, steps
from bitnet.layers import rotary_table


@dataclass(frozen=True)
class Layer:
    """The weights and norm gains of one block."""

    input_gain: Tensor
    qkv: steps.Projection
    heads: steps.Heads
    attention_gain: Tensor | None
    o: steps.Projection
    ffn_gain: Tensor
    gate_up: steps.Projection
    down_gain: Tensor | None
    down: steps.Projection


# From a layer's number, the layer and the sums of its queries, keys and values to the codes that o_proj reads.
Attention = Callable[[int, Layer, steps.Sums], steps.Codes]


class GpuModel:
    """The weights of a packed ternary or binary model on a device.

    tensors: by their names in a packed file. pdl: start each kernel of `forward` while the one before it still runs
    (programmatic dependent launch, compute capability 9.0 or more).
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], device: torch.device, *, pdl: bool) -> None:
        self.config, self.device, self.pdl = config, device, pdl
        self._tensors = tensors
        self.embedding = self._embedding("model.embed_tokens")
        self.head = self.embedding if config.tie_word_embeddings else self._embedding("lm_head")
        self.layers = [self._layer(f"model.layers.{i}") for i in range(config.num_hidden_layers)]
        self.norm = self._need("model.norm.weight")
        self._tensors = {}  # what is used is on the device now
        self._rotary: tuple[Tensor, Tensor] | None = None

    def _get(self, name: str) -> Tensor | None:
        return self._tensors[name].to(self.device) if name in self._tensors else None

    def _need(self, name: str) -> Tensor:
        return self._tensors[name].to(self.device)

    def _embedding(self, name: str) -> steps.Embedding:
        scale = self._get(f"{name}.scale")
        return steps.Embedding(self._need(f"{name}.weight"), None if scale is None else scale.reshape(-1))

    def _projection(self, prefix: str, names: Iterable[str], k: int) -> steps.Projection:
        keys = [f"{prefix}.{name}_proj" for name in names]
        merged = torch.cat([self._need(f"{key}.weight") for key in keys])
        packing.check(merged, k)
        scales = torch.cat([self._need(f"{key}.weight_scale") for key in keys])
        return steps.Projection(layout.arrange(merged, k), scales)

    def _layer(self, at: str) -> Layer:
        config = self.config
        heads = steps.Heads(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            self._get(f"{at}.self_attn.q_norm.weight"),
            self._get(f"{at}.self_attn.k_norm.weight"),
            config.rms_norm_eps,
        )
        return Layer(
            self._need(f"{at}.input_layernorm.weight"),
            self._projection(f"{at}.self_attn", "qkv", config.hidden_size),
            heads,
            self._get(f"{at}.self_attn.attn_sub_norm.weight"),
            self._projection(f"{at}.self_attn", "o", config.hidden_size),
            self._need(f"{at}.post_attention_layernorm.weight"),
            self._projection(f"{at}.mlp", ("gate", "up"), config.hidden_size),
            self._get(f"{at}.mlp.ffn_sub_norm.weight"),
            self._projection(f"{at}.mlp", ("down",), config.intermediate_size),
        )

    @property
    def weight_bytes(self) -> int:
        """See `Engine.weight_bytes`."""
        total = self.head.rows.nbytes + (0 if self.head.scale is None else self.head.scale.nbytes) + self.norm.nbytes
        for layer in self.layers:
            for projection in (layer.qkv, layer.o, layer.gate_up, layer.down):
                total += projection.weights.data.nbytes + projection.scales.nbytes
            gains = (layer.input_gain, layer.attention_gain, layer.ffn_gain, layer.down_gain)
            total += sum(gain.nbytes for gain in gains if gain is not None)
        return total

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of at least `length` positions, fp32 on the device."""
        if self._rotary is None or self._rotary[0].shape[0] < length:
            cos, sin = rotary_table(self.config, max(length, self.config.context), self.device)
            self._rotary = cos.contiguous(), sin.contiguous()
        return self._rotary

    def forward(self, ids: Tensor, attention: Attention, *, pdl: bool = False) -> tuple[Tensor, steps.Sums]:
        """All layers over ids [M] int64 on the device.

        Returns the residual stream [M, D] fp32 and the sums of the last product, not yet added to it: `states` does so
        for the rows that are wanted. `attention` mixes the rows and keeps their keys and values.
        """
        config, eps, layers = self.config, self.config.rms_norm_eps, self.layers
        squared_relu = config.hidden_act == "relu2"
        x, rows = steps.enter(ids, self.embedding, layers[0].input_gain, eps, pdl)
        for i, layer in enumerate(layers):
            rows = attention(i, layer, layer.qkv(rows, pdl))
            rows = steps.add(x, layer.o(rows, pdl), layer.o.scales, layer.ffn_gain, eps, pdl)
            rows = steps.gate(layer.gate_up(rows, pdl), layer.gate_up.scales, layer.down_gain, eps, squared_relu, pdl)
            sums = layer.down(rows, pdl)
            if i + 1 < len(layers):
                rows = steps.add(x, sums, layer.down.scales, layers[i + 1].input_gain, eps, pdl)
        return x, sums

    def states(self, x: Tensor, sums: steps.Sums, *, pdl: bool = False) -> Tensor:
        """The states after the final norm, [3, M, D] as `head_logits` reads them, from the results of `forward`."""
        return steps.last(x, sums, self.layers[-1].down.scales, self.norm, self.config.rms_norm_eps, pdl)

    def head_logits(self, states: Tensor, *, pdl: bool = False) -> Tensor:
        """Logits [M, V] fp32 of states [3, M, D]."""
        return steps.head(states, self.head, pdl)
