"""Contenders interleaved: every round runs each test once on each contender, the order reversed from round to round.

A warm-up round is discarded. Between rounds the machine itself is measured: how fast it reads a working set as large as
each contender's. Each row has a budget of seconds (series.py): one that does not fit it is left out, or has fewer
rounds, with the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from bitnet.benchmarks.bench.contenders import Contender, Files
from bitnet.benchmarks.bench.device_meter import DeviceMeter, needed_peaks, working_set
from bitnet.benchmarks.bench.interleaving import in_turn
from bitnet.benchmarks.bench.plan import Test
from bitnet.benchmarks.bench.rows import Subject, device_report, row, speeds
from bitnet.benchmarks.bench.series import Budget, Series, start
from bitnet.benchmarks.bench.table import digits
from bitnet.benchmarks.children.process import Child

Show = Callable[[str], None]


def group(
    subject: Subject,
    files: Files,
    contenders: Sequence[Contender],
    tests: list[Test],
    threads: int,
    repetitions: int,
    budget: Budget,
    status: Show,
    log: Show,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All contenders and tests of one model on so many threads. Returns the rows and a report of each device.

    status: shows what is being done. log: gets a line with the first figure of each row.
    """
    where = f"{subject.name}, {threads} thread{'s' * (threads > 1)}: "

    def doing(what: str) -> None:
        status(where + what)

    with ExitStack() as stack:
        all_series = []
        for one in contenders:
            doing(f"loading {one.name}")
            all_series.append(start(one, subject.config, files, tests, threads, budget))
            stack.callback(all_series[-1].close)
        meters = {one.device: _meter(one.device, threads) for one in contenders}
        for meter in meters.values():
            stack.callback(meter.close)
        _prepare(meters, all_series, tests, doing)
        for turn in range(1, repetitions + 1):
            for series, test in _next(all_series, tests, turn):
                doing(f"round {turn} of {repetitions}: {test.name} on {series.label}")
                if series.run(test, tests) and turn == 1:
                    speed = digits(speeds(test, series.samples[test])[0])
                    log(f"{where}{test.name} on {series.label}: {speed} tokens/s, round 1 of {repetitions}")
            last = turn == repetitions or not any(one.has_time_for(test) for one in all_series for test in tests)
            _visit(meters, all_series, tests, last or turn == 1, doing)  # peaks take longest: figures come first
            if last:
                break
    rows = [
        row(subject, one, meters[one.contender.device], test, threads, repetitions)
        for test in tests
        for one in all_series
    ]
    return rows, [device_report(subject, threads, meter) for meter in meters.values() if meter.reads]


def _prepare(meters: dict[str, DeviceMeter], all_series: list[Series], tests: list[Test], status: Show) -> None:
    """Calibrate and warm up every contender; measure the devices before and after the warm-up."""
    for series in all_series:
        if series.child:
            status(f"a short call of {series.label}")
            series.calibrate(tests)
    _visit(meters, all_series, tests, False, status)
    for series, test in _next(all_series, tests, 0):
        status(f"warming up: {test.name} on {series.label}")
        series.warm_up(test, tests)
    _visit(meters, all_series, tests, False, status)


def _next(all_series: list[Series], tests: list[Test], turn: int) -> Iterator[tuple[Series, Test]]:
    """What runs in a round, in this order, as far as the budgets allow."""
    for test in tests:
        for series in in_turn(all_series, turn):
            if series.has_time_for(test):
                yield series, test


def _meter(device: str, threads: int) -> DeviceMeter:
    return DeviceMeter(device, lambda: Child("meter", "bench/meter", {"threads": threads, "device": device}, threads))


def _visit(
    meters: dict[str, DeviceMeter], all_series: list[Series], tests: list[Test], products: bool, status: Show
) -> None:
    """Measure each device at the working sets and, if asked to, the products of the contenders that run on it."""
    for device, meter in meters.items():
        there = [one for one in all_series if one.contender.device == device and one.facts]
        sizes = {working_set(one, test) for one in there for test in tests if test not in one.left_out}
        if sizes:
            meter.read(sizes, status)
        if sizes and products:
            meter.product(needed_peaks(there, tests, device), status)
