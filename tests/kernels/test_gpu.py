"""The Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter, where
tests/kernels/test_gpu_interpreter.py starts this file. Integers are compared exactly, outputs are poisoned first."""

import math
import os
import random
from pathlib import Path

import pytest
import tiny_model
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet import quant
from bitnet.engine.base import BatchEntry
from bitnet.engine.load import load
from bitnet.engine.sampling import GREEDY
from bitnet.engine.torch import TorchEngine
from bitnet.errors import BitNetError
from bitnet.files.packed import build, read_packed, write_packed
from bitnet.kernels import ops, packing, reference
from bitnet.kernels.gpu import device as gpu
from bitnet.layers import BitLinear, PreNorm, project
from bitnet.model import Transformer
from bitnet.quant import Normed, Precision

ON_GPU = torch.cuda.is_available() and not gpu.INTERPRET
if not ON_GPU and not gpu.INTERPRET:
    pytest.skip("no GPU: run in the interpreter by tests/kernels/test_gpu_interpreter.py", allow_module_level=True)

from bitnet.engine.gpu import TritonEngine  # noqa: E402
from bitnet.kernels.gpu import (  # noqa: E402 - below the skip: a machine without Triton gets here
    gemv,
    int8_gemm,
    layout,
    products,
    quantize,
    steps,
    training,
    tune,
)

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
U = 2.0**-24  # half the distance between 1 and the next fp32: the relative error of one rounding
# NumPy warns of NaN, infinity and wrapping shifts, all of which are in the inputs below on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [(1, 1, 1), (1, 129, 257), (3, 67, 101), (2, 48, 256), (1, 31, 1000), (5, 7, 515), (17, 33, 63), (4, 130, 511)]
if ON_GPU:
    SHAPES += [
        (1, 13824, 2560),
        (1, 2560, 6912),
        (16, 3840, 2560),
        (64, 2560, 2560),
        (513, 640, 2560),
        (700, 1000, 300),
    ]


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate is named by the tests; the tuner would write into the user's cache."""
    monkeypatch.setenv(tune.ENVIRONMENT, "0")
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)


def identify(value: object) -> str:
    return "M{}-N{}-K{}".format(*value) if isinstance(value, tuple) else str(value)


def draw(m: int, n: int, k: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    q = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=rng)
    return q, torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=rng)


def truth(q: Tensor, codes: Tensor) -> Tensor:
    return (q.double() @ codes.double().T).to(torch.int32)  # exact below 2^53


def padded(q: Tensor) -> Tensor:
    out = torch.zeros(q.shape[0], quantize.padded(q.shape[1]), dtype=torch.int8)
    out[:, : q.shape[1]] = q
    return out.to(DEVICE)


# ---- products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=identify)
def test_packed_products_of_every_candidate(
    shape: tuple[int, int, int], rng: torch.Generator, poisoned_empty: None
) -> None:
    m, n, k = shape
    for q, codes in (draw(m, n, k, rng), (torch.full((m, k), 127, dtype=torch.int8), torch.ones(n, k).to(torch.int8))):
        weights = layout.arrange(packing.pack(codes).to(DEVICE), k)
        assert torch.equal(layout.codes_of(weights).cpu(), codes)
        rows, sums = padded(q), q.sum(dim=1, dtype=torch.int32).to(DEVICE)
        expected = truth(q, codes)
        for config in products.candidates(m, weights, DEVICE):
            got = products.partial_sums(rows, sums, weights, config)
            assert torch.equal(got.sum(0, dtype=torch.int32).cpu(), expected), config


@pytest.mark.parametrize("tokens", range(1, 17) if ON_GPU else (1, 2, 3, 7, 16))
def test_gemv_takes_one_to_sixteen_tokens(tokens: int, rng: torch.Generator, poisoned_empty: None) -> None:
    q, codes = draw(tokens, 37, 600, rng)
    weights = layout.arrange(packing.pack(codes).to(DEVICE), 600)
    for config in ({"block_n": 16, "step": 1, "steps": 1}, {"block_n": 32, "step": 2, "steps": 2}):
        got = gemv.gemv(padded(q), weights, config | {"num_warps": 4})
        assert torch.equal(got.sum(0, dtype=torch.int32).cpu(), truth(q, codes))


