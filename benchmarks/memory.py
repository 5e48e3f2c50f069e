"""Estimates of memory against reality: the largest resident set of real runs beside what was said before them.

    python benchmarks/memory.py [--only WORD]

Each case is a process of its own: `bitnet train` of three steps, then `generate`, `eval`, `serve`, `export` and
`import` of what came of it. Measured is what `/usr/bin/time -v` calls the maximum resident set size (of wait4); the
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


# Runs a command and writes down its largest resident set. A process begins with that of the one it was forked from, so
# it is one that imports next to nothing, as /usr/bin/time is.
_WATCH = """
import os, signal, subprocess, sys
child = subprocess.Popen(sys.argv[2:])
signal.signal(signal.SIGTERM, lambda *_: child.terminate())
_, status, usage = os.wait4(child.pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(str(usage.ru_maxrss))
os._exit(os.waitstatus_to_exitcode(status))
"""


def watched(command: list[str], folder: Path, **options: Any) -> "subprocess.Popen[bytes]":
    """Start a command that is measured; its log is `folder/log.txt`."""
    words = [sys.executable, "-ISc", _WATCH, str(folder / "peak.txt"), *command]
    with (folder / "log.txt").open("wb") as file:
        return subprocess.Popen(words, **{"stdout": file, "stderr": file, **options})


def ended(child: "subprocess.Popen[bytes]", folder: Path, fine: int = 0) -> int:
    """Wait for a command. Returns the bytes of its largest resident set. Raises RuntimeError where it fails."""
    if (code := child.wait()) != fine:
        raise RuntimeError(f"{child.args} ended with {code}: {(folder / 'log.txt').read_text(errors='replace')[-500:]}")
    return int((folder / "peak.txt").read_text()) * 1024  # Linux counts in kB


def peak(command: list[str], folder: Path) -> int:
    """Bytes of the largest resident set of a command."""
    return ended(watched(command, folder), folder)


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
        measured = peak(bitnet("train", *words), folder)
        rows.append(row(f"train {name}", fresh(run), measured))
    return rows


def fresh(run: Run) -> Need:
    """What a run was estimated at when it began: its saves, which a run that goes on has, are looked away from."""
    config: RunConfig = run.config()
    config = config.override({"model": {"vocab_size": run.tokenizer().vocab_size}})
    return run_need(config, CPU, Run(run.path / "not there"))


def served(model: Path, config: ModelConfig, folder: Path, slots: int) -> int:
    """The largest resident set of a server that has filled `slots` contexts."""
    words = ("serve", "-m", model, "--port", 0, "--slots", slots, "-t", 1)
    child = watched(bitnet(*words), folder, stdout=subprocess.PIPE)
    assert child.stdout is not None
    url = child.stdout.readline().decode().strip()

    def ask(number: int) -> None:
        body = {"prompt": f"{number} def ", "max_tokens": config.context - 16, "temperature": 1.0, "ignore_eos": True}
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}v1/completions", json.dumps(body).encode(), head)
        with urllib.request.urlopen(request, timeout=600) as answer:
            answer.read()

    with child.stdout, ThreadPoolExecutor(slots) as pool:
        list(pool.map(ask, range(slots)))
    child.terminate()
    return ended(child, folder, fine=143)


def others(folder: Path, only: str) -> list[dict[str, Any]]:
    """Rows of the verbs that take a model, on a run of `small-portable`."""
    if only not in "generate eval serve export import":
        return []
    run, packed = Run(folder / "model"), folder / "model.safetensors"
    words = ("--preset", "small-portable", "--data", text(folder), "--batch-size", 1, "--steps", 1, "-q", "-t", 1)
    settings = ("--set", "data.val_fraction=0.001", "--set", "train.quant_warmup=0")
    peak(bitnet("train", *words, *settings, "--out", run.path), folder)
    peak(bitnet("pack", run.path, "-o", packed), folder)
    config, size = read_config(packed), packed.stat().st_size
    limit = config.context
    rows = []
    measured = peak(bitnet("generate", "-m", packed, "-p", "def ", "-n", 64, "--ignore-eos", "--json"), folder)
    rows.append(row("generate", engine_need(config, size, CPU, Work(70, limit, read=5)), measured))
    windows = batch_for(limit, config.vocab_size)
    work = Work(limit, limit, windows, read=windows * limit, logits=2 * windows * limit)
    part = folder / "part.txt"
    part.write_text(text(folder).read_text(encoding="utf-8")[:200_000], encoding="utf-8")
    measured = peak(bitnet("eval", "-m", packed, "--data", part, "--json"), folder)
    rows.append(row("eval", engine_need(config, size, CPU, work), measured))
    measured = served(packed, config, folder, 4)
    rows.append(row("serve --slots 4", engine_need(config, size, CPU, Work(limit, limit, 4, 256, 260)), measured))
    measured = peak(bitnet("export", run.path, "-o", folder / "hf", "--to", "hf"), folder)
    rows.append(row("export --to hf", export_need(config, trained=True), measured))
    measured = peak(bitnet("export", packed, "-o", folder / "m.gguf", "--to", "gguf"), folder)
    rows.append(row("export --to gguf", export_need(config, trained=False, mapped=size), measured))
    measured = peak(bitnet("import", folder / "hf", "-o", folder / "again.safetensors"), folder)
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
