"""Rows of a result: one test of one contender, held against what the machine allows."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitnet.benchmarks.bench import limits, machine
from bitnet.benchmarks.bench.device_meter import FLOATS, DeviceMeter, working_set
from bitnet.benchmarks.bench.plan import Test
from bitnet.benchmarks.bench.series import Series
from bitnet.config import ModelConfig
from bitnet.files.tensors import parameters

# The keys of a row's figures; all are None in a row that was left out.
_FIGURES = (
    *("left_out", "remark", "avg_ts", "stddev_ts", "median_ts", "samples_ts", "first_token_ms", "bytes_per_token"),
    *("macs_per_token", "read_gigabytes_per_second", "bandwidth_gigabytes_per_second", "working_set_bytes", "cached"),
    *("peak_gigamacs_per_second", "peak_of", "own_peak_gigamacs_per_second", "own_peak_of", "limit_ts", "limit_by"),
    *("percent_of_limit", "load_seconds", "peak_memory_bytes", "model_memory_bytes", "joules_per_token"),
)


@dataclass(frozen=True)
class Subject:
    """A model to measure."""

    name: str
    config: ModelConfig
    size: int  # bytes of its packed file
    source: str  # where it comes from: a file, or random weights


def speeds(test: Test, samples: list[dict[str, Any]]) -> list[float]:
    """Tokens per second of each round."""
    count = test.tokens * test.batch
    return [count / (one["prefill"] * bool(test.prompt) + one["decode"] * bool(test.predict)) for one in samples]


def row(
    subject: Subject, series: Series, meter: DeviceMeter, test: Test, threads: int, repetitions: int
) -> dict[str, Any]:
    """One line of the result as JSON values: a test of one contender, or the reason why it was left out."""
    facts = series.facts
    identity: dict[str, Any] = {
        "model": subject.name,
        "model_size": facts.get("weight_bytes"),
        "file_size": subject.size,
        "n_params": parameters(subject.config),
        "backend": series.label,
        "what": facts.get("what"),
        "system": facts.get("system"),
        "ours": series.contender.ours,
        "device": series.contender.device,
        "threads": threads,
        "test": test.name,
        "n_prompt": test.prompt,
        "n_gen": test.predict,
        "n_depth": test.depth,
        "n_batch": test.batch,
        **dict.fromkeys(_FIGURES),
    }
    if not series.samples.get(test):
        return identity | {"left_out": series.left_out[test]}
    return identity | _figures(subject, series, meter, test, repetitions)


def _figures(subject: Subject, series: Series, meter: DeviceMeter, test: Test, repetitions: int) -> dict[str, Any]:
    samples = series.samples[test]
    rounds, why = len(samples), series.cut_short.get(test)
    rates = speeds(test, samples)
    median = statistics.median(rates)
    joules = [one["joules"] for one in samples if one["joules"] is not None]
    work = limits.work(subject.config, series.model_bytes, test)
    return {
        "remark": f"{rounds} of {repetitions} rounds: {why}" if rounds < repetitions else None,
        "avg_ts": statistics.fmean(rates),
        "stddev_ts": statistics.stdev(rates) if rounds > 1 else 0.0,
        "median_ts": median,
        "samples_ts": rates,
        "first_token_ms": statistics.median(one["prefill"] for one in samples) * 1e3 if test.prompt else None,
        "bytes_per_token": work.bytes,
        "macs_per_token": work.macs,
        "read_gigabytes_per_second": work.bytes * median / 1e9,
        **_limit(subject, series, meter, test, median),
        "load_seconds": series.facts["load_seconds"],
        "peak_memory_bytes": series.peak_bytes,
        "model_memory_bytes": series.peak_bytes - series.facts["base_bytes"],
        "joules_per_token": statistics.median(joules) / (test.tokens * test.batch) if joules else None,
    }


def fastest(kind: str, peaks: dict[str, float | None]) -> str:
    """The product that bounds one of this kind: for floats its own, for int8 the fastest int8 product of all."""
    rivals = [kind] if kind in FLOATS else [kind, *sorted(peaks.keys() - {kind, *FLOATS})]
    return max(rivals, key=lambda name: peaks.get(name) or 0.0)


def _limit(subject: Subject, series: Series, meter: DeviceMeter, test: Test, speed: float) -> dict[str, Any]:
    size, own = working_set(series, test), series.facts["peak"]
    bandwidth, peaks = meter.bandwidth(size), meter.peaks
    kind = fastest(own, peaks)
    peak, own_peak = peaks.get(kind), peaks.get(own)
    found = limits.limit(limits.phases(subject.config, series.model_bytes, test), bandwidth, peak)
    cached = bandwidth > limits.CACHED * meter.bandwidth(machine.MEMORY)
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
    if test.prompt and not peak:  # arithmetic bounds a prompt, and its peak is unknown
        return values
    by = kind if found.by == "arithmetic" else "cache" if cached else "memory"
    return values | {
        "limit_ts": found.tokens_per_second,
        "limit_by": by,
        "percent_of_limit": 100 * speed / found.tokens_per_second,
    }


def off_median(rates: Sequence[float]) -> tuple[float, float]:
    """How far three in four rates are from their median at most, and the worst of all, as shares of the median.

    The first shows how reliable a limit is: a limit is a median itself, and one disturbed sample moves it little.
    """
    median = statistics.median(rates)
    off = sorted(abs(rate / median - 1) for rate in rates)
    return off[math.ceil(0.75 * len(off)) - 1], off[-1]


def device_report(subject: Subject, threads: int, meter: DeviceMeter) -> dict[str, Any]:
    """What was measured of a device while a model ran, as JSON values."""
    return {
        "model": subject.name,
        "device": meter.device,
        "threads": threads,
        "reads": [
            {
                "bytes": size,
                "of": "memory" if size == machine.MEMORY else "smaller",
                "gigabytes_per_second": meter.bandwidth(size) / 1e9,
                "samples": [rate / 1e9 for rate in rates],
                **dict(zip(("off_median", "worst_off_median"), off_median(rates))),
            }
            for size, rates in meter.reads.items()
        ],
        "gigamacs_per_second": {kind: rate / 1e9 if rate else None for kind, rate in meter.peaks.items()},
        "gigamacs_of": meter.ways,
        "gigamacs_samples": {kind: [rate / 1e9 for rate in rates] for kind, rates in meter.products.items()},
    }
