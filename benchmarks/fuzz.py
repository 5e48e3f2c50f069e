"""Mutated inputs against every reader of files: each must be read, or refused with our own error.

    python benchmarks/fuzz.py --inputs 1000000 --workers 2        (make fuzz)

Small valid files are mutated (fuzz_targets.py): GGUF with tensors of each type, safetensors, indexes of shards,
config.json, both tokenizers, our packed file with a corrected checksum, saves, and complete folders and GGUF models
that go through `bitnet import` to a packed file. Inputs that are read, and inputs that are refused with BitNetError,
are counted by reader. These are failures:

  another exception, or the death of the process
  more than 5 seconds for an input: a hang
  memory beyond 2 x the input + 64 MiB, which the kernel enforces on each process (Linux); in addition a few hundred
  inputs of megabytes, built to take memory, are measured one by one (fuzz_memory.py)

An input that fails is kept in build/fuzz; `--seed S --only I` makes it again. Exit code 1 for a failure; the last line
of stdout is one JSON document.
"""

import argparse
import json
import mmap
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from fuzz_memory import SIZES, measure
from fuzz_targets import Target, make_targets

from bitnet.benchmarks.children.child import memory
from bitnet.errors import BitNetError

HANG = 5.0  # seconds
GROWTH = 64 << 20  # bytes that an input may take beyond twice its size
FAILURES = 20  # a worker stops after so many
STATE = struct.Struct("<qd")  # number of the input a worker is reading, and when it began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(31))
    parser.add_argument("--large", type=int, nargs="*", default=SIZES, help="Bytes of the large inputs.")
    parser.add_argument("--only", type=int, help="This input alone, here, with its traceback.")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        return only(options.seed, options.only)
    if options.worker is not None:
        return work(options)
    started = time.perf_counter()
    reports = run_workers(options)
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update(report["counts"])
    failures = [failure for report in reports for failure in report["failures"]]
    large = measure(options.large)
    failures += [row for row in large["rows"] if row["failed"]]
    total = {
        "benchmark": "fuzz",
        "inputs": sum(counts.values()),
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "workers": options.workers,
        "slowest_input_seconds": max(report["slowest"] for report in reports),
        "memory_growth_bytes": max(report["growth"] for report in reports),
        "large_inputs": large["inputs"],
        "large_inputs_worst": large["worst"],
        "failures": failures,
        "counts": dict(sorted(counts.items())),
    }
    for name in sorted({key.rpartition(" ")[0] for key in counts}):
        print(f"{name:24} read {counts[f'{name} read']:>9,}   refused {counts[f'{name} refused']:>9,}")
    growth = total["memory_growth_bytes"] / 2**20
    print(f"{total['inputs']:,} inputs, {len(failures)} failures, memory grew by {growth:.1f} MiB")
    print(json.dumps(total))
    return 1 if failures or total["inputs"] < options.inputs else 0


