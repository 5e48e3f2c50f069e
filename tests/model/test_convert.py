"""bitnet.convert on models it has never seen: what is replaced, what stays, and that it trains."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitnet
from bitnet.config import ModelConfig
from bitnet.conversion import HEADS, convert
from bitnet.errors import BitNetError
from bitnet.kernels import reference
from bitnet.layers import BitLinear
from bitnet.model import Transformer


class EncoderLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.ffn(self.norms[1](x))


class TinyGPT(nn.Module):
    """Somebody else's language model: other names, a bias here and there, a head tied to the embedding."""

    def __init__(self, tied: bool, head: str = "to_logits") -> None:
        super().__init__()
        self.tokens = nn.Embedding(29, 16)
        self.blocks = nn.ModuleList(EncoderLayer(16) for _ in range(2))
        self.head_name = head
        setattr(self, head, nn.Linear(16, 29, bias=False))
        if tied:
            getattr(self, head).weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return getattr(self, self.head_name)(x)


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("linear", ["ternary", "binary"])
def test_sequential(linear: str, rng: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Sequential(nn.Linear(7, 5, bias=False), nn.Tanh()))
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    assert convert(model, linear) is model
    assert kinds(model) == {"0": BitLinear, "2.0": BitLinear}
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]  # the same objects: an optimiser made before keeps working
        assert torch.equal(parameter, before[name][1])
    assert set(model.state_dict()) == set(before)
    assert model[0].linear == linear
    assert (model[0].in_features, model[0].out_features) == (10, 7)
    x = torch.randn(3, 10, generator=rng)
    q, inv_scale = reference.quantize_activations(x)
    codes, scale = (reference.ternary_weights if linear == "ternary" else reference.binary_weights)(
        model[0].weight.detach()
    )
    exact = (q.double() @ codes.double().T) * scale.double() / inv_scale.double() + model[0].bias.detach().double()
    assert torch.allclose(model[0](x).double(), exact, atol=1e-6, rtol=1e-6)  # three fp32 roundings of values about 1


def test_public_name() -> None:
    """Each time it is asked for: a module of the same name would take the function's place after the first."""
    for name in bitnet.__all__:
        assert not (Path(bitnet.__file__).parent / f"{name}.py").exists()
    assert bitnet.convert is convert
    assert bitnet.convert is convert


def test_tied_head_stays(rng: torch.Generator) -> None:
    model = convert(TinyGPT(tied=True))
    found = kinds(model)
    assert found.pop("to_logits") is nn.Linear
    assert set(found.values()) == {BitLinear}
    assert len(found) == 8
    assert model.to_logits.weight is model.tokens.weight
    assert type(model.tokens) is nn.Embedding
    untied = kinds(convert(TinyGPT(tied=False)))
    assert untied["to_logits"] is BitLinear  # a name nobody knows and no tie: excluded by pattern only


@pytest.mark.parametrize("head", HEADS)
def test_usual_heads_stay(head: str) -> None:
    assert kinds(convert(TinyGPT(tied=False, head=head)))[head] is nn.Linear


def test_patterns() -> None:
    def converted(*patterns: str) -> set[str]:
        return {
            name for name, kind in kinds(convert(TinyGPT(tied=False), exclude=patterns)).items() if kind is BitLinear
        }

    everything = {f"blocks.{i}.{n}" for i in range(2) for n in ("qkv", "out", "ffn.0", "ffn.2")} | {"to_logits"}
    assert converted() == everything
    assert converted("qkv") == everything - {"blocks.0.qkv", "blocks.1.qkv"}
    assert converted("blocks.0.*") == {name for name in everything if not name.startswith("blocks.0.")}
    assert converted("*.ffn.?", "to_*") == {f"blocks.{i}.{n}" for i in range(2) for n in ("qkv", "out")}
    assert converted("QKV") == everything  # case counts, on every system


def test_a_shared_layer_stays_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.again = nn.ModuleDict({"x": self.first})

        def forward(self, x: Tensor) -> Tensor:
            return self.again["x"](self.first(x))

    model = convert(Twice())
    assert isinstance(model.first, BitLinear)
    assert model.again["x"] is model.first
    assert len(list(model.parameters())) == 2


def test_subclasses_stay() -> None:
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"a": Special(4, 4), "b": nn.Linear(4, 4), "c": nn.MultiheadAttention(4, 2)})
    converted = convert(model)
    assert type(converted["a"]) is Special
    assert type(converted["b"]) is BitLinear
    assert type(converted["c"].out_proj) is not BitLinear  # MultiheadAttention reads its weight without calling it
    again = converted["b"]
    with pytest.raises(BitNetError):
        convert(converted)  # a second time there is nothing left to do
    assert converted["b"] is again


@pytest.mark.parametrize(
    "model",
    [nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Conv1d(2, 2, 1)), nn.ModuleDict({"lm_head": nn.Linear(4, 4)})],
    ids=lambda model: type(model).__name__,
)
def test_nothing_to_convert(model: nn.Module) -> None:
    with pytest.raises(
        BitNetError, match=r"convert: got a \w+ without an nn\.Linear to replace, expected at least one"
    ):
        convert(model)


def test_unknown_kind() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="got linear='int4', expected one of ternary, binary"):
        convert(model, "int4")
    assert type(model[0]) is nn.Linear


def test_modes_dtypes_and_frozen_weights_are_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4)).eval()
    model[1].weight.requires_grad_(False)
    convert(model)
    assert not any(module.training for module in model.modules())
    assert model[0].weight.dtype == torch.bfloat16
    assert not model[1].weight.requires_grad
    assert model[1].bias.requires_grad


def test_state_dict_goes_both_ways() -> None:
    model = convert(TinyGPT(tied=True))
    plain = TinyGPT(tied=True)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())


def test_own_plain_model_becomes_ternary(seed: int) -> None:
    shape = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    plain = Transformer(ModelConfig(**shape, linear="float"))
    ternary = Transformer(ModelConfig(**shape))
    for model in (plain, ternary):
        model.init_weights(seed)
    ids = torch.randint(31, (2, 7))
    assert torch.equal(convert(plain)(ids), ternary(ids))


@pytest.mark.parametrize("linear", ["ternary", "binary"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_model_trains(linear: str, tied: bool) -> None:
    """It learns one batch of random text by heart: the loss falls below half of a guess, log 29 = 3.4."""
    model = convert(TinyGPT(tied), linear)
    nn.init.normal_(model.tokens.weight, std=0.3)
    ids = torch.randint(29, (4, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(150):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if losses[-1] < 1.6:
            break
    assert losses[-1] < 1.6, losses[::10]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_encoder_is_ternary_in_evaluation_too(activation: str, norm_first: bool) -> None:
    """In evaluation torch's encoder hands its weights to one fused float kernel; it must call the layers instead."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, activation, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    x = torch.randn(2, 5, 16)
    calls: list[int] = []
    with torch.no_grad():
        plain = encoder.eval()(x)
        convert(encoder)
        for module in encoder.modules():
            if isinstance(module, BitLinear):
                module.forward = lambda x, f=module.forward: (calls.append(1), f(x))[1]
        evaluated = encoder(x)
        assert len(calls) == 4  # two a layer
        padded = encoder(x, src_key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))
        assert len(calls) == 8
    assert float((evaluated - plain).abs().max()) > 0.01
    assert bool(torch.isfinite(padded).all())
