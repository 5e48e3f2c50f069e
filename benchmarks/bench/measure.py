"""Contenders in turns: every round runs each test once on each of them, the order reversed from round to round.

The first round warms up and is thrown away. Between rounds the machine itself is measured: how fast it reads, at the
size of every contender's working set.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from bitnet.benchmarks.bench import limits
from bitnet.benchmarks.bench.contenders import Contender, Files
from bitnet.benchmarks.bench.limits import Weights
from bitnet.benchmarks.bench.machine import MEMORY
from bitnet.benchmarks.bench.meter import DOT_PRODUCTS
from bitnet.benchmarks.bench.plan import Test
from bitnet.benchmarks.bench.process import Worker
from bitnet.config import ModelConfig
from bitnet.model import parameters

FLOATS = ("torch fp32", "torch bf16")  # products that are held against their own peak; all others are int8's
_WARM_TOKENS = 4  # written in the warm-up: one would do, and a slow contender takes long
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
    """What was measured of one device while a model ran on so many threads."""

    device: str
    meter: Worker
    reads: dict[int, list[float]] = field(default_factory=dict)  # working set -> bytes/s, a sample a visit
    products: dict[str, list[float]] = field(default_factory=dict)  # kind -> multiply-adds/s; none: it has it not

    def read(self, sizes: set[int]) -> None:
        """One more sample of each working set, and of the memory."""
        for size in sorted({MEMORY, *sizes}):
            self.reads.setdefault(size, []).append(self.meter.ask("read", size=size)["rate"])

    def product(self, kinds: set[str]) -> None:
        """One more sample of the peaks of these products, and of those they are held against."""
        rivals = {"torch int8", DOT_PRODUCTS} if self.device == "cpu" else {"torch int8"}
        for kind in sorted(kinds | rivals if kinds - {*FLOATS} else kinds):
            rate = self.meter.ask("product", kind=kind)["rate"]
            self.products.setdefault(kind, []).extend([rate] if rate else [])

    @property
    def peaks(self) -> dict[str, float | None]:
        """The best of all visits; None where the machine has no such product."""
        return {kind: max(rates, default=None) for kind, rates in self.products.items()}

    def bandwidth(self, size: int) -> float:
        """Bytes/s, the median of the samples."""
        return statistics.median(self.reads[size])


@dataclass
class Runner:
    """A contender that is loaded, and what it has done so far."""

    contender: Contender
    worker: Worker
    machine: Machine
    weights: Weights
    taken: dict[Test, list[dict[str, Any]]] = field(default_factory=dict)
    peak_bytes: int = 0

    def working_set(self, test: Test) -> int:
        """Bytes that a step reads; above MEMORY they are read no slower."""
        return min(MEMORY, limits.working_set(self.weights, test))

    def run(self, test: Test, warm: bool) -> None:
        """One test once; what warms up is not kept."""
        predict = min(test.predict, _WARM_TOKENS) if warm else test.predict
        answer = self.worker.ask("measure", prompt=test.prompt, predict=predict, depth=test.depth, batch=test.batch)
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        if not warm:
            self.taken.setdefault(test, []).append(answer)


def group(
    subject: Subject,
    files: Files,
    contenders: list[Contender],
    tests: list[Test],
    threads: int,
    repetitions: int,
    say: Say,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All contenders and tests of one model on so many threads: rows, and what each device did meanwhile."""
    with ExitStack() as stack:
        machines = {}
        for device in dict.fromkeys(one.device for one in contenders):
            meter = Worker("meter", "meter", {"threads": threads, "device": device}, threads)
            machines[device] = Machine(device, stack.enter_context(meter))
        runners = []
        for one in contenders:
            say(f"{subject.name}, {threads} threads: loading {one.name}")
            worker = stack.enter_context(
                Worker(one.name, one.script, one.options(files, threads), threads, one.python, one.environment)
            )
            weights = Weights(worker.facts["weight_bytes"], worker.facts["kv_bytes"])
            runners.append(Runner(one, worker, machines[one.device], weights, peak_bytes=worker.facts["peak_bytes"]))
        _visit(runners, tests, products=True)
        for turn in range(repetitions + 1):
            for test in tests:
                for runner in runners if turn % 2 else reversed(runners):
                    part = f"round {turn} of {repetitions}" if turn else "warming up"
                    say(f"{subject.name}, {threads} threads: {part}: {test.name} on {runner.contender.name}")
                    runner.run(test, warm=turn == 0)
            _visit(runners, tests, products=turn == repetitions)
        rows = [row(subject, runner, test, threads) for test in tests for runner in runners]
        return rows, [_machine_report(subject, threads, machine) for machine in machines.values()]


