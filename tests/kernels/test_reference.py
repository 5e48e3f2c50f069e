"""The numerical truth itself, held against exact fractions and plain loops.

The expectation is written with Python's `fractions`, whose arithmetic has no rounding, and rounded to fp32 where the
definition says fp32. Variants found in other projects are constructed and told apart, one test each.
"""

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from bitnet.kernels import packing, reference

EPS = 1e-5  # clamp of both scales, as in Microsoft's FAQ
ULP = 2.0**-24  # half a unit in the last place of fp32, relative: the error of one rounding
SHAPES = [(1, 1), (1, 63), (3, 100), (31, 1), (17, 129), (64, 257)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def fp32(value: float | Fraction) -> float:
    """The nearest fp32 number. By way of fp64, whose 53 > 2 * 24 + 1 bits make that exact for one * or / of fp32s."""
    return float(torch.tensor(float(value), dtype=torch.float32))


def half_even(value: Fraction) -> int:
    return round(value)  # Python rounds a Fraction half to even, exactly


def mean_abs(weight: Tensor) -> Fraction:
    values = [abs(Fraction(v)) for v in weight.flatten().tolist()]
    return sum(values, Fraction(0)) / len(values)


def values_around(scale: float, shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng) * scale


# ---- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-K{s[1]}")
@pytest.mark.parametrize("scale", [1e-3, 0.02, 1.0, 1e4])
def test_ternary_weights(shape: tuple[int, int], scale: float, rng: torch.Generator) -> None:
    weight = values_around(scale, shape, rng)
    codes, s_w = reference.ternary_weights(weight)
    assert (codes.dtype, s_w.dtype, s_w.shape) == (torch.int8, torch.float32, ())
    # A sum of K positive fp32 numbers is off by at most K - 1 roundings, relative; two more for / and to fp32.
    assert abs(float(s_w) - mean_abs(weight)) <= (shape[1] + 2) * ULP * mean_abs(weight)
    inverse = fp32(1 / Fraction(float(s_w)))
    for w, code in zip(weight.flatten().tolist(), codes.flatten().tolist(), strict=True):
        product = fp32(Fraction(w) * Fraction(inverse))  # one fp32 multiplication
        assert code == max(-1, min(1, half_even(Fraction(product)))), (w, inverse)


def test_ternary_rounds_ties_to_even() -> None:
    # mean |w| is exactly 1, so +-0.5 and +-1.5 are exact ties: even neighbours are 0 and (clamped) 1.
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5, 0.5, 1.5, 1.0, -1.0]])
    codes, scale = reference.ternary_weights(weight)
    assert float(scale) == 1.0
    # floor(x + 0.5), as in onebitllms, gives 1, 0 for the first two; half away from zero gives 1, -1.
    assert codes.tolist() == [[0, 0, 1, -1, 0, 1, 1, -1]]


def test_zero_weights_stay_finite() -> None:
    codes, scale = reference.ternary_weights(torch.zeros(3, 5))
    assert not codes.any()
    assert float(scale) == fp32(EPS)


def test_weight_scale_is_clamped_not_shifted() -> None:
    """TriLM adds eps to the mean; ours is the mean itself above eps, and eps itself below."""
    weight = torch.full((4, 4), 2.0**-13)  # 1.2e-4: adding 1e-5 would show as 8 %
    assert float(reference.ternary_weights(weight).scale) == 2.0**-13
    below = torch.full((4, 4), 2.0**-18)  # 3.8e-6 < eps: 3.8e-6 / 1e-5 rounds to 0
    codes, scale = reference.ternary_weights(below)
    assert float(scale) == fp32(EPS)
    assert not codes.any()
    almost = torch.full((4, 4), 6e-6)  # 0.6 of the clamped scale rounds to 1; of the sum 1.6e-5 it would to 0
    assert bool((reference.ternary_weights(almost).codes == 1).all())


def test_weight_scale_is_not_rounded_to_bf16() -> None:
    """torchao rounds the scale to the dtype of the weights before use: a code next to the tie then flips."""
    mean = 1 + 2.0**-9  # rounds to 1 in bf16
    # 0.5 + 2^-11 lies between 0.5 * mean (its tie is 0.5 + 2^-10) and 0.5: 0 with the fp32 scale, 1 with the bf16 one.
    value = 0.5 + 2.0**-11
    weight = torch.tensor([[value, 2 * mean - value]])
    codes, scale = reference.ternary_weights(weight)
    assert float(scale) == mean
    assert codes.tolist() == [[0, 1]]
    assert round(value / float(torch.tensor(mean).bfloat16())) == 1  # the variant differs on this input


