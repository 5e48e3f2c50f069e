"""The filters against a plain per-row version of llama.cpp's chain, and the draws against their probabilities."""

import math
import random

import pytest
import torch
from torch import Tensor

from bitnet.engine.sampling import GREEDY, Sampler, Sampling, filtered_probabilities
from bitnet.errors import BitNetError

OFF = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def by_llama_cpp(logits: list[float], s: Sampling) -> tuple[dict[int, float], float]:
    """Its chain in fp64: top-k, top-p, min-p, temperature on a list of candidates that shrinks.

    Returns the probabilities that are left and how near, relative, any cut came to a candidate.
    """
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    margin = math.inf
    if s.top_k:
        order = order[: s.top_k]
    if s.top_p < 1.0:
        total, kept = 0.0, []
        for i, p in zip(order, softmax([logits[i] for i in order]), strict=True):
            kept.append(i)
            total += p
            margin = min(margin, abs(total - s.top_p))
            if total >= s.top_p:
                break
        order = kept
    if s.min_p > 0.0:
        threshold = logits[order[0]] + math.log(s.min_p)
        margin = min([margin, *(abs(logits[i] - threshold) for i in order[1:])])
        order = [order[0], *(i for i in order[1:] if logits[i] >= threshold)]
    probabilities = softmax([logits[i] / s.temperature for i in order])
    return dict(zip(order, probabilities, strict=True)), margin


@pytest.mark.parametrize("vocab", [1, 2, 3, 63, 100, 1009])
def test_filters_are_llama_cpps(vocab: int, rng: torch.Generator) -> None:
    checked = 0
    for _ in range(60):
        sampling = Sampling(
            temperature=random.choice([0.05, 0.8, 1.0, 1.7, 100.0]),
            top_k=random.choice([0, 1, 2, 40, vocab, vocab + 5]),
            top_p=random.choice([1e-6, 0.1, 0.5, 0.95, 1.0]),
            min_p=random.choice([0.0, 0.05, 0.5, 1.0]),
        )
        logits = torch.randn(2, vocab, generator=rng) * random.choice([0.1, 1.0, 5.0])
        result = filtered_probabilities(logits, sampling)
        for row, got in zip(logits.tolist(), result.tolist(), strict=True):
            expected, margin = by_llama_cpp(row, sampling)
            if margin < 1e-5:  # a cut at the rounding of fp32: either side is right
                continue
            checked += 1
            assert {i for i, p in enumerate(got) if p > 0} <= set(expected)
            for i, p in expected.items():
                # Exponents of up to 40 / 0.05 are rounded by 2^-24 of their size: 800 * 2^-23 = 1e-4 relative.
                assert got[i] == pytest.approx(p, rel=2e-4, abs=1e-7), sampling
    assert checked > 30


def test_each_filter_alone_by_hand() -> None:
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()[None]

    def kept(**changes: float) -> list[float]:
        values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | changes
        return [round(p, 4) for p in filtered_probabilities(logits, Sampling(**values))[0].tolist()]

    assert kept() == [0.4, 0.1, 0.3, 0.2]
    assert kept(top_k=2) == [0.5714, 0.0, 0.4286, 0.0]
    assert kept(top_p=0.65) == [0.5714, 0.0, 0.4286, 0.0]  # 0.4 < 0.65: the next one is needed
    assert kept(top_p=0.75) == [0.4444, 0.0, 0.3333, 0.2222]
    assert kept(min_p=0.6) == [0.5714, 0.0, 0.4286, 0.0]  # at least 0.24
    # top-p counts among what top-k left: 0.5714 alone reaches 0.5.
    assert kept(top_k=2, top_p=0.5) == [1.0, 0.0, 0.0, 0.0]
    # temperature comes last: min-p looked at the unheated 0.4 : 0.1, and squares follow.
    assert kept(temperature=0.5, min_p=0.6) == [0.64, 0.0, 0.36, 0.0]


def test_top_p_of_one_cuts_nothing(rng: torch.Generator) -> None:
    """Also where fp32 has no room for the tail: the sum of the tokens before reaches 1 by rounding."""
    steep = torch.tensor([[30.0, 0.0, -1.0, 1.0]])
    assert bool((filtered_probabilities(steep, OFF) > 0).all())
    wide = torch.randn(3, 50_000, generator=rng) * 3
    assert torch.allclose(filtered_probabilities(wide, OFF), wide.softmax(-1), rtol=1e-4)
    assert bool((filtered_probabilities(wide, OFF) > 0).all())


