"""Bits per byte, perplexity and standard errors, against plain Python in float64 and a bootstrap."""

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.train.evaluate import IGNORED, Evaluation, evaluate, summarize

Windows = list[tuple[Tensor, Tensor]]


def plain(table: list[list[float]], windows: Windows, lengths: list[int]) -> tuple[list[float], list[int], list[int]]:
    """Nats, tokens and bytes of each window, one number at a time."""
    nats, tokens, sizes = [], [], []
    for inputs, targets in windows:
        for row, goals in zip(inputs.tolist(), targets.tolist(), strict=True):
            pairs = [(i, t) for i, t in zip(row, goals, strict=True) if t != -100]
            nats.append(math.fsum(surprise(table[i], t) for i, t in pairs))
            tokens.append(len(pairs))
            sizes.append(sum(lengths[t] for _, t in pairs))
    return nats, tokens, sizes


def surprise(logits: list[float], target: int) -> float:
    top = max(logits)
    return top - logits[target] + math.log(math.fsum(math.exp(logit - top) for logit in logits))


def random_windows(vocab: int, rng: torch.Generator, ignored: float = 0.2) -> Windows:
    windows = []
    context = random.randint(1, 9)
    for _ in range(random.randint(2, 6)):
        rows = random.randint(1, 5)
        inputs = torch.randint(0, vocab, (rows, context), generator=rng)
        targets = torch.randint(0, vocab, (rows, context), generator=rng)
        targets[torch.rand(rows, context, generator=rng) < ignored] = IGNORED
        windows.append((inputs, targets))
    windows[0][1][0, 0] = 1  # so that something is scored
    return windows


def test_against_plain_python(rng: torch.Generator) -> None:
    for _ in range(25):
        vocab = random.randint(2, 40)
        table = torch.randn(vocab, vocab, generator=rng) * 5
        lengths = np.array([0] + [random.randint(0 if i > 1 else 1, 7) for i in range(1, vocab)])
        windows = random_windows(vocab, rng)
        got = evaluate(lambda ids, table=table: table[ids], windows, lengths)
        nats, tokens, sizes = plain(table.tolist(), windows, lengths.tolist())
        # Each loss is a difference of fp32 numbers below 64: 2^-24 * 64, half a dozen times. Sums are fp64.
        bound = 6 * 64 * 2**-24
        loss = math.fsum(nats) / sum(tokens)
        assert got.tokens == sum(tokens)
        assert got.bytes == sum(sizes)
        assert got.loss == pytest.approx(loss, abs=bound)
        assert got.perplexity == pytest.approx(math.exp(loss), rel=2 * bound)
        wanted = math.fsum(nats) / math.log(2) / sum(sizes)
        assert got.bits_per_byte == pytest.approx(wanted, abs=bound * sum(tokens) / sum(sizes) / math.log(2))


def test_equal_windows_have_the_textbook_error() -> None:
    """With windows of one size the ratio estimate is a mean: s / sqrt(n)."""
    n, size, width = random.randint(3, 60), random.randint(1, 50), random.randint(1, 90)
    nats = [random.gauss(3.0 * size, 5.0) for _ in range(n)]
    got = summarize(np.array(nats), np.full(n, size), np.full(n, width))
    mean = math.fsum(nats) / n
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in nats) / (n - 1))
    assert got.bits_per_byte_error == pytest.approx(deviation / math.sqrt(n) / width / math.log(2), rel=1e-9)
    assert got.perplexity_error == pytest.approx(
        math.exp(mean / size) * deviation / math.sqrt(n) / size, rel=1e-9
    )  # d exp(l) = exp(l) dl


def test_error_agrees_with_a_bootstrap(seed: int) -> None:
    """Independent windows of unequal size: the linearised error is the spread of resampled ratios."""
    generator = np.random.default_rng(seed)
    n, draws = 400, 4000
    tokens = generator.integers(5, 60, n)
    sizes = tokens * 3 + generator.integers(0, 40, n)
    nats = tokens * generator.normal(2.5, 0.4, n)
    got = summarize(nats, tokens, sizes)
    chosen = generator.integers(0, n, (draws, n))
    per_byte = nats[chosen].sum(1) / sizes[chosen].sum(1) / math.log(2)
    perplexity = np.exp(nats[chosen].sum(1) / tokens[chosen].sum(1))
    # The spread of 4,000 draws is known to 1 / sqrt(2 * 4000) = 1.1 %, and linearising errs by about 1 / 400; the
    # spread over resamples is itself sqrt(1 - 1/n) of the estimate. 10 % are far outside of all that.
    assert got.bits_per_byte_error == pytest.approx(float(per_byte.std()), rel=0.1)
    assert got.perplexity_error == pytest.approx(float(perplexity.std()), rel=0.1)