def test_half_precision_masters_are_quantised_in_fp32(rng: torch.Generator) -> None:
    weight = torch.randn(31, 100, generator=rng).bfloat16()
    codes, scale = reference.ternary_weights(weight)
    expected = reference.ternary_weights(weight.float())
    assert scale.dtype == torch.float32
    assert torch.equal(codes, expected.codes)
    assert torch.equal(scale, expected.scale)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-K{s[1]}")
def test_binary_weights(shape: tuple[int, int], rng: torch.Generator) -> None:
    weight = values_around(0.5, shape, rng) + 0.1
    codes, scale = reference.binary_weights(weight)
    exact = [Fraction(v) for v in weight.flatten().tolist()]
    mean = sum(exact, Fraction(0)) / len(exact)
    bound = (shape[1] + 2) * ULP * mean_abs(weight)  # as above; terms cancel, so relative to mean |w|
    assert abs(float(scale) - mean_abs(weight)) <= bound
    for value, code in zip(exact, codes.flatten().tolist(), strict=True):
        if abs(value - mean) > bound or value == mean:
            assert code == (1 if value > mean else -1)
        assert code in (-1, 1)


def test_binary_sign_of_the_mean_is_minus_one() -> None:
    """sign(0) = 0 does not exist in one bit: the mean itself goes to -1, and so does a constant tensor."""
    assert reference.binary_weights(torch.tensor([[-1.0, 0.0, 1.0]])).codes.tolist() == [[-1, -1, 1]]
    assert reference.binary_weights(torch.tensor([[1.0, 2.0, 3.0]])).codes.tolist() == [[-1, -1, 1]]
    codes, scale = reference.binary_weights(torch.zeros(2, 3))
    assert codes.tolist() == [[-1] * 3] * 2
    assert float(scale) == fp32(EPS)


def test_binary_scale_is_not_centred() -> None:
    """s_w is mean |W|, not mean |W - mean W| (which differs as soon as the mean is not 0)."""
    assert float(reference.binary_weights(torch.tensor([[1.0, 3.0]])).scale) == 2.0


@pytest.mark.parametrize("shape", [(1, 100_003), (2, 70_001), (3, 40_009), (40_009, 3), (257, 401)])
def test_scale_does_not_depend_on_threads(shape: tuple[int, int], rng: torch.Generator, threads: None) -> None:
    for _ in range(4):
        weight = torch.randn(shape, generator=rng)
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((*reference.ternary_weights(weight), *reference.binary_weights(weight)))
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two)


# ---- activations -------------------------------------------------------------------------------------------


def inverse_scale(largest: float) -> float:
    """127 / max in two fp32 roundings, 1 / max first: what torch and so transformers make of `127 / tensor`."""
    return fp32(127 * Fraction(fp32(1 / Fraction(fp32(largest)))))


def check_activations(x: Tensor) -> None:
    q, inv_scale = reference.quantize_activations(x)
    assert (q.dtype, inv_scale.dtype) == (torch.int8, torch.float32)
    assert q.shape == x.shape
    assert inv_scale.shape == (*x.shape[:-1], 1)
    rows = zip(x.view(-1, x.shape[-1]).tolist(), q.view(-1, x.shape[-1]).tolist(), inv_scale.flatten().tolist())
    for values, codes, inverse in rows:
        largest = max(fp32(EPS), *(abs(v) for v in values))
        assert inverse == inverse_scale(largest)
        for value, code in zip(values, codes, strict=True):
            assert code == half_even(Fraction(fp32(Fraction(value) * Fraction(inverse))))
            assert abs(code) <= 127


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 63), (7, 100), (2, 3, 31), (5, 129)], ids=str)
@pytest.mark.parametrize("scale", [1e-7, 1e-2, 1.0, 300.0, 1e30])
def test_activations(shape: tuple[int, ...], scale: float, rng: torch.Generator) -> None:
    check_activations(torch.randn(shape, generator=rng) * scale)


NASTY = {
    "zeros": [0.0, -0.0, 0.0],
    "denormals": [1e-45, -1e-40, 1.1754944e-38, 0.0],
    "around the clamp": [1e-5, -9.999e-6, 1.001e-5, 5e-6],
    "huge": [1e30, -1e30, 3.4028235e38, 1.0],
    "one outlier": [1e6, 1e-3, -0.5, 3.0, 3937.0, 3938.0],
    "lone negative": [-3.0, 1.0, 1.5],
    "same": [0.1] * 7,
}


@pytest.mark.parametrize("values", NASTY.values(), ids=NASTY)
def test_nasty_activations(values: list[float]) -> None:
    check_activations(torch.tensor([values, values[::-1]]))


