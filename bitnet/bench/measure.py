"""Contenders in turns: every round runs each test once on each of them, the order reversed from round to round.

The first round warms up and is thrown away. Between rounds the machine itself is measured: how fast it reads, at the
size of every contender's working set.
"""

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from bitnet.bench import limits
from bitnet.bench.contenders import Contender, Files
from bitnet.bench.limits import Weights
from bitnet.bench.machine import MEMORY
from bitnet.bench.plan import Test
from bitnet.bench.process import Worker
from bitnet.config import ModelConfig
from bitnet.model import parameters

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
    """What was measured of the machine while one model ran on so many threads."""

    meter: Worker
    reads: dict[int, list[float]] = field(default_factory=dict)  # working set -> bytes/s, a sample a visit
    peaks: dict[str, float | None] = field(default_factory=dict)

    def read(self, sizes: list[int]) -> None:
        """One more sample of each working set."""
        for size in sizes:
            self.reads.setdefault(size, []).append(self.meter.ask("read", size=size)["rate"])

    def product(self, kinds: list[str]) -> None:
        """The peaks of these products; the best of all visits."""
        for kind in kinds:
            rate = self.meter.ask("product", kind=kind)["rate"]
            before = self.peaks.get(kind)
            self.peaks[kind] = max(rate, before) if rate and before else rate

    def bandwidth(self, size: int) -> float:
        """Bytes/s, the median of the samples."""
        return statistics.median(self.reads[size])


@dataclass
class Runner:
    """A contender that is loaded, and what it has done so far."""

    contender: Contender
    worker: Worker
    working_set: int
    weights: Weights
    taken: dict[Test, list[dict[str, Any]]] = field(default_factory=dict)
    peak_bytes: int = 0

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
    device: str,
    say: Say,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All contenders and tests of one model on so many threads: rows, and what the machine did meanwhile."""
    with ExitStack() as stack:
        meter = stack.enter_context(Worker("meter", "meter", {"threads": threads, "device": device}, threads))
        runners = []
        for one in contenders:
            say(f"{subject.name}, {threads} threads: loading {one.name}")
            worker = stack.enter_context(
                Worker(one.name, one.script, one.options(files, threads), threads, one.python, one.environment)
            )
            weights = Weights(worker.facts["weight_bytes"], worker.facts["kv_bytes"])
            size = min(MEMORY, limits.working_set(weights, tests))
            runners.append(Runner(one, worker, size, weights, peak_bytes=worker.facts["peak_bytes"]))
        machine = Machine(meter)
        sizes = sorted({MEMORY, *(runner.working_set for runner in runners)})
        kinds = sorted({runner.worker.facts["peak"] for runner in runners})
        machine.read(sizes)
        machine.product(kinds)
        for turn in range(repetitions + 1):
            for test in tests:
                for runner in runners if turn % 2 else reversed(runners):
                    part = f"round {turn} of {repetitions}" if turn else "warming up"
                    say(f"{subject.name}, {threads} threads: {part}: {test.name} on {runner.contender.name}")
                    runner.run(test, warm=turn == 0)
            machine.read(sizes)
        machine.product(kinds)
        rows = [row(subject, runner, test, threads, machine) for test in tests for runner in runners]
        return rows, _machine_report(subject, threads, machine)


def row(subject: Subject, runner: Runner, test: Test, threads: int, machine: Machine) -> dict[str, Any]:
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
        **_limit(subject, runner, test, machine, middle),
        "load_seconds": facts["load_seconds"],
        "peak_memory_bytes": runner.peak_bytes,
        "model_memory_bytes": runner.peak_bytes - facts["base_bytes"],
        "joules_per_token": statistics.median(joules) / count if joules else None,
    }


def label(runner: Runner) -> str:
    """What the table calls it: the engine in use, and what tells it from its neighbours."""
    return f"{runner.worker.facts['backend']} {runner.contender.suffix}".strip()


def _limit(subject: Subject, runner: Runner, test: Test, machine: Machine, speed: float) -> dict[str, Any]:
    kind, bandwidth = runner.worker.facts["peak"], machine.bandwidth(runner.working_set)
    peak = machine.peaks[kind]
    found = limits.limit(limits.parts(subject.config, runner.weights, test), bandwidth, peak)
    cached = bandwidth > limits.CACHED * machine.bandwidth(MEMORY)
    values: dict[str, Any] = {
        "bandwidth_gigabytes_per_second": bandwidth / 1e9,
        "working_set_bytes": runner.working_set,
        "cached": cached,
        "peak_gigamacs_per_second": peak / 1e9 if peak else None,
        "peak_of": kind,
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


def _machine_report(subject: Subject, threads: int, machine: Machine) -> dict[str, Any]:
    return {
        "model": subject.name,
        "threads": threads,
        "reads": [
            {
                "bytes": size,
                "gigabytes_per_second": machine.bandwidth(size) / 1e9,
                "samples": [rate / 1e9 for rate in rates],
                "off_median": max(abs(rate / machine.bandwidth(size) - 1) for rate in rates),
            }
            for size, rates in machine.reads.items()
        ],
        "gigamacs_per_second": {kind: rate / 1e9 if rate else None for kind, rate in machine.peaks.items()},
    }
