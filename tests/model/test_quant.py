"""BitLinear, forward and backward, against fp64: the integer formula, and autograd of straight-through quantisation.

Rounding bounds: U = 2^-24 is fp32's unit roundoff and V = 2^-8 is bf16's. A sum of n products in fp32 is off by at most
(n + 1) U times the sum of their magnitudes; second-order terms are covered by doubling U where n is large.
Codes and scales come from kernels/reference.py, which test_reference.py holds against exact fractions.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compiler import why_no_compiler
from torch import Tensor, nn

from bitnet import quant
from bitnet.errors import BitNetError
from bitnet.kernels import ops, reference
from bitnet.layers import BitLinear, keep_codes

U, V = 2.0**-24, 2.0**-8
LINEARS = ("ternary", "binary")
SHAPES = [((1,), 1, 1), ((1, 63), 7, 63), ((3, 5), 31, 100), ((2, 3, 4), 2, 129), ((), 5, 6)]


def quantizer(linear: str) -> Callable[[Tensor], reference.WeightCodes]:
    return reference.ternary_weights if linear == "ternary" else reference.binary_weights


def quantised(weight: Tensor, linear: str) -> Tensor:
    """codes * scale in fp64, written out."""
    codes, scale = quantizer(linear)(weight)
    return codes.double() * scale.double()


def dequantised(x: Tensor) -> Tensor:
    q, inv_scale = reference.quantize_activations(x)
    return q.double() / inv_scale.double()


def straight_through(x: Tensor, weight: Tensor, linear: str) -> Tensor:
    """What training means: the fake-quantised product, whose rounding has the gradient of the identity. All fp64."""
    x_q = x + (dequantised(x.detach().float()) - x).detach()
    w_q = weight + (quantised(weight.detach().float(), linear) - weight).detach()
    return x_q @ w_q.T


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def assert_within(got: Tensor, expected: Tensor, bound: Tensor, what: str = "") -> None:
    got, expected = got.detach(), expected.detach()
    error = (got.double() - expected).abs()
    worst = int((error - bound).argmax())
    was, wanted, slack = (float(t.flatten()[worst]) for t in (got, expected, bound))
    assert bool((error <= bound).all()), f"{what} at {worst}: got {was}, expected {wanted} +- {slack}"


def tiny(t: Tensor) -> Tensor:
    return t + 1e-37  # below fp32's normal numbers relative bounds do not hold


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize(("batch", "n", "k"), SHAPES, ids=str)
def test_forward(batch: tuple[int, ...], n: int, k: int, linear: str, rng: torch.Generator) -> None:
    layer = BitLinear(k, n, bias=False, linear=linear)
    x = torch.randn(*batch, k, generator=rng)
    y = layer(x).detach()
    assert y.shape == (*batch, n)
    assert y.dtype == torch.float32
    q, inv_scale = reference.quantize_activations(x)
    codes, scale = quantizer(linear)(layer.weight.detach())
    exact = (q.double() @ codes.double().T) * scale.double() / inv_scale.double()
    assert_within(y, exact, tiny(2.01 * U * exact.abs()), "y")  # one division, one multiplication


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("sizes", [(5,), (7, 7), (8, 3, 1), (1, 1, 1, 31)], ids=str)
@pytest.mark.parametrize("batch", [(1,), (3, 7), (2, 1, 5)], ids=str)
def test_gradients(batch: tuple[int, ...], sizes: tuple[int, ...], linear: str, rng: torch.Generator) -> None:
    k = 37
    x = leaf(torch.randn(*batch, k, generator=rng) * 3)
    weights = [leaf(torch.randn(n, k, generator=rng) * 0.1 * (i + 1)) for i, n in enumerate(sizes)]
    dys = [torch.randn(*batch, n, generator=rng) for n in sizes]
    ys = quant.bit_linear(x, weights, [quant.quantize_weight(w, linear) for w in weights])
    torch.autograd.backward(ys, dys)

    x64, weights64 = leaf(x.double()), [leaf(w.double()) for w in weights]
    torch.autograd.backward([straight_through(x64, w, linear) for w in weights64], [dy.double() for dy in dys])

    rows, n = x[..., 0].numel(), sum(sizes)
    spread = sum(dy.double().abs() @ quantised(w.detach(), linear).abs() for dy, w in zip(dys, weights))
    assert x.grad is not None
    assert_within(x.grad, x64.grad, tiny((n + 3) * U * spread), "dx")  # dy * s, then a sum of n
    for w, w64, dy in zip(weights, weights64, dys):
        spread = dy.reshape(rows, -1).double().abs().T @ dequantised(x.detach()).reshape(rows, k).abs()
        assert_within(w.grad, w64.grad, tiny((rows + 4) * U * spread), "dw")  # q * (1 / inv_x), then a sum of rows


@pytest.mark.parametrize("linear", LINEARS)
def test_gradients_in_fp64(linear: str, rng: torch.Generator) -> None:
    """Nothing but q * (1 / inv_x), two roundings, is fp32: a formula that is off by 1e-6 anywhere else shows here."""
    x, weight = leaf(torch.randn(6, 20, generator=rng).double()), leaf(torch.randn(9, 20, generator=rng).double())
    dy = torch.randn(6, 9, generator=rng).double()
    (y,) = quant.bit_linear(x, [weight], [quant.quantize_weight(weight, linear)])
    assert y.dtype == torch.float64
    y.backward(dy)
    x64, w64 = leaf(x), leaf(weight)
    straight_through(x64, w64, linear).backward(dy)
    torch.testing.assert_close(x.grad, x64.grad, rtol=1e-12, atol=1e-13)
    assert_within(weight.grad, w64.grad, 2.01 * U * (dy.abs().T @ dequantised(x.detach()).abs()) + 1e-13)


def test_no_clipping_and_no_gradient_through_the_scale(rng: torch.Generator) -> None:
    """Weights far outside +-s_w and the largest activation keep the full gradient; d y / d s_w does not exist."""
    x = leaf(torch.tensor([[100.0, 0.01, -3.0]]))
    weight = leaf(torch.tensor([[50.0, -0.001, 2.0]]))
    (y,) = quant.bit_linear(x, [weight], [quant.quantize_weight(weight, "ternary")])
    y.sum().backward()
    # codes: 50 / 17.3 -> 1, 0, 2 / 17.3 -> 0;   q: 127, 0, -4
    assert torch.allclose(x.grad, torch.tensor([[52.001 / 3, 0.0, 0.0]]), rtol=4 * U)
    assert torch.allclose(weight.grad, torch.tensor([[100.0, 0.0, -400 / 127]]), rtol=4 * U)


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("sizes", [(33,), (16, 5, 5)], ids=str)
def test_bf16_autocast(sizes: tuple[int, ...], linear: str, rng: torch.Generator) -> None:
    rows, k = 29, 70
    x = leaf(torch.randn(rows, k, generator=rng))
    weights = [leaf(torch.randn(n, k, generator=rng) * 0.05) for n in sizes]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = quant.bit_linear(x, weights, [quant.quantize_weight(w, linear) for w in weights])
    dys = [torch.randn(rows, n, generator=rng).bfloat16() for n in sizes]
    torch.autograd.backward(ys, dys)
    x64, weights64 = leaf(x.double()), [leaf(w.double()) for w in weights]
    exact = [straight_through(x64, w, linear) for w in weights64]
    torch.autograd.backward(exact, [dy.double() for dy in dys])
    for y, expected in zip(ys, exact):
        assert y.dtype == torch.bfloat16
        # Only the result is rounded: a bf16 product of fake-quantised operands would be off by far more.
        assert_within(y, expected.detach(), (V + 4 * U) * expected.detach().abs() + 1e-12, "y")
    n = sum(sizes)
    spread = sum(dy.double().abs() @ quantised(w.detach(), linear).abs() for dy, w in zip(dys, weights))
    # Three bf16 roundings: s_w, dy * s_w, the result; the sum between them is fp32.
    assert x.grad.dtype == torch.float32
    assert_within(x.grad, x64.grad, (3.05 * V + 2 * n * U) * spread, "dx")
    for w, w64, dy in zip(weights, weights64, dys):
        spread = dy.double().abs().T @ dequantised(x.detach()).abs()
        assert w.grad.dtype == torch.float32
        assert_within(w.grad, w64.grad, (2.05 * V + 2 * rows * U) * spread, "dw")  # x_q and the result


def test_autocast_forward_is_the_fp32_forward_rounded_once(rng: torch.Generator) -> None:
    layer, x = BitLinear(300, 40, bias=False), torch.randn(5, 300, generator=rng)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer(x).bfloat16())


def test_bias(rng: torch.Generator) -> None:
    layer = BitLinear(20, 6)
    bare = BitLinear(20, 6, bias=False)
    bare.weight = layer.weight
    x, dy = torch.randn(3, 4, 20, generator=rng), torch.randn(3, 4, 6, generator=rng)
    y = layer(x)
    assert torch.equal(y, bare(x) + layer.bias)
    y.backward(dy)
    expected = dy.double().sum(dim=(0, 1))
    assert_within(layer.bias.grad, expected, 13 * U * dy.double().abs().sum(dim=(0, 1)))  # a sum of 12


@pytest.mark.parametrize("bias", [True, False])
def test_dtypes_are_those_of_nn_linear(bias: bool, rng: torch.Generator) -> None:
    x = torch.randn(2, 20, generator=rng)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert BitLinear(20, 6, bias)(x).dtype == nn.Linear(20, 6, bias)(x).dtype == torch.bfloat16
    layer = BitLinear(20, 6, bias, dtype=torch.bfloat16)
    layer(x.bfloat16()).sum().backward()
    assert layer(x.bfloat16()).dtype == layer.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("x_needs", [True, False])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_frozen_parts_get_no_gradient(x_needs: bool, needs: tuple[bool, ...], rng: torch.Generator) -> None:
    x = torch.randn(4, 9, generator=rng)
    weights = [torch.randn(n, 9, generator=rng) for n in (3, 5)]
    dys = [torch.randn(4, n, generator=rng) for n in (3, 5)]
    full = [leaf(t) for t in (x, *weights)]
    ys = quant.bit_linear(full[0], full[1:], [quant.quantize_weight(w, "ternary") for w in weights])
    torch.autograd.backward(ys, dys)

    some = [t.clone().requires_grad_(flag) for t, flag in zip((x, *weights), (x_needs, *needs), strict=True)]
    ys = quant.bit_linear(some[0], some[1:], [quant.quantize_weight(w, "ternary") for w in weights])
    assert all(y.requires_grad == (x_needs or any(needs)) for y in ys)
    if x_needs or any(needs):
        torch.autograd.backward(ys, dys)
    for got, want in zip(some, full, strict=True):
        assert torch.equal(got.grad, want.grad) if got.requires_grad else got.grad is None


def test_an_unused_output_counts_as_zero(rng: torch.Generator) -> None:
    x, a, b = (leaf(torch.randn(n, 9, generator=rng)) for n in (4, 3, 5))
    codes = [quant.quantize_weight(w, "ternary") for w in (a, b)]
    quant.bit_linear(x, [a, b], codes)[1].sum().backward()
    both = x.grad.clone()
    x.grad = None
    quant.bit_linear(x, [b], codes[1:])[0].sum().backward()
    # The same five terms, once with three zeros between them: two orders of one fp32 sum.
    spread = torch.ones(4, 5).double() @ quantised(b.detach(), "ternary").abs()
    assert_within(both, x.grad.double(), 2 * 6 * U * spread)
    assert not a.grad.any()


def test_shared_input_gives_each_layers_own_output(rng: torch.Generator) -> None:
    x, weights = torch.randn(7, 50, generator=rng), [torch.randn(n, 50, generator=rng) for n in (8, 3, 1)]
    codes = [quant.quantize_weight(w, "ternary") for w in weights]
    for i, y in enumerate(quant.bit_linear(x, weights, codes)):
        assert torch.equal(y, quant.bit_linear(x, weights[i : i + 1], codes[i : i + 1])[0])


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got torch\.int8 \(2, 5\), expected int8 \[M, 6\]"):
        BitLinear(6, 3)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="got linear='quaternary', expected one of ternary, binary"):
        BitLinear(6, 3, linear="quaternary")


def test_gradient_accumulates_over_micro_batches(rng: torch.Generator) -> None:
    layer, x = BitLinear(30, 8, bias=False), torch.randn(6, 30, generator=rng)
    layer(x).square().sum().backward()
    whole = layer.weight.grad.clone()
    layer.weight.grad = None
    with keep_codes(layer):
        for part in x.split(2):
            layer(part).square().sum().backward()
    # Two orders of one fp32 sum of six terms: each within 7 U of the truth.
    y = layer(x).detach()
    spread = (2 * y).double().abs().T @ dequantised(x).abs()
    assert_within(layer.weight.grad, whole.double(), 2 * 9 * U * spread)


# ---- keep_codes --------------------------------------------------------------------------------------------


def test_keep_codes_changes_nothing_and_resets(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(BitLinear(20, 30), nn.ReLU(), BitLinear(30, 5, linear="binary"))
    x, dy = torch.randn(4, 20, generator=rng), torch.randn(4, 5, generator=rng)

    def run() -> list[Tensor]:
        model.zero_grad()
        y = model(x)
        y.backward(dy)
        return [y.detach(), *(p.grad.clone() for p in model.parameters())]

    calls = []
    quantize = quant.quantize_weight
    monkeypatch.setattr(quant, "quantize_weight", lambda *args: (calls.append(1), quantize(*args))[1])
    plain = run()
    assert len(calls) == 2
    calls.clear()
    with keep_codes(model):
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(plain, run(), strict=True))
    assert len(calls) == 2  # once a layer, however many passes

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    assert torch.equal(model[0].quantized_weight().codes, -reference.ternary_weights(-model[0].weight).codes)
    assert not torch.equal(run()[0], plain[0])  # outside of the block the masters count again


def test_keep_codes_resets_after_an_error() -> None:
    layer = BitLinear(5, 5)
    with pytest.raises(KeyError), keep_codes(layer):
        raise KeyError
    before = layer.quantized_weight().codes
    with torch.no_grad():
        layer.weight.neg_()
    assert torch.equal(layer.quantized_weight().codes, -before)


# ---- the rest ----------------------------------------------------------------------------------------------


def test_round_to_bf16(rng: torch.Generator) -> None:
    weight = leaf(torch.randn(40, 50, generator=rng))
    dy = torch.randn(40, 50, generator=rng)
    rounded = quant.round_to_bf16(weight)
    assert rounded.dtype == torch.float32
    assert bool(((rounded - weight).abs() <= V * weight.abs()).all())
    assert bool((rounded.view(torch.int32) & 0xFFFF == 0).all())  # bf16 is the upper half of fp32
    rounded.backward(dy)
    assert torch.equal(weight.grad, dy)
    tie = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])  # half-way: to even
    assert quant.round_to_bf16(tie).tolist() == [1.0, 1 + 2.0**-6]


def test_training_finds_a_ternary_teacher(rng: torch.Generator) -> None:
    """The estimator points downhill: loss against a layer of the same kind falls by more than half."""
    teacher = torch.randint(-1, 2, (8, 16), generator=rng).float()
    layer = BitLinear(16, 8, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        x = torch.randn(32, 16, generator=rng)
        loss = F.mse_loss(layer(x), x @ teacher.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of parts of its own
@pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))
def test_compiled_layer_gives_the_same(rng: torch.Generator) -> None:
    layer, x = BitLinear(20, 6, bias=False), leaf(torch.randn(3, 20, generator=rng))
    y = layer(x)
    y.sum().backward()
    expected = [y.detach(), x.grad.clone(), layer.weight.grad.clone()]
    x.grad = layer.weight.grad = None
    compiled = torch.compile(layer)(x)
    compiled.sum().backward()
    for got, want in zip((compiled.detach(), x.grad, layer.weight.grad), expected, strict=True):
        # The compiler may fuse a * b + c and replace x / y by x * (1 / y): a few roundings more.
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_int8_gradients_need_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.ENVIRONMENT, "float")
    for kind in ("dx", "all"):
        with pytest.raises(BitNetError, match=f"int8_gradients: got '{kind}' on cpu, expected an NVIDIA GPU"):
            quant.training_precision(1.0, kind, torch.device("cpu"))
    assert quant.training_precision(1.0, "none", torch.device("cpu")) == quant.QUANTISED == (None, False, False)