def test_the_largest_activation_is_always_127(rng: torch.Generator) -> None:
    """No clamp is needed: whatever 127 / max rounds to, max times it rounds to 127, never to 128 or -128."""
    exponent = torch.empty(200_000).uniform_(-16, 38.5, generator=rng)
    x = (10 ** exponent.double()).float().clamp(1e-5, 3.4e38)[:, None] * torch.tensor([1.0, -1.0])
    q, inv_scale = reference.quantize_activations(x)
    assert bool((q[:, 0] == 127).all())
    assert bool((q[:, 1] == -127).all())
    assert bool(torch.isfinite(inv_scale).all())


def test_activations_round_ties_to_even() -> None:
    # max |x| = 127, so the codes are the values: exact ties at every half.
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    # floor(x + 0.5) gives 1 2 3 0 -1 -2 127, half away from zero (Triton's old round) 1 2 3 -1 -2 -3 127.
    assert reference.quantize_activations(x).codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_activation_scale_is_clamped_at_the_maximum() -> None:
    """eps on max |x| (ours), not on max |x| / 127 (torchao): 1e-4 is far above the one, far below the other."""
    q, inv_scale = reference.quantize_activations(torch.tensor([[1e-4, -5e-5]]))
    assert q.tolist() == [[127, round(-63.5)]]
    assert float(inv_scale) == inverse_scale(1e-4)
    q, inv_scale = reference.quantize_activations(torch.tensor([[5e-6]]))  # below: half of the clamp
    assert q.tolist() == [[64]]  # 63.5 (to even), where an unclamped scale would give 127
    assert float(inv_scale) == inverse_scale(EPS)


def test_activation_scale_is_fp32_for_bf16_inputs() -> None:
    # 127 / 3 = 42.33; in bf16 it would be 42.25: 2.5 * 42.33 = 105.8 against 105.6, 1.5: 63.5 (even) against 63.4.
    x = torch.tensor([[3.0, 1.5, 2.5]], dtype=torch.bfloat16)
    q, inv_scale = reference.quantize_activations(x)
    assert float(inv_scale) == inverse_scale(3.0)
    assert q.tolist() == [[127, 64, 106]]


def test_each_token_has_its_own_scale(rng: torch.Generator) -> None:
    x = torch.randn(5, 33, generator=rng)
    alone = [reference.quantize_activations(row[None]) for row in x]
    together = reference.quantize_activations(x * torch.tensor([1, 2, 4, 8, 0.5])[:, None])  # powers of 2: exact
    assert torch.equal(together.codes, torch.cat([one.codes for one in alone]))


def test_quantisers_leave_their_input_alone(rng: torch.Generator) -> None:
    x = torch.randn(7, 9, generator=rng)
    copy = x.clone()
    for quantise in (reference.ternary_weights, reference.binary_weights, reference.quantize_activations):
        quantise(x)
    assert torch.equal(x, copy)


# ---- products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 7, 3), (3, 5, 63), (5, 1, 101)], ids=str)
def test_products(m: int, n: int, k: int, rng: torch.Generator) -> None:
    q = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=rng)
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=rng)
    expected = [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in codes.tolist()] for row in q.tolist()
    ]
    acc = reference.matmul(q, codes)
    assert acc.dtype == torch.int32
    assert acc.tolist() == expected
    assert reference.packed_matmul(q, packing.pack(codes)).tolist() == expected


def test_product_is_exact_beyond_fp32() -> None:
    k = 140_001  # 127 * k = 17,780,127 > 2^24
    q, codes = torch.full((1, k), 127, dtype=torch.int8), torch.ones(1, k, dtype=torch.int8)
    assert int(reference.matmul(q, codes)) == 127 * k
    assert int(reference.matmul(q, -codes)) == -127 * k


def test_scale_output(rng: torch.Generator) -> None:
    acc = torch.randint(-(2**20), 2**20, (3, 5), dtype=torch.int32, generator=rng)
    inv_scale = torch.rand(3, 1, generator=rng) + 0.1
    for scale in (torch.rand((), generator=rng), torch.rand(5, generator=rng)):
        y = reference.scale_output(acc, scale, inv_scale)
        assert y.dtype == torch.float32
        for m, n in ((m, n) for m in range(3) for n in range(5)):
            s = float(scale if scale.dim() == 0 else scale[n])
            exact = Fraction(int(acc[m, n])) * Fraction(s) / Fraction(float(inv_scale[m]))
            # Two roundings, / and *: an accumulator below 2^24 is exact in fp32.
            assert math.isclose(float(y[m, n]), float(exact), rel_tol=2 * ULP + 1e-12)
