"""Contenders in turns: every round runs each test once on each of them, the order reversed from round to round.

The first round warms up and is thrown away. Between rounds the machine itself is measured: how fast it reads, at the
size of every contender's working set. Each row has a budget of seconds (runner.py): one that does not fit it is left
out, or has fewer rounds, and says so.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from bitnet.benchmarks.bench import limits
from bitnet.benchmarks.bench.contenders import Contender, Files
from bitnet.benchmarks.bench.machine import MEMORY
from bitnet.benchmarks.bench.meter import DOT_PRODUCTS
from bitnet.benchmarks.bench.plan import Test
from bitnet.benchmarks.bench.process import TooSlowError, Worker
from bitnet.benchmarks.bench.runner import Budget, Runner, start
from bitnet.benchmarks.bench.table import digits
from bitnet.config import ModelConfig
from bitnet.files.tensors import parameters

FLOATS = ("torch fp32", "torch bf16")  # products that are held against their own peak; all others are int8's
METER = 60.0  # seconds of one answer of the meter, which limits itself to 5 a way: past that it hangs
# What a row that was left out has no value of.
_MEASURED = (
    *("left_out", "remark", "avg_ts", "stddev_ts", "median_ts", "samples_ts", "first_token_ms", "bytes_per_token"),
    *("macs_per_token", "read_gigabytes_per_second", "bandwidth_gigabytes_per_second", "working_set_bytes", "cached"),
    *("peak_gigamacs_per_second", "peak_of", "own_peak_gigamacs_per_second", "own_peak_of", "limit_ts", "limit_by"),
    *("percent_of_limit", "load_seconds", "peak_memory_bytes", "model_memory_bytes", "joules_per_token"),
)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A model to measure."""

    name: str
    config: ModelConfig
    size: int  # bytes of its packed file
    source: str  # where it comes from: a file, or random weights


@dataclass
class Machine:
    """What was measured of one device while a model ran on so many threads. `start` makes the process that does it."""

    device: str
    start: Callable[[], Worker]
    reads: dict[int, list[float]] = field(default_factory=dict)  # working set -> bytes/s, a sample a visit
    products: dict[str, list[float]] = field(default_factory=dict)  # kind -> multiply-adds/s; none: it has it not
    ways: dict[str, str] = field(default_factory=dict)  # kind -> the way of torch, or the kernel, that was the fastest
    cut_off: set[str] = field(default_factory=set)  # kinds that gave no answer in time
    meter: Worker | None = None

    def close(self) -> None:
        """End the process."""
        if self.meter:
            self.meter.close()
            self.meter = None

    def _ask(self, do: str, **command: Any) -> dict[str, Any]:
        self.meter = self.meter or self.start()
        try:
            return self.meter.ask(do, METER, **command)
        except TooSlowError:
            self.close()
            raise

    def read(self, sizes: set[int], say: Say) -> None:
        """One more sample of each working set, and of the memory."""
        for size in sorted({MEMORY, *sizes}):
            say(f"measuring how fast {size / 1e6:,.3g} MB are read")
            self.reads.setdefault(size, []).append(self._ask("read", size=size)["rate"])

    def product(self, kinds: set[str], say: Say) -> None:
        """One more sample of the peaks of these products."""
        for kind in sorted(kinds - self.cut_off):
            say(f"measuring the peak of {kind}")
            rates = self.products.setdefault(kind, [])
            try:
                answer = self._ask("product", kind=kind)
            except TooSlowError:  # a row without a peak says that its limit is unknown
                self.cut_off.add(kind)
                continue
            if answer["rate"]:
                if answer["rate"] > max(rates, default=0.0):
                    self.ways[kind] = answer["how"]
                rates.append(answer["rate"])

    @property
    def peaks(self) -> dict[str, float | None]:
        """The best of all visits; None where the machine has no such product."""
        return {kind: max(rates, default=None) for kind, rates in self.products.items()}

    def bandwidth(self, size: int) -> float:
        """Bytes/s, the median of the samples."""
        return statistics.median(self.reads[size])


def working_set(runner: Runner, test: Test) -> int:
    """Bytes that a step reads; above MEMORY they are read no slower."""
    return min(MEMORY, limits.working_set(runner.weights, test))


