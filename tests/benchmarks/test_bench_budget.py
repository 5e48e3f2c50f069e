"""A contender of `bitnet bench` within its budget, and the meter within its own. Tests bring clocks and limits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_fakes import TINY, FakeMeter, rows_of, series_of

from bitnet.benchmarks.bench import meter
from bitnet.benchmarks.bench.device_meter import DeviceMeter, needed_peaks
from bitnet.benchmarks.bench.plan import Test
from bitnet.benchmarks.bench.series import Budget
from bitnet.benchmarks.children.process import ChildError
from bitnet.errors import BitNetError
from bitnet.files.tensors import linear_parameters


def test_the_short_call_predicts_a_round() -> None:
    one, child = series_of(0.1, 0.5, Budget(row=60))
    tests = [Test(40, 0), Test(0, 30), Test(20, 10, depth=30)]
    one.calibrate(tests)
    assert [(run["prompt"], run["predict"], run["depth"]) for run in child.asked] == [(16, 2, 0)]
    assert [one.cost[test] for test in tests] == pytest.approx([4.0, 15.0, 10.0])
    assert not one.left_out
    assert all(one.has_time_for(test) for test in tests)


def test_a_row_that_does_not_fit_is_left_out_with_the_rate_that_was_measured() -> None:
    one, child = series_of(0.001, 2.0, Budget(row=60))
    prompt, answer = Test(32, 0), Test(0, 50)
    one.calibrate([prompt, answer])
    assert len(child.asked) == 2  # the first call may have been slow because it was the first
    assert list(one.left_out) == [answer]
    assert one.has_time_for(prompt)
    assert not one.has_time_for(answer)
    macs = linear_parameters(TINY) + TINY.vocab_size * TINY.hidden_size
    macs += 2 * TINY.num_hidden_layers * TINY.hidden_size * sum(range(1, 51)) / 50
    rate = f"{macs / 2.0 / 1e9:.2g} GMAC/s here"
    assert one.left_out[answer] == f"{rate}, one round would take 100 s of its 60 (--budget); no kernel here"


def test_as_many_rounds_as_fit() -> None:
    one, child = series_of(0.0, 1.0, Budget(row=60))
    test = Test(0, 16)
    one.calibrate([test])
    one.warm_up(test, [test])
    rounds = 0
    while one.has_time_for(test):
        assert one.run(test, [test])
        rounds += 1
    assert rounds == 3  # 4 s of warming up and 3 x 16 s; a fourth would end at 68 s
    assert [run["predict"] for run in child.asked] == [2, 4, 16, 16, 16]
    assert one.cut_short[test] == "its 60 s were over (--budget)"
    assert not child.closed


def test_one_round_may_take_the_whole_budget() -> None:
    one, _ = series_of(0.5, 0.0, Budget(row=60))
    test = Test(120, 0)
    one.calibrate([test])
    one.warm_up(test, [test])
    assert one.has_time_for(test)
    one.run(test, [test])
    assert not one.has_time_for(test)
    assert len(one.samples[test]) == 1


def test_the_warm_up_may_show_that_it_does_not_fit() -> None:
    """A short call at an empty context is quicker than one far into it."""
    one, child = series_of(0.5, 0.1, Budget(row=60))
    test = Test(30, 20)
    one.calibrate([test])
    child.writing = 4.0
    one.warm_up(test, [test])
    assert "one round would take 95 s of its 60" in one.left_out[test]
    assert not one.has_time_for(test)


def test_a_call_that_hangs_costs_the_other_tests_of_its_contender_only() -> None:
    one, child = series_of(0.1, 0.1, Budget(row=60))
    first, second, third = tests = [Test(8, 0), Test(0, 8), Test(8, 8)]
    one.calibrate(tests)
    for test in tests:
        one.warm_up(test, tests)
    one.run(first, tests)
    child.writing = 1000.0
    assert not one.run(second, tests)
    assert child.asked[-1]["limit"] == pytest.approx(2 * 60 - 0.4)  # what its warm-up took is spent
    assert child.closed
    assert not any(one.has_time_for(test) for test in tests)
    assert len(one.samples[first]) == 1
    assert set(one.left_out) == {second, third}
    assert "tg8 was ended after 120 s (--budget); no kernel here" in one.left_out[third]
    rows = {test.name: rows_of(one, test, repetitions=5) for test in tests}
    assert rows["pp8"]["median_ts"] == pytest.approx(10.0)
    assert rows["pp8"]["remark"].startswith("1 of 5 rounds: less than ")
    assert (rows["tg8"]["median_ts"], rows["tg8"]["left_out"]) == (None, one.left_out[second])


def test_a_short_call_that_hangs_ends_its_contender() -> None:
    one, child = series_of(1e9, 1.0, Budget(row=60))
    tests = [Test(8, 0), Test(0, 8)]
    one.calibrate(tests)
    assert [run["limit"] for run in child.asked] == [15]
    assert child.closed
    assert set(one.left_out) == {*tests}


@pytest.mark.parametrize("ours", [True, False])
def test_a_failure_of_ours_is_an_error_and_of_another_a_row(ours: bool) -> None:
    one, child = series_of(0.1, 0.1, Budget(), ours)
    test = Test(8, 0)
    child.fails = ChildError("fake", "its process ended with code 3")
    if ours:
        with pytest.raises(BitNetError, match="ended with code 3"):
            one.calibrate([test])
    else:
        one.calibrate([test])
        assert one.left_out == {test: "its process ended with code 3"}


def test_a_short_call_stays_in_a_small_context() -> None:
    one, child = series_of(0.1, 0.1, Budget())
    one.config = TINY.replace(max_position_embeddings=4)
    one.calibrate([Test(4, 0), Test(0, 4)])
    (run,) = child.asked
    assert run["prompt"] > 0
    assert run["predict"] > 0
    assert run["prompt"] + run["predict"] <= 4


def test_peaks_that_no_row_needs_are_not_measured() -> None:
    prompt, answer, batch = Test(8, 0), Test(0, 8), Test(0, 8, batch=4)
    ours, _ = series_of(0, 0, Budget(), ours=True)
    ours.facts["peak"] = "avx512"
    rival, _ = series_of(0, 0, Budget())
    rival.facts["peak"] = "torch bf16"
    assert needed_peaks([ours, rival], [answer], "cpu") == set()
    assert needed_peaks([ours], [prompt], "cpu") == {"avx512", "torch int8", meter.DOT_PRODUCTS}
    assert needed_peaks([ours], [batch], "cpu") == {"avx512", "torch int8", meter.DOT_PRODUCTS}
    assert needed_peaks([rival], [prompt], "cpu") == {"torch bf16"}
    ours.left_out[prompt] = "too slow"  # then nothing of ours is held against a rival's peak
    assert needed_peaks([ours, rival], [prompt], "cpu") == {"torch bf16"}


def test_a_peak_that_hangs_costs_that_peak_only() -> None:
    meters: list[FakeMeter] = []

    def start() -> Any:
        meters.append(FakeMeter({"b"}))
        return meters[-1]

    device = DeviceMeter("cpu", start)
    for _ in range(2):
        device.product({"a", "b", "c"}, lambda text: None)
    assert device.peaks == {"a": 1e9, "b": None, "c": 1e9}
    assert [one.asked for one in meters] == [["a", "b", "close"], ["c", "a", "c"]]


@pytest.mark.parametrize(
    ("rate", "calls"), [(0.03e9, [3]), (1e9, [6, 6, 6]), (100e9, [6, 6, 6, 6])], ids=["slow", "middling", "fast"]
)
def test_a_peak_takes_its_seconds(rate: float, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest shape comes first; dearer ones only where the time that is left is enough for them."""
    clock = [0.0]
    ran: dict[tuple[int, int, int], int] = {}

    def make(m: int, n: int, k: int) -> Callable[[], object]:
        def product() -> None:
            ran[m, n, k] = ran.get((m, n, k), 0) + 1
            clock[0] += m * n * k / rate

        return product

    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(meter.Meter, "_makes", lambda self, kind: {"the way": make})
    answer = meter.Meter(torch.get_num_threads(), "cpu").product("torch int8")
    assert answer == {"rate": pytest.approx(rate), "how": "the way"}
    assert list(ran.values()) == calls
    shapes = [m * n * k for m, n, k in ran]
    assert shapes == sorted(shapes)
    assert clock[0] < 2 * meter.PRODUCT_SECONDS
