"""Estimates of memory against reality: the largest resident set of real runs beside what was said before them.

    python benchmarks/memory.py [--only WORD]

Each case is a process of its own: `bitnet train` of three steps, then `generate`, `eval`, `serve`, `export` and
`import` of what came of it. Measured is what `/usr/bin/time -v` calls the maximum resident set size (wait4); the
estimate is that of the same configuration, with the vocabulary that the text gave. No case takes more than 6 GB. The
last line is one JSON document.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bitnet.benchmarks.bench import machine, table
from bitnet.config import ModelConfig
from bitnet.engine.memory import Work, engine_need
from bitnet.files.memory import export_need, import_need
from bitnet.files.packed import read_config
from bitnet.memory import Need
from bitnet.train.config import RunConfig
from bitnet.train.data.windows import batch_for
from bitnet.train.memory import run_need
from bitnet.train.runs.run import Run

CPU = torch.device("cpu")
_TEXT = 2_000_000  # characters
# Preset and flags. Small batches where the preset is large: what is compared is the sum, whichever part dominates.
RUNS = [
    ("nano", ["--dtype", "bf16"]),
    ("nano", ["--dtype", "fp32", "--optimizer", "adamw"]),
    ("nano", ["--dtype", "fp32", "--set", "train.quant_warmup=0"]),
    ("nano", ["--dtype", "bf16", "--linear", "float"]),
    ("nano", ["--dtype", "bf16", "--set", "train.recompute=true", "--set", "train.loss_chunk=512"]),
    ("mini", ["--dtype", "bf16", "--batch-size", "4", "-c", "256", "--optimizer", "adamw"]),
    ("mini", ["--dtype", "fp32", "--batch-size", "4", "-c", "256", "--set", "train.quant_warmup=0"]),
    ("small", ["--dtype", "bf16", "--batch-size", "2", "-c", "256"]),
    (
        "small",
        ["--dtype", "fp32", "--batch-size", "2", "-c", "256", "--optimizer", "adamw", "--set", "train.quant_warmup=0"],
    ),
]


def peak(command: list[str], log: Path) -> int:
    """Bytes of the largest resident set of a command. Raises RuntimeError, with its last words, where it fails."""
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file)
        return wait(child, log)


def wait(child: "subprocess.Popen[bytes]", log: Path, fine: tuple[int, ...] = (0,)) -> int:
    """Wait for a child and return its largest resident set, in bytes."""
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)  # which Popen would wait for a second time
    if child.returncode not in fine:
        raise RuntimeError(f"{child.args} ended with {child.returncode}: {log.read_text(errors='replace')[-500:]}")
    return int(usage.ru_maxrss) * 1024  # Linux counts in kB


def bitnet(*words: object) -> list[str]:
    """A command line of ours, run by this Python."""
    return [sys.executable, "-m", "bitnet.cli", *map(str, words)]


def row(name: str, need: Need, measured: int) -> dict[str, Any]:
    """One result."""
    off = need.total / measured - 1
    print(f"| {name} | {need.total / 1e9:.2f} | {measured / 1e9:.2f} | {off:+.0%} | {need} |", flush=True)
    terms = {key: round(size) for key, size in need.terms.items()}
    return {"case": name, "estimate": round(need.total), "measured": measured, "off": round(off, 4), "terms": terms}


def text(folder: Path) -> Path:
    """Text of Python's own library, which every machine has: enough of it for a vocabulary of 16,384."""
    target = folder / "text.py"
    if not target.exists():
        sources = sorted(Path(os.__file__).parent.glob("*.py"))
        whole = "".join(path.read_text(encoding="utf-8", errors="replace") for path in sources)
        target.write_text(whole[:_TEXT], encoding="utf-8")
    return target


def trainings(folder: Path, only: str) -> list[dict[str, Any]]:
    """Rows of `bitnet train`."""
    rows = []
    corpus = text(folder)
    for preset, flags in RUNS:
        name = " ".join([preset, *(flag for flag in flags if flag != "--set")])
        if only not in f"train {name}":
            continue
        run = Run(folder / "-".join([preset, *flags]).replace("/", "_").replace(" ", ""))
        words = ["--preset", preset, *flags, "--data", corpus, "--out", run.path, "--steps", 3, "-q", "-t", 1]
        words += ["--set", "train.eval_tokens=1024", "--set", "data.val_fraction=0.001"]
        measured = peak(bitnet("train", *words), folder / "log.txt")
        rows.append(row(f"train {name}", fresh(run), measured))
    return rows


