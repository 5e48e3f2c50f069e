"""Layers of a block against plain fp64 loops and complex rotations; packed and cached forms against the trained one."""

import math

import pytest
import torch
from torch import Tensor, nn

from bitnet import layers
from bitnet.config import ModelConfig
from bitnet.kernels import packing, reference
from bitnet.layers import Attention, BitLinear, Embedding, FeedForward, PackedLinear, RMSNorm

U = 2.0**-24  # unit roundoff of fp32
CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    initializer_range=0.3,
)


class ListCache:
    """The plainest LayerCache: it concatenates."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
        return self.k, self.v


def drawn(module: nn.Module, rng: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.3 * noise)
    return module


# ---- norm and rotation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5, 100)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_rms_norm(shape: tuple[int, ...], eps: float, rng: torch.Generator) -> None:
    norm = drawn(RMSNorm(shape[-1], eps), rng)
    for x in (torch.randn(shape, generator=rng), torch.zeros(shape), torch.full(shape, 1e-4)):
        y = norm(x).detach()
        wide = x.double()
        exact = wide / (wide.square().mean(dim=-1, keepdim=True) + eps).sqrt() * norm.weight.detach().double()
        # The mean of n squares is off by (n + 2) U; its root halves that; root, division and gain add four.
        assert bool(((y - exact).abs() <= (shape[-1] / 2 + 6) * U * exact.abs()).all())


def test_rms_norm_returns_fp32(rng: torch.Generator) -> None:
    norm, x = drawn(RMSNorm(33, 1e-5), rng), torch.randn(2, 33, generator=rng).bfloat16()
    assert torch.equal(norm(x), norm(x.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x).dtype == torch.float32


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotation_is_a_complex_product(theta: float, rng: torch.Generator) -> None:
    """Elements i and i + E/2 are one complex number, turned by position * theta^(-2i/E), far positions included."""
    config = CONFIG.replace(hidden_size=64, num_attention_heads=4, rope_theta=theta)
    size, length = config.head_dim, 131_072
    tables = layers.rotary_table(config, length, torch.device("cpu"))
    positions = torch.tensor([0, 1, 2, 1000, 65_537, length - 1])
    x = torch.randn(2, 3, len(positions), size, generator=rng)
    turned = layers.rotate(x, tuple(table[positions] for table in tables)).double()
    half = size // 2
    for t, position in enumerate(positions.tolist()):
        for i in range(half):
            angle = position * theta ** (-2 * i / size)
            spin = complex(math.cos(angle), math.sin(angle))
            number = torch.complex(x[:, :, t, i].double(), x[:, :, t, i + half].double()) * spin
            # cos and sin are rounded to fp32 (their fp64 angle is off by 1e5 * 2^-52), then two products and a sum.
            slack = 5 * U * number.abs() + 1e-9
            assert bool(((turned[:, :, t, i] - number.real).abs() <= slack).all()), (position, i)
            assert bool(((turned[:, :, t, i + half] - number.imag).abs() <= slack).all()), (position, i)


def test_rotary_table_serves_training_after_inference() -> None:
    with torch.inference_mode():
        cos, _ = layers.rotary_table(CONFIG, 8, torch.device("cpu"))
    assert not cos.is_inference()


# ---- attention ---------------------------------------------------------------------------------------------


def attention_by_loops(module: Attention, config: ModelConfig, x: Tensor) -> Tensor:
    """Causal grouped-query attention in fp64, one head, query and key at a time. Plain linears."""
    eps, size = config.rms_norm_eps, config.head_dim

    def norm(values: Tensor, gain: nn.Module) -> Tensor:
        if isinstance(gain, nn.Identity):
            return values
        return values / (values.square().mean() + eps).sqrt() * gain.weight.detach().double()

    def turn(values: Tensor, position: int) -> Tensor:
        out, half = values.clone(), size // 2
        for i in range(half):
            angle = position * config.rope_theta ** (-2 * i / size)
            a, b = float(values[i]), float(values[i + half])
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    wide = x.double()
    wq, wk, wv, wo = (getattr(module, f"{n}_proj").weight.detach().double() for n in "qkvo")
    outputs = torch.zeros_like(wide)
    group = config.num_attention_heads // config.num_key_value_heads
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            heads = []
            for h in range(config.num_attention_heads):
                rows = slice(h * size, (h + 1) * size)
                kv_rows = slice(h // group * size, (h // group + 1) * size)
                q = turn(norm(wq[rows] @ wide[b, t], module.q_norm), t)
                scores, values = [], []
                for s in range(t + 1):
                    k = turn(norm(wk[kv_rows] @ wide[b, s], module.k_norm), s)
                    scores.append(float(q @ k) / math.sqrt(size))
                    values.append(wv[kv_rows] @ wide[b, s])
                weights = [math.exp(score - max(scores)) for score in scores]
                heads.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
            outputs[b, t] = wo @ norm(torch.cat(heads), module.attn_sub_norm)
    return outputs


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("sub_norms", [True, False])
def test_attention(kv_heads: int, qk_norm: bool, sub_norms: bool, rng: torch.Generator) -> None:
    """With plain linears, so that no int8 rounding hides an error of the structure."""
    config = CONFIG.replace(linear="float", num_key_value_heads=kv_heads, qk_norm=qk_norm, sub_norms=sub_norms)
    module = drawn(Attention(config), rng)
    x = torch.randn(2, 7, config.hidden_size, generator=rng)
    y = module(x, layers.rotary_table(config, 7, torch.device("cpu"))).detach()
    # fp32 through about a hundred dependent roundings of sums over at most 24 terms: 1e-4 of the largest value is
    # generous for those and far below any wrong head, position or mask (which change values by their own size).
    exact = attention_by_loops(module, config, x)
    assert float((y - exact).abs().max()) <= 1e-4 * float(exact.abs().max())


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("t", [1, 7, 33])
def test_attend_in_bf16_training(heads: int, groups: int, t: int, rng: torch.Generator) -> None:
    """The way of short bf16 training steps against fp64 on the same bf16 values, forward and backward."""
    q, k, v = (torch.randn(2, h, t, 8, generator=rng).bfloat16().requires_grad_() for h in (heads, groups, groups))
    y = layers.attend(q, k, v)
    dy = torch.randn(y.shape, generator=rng).bfloat16()
    y.backward(dy)
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    wide_k, wide_v = (x.repeat_interleave(heads // groups, dim=1) for x in (k64, v64))
    scores = q64 @ wide_k.mT / math.sqrt(8)
    allowed = torch.tensor([[j <= i for j in range(t)] for i in range(t)])
    exact = scores.masked_fill(~allowed, -math.inf).softmax(-1) @ wide_v
    exact.backward(dy.double())
    assert y.dtype == torch.bfloat16
    for got, want in ((y, exact), (q.grad, q64.grad), (k.grad, k64.grad), (v.grad, v64.grad)):
        # Scores, weights and results are bf16 (2^-8 each, scores up to about 8 in size): 8 % of the largest value.
        got, want = got.detach().double(), want.detach()
        assert float((got - want).abs().max()) <= 0.08 * float(want.abs().max()) + 1e-6


@pytest.mark.parametrize("t", [1, 2, 5])
@pytest.mark.parametrize("s", [5, 6, 9])
def test_causal_mask(t: int, s: int) -> None:
    mask = layers.causal_mask(t, s, torch.device("cpu"))
    assert mask.tolist() == [[j <= s - t + i for j in range(s)] for i in range(t)]


@pytest.mark.parametrize("linear", ["ternary", "float"])
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 1, 3], [8, 1], [2, 7]], ids=str)
def test_cached_attention_is_full_attention(linear: str, chunks: list[int], rng: torch.Generator) -> None:
    """Step by step, and in chunks that need a mask (1 < t < s). Compared before the next rounding to int8."""
    config = CONFIG.replace(linear=linear)
    module = drawn(Attention(config), rng)
    module.o_proj, module.attn_sub_norm = nn.Identity(), nn.Identity()
    x = torch.randn(2, sum(chunks), config.hidden_size, generator=rng)
    cos, sin = layers.rotary_table(config, sum(chunks), torch.device("cpu"))
    with torch.no_grad():
        full = module(x, (cos, sin))
        cache, start, parts = ListCache(), 0, []
        for length in chunks:
            span = slice(start, start + length)
            parts.append(module(x[:, span], (cos[span], sin[span]), cache))
            start += length
    # The same fp32 numbers added in another order: sums of at most 24 and 9 terms.
    assert float((torch.cat(parts, dim=1) - full).abs().max()) <= 64 * U * float(full.abs().max())


# ---- feed-forward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["relu2", "silu"])
@pytest.mark.parametrize("sub_norms", [True, False])
def test_feed_forward(act: str, sub_norms: bool, rng: torch.Generator) -> None:
    config = CONFIG.replace(linear="float", hidden_act=act, sub_norms=sub_norms)
    module = drawn(FeedForward(config), rng)
    x = torch.randn(3, 5, config.hidden_size, generator=rng)
    gate, up, down = (getattr(module, f"{n}_proj").weight.detach().double() for n in ("gate", "up", "down"))
    g = x.double() @ gate.T
    h = (g.clamp(min=0) ** 2 if act == "relu2" else g / (1 + (-g).exp())) * (x.double() @ up.T)
    if sub_norms:
        gain = module.ffn_sub_norm.weight.detach().double()
        h = h / (h.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps).sqrt() * gain
    exact = h @ down.T
    # Three sums of at most 40 terms; the square doubles the relative error of the first: below 200 U of the largest.
    assert float((module(x).detach() - exact).abs().max()) <= 1e-5 * float(exact.abs().max())


# ---- linears -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", ["ternary", "binary"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (31, 63), (100, 129), (5, 256)], ids=str)
@pytest.mark.parametrize("batch", [(1,), (2, 3)], ids=str)
def test_packed_linear_is_bit_linear(
    linear: str, n: int, k: int, batch: tuple[int, ...], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = drawn(BitLinear(k, n, bias=False, linear=linear), rng)
    x = torch.randn(*batch, k, generator=rng)
    for name in ("", "reference", "float"):
        monkeypatch.setenv("BITNET_BACKEND", name)
        packed = PackedLinear.from_bit_linear(layer)
        assert torch.equal(packed(x), layer(x))
        assert torch.equal(packed(x.bfloat16()), layer(x.bfloat16()))
        assert packed(x.bfloat16()).dtype == torch.bfloat16
        assert packed.packed.tolist() == packing.pack(layer.quantized_weight().codes).tolist()
        packed.prepare(keep_packed=False)
        assert packed.packed is None
        assert torch.equal(packed(x), layer(x))


def test_packed_linear_has_no_bias() -> None:
    with pytest.raises(ValueError, match="bias=False"):
        PackedLinear.from_bit_linear(BitLinear(4, 4))


@pytest.mark.parametrize("kind", ["ternary", "binary", "float", "packed", "mixed"])
def test_project_is_each_layer_alone(kind: str, rng: torch.Generator) -> None:
    made: list[nn.Module] = [
        drawn(nn.Linear(30, n, bias=False) if kind == "float" else BitLinear(30, n, bias=False), rng) for n in (8, 3, 1)
    ]
    for layer in made:
        layer.linear = "binary" if kind == "binary" else "ternary"
    if kind == "packed":
        made = [PackedLinear.from_bit_linear(layer) for layer in made]
    if kind == "mixed":
        made[1] = PackedLinear.from_bit_linear(made[1])
    x = torch.randn(2, 5, 30, generator=rng)
    for y, layer in zip(layers.project(x, *made), made, strict=True):
        assert torch.equal(y, layer(x))


def test_shared_input_is_quantised_once(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    quantise = reference.quantize_activations
    monkeypatch.setattr(reference, "quantize_activations", lambda x: (calls.append(1), quantise(x))[1])
    trained = [BitLinear(30, n, bias=False) for n in (8, 3, 1)]
    layers.project(torch.randn(2, 30, generator=rng), *trained)
    layers.project(torch.randn(2, 30, generator=rng), *map(PackedLinear.from_bit_linear, trained))
    assert len(calls) == 2


def test_bit_linear_is_a_drop_in(rng: torch.Generator) -> None:
    layer, plain = BitLinear(12, 5), nn.Linear(12, 5)
    assert isinstance(layer, nn.Linear)
    assert [(n, p.shape, p.dtype) for n, p in layer.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in plain.named_parameters()
    ]
    layer.load_state_dict(plain.state_dict())
    assert layer.quantized_weight().codes.dtype == torch.int8
    assert "linear=ternary" in repr(layer)


def test_embedding_values(rng: torch.Generator) -> None:
    embedding = drawn(Embedding(20, 12), rng)
    assert torch.equal(embedding.values(), embedding.weight.detach().bfloat16().float())
    embedding.values().sum().backward()
    assert torch.equal(embedding.weight.grad, torch.ones(20, 12))
    exact = drawn(Embedding(20, 12, exact=True), rng)
    assert torch.equal(exact.values(), exact.weight)