def _visit(runners: list[Runner], tests: list[Test], products: bool) -> None:
    """Measure each device at the sizes, and at the products, of those that run there."""
    for machine in {id(runner.machine): runner.machine for runner in runners}.values():
        there = [runner for runner in runners if runner.machine is machine]
        machine.read({runner.working_set(test) for runner in there for test in tests})
        if products:
            machine.product({runner.worker.facts["peak"] for runner in there})


def row(subject: Subject, runner: Runner, test: Test, threads: int) -> dict[str, Any]:
    """One line of the result: a test of one contender, as JSON values."""
    facts, taken = runner.worker.facts, runner.taken[test]
    count = test.tokens * test.batch
    speeds = [count / (one["prefill"] * bool(test.prompt) + one["decode"] * bool(test.predict)) for one in taken]
    middle = statistics.median(speeds)
    joules = [one["joules"] for one in taken if one["joules"] is not None]
    work = limits.work(subject.config, runner.weights, test)
    return {
        "model": subject.name,
        "model_size": facts["weight_bytes"],
        "file_size": subject.size,
        "n_params": parameters(subject.config),
        "backend": label(runner),
        "what": facts["what"],
        "system": facts.get("system"),
        "ours": runner.contender.ours,
        "device": runner.contender.device,
        "threads": threads,
        "test": test.name,
        "n_prompt": test.prompt,
        "n_gen": test.predict,
        "n_depth": test.depth,
        "n_batch": test.batch,
        "avg_ts": statistics.fmean(speeds),
        "stddev_ts": statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        "median_ts": middle,
        "samples_ts": speeds,
        "first_token_ms": statistics.median(one["prefill"] for one in taken) * 1e3 if test.prompt else None,
        "bytes_per_token": work.bytes,
        "macs_per_token": work.macs,
        "read_gigabytes_per_second": work.bytes * middle / 1e9,
        **_limit(subject, runner, test, middle),
        "load_seconds": facts["load_seconds"],
        "peak_memory_bytes": runner.peak_bytes,
        "model_memory_bytes": runner.peak_bytes - facts["base_bytes"],
        "joules_per_token": statistics.median(joules) / count if joules else None,
    }


def label(runner: Runner) -> str:
    """What the table calls it: the engine in use, and what tells it from its neighbours."""
    return f"{runner.worker.facts['backend']} {runner.contender.suffix}".strip()


def fastest(kind: str, peaks: dict[str, float | None]) -> str:
    """The product that bounds one of this kind: its own in floats; for int8 the fastest int8 one, whoever's it is."""
    rivals = [kind] if kind in FLOATS else [kind, *sorted(peaks.keys() - {kind, *FLOATS})]
    return max(rivals, key=lambda name: peaks[name] or 0.0)


def _limit(subject: Subject, runner: Runner, test: Test, speed: float) -> dict[str, Any]:
    machine, size, own = runner.machine, runner.working_set(test), runner.worker.facts["peak"]
    bandwidth, peaks = machine.bandwidth(size), machine.peaks
    kind = fastest(own, peaks)
    peak, own_peak = peaks[kind], peaks[own]
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
        "gigamacs_samples": {kind: [rate / 1e9 for rate in rates] for kind, rates in machine.products.items()},
    }