def test_gemv_refuses_what_it_cannot_do(rng: torch.Generator) -> None:
    q, codes = draw(17, 8, 256, rng)
    weights = layout.arrange(packing.pack(codes).to(DEVICE), 256)
    config = {"block_n": 16, "step": 1, "steps": 1, "num_warps": 4}
    with pytest.raises(ValueError, match="got 17 tokens, expected 1 to 16"):
        gemv.gemv(padded(q), weights, config)
    with pytest.raises(ValueError, match=r"got torch.int8 \(3, 255\), expected torch.int8 \[\*, 256\]"):
        gemv.gemv(q[:3, :255].contiguous().to(DEVICE), weights, config)


@pytest.mark.parametrize("shape", SHAPES, ids=identify)
def test_int8_gemm_of_every_candidate(shape: tuple[int, int, int], rng: torch.Generator) -> None:
    q, codes = draw(*shape, rng)
    for config in int8_gemm.CONFIGS:
        got = int8_gemm.int8_gemm(q.to(DEVICE), codes.to(DEVICE), config=config)
        assert torch.equal(got.cpu(), truth(q, codes)), config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(100,), (128, 72), (20, 50, 30), (128, 128, 1)], ids=str)
def test_scales_come_after_the_sum(sizes: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> None:
    """Bit-equal to reference.scale_output, with groups of rows that begin inside a tile and at its edge."""
    q, codes = draw(5, sum(sizes), 129, rng)
    inv_scale, scales = torch.rand(5, generator=rng) * 50, torch.rand(len(sizes), generator=rng) * 0.1
    parts = truth(q, codes).split(sizes, dim=1)
    wanted = torch.cat(
        [reference.scale_output(part, s, inv_scale[:, None]) for part, s in zip(parts, scales, strict=True)], dim=1
    ).to(dtype)
    inv, s = inv_scale.to(DEVICE), scales.to(DEVICE)
    got = int8_gemm.int8_gemm(q.to(DEVICE), codes.to(DEVICE), inv, s, dtype, sizes)
    assert torch.equal(got.cpu(), wanted)


def test_the_backend_passes_its_self_test() -> None:
    assert ops.TRITON.why_not(DEVICE) is None
    assert ops.select(DEVICE) is ops.TRITON
    assert ops.self_test(ops.TRITON, DEVICE) is None


def test_views_and_no_rows(rng: torch.Generator) -> None:
    q, codes = draw(10, 14, 62, rng)
    for a, b in ((q[::2, ::2], codes[:, ::2]), (q.T[:10, :10], codes[:, :10]), (q[:0], codes)):
        assert torch.equal(ops.TRITON.codes_matmul(a.to(DEVICE), b.to(DEVICE)).cpu(), truth(a, b))
        prepared = ops.prepare(packing.pack(b).to(DEVICE), b.shape[1], ops.TRITON)
        assert torch.equal(ops.packed_matmul(a.to(DEVICE), prepared).cpu(), truth(a, b))


# ---- quantisers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3, 63, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_the_references(width: int, dtype: torch.dtype, rng: torch.Generator, poisoned_empty: None) -> None:
    x = torch.randn(6, width, generator=rng) * 10.0 ** torch.randint(-4, 4, (6, 1), generator=rng)
    x[1], x[2] = 0.0, 1e-7  # all zero; under the clamp
    x[3] = torch.arange(width) - width // 2  # halves among the quotients
    x = x.to(dtype)
    out = quantize.quantize_rows(x.to(DEVICE), width=quantize.padded(width))
    wanted = reference.quantize_activations(x)
    assert torch.equal(out.codes[:, :width].cpu(), wanted.codes)
    assert not out.codes[:, width:].any()
    assert torch.equal(out.inv_scale.cpu(), wanted.inv_scale[:, 0])
    assert torch.equal(out.sums.cpu(), wanted.codes.sum(dim=1, dtype=torch.int32))


def test_halves_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5, -64.5]])
    assert quantize.quantize_rows(x.to(DEVICE)).codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 64, -64]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["float", "norm"])
def test_a_row_that_is_not_finite_gives_nothing_finite(bad: float, norm: bool, rng: torch.Generator) -> None:
    x = torch.randn(3, 40, generator=rng)
    x[1, 7] = bad
    gain = torch.ones(40, device=DEVICE) if norm else None
    rows = quantize.quantize_rows(x.to(DEVICE), gain, 1e-5)
    _, codes = draw(1, 9, 40, rng)
    one = torch.ones(1, device=DEVICE)
    y = int8_gemm.int8_gemm(rows.codes, codes.to(DEVICE), rows.inv_scale, one, torch.float32).cpu()
    assert torch.isfinite(y[[0, 2]]).all()
    assert not torch.isfinite(y[1]).any()