def needed_peaks(runners: list[Runner], tests: list[Test], device: str) -> set[str]:
    """The products that bound a row of these runners of a device: their own and, for our int8 ones, others'.

    Arithmetic bounds prompts and batches. A lone answer reads more than it computes and needs none.
    """
    found: set[str] = set()
    for runner in runners:
        bound = [test for test in tests if test not in runner.left_out and (test.prompt or test.batch > 1)]
        if bound and runner.facts["peak"]:
            kind = runner.facts["peak"]
            rivals = {"torch int8", DOT_PRODUCTS} if device == "cpu" else {"torch int8"}
            found |= {kind} | (rivals if runner.contender.ours and kind not in FLOATS else set())
    return found


def group(
    subject: Subject,
    files: Files,
    contenders: list[Contender],
    tests: list[Test],
    threads: int,
    repetitions: int,
    budget: Budget,
    say: Say,
    tell: Say,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All contenders and tests of one model on so many threads: rows, and what each device did meanwhile.

    say: what is being done. tell: the first figure of each row.
    """
    where = f"{subject.name}, {threads} thread{'s' * (threads > 1)}: "

    def doing(what: str) -> None:
        say(where + what)

    with ExitStack() as stack:
        runners = []
        for one in contenders:
            doing(f"loading {one.name}")
            runners.append(start(one, subject.config, files, tests, threads, budget))
            stack.callback(runners[-1].close)
        for runner in runners:
            if runner.worker:
                doing(f"a short call of {runner.label}")
                runner.calibrate(tests)
        machines = {device: _machine(device, threads) for device in dict.fromkeys(one.device for one in contenders)}
        for machine in machines.values():
            stack.callback(machine.close)
        _visit(machines, runners, tests, False, doing)
        for runner, test in _next(runners, tests, 0):
            doing(f"warming up: {test.name} on {runner.label}")
            runner.warm_up(test, tests)
        _visit(machines, runners, tests, False, doing)
        for turn in range(1, repetitions + 1):
            for runner, test in _next(runners, tests, turn):
                doing(f"round {turn} of {repetitions}: {test.name} on {runner.label}")
                if runner.run(test, tests) and turn == 1:
                    speed = digits(speeds(test, runner.taken[test])[0])
                    tell(f"{where}{test.name} on {runner.label}: {speed} tokens/s, round 1 of {repetitions}")
            last = turn == repetitions or not any(runner.wants(test) for runner in runners for test in tests)
            _visit(machines, runners, tests, last or turn == 1, doing)  # peaks take longest: figures come first
            if last:
                break
        by_device = [(one, machines[one.contender.device]) for one in runners]
        rows = [row(subject, one, at, test, threads, repetitions) for test in tests for one, at in by_device]
        return rows, [_machine_report(subject, threads, machine) for machine in machines.values() if machine.reads]


def _next(runners: list[Runner], tests: list[Test], turn: int) -> Iterator[tuple[Runner, Test]]:
    """Who runs what in a round, in this order, as far as the budgets allow."""
    for test in tests:
        for runner in runners if turn % 2 else reversed(runners):
            if runner.wants(test):
                yield runner, test


def _machine(device: str, threads: int) -> Machine:
    return Machine(device, lambda: Worker("meter", "meter", {"threads": threads, "device": device}, threads))


def _visit(machines: dict[str, Machine], runners: list[Runner], tests: list[Test], products: bool, say: Say) -> None:
    """Measure each device at the working sets, and at the products, of the runners that are on it."""
    for device, machine in machines.items():
        there = [one for one in runners if one.contender.device == device and one.facts]
        sizes = {working_set(one, test) for one in there for test in tests if test not in one.left_out}
        if sizes:
            machine.read(sizes, say)
        if sizes and products:
            machine.product(needed_peaks(there, tests, device), say)


def speeds(test: Test, taken: list[dict[str, Any]]) -> list[float]:
    """Tokens a second of each round."""
    count = test.tokens * test.batch
    return [count / (one["prefill"] * bool(test.prompt) + one["decode"] * bool(test.predict)) for one in taken]


def row(
    subject: Subject, runner: Runner, machine: Machine, test: Test, threads: int, repetitions: int
) -> dict[str, Any]:
    """One line of the result, as JSON values: a test of one contender, or the reason why it was left out."""
    facts = runner.facts
    values: dict[str, Any] = {
        "model": subject.name,
        "model_size": facts.get("weight_bytes"),
        "file_size": subject.size,
        "n_params": parameters(subject.config),
        "backend": runner.label,
        "what": facts.get("what"),
        "system": facts.get("system"),
        "ours": runner.contender.ours,
        "device": runner.contender.device,
        "threads": threads,
        "test": test.name,
        "n_prompt": test.prompt,
        "n_gen": test.predict,
        "n_depth": test.depth,
        "n_batch": test.batch,
        **dict.fromkeys(_MEASURED),
    }
    taken = runner.taken.get(test)
    if not taken:
        return values | {"left_out": runner.left_out[test]}
    rounds, why = len(taken), runner.cut_short.get(test)
    found = speeds(test, taken)
    middle = statistics.median(found)
    joules = [one["joules"] for one in taken if one["joules"] is not None]
    work = limits.work(subject.config, runner.weights, test)
    return values | {
        "remark": f"{rounds} of {repetitions} rounds: {why}" if rounds < repetitions else None,
        "avg_ts": statistics.fmean(found),
        "stddev_ts": statistics.stdev(found) if rounds > 1 else 0.0,
        "median_ts": middle,
        "samples_ts": found,
        "first_token_ms": statistics.median(one["prefill"] for one in taken) * 1e3 if test.prompt else None,
        "bytes_per_token": work.bytes,
        "macs_per_token": work.macs,
        "read_gigabytes_per_second": work.bytes * middle / 1e9,
        **_limit(subject, runner, machine, test, middle),
        "load_seconds": facts["load_seconds"],
        "peak_memory_bytes": runner.peak_bytes,
        "model_memory_bytes": runner.peak_bytes - facts["base_bytes"],
        "joules_per_token": statistics.median(joules) / (test.tokens * test.batch) if joules else None,
    }


def fastest(kind: str, peaks: dict[str, float | None]) -> str:
    """The product that bounds one of this kind: its own in floats; for int8 the fastest int8 one, whoever's it is."""
    rivals = [kind] if kind in FLOATS else [kind, *sorted(peaks.keys() - {kind, *FLOATS})]
    return max(rivals, key=lambda name: peaks.get(name) or 0.0)


def _limit(subject: Subject, runner: Runner, machine: Machine, test: Test, speed: float) -> dict[str, Any]:
    size, own = working_set(runner, test), runner.facts["peak"]
    bandwidth, peaks = machine.bandwidth(size), machine.peaks
    kind = fastest(own, peaks)
    peak, own_peak = peaks.get(kind), peaks.get(own)
    found = limits.limit(limits.parts(subject.config, runner.weights, test), bandwidth, peak)
    cached = bandwidth > limits.CACHED * machine.bandwidth(MEMORY)
    values: dict[str, Any] = {
        "bandwidth_gigabytes_per_second": bandwidth / 1e9,
        "working_set_bytes": size,
        "cached": cached,
        "peak_gigamacs_per_second": peak / 1e9 if peak else None,
        "peak_of": kind,
        "own_peak_gigamacs_per_second": own_peak / 1e9 if own_peak else None,
        "own_peak_of": own,
        "limit_ts": None,
        "limit_by": None,
        "percent_of_limit": None,
    }
    if test.prompt and not peak:  # arithmetic bounds a prompt, and nobody knows by how much
        return values
    by = kind if found.by == "arithmetic" else "cache" if cached else "memory"
    return values | {
        "limit_ts": found.tokens_per_second,
        "limit_by": by,
        "percent_of_limit": 100 * speed / found.tokens_per_second,
    }


def off_median(rates: Sequence[float]) -> tuple[float, float]:
    """How far from their median three in four rates lie at most, and the worst of them, as shares of the median.

    The first says what a limit is worth, which is a median itself: one sample that a neighbour took moves it little.
    """
    median = statistics.median(rates)
    off = sorted(abs(rate / median - 1) for rate in rates)
    return off[math.ceil(0.75 * len(off)) - 1], off[-1]


def _machine_report(subject: Subject, threads: int, machine: Machine) -> dict[str, Any]:
    return {
        "model": subject.name,
        "device": machine.device,
        "threads": threads,
        "reads": [
            {
                "bytes": size,
                "of": "memory" if size == MEMORY else "smaller",
                "gigabytes_per_second": machine.bandwidth(size) / 1e9,
                "samples": [rate / 1e9 for rate in rates],
                **dict(zip(("off_median", "worst_off_median"), off_median(rates))),
            }
            for size, rates in machine.reads.items()
        ],
        "gigamacs_per_second": {kind: rate / 1e9 if rate else None for kind, rate in machine.peaks.items()},
        "gigamacs_of": machine.ways,
        "gigamacs_samples": {kind: [rate / 1e9 for rate in rates] for kind, rates in machine.products.items()},
    }