def test_one_window_has_no_error() -> None:
    got = summarize(np.array([3.0]), np.array([2]), np.array([6]))
    assert (got.bits_per_byte_error, got.perplexity_error) == (None, None)
    assert got.loss == 1.5
    # A second window in which nothing is scored does not make it two.
    assert summarize(np.array([3.0, 0.0]), np.array([2, 0]), np.array([6, 0])) == got


def test_ignored_targets_do_not_count(rng: torch.Generator) -> None:
    """Whatever stands at the inputs of ignored targets, and however many there are."""
    table = torch.randn(9, 9, generator=rng)
    inputs = torch.randint(0, 9, (3, 4), generator=rng)
    targets = torch.randint(0, 9, (3, 4), generator=rng)
    lengths = np.arange(9) + 1
    alone = evaluate(lambda ids: table[ids], [(inputs, targets)], lengths)
    padding = torch.randint(0, 9, (3, 5), generator=rng)
    padded = (torch.cat((inputs, padding), 1), torch.cat((targets, torch.full((3, 5), -100)), 1))
    assert evaluate(lambda ids: table[ids], [padded], lengths) == alone


def test_how_windows_are_batched_does_not_matter(rng: torch.Generator) -> None:
    table = torch.randn(33, 33, generator=rng)
    inputs = torch.randint(0, 33, (30, 7), generator=rng)
    targets = torch.randint(0, 33, (30, 7), generator=rng)
    lengths = np.arange(33) % 5
    results = []
    for size in (1, 7, 30):
        windows = list(zip(inputs.split(size), targets.split(size), strict=True))
        results.append(evaluate(lambda ids: table[ids], windows, lengths))
    for other in results[1:]:
        assert (other.tokens, other.bytes) == (results[0].tokens, results[0].bytes)
        assert other.loss == pytest.approx(results[0].loss, abs=1e-6)  # fp32 logits of a few units, fp64 sums
        assert other.bits_per_byte_error == pytest.approx(results[0].bits_per_byte_error, abs=1e-6)


def test_a_uniform_guess() -> None:
    """A uniform prediction over 256 one-byte tokens costs eight bits per byte, with no standard error."""

    def windows() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(5):
            yield torch.zeros(2, 8, dtype=torch.int64), torch.randint(0, 256, (2, 8))

    got = evaluate(lambda ids: torch.zeros(*ids.shape, 256), windows(), np.ones(256, dtype=np.int64))
    assert got.bits_per_byte == pytest.approx(8.0, abs=1e-6)
    assert got.perplexity == pytest.approx(256.0, rel=1e-6)
    assert got.bits_per_byte_error == pytest.approx(0.0, abs=1e-6)


def test_certainty_costs_nothing_and_a_hopeless_loss_is_no_crash() -> None:
    inputs = torch.arange(4)[None]
    table = torch.eye(4) * 2000.0
    assert evaluate(lambda ids: table[ids], [(inputs, inputs)], np.ones(4)).bits_per_byte == 0.0
    lost = evaluate(lambda ids: table[ids], [(inputs, inputs.flip(1))], np.ones(4))
    assert lost.loss == pytest.approx(2000.0)
    assert lost.perplexity == math.inf


def test_low_precision_scores_are_judged_in_fp32(rng: torch.Generator) -> None:
    table = torch.randn(20, 20, generator=rng).bfloat16()
    inputs, targets = (torch.randint(0, 20, (2, 6), generator=rng) for _ in range(2))
    wide = table.float()
    narrow = evaluate(lambda ids: table[ids], [(inputs, targets)], np.ones(20))
    assert narrow == evaluate(lambda ids: wide[ids], [(inputs, targets)], np.ones(20))


def test_nothing_to_score_is_refused() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(BitNetError, match="no text"):
        evaluate(lambda ids: torch.zeros(1, 3, 5), [(ids, torch.full((1, 3), IGNORED))], np.ones(5))
    with pytest.raises(BitNetError, match="no text"):  # control tokens only: no bytes to divide by
        evaluate(lambda ids: torch.zeros(1, 3, 5), [(ids, ids)], np.zeros(5))


def test_progress_counts_scored_tokens(rng: torch.Generator) -> None:
    windows = random_windows(12, rng)
    told: list[int] = []
    got = evaluate(lambda ids: torch.zeros(*ids.shape, 12), windows, np.ones(12), told.append)
    each = [int((targets != IGNORED).sum()) for _, targets in windows]
    assert told == [sum(each[: i + 1]) for i in range(len(each))]
    assert told[-1] == got.tokens


def test_json_values() -> None:
    got = summarize(np.array([3.0, 5.0]), np.array([2, 2]), np.array([6, 7]))
    assert Evaluation(**got.to_dict()) == got
    assert {type(value) for value in got.to_dict().values()} == {float, int}