@pytest.mark.parametrize("width", [1, 63, 600])
def test_the_fused_norm_differs_at_ties_only(width: int, rng: torch.Generator) -> None:
    x, gain = torch.randn(9, width, generator=rng) * 3, torch.rand(width, generator=rng) + 0.5
    rows = quantize.quantize_rows(x.to(DEVICE), gain.to(DEVICE), 1e-5)
    exact = F.rms_norm(x.double(), (width,), gain.double(), 1e-5)
    quotient = exact * (127 / exact.abs().amax(dim=1, keepdim=True).clamp(min=1e-5))
    wrong = (rows.codes.cpu() - quotient).abs() - 0.5
    # A sum of `width` squares loses (width + 8) U at most, half of it behind the root; the largest element has the same
    # error, then some ten roundings. A code may differ from the exact quotient's by that times 127 past a half.
    assert wrong.max() <= 127 * (width + 20) * U
    torch.testing.assert_close(
        rows.rstd.cpu().double(), (x.double().square().mean(dim=1) + 1e-5).rsqrt(), rtol=(width + 8) * U, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (700, 24)], ids=str)
def test_norm_gradients_are_autograds(shape: tuple[int, int], dtype: torch.dtype, rng: torch.Generator) -> None:
    x, dy = (torch.randn(shape, generator=rng).to(dtype) for _ in range(2))
    gain = torch.rand(shape[1], generator=rng) + 0.5
    rstd = quantize.quantize_rows(x.to(DEVICE), gain.to(DEVICE), 1e-5).rstd
    dx, dgain = quantize.norm_backward(dy.to(DEVICE), x.to(DEVICE), gain.to(DEVICE), rstd)
    wide, wide_gain = x.double().requires_grad_(), gain.double().requires_grad_()
    F.rms_norm(wide, (shape[1],), wide_gain, 1e-5).backward(dy.double())
    # dx is two terms of size r * |dy gain| and r^2 |x| mean|dy gain x r|; each has a handful of roundings and a sum of
    # K terms. The bound holds for every element with the largest of the first term, plus the rounding of the output.
    scale = float((rstd.cpu().double()[:, None] * dy.double() * gain.double()).abs().max()) * (1 + shape[1] ** 0.5)
    slack = (shape[1] + 40) * U * scale * float(1 + x.double().abs().max())
    limit = slack + wide.grad.abs() * (2.0**-8 if dtype == torch.bfloat16 else 2 * U)
    assert ((dx.cpu().double() - wide.grad).abs() <= limit).all()
    terms = (dy.double() * x.double() * rstd.cpu().double()[:, None]).abs().sum(dim=0)
    assert ((dgain.cpu().double() - wide_gain.grad).abs() <= (shape[0] + 40) * U * terms).all()
    assert dx.dtype == dtype


@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (31, 257), (1, 5000), (70, 129)], ids=str)
def test_ternary_weights_where_sums_are_exact(shape: tuple[int, int], rng: torch.Generator) -> None:
    """Multiples of 2^-6 below 2: every partial sum in every order is an fp32 number, so the scale is bit-equal too."""
    weight = torch.randint(-128, 129, shape, generator=rng) / 64
    wanted = reference.ternary_weights(weight)
    codes, scale = quantize.ternary_weights(weight.to(DEVICE))
    assert torch.equal(scale.cpu(), wanted.scale)
    assert torch.equal(codes.cpu(), wanted.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-9, 0.02, 300.0], ids=str)
def test_ternary_weights_given_the_scale(size: float, dtype: torch.dtype, rng: torch.Generator) -> None:
    weight = (torch.randn(37, 300, generator=rng) * size).to(dtype)
    weight[3, 5] = 1e9 * size  # W / scale beyond what fp32 rounds to integers by addition
    codes, scale = (part.cpu() for part in quantize.ternary_weights(weight.to(DEVICE)))
    wanted = reference.ternary_weights(weight)
    # Rows of 300 in fp32 in the reference, tiles of 4,096 here: log2 levels of additions, each within U of the sum.
    assert abs(scale - wanted.scale) <= 64 * U * wanted.scale
    again = (weight.float() * scale.reciprocal()).round().clamp(-1, 1).to(torch.int8)
    assert torch.equal(codes, again)