def run_workers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the workers. One that hangs is killed; one that dies is reported with its input."""
    with tempfile.TemporaryDirectory() as name:
        workers = []
        # A panic of a Rust library would read 50 MB of symbols to show where it was.
        environment = {**os.environ, "RUST_BACKTRACE": "0"}
        for number in range(options.workers):
            state = Path(name) / f"{number}.state"
            state.write_bytes(STATE.pack(-1, time.time()))
            command = [sys.executable, __file__, "--inputs", str(options.inputs), "--workers", str(options.workers)]
            command += ["--seed", str(options.seed), "--worker", str(number), "--state", str(state)]
            output = (Path(name) / f"{number}.json").open("w+")
            workers.append((state, output, subprocess.Popen(command, stdout=output, env=environment)))
        while any(process.poll() is None for _, _, process in workers):
            time.sleep(0.2)
            for state, _, process in workers:
                number, begun = STATE.unpack(state.read_bytes())
                if number >= 0 and process.poll() is None and time.time() - begun > 2 * HANG:
                    process.kill()
        return [result(options.seed, *worker) for worker in workers]


def result(seed: int, state: Path, output: Any, process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    output.seek(0)
    text = output.read()
    output.close()
    if process.returncode == 0:
        report: dict[str, Any] = json.loads(text.splitlines()[-1])
        return report
    number, begun = STATE.unpack(state.read_bytes())
    what = f"ended the process ({process.returncode}) after {time.time() - begun:.1f} s"
    print(f"input {number} of seed {seed} {what}", file=sys.stderr)
    return {"counts": {}, "failures": [{"input": number, "what": what}], "slowest": 0.0, "growth": 0}


def work(options: argparse.Namespace) -> int:
    """A worker's share of the inputs; its report on stdout."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    slowest = 0.0
    with scratch() as name, options.state.open("r+b") as file, mmap.mmap(file.fileno(), 0) as state:
        targets = make_targets(Path(name))
        warm_up(targets)
        before = memory("VmHWM")
        limit_memory(max(len(seed) for target in targets for seed in target.seeds))
        schedule = make_schedule(targets)
        for number in range(options.worker, options.inputs, options.workers):
            target, data = draw(targets, schedule, options.seed, number)
            begun = time.time()
            state[:] = STATE.pack(number, begun)
            outcome = attempt(target, data)
            seconds = time.time() - begun
            slowest = max(slowest, seconds)
            if seconds > HANG:
                outcome = f"took {seconds:.1f} s"
            if outcome in ("read", "refused"):
                counts[f"{target.name} {outcome}"] += 1
                continue
            failures.append({"input": number, "target": target.name, "what": outcome})
            keep(target, data, outcome, options.seed, number)
            if len(failures) == FAILURES:
                break
        state[:] = STATE.pack(-1, time.time())
    growth = memory("VmHWM") - before
    if growth > GROWTH:
        failures.append({"input": -1, "what": f"memory grew by {growth:,} bytes"})
    print(json.dumps({"counts": counts, "failures": failures, "slowest": round(slowest, 3), "growth": growth}))
    return 0


def only(seed: int, number: int) -> int:
    """Read one input again, here."""
    torch.set_num_threads(1)
    with scratch() as name:
        targets = make_targets(Path(name))
        target, data = draw(targets, make_schedule(targets), seed, number)
        print(f"{target.name}, {len(data):,} bytes: {data[:400]!r}")
        target.read(data)
    return 0


def scratch() -> "tempfile.TemporaryDirectory[str]":
    """A folder in memory where there is one: a hundred thousand files are written."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)


def make_schedule(targets: list[Target]) -> list[int]:
    """Which target each of 100 inputs in a row goes to."""
    order = [i for i, target in enumerate(targets) for _ in range(target.share)]
    assert len(order) == 100, len(order)
    random.Random(0).shuffle(order)
    return order


def draw(targets: list[Target], schedule: list[int], seed: int, number: int) -> tuple[Target, bytes]:
    """The input of a number; it depends on the seed and the number alone."""
    rng = random.Random(seed << 40 | number)
    target = targets[schedule[number % 100]]
    return target, target.mutate(rng.choice(target.seeds), rng)


def attempt(target: Target, data: bytes) -> str:
    """ "read", "refused", or a description of the failure."""
    try:
        target.read(data)
    except BitNetError:
        return "refused"
    except BaseException as error:  # a panic of a Rust library is not an Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:300]
    return "read"


def warm_up(targets: list[Target]) -> None:
    """Read every valid file once, so that later growth of memory comes from mutated ones."""
    for target in targets:
        for seed in target.seeds:
            target.read(seed)


def limit_memory(largest: int) -> None:
    """From now on let allocations beyond twice the largest input and GROWTH fail; Linux only."""
    if sys.platform != "linux":
        return
    limit = memory("VmData") + 2 * largest + GROWTH
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def keep(target: Target, data: bytes, what: str, seed: int, number: int) -> None:
    """Save an input that failed."""
    folder = Path("build/fuzz")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{seed}-{number}").write_bytes(data)
    print(f"{target.name}: input {number} of seed {seed}: {what}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
