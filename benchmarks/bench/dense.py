"""The same model as dense torch: its whole forward pass in bf16 or int8; run by children/child.py.

What a good eager implementation does: q/k/v and gate/up as one matrix each, fused attention over a preallocated cache,
logits of the last position only. Linear layers in one of two formats:

    bf16    bf16 weights
    int8    int8 weights with a scale per tensor (exact: the codes are ternary) and int8 activations with a scale per
            token, quantised as they are used. The head has a scale per row.

Torch computes each product in several ways, and which is fast depends on the CPU (bitnet/dense_products.py). `prepare`
times them on a product of this model, for few rows and for many, and picks the faster one for each; where those two
differ, both layouts of the weights are kept if memory allows.

Norms, rotary positions, attention and the residual stream are bf16 in both. Its logits are the model's up to that
rounding, which tests/benchmarks/test_bench.py checks.

Dimensions: B batch, T time, D model, V vocabulary, H heads, G key/value heads, E width of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet import dense_products
from bitnet.config import ModelConfig
from bitnet.dense_products import Product, Timed
from bitnet.errors import BitNetError
from bitnet.files.packed import PackedModel, read_config, read_packed
from bitnet.files.tensors import kv_cache_bytes, linear_parameters, projection_shape
from bitnet.kernels import packing, reference
from bitnet.layers import attend, rotary_table
from bitnet.machine import available_memory

_ROWS = 8192  # of a head that are quantised at a time: 2B4T's in fp32, twice, would take 2.6 GB
_MANY = 128  # rows of a prompt in the product that is timed
_WORTHWHILE = 1.1  # how many times as fast a second layout must be: less is noise
_SPARE = 0.25  # of the available memory that a second layout may take
Linear = Callable[[Tensor], Tensor]  # [B, T, K] bf16 -> [B, T, N] bf16


@dataclass(frozen=True)
class _Block:
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    input_gain: Tensor
    post_gain: Tensor
    q_gain: Tensor | None
    k_gain: Tensor | None
    sub_gain: Tensor | None
    ffn_gain: Tensor | None


def prepare(path: str, dtype: str, threads: int) -> dict[str, Any]:
    """Time the ways to compute a product. Returns the options `few`, `many` and `remark` of `load`."""
    torch.set_num_threads(threads)
    config = read_config(Path(path))
    n, k = 2 * config.intermediate_size, config.hidden_size  # gate and up: the largest of a block
    with torch.inference_mode():
        few, many = (dense_products.compare(dtype, rows, n, k) for rows in (1, _MANY))
    weights = (2 if dtype == "bf16" else 1) * (linear_parameters(config) + config.vocab_size * config.hidden_size)
    free = available_memory()
    names = choose(few, many, two=free is None or weights <= _SPARE * free)
    return {"few": names[0], "many": names[1], "remark": dense_products.remark(many)}


def choose(few: list[Timed], many: list[Timed], two: bool) -> tuple[str, str]:
    """The ways for few rows and for many, from the timings of each. two: whether they may differ.

    Raises BitNetError where torch cannot compute the product.
    """
    rates = [{one.way.name: one.rate for one in dense_products.contending(timed) if one.rate} for timed in (few, many)]
    if not all(rates):
        reasons = "; ".join(f"{one.way.name} {one.why_not}" for one in many)
        raise BitNetError(f"torch cannot compute this product on this CPU ({reasons}); leave this contender out")
    best = [max(found, key=lambda name: found[name]) for found in rates]
    if best[0] == best[1]:
        return best[0], best[1]
    # Where two layouts gain little over one, keep the one with the best product of both rates.
    both = {name: rates[0][name] * rates[1][name] for name in rates[0].keys() & rates[1].keys()}
    if not both:
        return best[0], best[1]
    one = max(both, key=lambda name: both[name])
    gain = max(found[name] / found[one] for found, name in zip(rates, best, strict=True))
    return (best[0], best[1]) if two and gain >= _WORTHWHILE else (one, one)


class DenseDriver:
    """A packed file made dense. dtype: bf16 or int8; few, many: names of ways to a product, "" for the first one."""

    def __init__(self, path: str, dtype: str, threads: int, few: str = "", many: str = "", remark: str = "") -> None:
        torch.set_num_threads(threads)
        known = {way.name: way for way in dense_products.ways(dtype)}
        first = next(iter(known))
        self._few, self._many = known[few or first], known[many or first]
        packed = read_packed(path)
        self.config = packed.config
        self._weight_bytes = 0
        self._make = self._bf16 if dtype == "bf16" else self._int8
        self._load(packed)
        cos, sin = rotary_table(self.config, self.config.context, torch.device("cpu"))
        self._rotary = cos.bfloat16(), sin.bfloat16()
        self._cache = torch.empty(0)
        self._ids = torch.empty(0)
        self._position = 0
        version = torch.__version__.partition("+")[0]
        how = {
            "bf16": "bf16",
            "int8": "int8 weights (a scale per tensor; head: per row), int8 activations (a scale per token)",
        }
        self.facts: dict[str, Any] = {
            "what": f"torch {version} eager, dense, {self._ways()}: {how[dtype]}; bf16 attention"
            + f"; {remark}" * bool(remark),
            "remark": remark,
            "backend": f"torch-{dtype}",
            "weight_bytes": self._weight_bytes,
            "kv_bytes": kv_cache_bytes(self.config, 1, 2),
            "peak": f"torch {dtype}",
        }

    def _ways(self) -> str:
        """The ways its products are computed, in words."""
        few, many = (f"torch.{way.name}" for way in (self._few, self._many))
        return f"products {few}" if few == many else f"products {many} for prompts and {few} for answers"

    def _product(self, weight: Tensor) -> Product:
        few = self._few.make(weight)
        if self._many == self._few:
            return few
        many = self._many.make(weight)
        return lambda x: (few if x.shape[0] <= dense_products.FEW_ROWS else many)(x)

    def _load(self, packed: PackedModel) -> None:
        config, tensors = packed.config, packed.tensors

        def gain(name: str) -> Tensor | None:
            value = tensors.pop(f"{name}.weight", None)
            return None if value is None else value.bfloat16()

        def need(name: str) -> Tensor:
            return tensors.pop(f"{name}.weight").bfloat16()

        def linear(prefix: str, *names: str) -> Linear:
            weights = [_codes(tensors, f"{prefix}.{name}_proj", config) for name in names]
            return self._make(torch.cat([w for w, _ in weights]), torch.cat([s for _, s in weights]))

        self._embedding = _embedding(tensors, "model.embed_tokens")
        self._blocks = []
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}"
            at, mlp = f"{layer}.self_attn", f"{layer}.mlp"
            self._blocks.append(
                _Block(
                    qkv=linear(at, "q", "k", "v"),
                    o=linear(at, "o"),
                    gate_up=linear(mlp, "gate", "up"),
                    down=linear(mlp, "down"),
                    input_gain=need(f"{layer}.input_layernorm"),
                    post_gain=need(f"{layer}.post_attention_layernorm"),
                    q_gain=gain(f"{at}.q_norm"),
                    k_gain=gain(f"{at}.k_norm"),
                    sub_gain=gain(f"{at}.attn_sub_norm"),
                    ffn_gain=gain(f"{mlp}.ffn_sub_norm"),
                )
            )
        self._gain = need("model.norm")
        head = self._embedding if config.tie_word_embeddings else _embedding(tensors, "lm_head")
        scale = torch.ones(head.shape[0])
        if self._make == self._int8:
            quantised = [reference.quantize_activations(rows) for rows in head.split(_ROWS)]
            head = torch.cat([codes for codes, _ in quantised])
            scale = torch.cat([inv_scale for _, inv_scale in quantised]).reciprocal()[:, 0]
        self._head = self._make(head, scale)

    def _bf16(self, weight: Tensor, scale: Tensor) -> Linear:
        """weight: [N, K] codes, or the values of a head; scale: [N] fp32."""
        values = weight if weight.dtype == torch.bfloat16 else (weight * scale[:, None]).bfloat16()
        self._weight_bytes += values.nbytes
        product = self._product(values)
        return lambda x: product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def _int8(self, weight: Tensor, scale: Tensor) -> Linear:
        """weight: [N, K] int8, scale: [N] fp32."""
        self._weight_bytes += weight.nbytes + scale.nbytes
        product = self._product(weight)
        return lambda x: _quantised_product(x, product, scale)

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x, gain.shape, gain, self.config.rms_norm_eps)

    def _rotate(self, x: Tensor) -> Tensor:
        """x: [B, heads, T, E] at the current positions."""
        end = self._position + x.shape[2]
        cos, sin = (table[self._position : end] for table in self._rotary)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def _attention(self, index: int, block: _Block, x: Tensor) -> Tensor:
        config, (B, T, _) = self.config, x.shape
        E, H, G = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        q, k, v = block.qkv(x).view(B, T, -1, E).transpose(1, 2).split((H, G, G), dim=1)
        if block.q_gain is not None and block.k_gain is not None:
            q, k = self._norm(q, block.q_gain), self._norm(k, block.k_gain)
        end = self._position + T
        keys, values = self._cache[index]
        keys[:, :, self._position : end], values[:, :, self._position : end] = self._rotate(k), v
        y = attend(self._rotate(q), keys[:, :, :end], values[:, :, :end]).transpose(1, 2).reshape(B, T, -1)
        return block.o(y if block.sub_gain is None else self._norm(y, block.sub_gain))

    def _ffn(self, block: _Block, x: Tensor) -> Tensor:
        gate, up = block.gate_up(x).chunk(2, dim=-1)
        h = (F.relu(gate).square() if self.config.hidden_act == "relu2" else F.silu(gate)) * up
        return block.down(h if block.ffn_gain is None else self._norm(h, block.ffn_gain))

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        """Append ids [B, T]. Returns the logits of the last position, [B, V]."""
        x = F.embedding(ids, self._embedding)
        for index, block in enumerate(self._blocks):
            x = x + self._attention(index, block, self._norm(x, block.input_gain))
            x = x + self._ffn(block, self._norm(x, block.post_gain))
        self._position += ids.shape[1]
        return self._head(self._norm(x[:, -1], self._gain))

    def start(self, batch: int, depth: int, capacity: int) -> None:
        """A cache for `batch` sequences of `capacity` tokens, `depth` of them read."""
        config = self.config
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads, capacity, config.head_dim)
        self._cache = torch.empty(0)  # frees the last one first
        self._cache = torch.empty(shape, dtype=torch.bfloat16)
        self._ids = torch.randint(0, config.vocab_size, (batch, capacity))
        self._position = 0
        if depth:
            self.prefill(depth)

    def prefill(self, tokens: int) -> None:
        """Read `tokens` random ids into each sequence."""
        self.forward(self._ids[:, self._position : self._position + tokens])

    def decode(self, tokens: int) -> None:
        """Read `tokens` random ids into each sequence, one at a time."""
        for at in range(self._position, self._position + tokens):
            self.forward(self._ids[:, at : at + 1])


def load(**options: Any) -> DenseDriver:
    """The driver that child.py asks for."""
    return DenseDriver(**options)


def _quantised_product(x: Tensor, product: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
    """x: [..., K] bf16, quantised to int8 per token for `product`; scale: [N] of the weights. Returns [..., N] bf16."""
    rows = x.reshape(-1, x.shape[-1])
    inv_scale = reference.Q_MAX / rows.abs().amax(dim=-1, keepdim=True).float().clamp_(min=reference.EPS)
    q = (rows * inv_scale).round_().to(torch.int8)
    return (product(q) * (scale / inv_scale)).bfloat16().view(*x.shape[:-1], -1)


def _codes(tensors: dict[str, Tensor], name: str, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """A projection's codes [N, K] int8, and its scale as [N]."""
    codes = packing.unpack(tensors.pop(f"{name}.weight"), projection_shape(config, name)[1])
    return codes, tensors.pop(f"{name}.weight_scale").expand(codes.shape[0])


def _embedding(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Embedding or head [V, D] bf16."""
    weight, scale = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.scale", None)
    return weight if scale is None else (weight * scale).bfloat16()