def test_a_weight_that_is_not_finite_shows(rng: torch.Generator) -> None:
    weight = torch.randn(4, 8, generator=rng)
    weight[2, 2] = math.nan
    assert torch.isnan(quantize.ternary_weights(weight.to(DEVICE))[1])


# ---- training ----------------------------------------------------------------------------------------------


def forced(monkeypatch: pytest.MonkeyPatch, name: str) -> torch.device:
    """The device on which this backend is used for training: the reference's path runs on the CPU."""
    monkeypatch.setenv(ops.ENVIRONMENT, name)
    return DEVICE if name == "triton" else torch.device("cpu")


@pytest.mark.parametrize("leading", [(1,), (2, 3), (9,)], ids=str)
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
def test_a_layer_is_the_references(
    leading: tuple[int, ...], amp: bool, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [torch.randint(-64, 65, (n, 50), generator=rng) / 64 for n in (20, 9, 9)]  # exact sums: equal scales
    x = torch.randn(*leading, 50, generator=rng)
    results = {}
    for name in ("triton", "reference"):
        device = forced(monkeypatch, name)
        parameters = [weight.to(device).requires_grad_() for weight in weights]
        inputs = x.to(device).requires_grad_()
        codes = [quant.quantize_weight(weight, "ternary") for weight in parameters]
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            ys = quant.bit_linear(inputs, parameters, codes)
        sum((y.float() * (i + 1)).sin().sum() for i, y in enumerate(ys)).backward()
        results[name] = [y.detach().cpu() for y in ys], [t.grad.cpu() for t in (inputs, *parameters)]
    (ys, grads), (wanted_ys, wanted_grads) = results["triton"], results["reference"]
    for y, wanted in zip(ys, wanted_ys, strict=True):
        assert torch.equal(y, wanted)
        assert y.dtype == (torch.bfloat16 if amp else torch.float32)
    # Sums of 38 or rows products. In fp32 another order; in bf16 dy is rounded once more on either side (the
    # scale goes onto the gradient there and onto the codes here): three roundings of 2^-9 relative to the terms.
    step = 3 * 2.0**-9 if amp else 64 * U
    for grad, wanted in zip(grads, wanted_grads, strict=True):
        size = float(wanted.abs().max()) * 50**0.5
        assert ((grad - wanted).abs() <= step * size).all()


def test_gradients_through_the_fused_norm(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randint(-64, 65, (30, 40), generator=rng) / 64
    x, gain = torch.randn(7, 40, generator=rng), torch.rand(40, generator=rng) + 0.5
    results = {}
    for name in ("triton", "reference"):
        device = forced(monkeypatch, name)
        tensors = [t.to(device).requires_grad_() for t in (x, gain, weight)]
        codes = [quant.quantize_weight(tensors[2], "ternary")]
        (y,) = quant.bit_linear(Normed(tensors[0], tensors[1], 1e-5), [tensors[2]], codes)
        (y * torch.arange(30, device=device)).sum().backward()
        results[name] = [y.detach().cpu(), *(t.grad.cpu() for t in tensors)]
    # One flip of an int8 code (a tie that the norm's last bit decides) moves y by scale / inv: allow one in a row.
    flip = float(results["reference"][0].detach().abs().max()) / 20
    assert ((results["triton"][0] - results["reference"][0]).abs() <= flip).all()
    for grad, wanted in zip(results["triton"][1:3], results["reference"][1:3], strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=float(wanted.abs().max()) * 200 * U)
    # dW = dy^T (q / inv): a flip there is one step of 1 / 127 of a row's largest normed activation, below 4 * 1.5.
    assert ((results["triton"][3] - results["reference"][3]).abs() <= 29 * 6 / 127).all()


def test_int8_gradients_are_within_their_bound(rng: torch.Generator) -> None:
    dy, (_, codes) = torch.randn(6, 50, generator=rng), draw(1, 50, 40, rng)
    got = training.int8_dx(dy.to(DEVICE), codes.to(DEVICE)).cpu()
    exact = dy.double() @ codes.double()
    bound = dy.abs().amax(dim=1, keepdim=True) / 254 * codes.abs().sum(dim=0) * (1 + 1e-5)
    assert ((got - exact).abs() <= bound.double()).all()
    assert (got - exact).abs().max() > 0  # it is the int8 path

    q = torch.randint(-127, 128, (6, 30), generator=rng, dtype=torch.int8)
    got = training.int8_dw(dy.to(DEVICE), q.to(DEVICE)).cpu()
    exact = dy.double().T @ q.double()
    bound = dy.abs().amax(dim=0)[:, None] / 254 * q.float().abs().sum(dim=0) * (1 + 1e-5)
    assert ((got - exact).abs() <= bound.double()).all()
    assert (got - exact).abs().max() > 0
    with pytest.raises(ValueError, match="int8 dW: got 133145 tokens in one product, expected at most 133144"):
        training.int8_dw(torch.zeros(133145, 1), torch.zeros(133145, 1, dtype=torch.int8))


def test_a_layer_trains_with_int8_gradients(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both options through the layer: the same output, gradients within the roundings of one int8 product."""
    device = forced(monkeypatch, "triton")
    layer = BitLinear(40, 24).to(device)
    x = torch.randn(7, 40, generator=rng).to(device).requires_grad_()
    weigh = torch.randn(7, 24, generator=rng).to(device)
    results = []
    for on in (False, True):
        y = layer(x, Precision(int8_dx=on, int8_dw=on))
        (y * weigh).sum().backward()
        results.append([t.detach().cpu().double() for t in (y, x.grad, layer.weight.grad)])
        x.grad = layer.weight.grad = None
    (y, dx, dw), (y8, dx8, dw8) = results
    assert torch.equal(y, y8)
    codes, scale = (t.cpu().double() for t in quant.quantize_weight(layer.weight, "ternary"))
    assert ((dx - dx8).abs() <= 1.01 * weigh.cpu().abs().amax(1, keepdim=True) * scale / 254 * codes.abs().sum(0)).all()
    q, inv = (t.double() for t in reference.quantize_activations(x.detach().cpu()))
    folded = weigh.cpu().double() / inv.reshape(-1, 1)
    assert ((dw - dw8).abs() <= 1.01 * folded.abs().amax(0)[:, None] / 254 * q.abs().sum(0)).all()
    assert not torch.equal(dx, dx8)
    assert not torch.equal(dw, dw8)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of parts of its own
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
def test_compiled_without_a_break(amp: bool, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, forward and backward, the same numbers: the fake kernels tell shapes and dtypes truly."""
    device = forced(monkeypatch, "triton")
    torch._dynamo.reset()
    model = Transformer(CONFIG.replace(num_hidden_layers=1)).to(device)
    model.init_weights(5)
    ids = torch.randint(61, (2, 5), generator=rng).to(device)
    results = []
    for network in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            F.cross_entropy(network(ids).flatten(0, 1).float(), ids.flatten()).backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    for got, wanted in zip(*results, strict=True):
        # The same kernels on the same codes; the decomposed softmax and norms may round elsewhere.
        torch.testing.assert_close(got, wanted, rtol=0, atol=float(wanted.abs().max()) * (2.0**-5 if amp else 1e-4))


def test_operators_keep_their_word(rng: torch.Generator) -> None:
    """torch's own check: no aliasing, no mutation, fake kernels like the real ones."""
    weight = torch.randn(20, 24, generator=rng).to(DEVICE).requires_grad_()
    x, gain = (torch.randn(s, generator=rng).to(DEVICE).requires_grad_() for s in ((5, 24), (24,)))
    codes, scale = training.ternary_weights(weight.detach())
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for arguments in (
        (x, gain, 1e-5, codes, scale[None], [weight], torch.float32, False, False),
        (x, None, 0.0, codes, scale[None], [weight], torch.bfloat16, True, True),
    ):
        torch.library.opcheck(training._bit_linear, arguments, test_utils=checks)
    torch.library.opcheck(training.ternary_weights, (weight.detach(),), test_utils=checks)
    dy, q = torch.randn(5, 20, generator=rng).to(DEVICE), torch.ones(5, 24, dtype=torch.int8, device=DEVICE)
    torch.library.opcheck(training.int8_dx, (dy, codes), test_utils=checks)
    torch.library.opcheck(training.int8_dw, (dy, q), test_utils=checks)


# ---- the engine --------------------------------------------------------------------------------------------

CONFIG = tiny_model.CONFIG.replace(max_position_embeddings=40)
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "ternary": ("bf16", {}),
    "llama-shaped": (
        "int8",
        {"hidden_act": "silu", "sub_norms": False, "qk_norm": False, "tie_word_embeddings": False},
    ),
    "one-key-head": ("bf16", {"num_key_value_heads": 1, "num_attention_heads": 3}),
    "binary": ("int8", {"linear": "binary", "num_key_value_heads": 4}),
}


def engines(folder: Path, seed: int, variant: str = "ternary", **options: object) -> tuple[TorchEngine, TritonEngine]:
    embedding, changes = VARIANTS[variant]
    model = Transformer(CONFIG.replace(**changes))
    model.init_weights(seed)
    path = write_packed(folder / f"{seed}.safetensors", model, None, embedding=embedding)
    return TorchEngine(build(read_packed(path))), TritonEngine(read_packed(path), DEVICE, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_greedy_ids(variant: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the torch engine, token by token; a draw with a near tie (an int8 flip may decide it) is drawn again."""
    for attempt in range(5):
        monkeypatch.setenv(ops.ENVIRONMENT, "reference")  # the torch engine, on the CPU
        torch_engine, engine = engines(tmp_path, seed + attempt, variant)
        ids = torch.randint(61, (5,)).tolist()
        tokens = 32 if ON_GPU else 8
        wanted = torch_engine.generate(ids, tokens, GREEDY)
        top = torch_engine.logits(torch.tensor(ids + wanted))[len(ids) - 1 : -1].topk(2).values
        monkeypatch.delenv(ops.ENVIRONMENT)
        if engine.generate(ids, tokens, GREEDY) == wanted:
            return
        assert float((top[:, 0] - top[:, 1]).min()) < 0.05, "not a near tie: the engines differ"
    pytest.fail("five models in a row with a near tie: the engines differ")


@pytest.mark.parametrize("variant", ["ternary", "llama-shaped"])
def test_decode_is_prefill(variant: str, tmp_path: Path, seed: int) -> None:
    """Batch of three: prefill 4, decode 4, prefill 3 more, then back to 5: every logit is that of one pass over all."""
    _, engine = engines(tmp_path, seed, variant)
    ids = torch.randint(61, (3, 11))
    whole = engine.logits(ids)
    session = engine.session(3, 11)
    session._cache._store.fill_(math.nan)  # nothing may be read that was not written
    got = [session.prefill(ids[:, :4]).cpu()]
    got += [session.decode(ids[:, t]).cpu().clone() for t in range(4, 8)]
    got.append(session.prefill(ids[:, 8:]).cpu())
    assert (session.position, session.limit) == (11, 11)
    session.truncate(5)
    got.append(session.decode(ids[:, 5]).cpu().clone())
    got.append(session.score(ids[:, 6:])[:, -1])
    wanted = [whole[:, t] for t in (3, 4, 5, 6, 7, 10, 5, 10)]
    # Attention and norms add up in another order; a flip of one int8 code moves a logit by about 1 / 127 of its size.
    close = [float((a - b).abs().max()) < 0.1 * float(b.abs().max()) for a, b in zip(got, wanted, strict=True)]
    assert all(close)
    assert all(torch.isfinite(a).all() for a in got)
    equal = [float((a - b).abs().max()) < 1e-4 * float(b.abs().max()) for a, b in zip(got, wanted, strict=True)]
    assert sum(equal) >= 2, "flips are rare: most positions agree to rounding"


def test_a_sequence_of_a_batch_gets_what_it_gets_alone(tmp_path: Path, seed: int) -> None:
    """Sequences join and leave: each has the bits it has alone, and the logits of one pass over its ids."""
    _, engine = engines(tmp_path, seed)
    count, limit = 3, 12
    rng = random.Random(seed)
    crowd, alone = engine.sequence_batch(count, limit), [engine.sequence_batch(count, limit) for _ in range(count)]
    for batch in (crowd, *alone):
        batch._cache._store.fill_(math.nan)  # nothing may be read that was not written
    held: list[list[int]] = [[] for _ in range(count)]
    equal = 0
    steps = 40 if ON_GPU else 8
    for _ in range(steps):
        entries = []
        for sequence in rng.sample(range(count), rng.randint(1, count)):
            room = limit - len(held[sequence])
            if not room or rng.random() < 0.1:  # full, or its text has ended
                keep = rng.randint(0, len(held[sequence]))
                for batch in (crowd, alone[sequence]):
                    batch.truncate(sequence, keep)
                del held[sequence][keep:]
                continue
            ids = [rng.randrange(61) for _ in range(1 if rng.random() < 0.6 else rng.randint(1, room))]
            entries.append(BatchEntry(sequence, ids, every=rng.random() < 0.2))
        for entry, got in zip(entries, crowd.forward(entries) if entries else [], strict=True):
            (wanted,) = alone[entry.sequence].forward([entry])
            assert torch.equal(got.cpu(), wanted.cpu())
            held[entry.sequence] += entry.ids
            whole = engine.logits(torch.tensor(held[entry.sequence]))
            whole = whole[-len(entry.ids) :] if entry.every else whole[-1]
            gap = float((got.cpu() - whole).abs().max())
            assert gap < 0.1 * float(whole.abs().max())  # as in test_decode_is_prefill
            equal += gap < 1e-4 * float(whole.abs().max())
        assert [crowd.length(sequence) for sequence in range(count)] == [len(ids) for ids in held]
    assert equal >= 2, "flips are rare: most logits agree to rounding"


def test_a_full_sequence_stays_as_it_is(tmp_path: Path, seed: int) -> None:
    """A step of its neighbours, in which its row is idle, changes nothing of it."""
    _, engine = engines(tmp_path, seed)
    batch = engine.sequence_batch(2, 4)
    batch._cache._store.fill_(math.nan)
    batch.forward([BatchEntry(0, [1, 2, 3, 4]), BatchEntry(1, [5])])
    before = batch._cache._store[:, :, 0, :, :4].clone()
    batch.forward([BatchEntry(1, [6])])
    assert torch.equal(batch._cache._store[:, :, 0, :, :4], before)
    with pytest.raises(BitNetError, match="context is full"):
        batch.forward([BatchEntry(0, [1])])
    assert (batch.length(0), batch.length(1)) == (4, 2)


def test_many_parts_and_positions(tmp_path: Path, seed: int) -> None:
    """Attention in several parts, some of them empty, against the logits of a single pass."""
    packed_model = Transformer(CONFIG.replace(num_hidden_layers=1, max_position_embeddings=200))
    packed_model.init_weights(seed)
    engine = TritonEngine(read_packed(write_packed(tmp_path / "m.safetensors", packed_model, None)), DEVICE)
    assert steps._parts(2, 200, DEVICE) > 1
    ids = torch.randint(61, (1, 71))
    session = engine.session(1, 200)
    session.prefill(ids[:, :69])
    session._cache._store[..., 69:, :] = math.nan
    whole = engine.logits(ids)
    for t in (69, 70):
        got = session.decode(ids[:, t]).cpu()
        assert torch.isfinite(got).all()
        assert float((got - whole[:, t]).abs().max()) < 0.1 * float(whole[:, t].abs().max())


def test_weights_are_there_once_and_packed(tmp_path: Path, seed: int) -> None:
    _, engine = engines(tmp_path, seed)
    model = engine.model
    packed = [p.weights.data for layer in model.layers for p in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    rows = sum(data.shape[1] * data.shape[0] * 64 for data in packed)
    assert all(data.dtype == torch.uint8 for data in packed)
    assert sum(data.nbytes for data in packed) == rows
    assert model.head is model.embedding  # tied: one matrix
    assert model.embedding.rows.dtype == torch.bfloat16
    assert engine.weight_bytes >= rows + model.head.rows.nbytes


def test_load_chooses_the_engine(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(CONFIG)
    model.init_weights(seed)
    path = write_packed(tmp_path / "m.safetensors", model, None)
    assert isinstance(load(path, DEVICE), TritonEngine)
    monkeypatch.setenv(ops.ENVIRONMENT, "float")
    assert isinstance(load(path, DEVICE), TorchEngine)
    monkeypatch.delenv(ops.ENVIRONMENT)
    plain = Transformer(CONFIG.replace(linear="float"))
    plain.init_weights(seed)
    path = write_packed(tmp_path / "plain.safetensors", plain, None)
    assert isinstance(load(path, DEVICE), TorchEngine)
    with pytest.raises(BitNetError, match="float linears"):
        TritonEngine(read_packed(path), DEVICE)


def test_an_unknown_id_is_never_an_answer(tmp_path: Path, seed: int) -> None:
    _, engine = engines(tmp_path, seed)
    embedding, gain = engine.model.embedding, engine.model.layers[0].input_gain
    x, codes = steps.enter(torch.tensor([3, 61, -1], device=DEVICE), embedding, gain, 1e-5)
    assert torch.equal(x[0].cpu(), embedding.rows[3].float().cpu())
    assert torch.isnan(x[1:]).all()
    assert torch.isnan(codes.inv_scale[1:]).all()
    session = engine.session(1, 4)
    for ids in (torch.tensor([61]), torch.tensor([-1])):
        with pytest.raises(BitNetError, match=r"expected 0\.\.60"):
            session.decode(ids)


def test_sessions_refuse_what_does_not_fit(tmp_path: Path, seed: int) -> None:
    _, engine = engines(tmp_path, seed)
    for batch, limit in ((0, 4), (65, 4), (1, 0)):
        with pytest.raises(BitNetError, match=f"got batch {batch} and limit {limit}"):
            engine.session(batch, limit)
    session = engine.session(2, 3)
    with pytest.raises(BitNetError, match=r"expected \[2, T\]"):
        session.prefill(torch.zeros(1, 2, dtype=torch.int64))
    session.prefill(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(BitNetError, match="context is full"):
        session.decode(torch.zeros(2, dtype=torch.int64))
    if not ON_GPU:
        with pytest.raises(BitNetError, match="got pdl=True, expected a GPU"):
            engines(tmp_path, seed, pdl=True)


# ---- on the device only ------------------------------------------------------------------------------------


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("pdl", [False, True], ids=["float", "pdl"])
def test_the_graph_is_the_step(pdl: bool, tmp_path: Path, seed: int) -> None:
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    _, graph = engines(tmp_path, seed, pdl=pdl)
    _, plain = engines(tmp_path, seed, graph=False, pdl=False)
    for batch in (1, 3, 64):
        ids = torch.randint(61, (batch, 20))
        a, b = graph.session(batch), plain.session(batch)
        assert torch.equal(a.prefill(ids[:, :3]), b.prefill(ids[:, :3]))
        for t in range(3, 20):
            assert torch.equal(a.decode(ids[:, t]), b.decode(ids[:, t].cuda())), f"batch {batch}, position {t}"


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_the_tuner_measures_once_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tune.ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls: list[int] = []

    def run(config: tune.Config) -> None:
        calls.append(config["size"])
        torch.ones(config["size"], device=DEVICE)

    configs = [{"size": 2**28}, {"size": 16}]
    assert tune.best("test", (os.getpid(),), configs, run, DEVICE) == configs[1]
    assert calls
    calls.clear()
    tune._chosen.clear()
    tune._files_read.clear()
    assert tune.best("test", (os.getpid(),), configs, run, DEVICE) == configs[1]
    assert not calls


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_a_training_step_under_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = BitLinear(256, 512, bias=False, device=DEVICE)
    x = torch.randn(64, 256, device=DEVICE, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        wanted = layer(x)
        got = torch.compile(layer, fullgraph=True)(x)
    assert torch.equal(got, wanted)
    got.float().square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_warmup_on_a_device(share: float) -> None:
    """A float product behind the device's own quantisers, against float64; the norm before it is not fused then."""
    layer, norm = BitLinear(40, 24, bias=False, device=DEVICE), PreNorm(40, 1e-5).to(DEVICE)
    x = torch.randn(5, 40, device=DEVICE)
    (y,) = project(norm(x), layer, precision=Precision(torch.tensor(share, device=DEVICE)))
    normed, weight, codes = norm(x).compute().detach(), layer.weight.detach(), layer.quantized_weight()
    q, inv_scale = reference.quantize_activations(normed)
    mixed_x = normed.double().lerp(q.double() / inv_scale, share)
    mixed_w = weight.double().lerp(codes.codes.double() * codes.scale, share)
    size = torch.maximum(normed.abs(), q.float().abs() / inv_scale) @ torch.maximum(weight.abs(), codes.scale).T
    bound = (40 + 12) * U * size  # a sum of 40 products of operands that are rounded a few times
    assert ((y.double() - mixed_x @ mixed_w.T).abs() <= bound).all()
    y.sum().backward()
    torch.testing.assert_close(layer.weight.grad, mixed_x.sum(0).float().expand(24, 40), rtol=1e-4, atol=1e-4)