def test_ties() -> None:
    same = torch.zeros(1, 7)
    assert filtered_probabilities(same, OFF)[0].tolist() == pytest.approx([1 / 7] * 7)
    three = filtered_probabilities(same, Sampling(temperature=1.0, top_k=3, top_p=1.0, min_p=0.0))[0].tolist()
    assert sorted(three) == pytest.approx([0.0] * 4 + [1 / 3] * 3)  # any three
    all_stay = filtered_probabilities(same, Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=1.0))[0]
    assert bool((all_stay > 0).all())  # as likely as the likeliest is likely enough


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-38, 1e-6, 0.01, 100.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 1e30])
def test_extremes_stay_finite(temperature: float, scale: float, rng: torch.Generator) -> None:
    logits = torch.randn(4, 33, generator=rng) * scale
    every = Sampling(temperature, 0, 1.0, 0.0)
    filtered = Sampling(temperature), Sampling(temperature, 0, 1e-6, 1.0), Sampling(temperature, 1)
    for sampling in (every, *filtered):
        probabilities = filtered_probabilities(logits, sampling)
        assert bool(torch.isfinite(probabilities).all())
        assert probabilities.sum(-1).tolist() == pytest.approx([1.0] * 4, rel=1e-5)
        top = probabilities.gather(1, logits.argmax(-1, keepdim=True))
        assert bool((top >= probabilities.amax(-1, keepdim=True)).all()) or scale == 0
        ids = Sampler(sampling).draw(logits)
        assert bool((probabilities.gather(1, ids[:, None]) > 0).all())


def test_masked_tokens_are_never_drawn(rng: torch.Generator) -> None:
    logits = torch.randn(2, 10, generator=rng)
    logits[:, 3:] = -torch.inf
    probabilities = filtered_probabilities(logits, OFF)
    assert not probabilities[:, 3:].any()
    assert int(Sampler(OFF).draw(logits[:1].expand(5000, -1)).max()) < 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 0, 1.0, 0.0)], ids=["filtered", "all"])
def test_what_is_no_number_is_an_error(bad: float, sampling: Sampling, rng: torch.Generator) -> None:
    logits = torch.randn(2, 10, generator=rng)
    logits[1, 4] = bad
    with pytest.raises(RuntimeError):
        Sampler(sampling).draw(logits)


def test_temperature_zero_is_greedy(rng: torch.Generator) -> None:
    logits = torch.randn(50, 97, generator=rng)
    ids = Sampler(GREEDY).draw(logits)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert Sampler(Sampling(temperature=1.0, top_k=1)).draw(logits).tolist() == ids.tolist()


def test_rows_do_not_touch_each_other(rng: torch.Generator) -> None:
    logits = torch.randn(5, 40, generator=rng) * 3
    together = filtered_probabilities(logits, Sampling())
    for row, expected in zip(logits, together, strict=True):
        assert torch.equal(filtered_probabilities(row[None], Sampling())[0], expected)


@pytest.mark.parametrize("filters", [(8, 0.95, 0.02), (0, 1.0, 0.0)], ids=["filtered", "all"])
def test_draws_follow_the_probabilities(filters: tuple[int, float, float], seed: int, rng: torch.Generator) -> None:
    logits = torch.randn(1, 12, generator=rng)
    sampling = Sampling(1.3, *filters, seed=seed)
    probabilities = filtered_probabilities(logits, sampling)[0].tolist()
    n = 40_000
    counts = torch.bincount(Sampler(sampling).draw(logits.expand(n, -1)), minlength=12).tolist()
    for count, p in zip(counts, probabilities, strict=True):
        # Bernstein: P(|count - np| > t) <= 2 exp(-t^2 / (2 n p (1 - p) + 2 t / 3)), below 1e-12 a token with this t.
        log = math.log(2e12)
        t = math.sqrt(2 * n * p * (1 - p) * log) + 2 * log / 3
        assert abs(count - n * p) <= t if p > 0 else count == 0


def test_seeds(seed: int, rng: torch.Generator) -> None:
    logits = torch.randn(300, 50, generator=rng)

    def drawn(seed: int) -> Tensor:
        return Sampler(Sampling(seed=seed)).draw(logits)

    first = drawn(seed)
    torch.manual_seed(seed + 1)  # the global generator plays no part
    assert torch.equal(drawn(seed), first)
    assert not torch.equal(drawn(seed + 1), first)
    sampler = Sampler(Sampling(seed=seed))
    assert torch.equal(sampler.draw(logits), first)
    assert not torch.equal(sampler.draw(logits), first)  # its state moves on


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", 101.0), ("temperature", math.nan), ("temperature", math.inf),
        ("temperature", "hot"), ("top_k", -1), ("top_k", 1.5), ("top_k", True), ("top_p", 0.0), ("top_p", 1.01),
        ("top_p", math.nan), ("min_p", -0.01), ("min_p", 1.1), ("seed", -1), ("seed", 2**63), ("seed", 0.5),
    ],
)  # fmt: skip
def test_ranges(name: str, value: object) -> None:
    with pytest.raises(BitNetError, match=rf"sampling\.{name}: got .*, expected "):
        Sampling(**{name: value})
