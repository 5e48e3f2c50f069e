"""What `bitnet bench` does: check everything that can be checked, then measure, then report."""

import json
import logging
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bitnet.benchmarks.bench import contenders, machine, measure, plan, table
from bitnet.benchmarks.bench.contenders import DENSE_SCRIPT, LLAMA_SCRIPT, Contender, EngineChoice, Files
from bitnet.benchmarks.bench.plan import Test, TestChoice
from bitnet.benchmarks.bench.random_model import write_random
from bitnet.benchmarks.bench.rows import Subject
from bitnet.benchmarks.bench.series import Budget
from bitnet.benchmarks.children import builds
from bitnet.benchmarks.children.process import LOAD, cores_first
from bitnet.config import PRESETS, ModelConfig, preset
from bitnet.engine.cpu import CACHES, HEADS
from bitnet.errors import BitNetError
from bitnet.files.gguf.export import export_gguf
from bitnet.files.packed import PackedSource, read_config, read_packed
from bitnet.files.packed_layout import packed_bytes
from bitnet.files.tensors import embedding_parameters, linear_parameters
from bitnet.included import BOOKS
from bitnet.machine import BUSY, busy, load, stolen
from bitnet.threads import check_threads, use_threads

STEADY = 0.10  # a steady machine: three in four samples of memory bandwidth are no further from their median
RANDOM = "random weights"
OUTPUTS = ("md", "json", "csv")


@dataclass(frozen=True)
class Flags:
    """The command line as typed: lists are words separated by commas; an empty one stands for the default."""

    models: list[Path]
    preset: str
    prompt: str
    predict: str
    pairs: list[str]
    depth: str
    batch: str
    threads: str
    repetitions: int
    backend: str
    isa: str
    head: str
    cache: str
    against: str
    llama: str
    price: float | None
    budget: float
    output: str
    device: torch.device


@dataclass(frozen=True)
class Settings:
    """Everything one call measures."""

    models: list[Path]
    presets: list[str]
    tests: TestChoice
    threads: list[int]
    repetitions: int
    engines: EngineChoice
    price: float | None  # of the machine, in dollars per hour
    budget: Budget
    command: list[str]


def parse(flags: Flags, arguments: Sequence[str]) -> Settings:
    """The settings the flags ask for; `arguments` are the words after `bitnet`."""
    plan.words("-o", flags.output, OUTPUTS)
    engines = EngineChoice(
        plan.words("--backend", flags.backend, contenders.BACKENDS),
        flags.isa.split(",") if flags.isa else [],
        plan.words("--head", flags.head, HEADS),
        plan.words("--cache", flags.cache, CACHES),
        plan.words("--against", flags.against, contenders.OTHERS) if flags.against else [],
        flags.llama or sys.executable,
        flags.device,
    )
    tests = TestChoice(
        plan.numbers("-p", flags.prompt, 0) if flags.prompt else None,
        plan.numbers("-n", flags.predict, 0) if flags.predict else None,
        [plan.pair(text) for text in flags.pairs],
        plan.numbers("-d", flags.depth, 0),
        plan.numbers("-b", flags.batch, 1),
    )
    return Settings(
        models=flags.models if flags.models or flags.preset else [BOOKS],
        presets=plan.words("--preset", flags.preset, tuple(PRESETS)) if flags.preset else [],
        tests=tests,
        threads=list(dict.fromkeys(check_threads(word.strip()) for word in flags.threads.split(",")))
        if flags.threads
        else [use_threads()],
        repetitions=flags.repetitions,
        engines=engines,
        price=flags.price,
        budget=Budget(row=flags.budget, load=max(LOAD, flags.budget)),
        command=["bitnet", *(without_folder(word) for word in arguments)],
    )


def without_folder(word: str) -> str:
    """A word of the command line for the record: an absolute path is cut to its name."""
    option, equals, value = word.rpartition("=")
    return option + equals + (Path(value).name if value.startswith("/") else value)


def run(settings: Settings, quiet: bool = False) -> dict[str, Any]:
    """Measure everything. Returns one document of JSON values.

    Raises BitNetError for bad input before anything is loaded.
    """
    subjects: list[tuple[Subject, Path | None]] = [(_packed(path), path) for path in settings.models]
    subjects += [(_preset(name), None) for name in settings.presets]
    selected = contenders.select_contenders(settings.engines)
    work = [(subject, path, _check(subject, settings, selected)) for subject, path in subjects]
    others = load_of(cores_first()[: max(settings.threads)])
    if others["busy"]:
        logging.getLogger("bitnet").warning(table.load_line(others))
    before = stolen()
    rows: list[dict[str, Any]] = []
    reports: list[dict[str, Any]] = []
    notes: list[str] = []
    with terminated(), tempfile.TemporaryDirectory(prefix="bitnet-bench-") as folder, _progress(quiet) as (status, log):
        for subject, path, tests in work:
            files = _files(subject, path, Path(folder), selected, status, notes)
            for threads in settings.threads:
                found, seen = measure.group(
                    subject, files, selected, tests, threads, settings.repetitions, settings.budget, status, log
                )
                rows += found
                reports += seen
            for made in Path(folder).iterdir():
                made.unlink()
    if not table.measured(rows):
        reasons = dict.fromkeys(f"{row['backend']}, {row['test']}: {row['left_out']}" for row in rows)
        raise BitNetError(f"bench: nothing could be measured ({' | '.join(reasons)}), expected at least one row")
    return _document(settings, rows, reports, notes, before, others)


def load_of(cpus: Sequence[int]) -> dict[str, Any]:
    """The load of other processes on these CPUs, as JSON values. `busy`: enough to show in the figures."""
    others = busy(cpus)
    return {
        "others": others,
        "cpus": len(cpus),
        "average": load(),
        "busy": others is not None and others > BUSY * len(cpus),
    }