def fresh(run: Run) -> Need:
    """What a run was estimated at when it began: its saves, which a run that goes on has, are looked away from."""
    config: RunConfig = run.config()
    config = config.override({"model": {"vocab_size": run.tokenizer().vocab_size}})
    return run_need(config, CPU, Run(run.path / "not there"))


def served(model: Path, config: ModelConfig, folder: Path, slots: int) -> int:
    """The largest resident set of a server that has filled `slots` contexts."""
    log = folder / "log.txt"
    with log.open("wb") as file:
        words = ("serve", "-m", model, "--port", 0, "--slots", slots, "-t", 1)
        child = subprocess.Popen(bitnet(*words), stdout=subprocess.PIPE, stderr=file)
        assert child.stdout is not None
        url = child.stdout.readline().decode().strip()

        def ask(number: int) -> None:
            body = {
                "prompt": f"{number} def ",
                "max_tokens": config.context - 16,
                "temperature": 1.0,
                "ignore_eos": True,
            }
            request = urllib.request.Request(
                f"{url}v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=600) as answer:
                answer.read()

        with ThreadPoolExecutor(slots) as pool:
            list(pool.map(ask, range(slots)))
        child.terminate()
        return wait(child, log, fine=(143,))


def others(folder: Path, only: str) -> list[dict[str, Any]]:
    """Rows of the verbs that take a model, on a run of `mini`."""
    if only not in "generate eval serve export import":
        return []
    log, run, packed = folder / "log.txt", Run(folder / "model"), folder / "model.safetensors"
    words = (
        "--preset",
        "mini-portable",
        "--data",
        text(folder),
        "--batch-size",
        1,
        "-c",
        128,
        "--steps",
        1,
        "-q",
        "-t",
        1,
    )
    peak(
        bitnet("train", *words, "--set", "train.eval_tokens=512", "--set", "train.quant_warmup=0", "--out", run.path),
        log,
    )
    peak(bitnet("pack", run.path, "-o", packed), log)
    config, size = read_config(packed), packed.stat().st_size
    limit = config.context
    rows = []
    measured = peak(bitnet("generate", "-m", packed, "-p", "def ", "-n", 64, "--ignore-eos", "--json"), log)
    rows.append(row("generate", engine_need(config, size, CPU, Work(70, limit, read=5)), measured))
    windows = batch_for(limit, config.vocab_size)
    work = Work(limit, limit, windows, read=windows * limit, logits=2 * windows * limit)
    part = folder / "part.txt"
    part.write_text(text(folder).read_text(encoding="utf-8")[:200_000], encoding="utf-8")
    measured = peak(bitnet("eval", "-m", packed, "--data", part, "--json"), log)
    rows.append(row("eval", engine_need(config, size, CPU, work), measured))
    measured = served(packed, config, folder, 4)
    rows.append(row("serve --slots 4", engine_need(config, size, CPU, Work(limit, limit, 4, 256, 260)), measured))
    measured = peak(bitnet("export", run.path, "-o", folder / "hf", "--to", "hf"), log)
    rows.append(row("export --to hf", export_need(config, trained=True), measured))
    measured = peak(bitnet("export", packed, "-o", folder / "m.gguf", "--to", "gguf"), log)
    rows.append(row("export --to gguf", export_need(config, trained=False, mapped=size), measured))
    measured = peak(bitnet("import", folder / "hf", "-o", folder / "again.safetensors"), log)
    rows.append(row("import", import_need(config), measured))
    return rows


def main() -> None:
    """Measure, print a table, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this word")
    options = parser.parse_args()
    described = machine.describe(bandwidth=False)
    print(table.machine_line(described))
    print("\n| case | estimate, GB | measured, GB | off | parts, GB |\n|---|---|---|---|---|")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bitnet-memory-") as folder:
        rows = trainings(Path(folder), options.only) + others(Path(folder), options.only)
    worst = max((abs(each["off"]) for each in rows), default=0.0)
    print(f"\nworst: {worst:.0%} off, in {time.perf_counter() - started:.0f} s")
    print(json.dumps({"benchmark": "memory", "machine": described, "worst": worst, "results": rows}))


if __name__ == "__main__":
    main()