def _packed(path: Path) -> Subject:
    config = read_config(path)
    return Subject(path.name.removesuffix(".safetensors"), config, path.stat().st_size, str(path))


def _preset(name: str) -> Subject:
    config = preset(name)
    return Subject(name, config, packed_bytes(config), RANDOM)


def _check(subject: Subject, settings: Settings, selected: list[Contender]) -> list[Test]:
    """The tests of a model. Raises BitNetError where one of them cannot run."""
    tests = plan.tests(settings.tests, subject.config, subject.name)
    contenders.check_memory(subject.name, subject.config, tests, selected)
    contenders.check_batch(tests, selected)
    if any(one.script == LLAMA_SCRIPT for one in selected):
        contenders.llama_config(subject.config)
    if subject.config.linear == "float" and any(one.script == DENSE_SCRIPT for one in selected):
        raise BitNetError(
            f"bench: --against: {subject.name} has float linear layers, expected ternary or binary ones for torch-bf16 "
            "and torch-int8; leave them out"
        )
    free, needed = shutil.disk_usage(tempfile.gettempdir()).free, _disk(subject, selected)
    if free < needed:
        raise BitNetError(
            f"bench: {subject.name} needs about {needed / 1e9:.1f} GB of disk for temporary files, got "
            f"{free / 1e9:.1f} GB in '{tempfile.gettempdir()}'; set TMPDIR to a larger one"
        )
    return tests


def _disk(subject: Subject, selected: list[Contender]) -> float:
    """Bytes of temporary files: a preset's weights, and two GGUF files for llama.cpp."""
    linear, embedding = linear_parameters(subject.config), embedding_parameters(subject.config)
    packed = subject.size if subject.source == RANDOM else 0
    gguf = 2 * contenders.TQ2_0_BYTES * linear + (2 + contenders.Q6_K_BYTES) * embedding  # embedding in F16, then Q6_K
    return packed + gguf * any(one.script == LLAMA_SCRIPT for one in selected)


def _files(
    subject: Subject,
    path: Path | None,
    folder: Path,
    selected: list[Contender],
    status: measure.Show,
    notes: list[str],
) -> Files:
    """The files that the contenders read; those that do not exist yet are written into `folder`."""
    files = Files(path or folder / "model.safetensors", folder / "raw.gguf", folder / "model.gguf")
    if path is None:
        status(f"{subject.name}: making a model of random weights")
        write_random(subject.config, files.packed)
    if any(one.script == LLAMA_SCRIPT for one in selected):
        config, differs = contenders.llama_config(subject.config)
        status(f"{subject.name}: writing it for llama.cpp")
        packed_to_gguf(files.packed, config, files.raw)
        if differs:
            notes.append(f"{subject.name} in llama.cpp: the same weights with {differs}; its time counts, not its text")
    return files


def packed_to_gguf(packed: Path, config: ModelConfig, target: Path) -> None:
    """Write a packed file as GGUF, as if its model had the config `config`."""
    export_gguf(PackedSource(replace(read_packed(packed), config=config)), target, "tq2_0")


def _document(
    settings: Settings,
    rows: list[dict[str, Any]],
    reports: list[dict[str, Any]],
    notes: list[str],
    before: tuple[int, int],
    others: dict[str, Any],
) -> dict[str, Any]:
    after = stolen()
    described = machine.describe(bandwidth=False)
    spread = bandwidth_spread(reports)
    for row in rows:
        price, speed = settings.price, row["median_ts"]
        row["dollars_per_million"] = None if price is None or speed is None else price / 3600 / speed * 1e6
    return {
        "benchmark": "bench",
        "command": settings.command,
        "machine": described,
        "repetitions": settings.repetitions,
        "budget_seconds": settings.budget.row,
        "load": others,
        "price_per_hour": settings.price,
        "steady": spread["memory"][0] <= STEADY,
        "steady_within": STEADY,
        "bandwidth_off_median": spread,
        "stolen": (after[0] - before[0]) / max(1, after[1] - before[1]),
        "notes": notes + _llama_notes(rows, described["features"]),
        "measured": reports,
        "results": rows,
    }


def bandwidth_spread(reports: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """How far samples are from the median of their size, three in four and the worst: for "memory" and "smaller"."""
    found: dict[str, tuple[float, float]] = {}
    for read in (read for report in reports for read in report["reads"]):
        before = found.get(read["of"], (0.0, 0.0))
        found[read["of"]] = max(before[0], read["off_median"]), max(before[1], read["worst_off_median"])
    return found


def _llama_notes(rows: list[dict[str, Any]], features: list[str]) -> list[str]:
    """What the builds of llama.cpp lack on this CPU."""
    found = dict.fromkeys(builds.lacks("", row["system"], features) for row in rows if row.get("system"))
    return [f"llama.cpp: {text}" for text in found if text]


@contextmanager
def _progress(quiet: bool) -> Iterator[tuple[measure.Show, measure.Show]]:
    """Two printers to stderr: a status line, on a terminal only, and a log of lines that stay."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def log(text: str) -> None:
            if not quiet:
                bar.console.print(f"bitnet: {text}", markup=False, highlight=False, soft_wrap=True)

        yield lambda text: bar.update(task, description=text), log


@contextmanager
def terminated() -> Iterator[None]:
    """End the run on SIGTERM as on Ctrl-C: children end and temporary files are deleted. Exit code 143."""

    def exit_(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, exit_)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def show(document: dict[str, Any], output: str) -> str:
    """The document as md, csv, or JSON on one line."""
    if output == "md":
        return table.as_markdown(document)
    return json.dumps(document) if output == "json" else table.as_csv(document["results"])
