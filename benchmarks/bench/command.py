"""What `bitnet bench` does: check everything that can be wrong, then measure, then report."""

import json
import logging
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bitnet.benchmarks.bench import contenders, machine, measure, plan, table
from bitnet.benchmarks.bench.contenders import Contender, Files, Wanted
from bitnet.benchmarks.bench.measure import Subject
from bitnet.benchmarks.bench.plan import Choice, Test
from bitnet.benchmarks.bench.process import LOAD, cores_first
from bitnet.benchmarks.bench.random_model import write_random
from bitnet.benchmarks.bench.runner import Budget
from bitnet.config import PRESETS, ModelConfig, preset
from bitnet.engine.cpu import CACHES, HEADS
from bitnet.errors import BitNetError
from bitnet.files.packed import read_config
from bitnet.files.packed_layout import packed_bytes
from bitnet.files.tensors import embedding_parameters, linear_parameters
from bitnet.included import BOOKS
from bitnet.machine import BUSY, busy, load, stolen
from bitnet.threads import check_threads, use_threads

STEADY = 0.10  # three in four samples of the memory's bandwidth may be this far off their median
RANDOM = "random weights"
OUTPUTS = ("md", "json", "csv")
WriteGguf = Callable[[Path, ModelConfig, Path], None]  # packed file, the config llama.cpp is to see, file to write


@dataclass(frozen=True)
class Flags:
    """The command line as typed: lists are words with commas; an empty one has a default."""

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
    """A whole run."""

    models: list[Path]
    presets: list[str]
    choice: Choice
    threads: list[int]
    repetitions: int
    wanted: Wanted
    price: float | None  # a machine's, in dollars an hour
    budget: Budget
    command: list[str]


def parse(flags: Flags, arguments: Sequence[str]) -> Settings:
    """The settings the flags ask for; `arguments` are the words after `bitnet`."""
    plan.words("-o", flags.output, OUTPUTS)
    wanted = Wanted(
        plan.words("--backend", flags.backend, contenders.BACKENDS),
        flags.isa.split(",") if flags.isa else [],
        plan.words("--head", flags.head, HEADS),
        plan.words("--cache", flags.cache, CACHES),
        plan.words("--against", flags.against, contenders.OTHERS) if flags.against else [],
        flags.llama or sys.executable,
        flags.device,
    )
    choice = Choice(
        plan.numbers("-p", flags.prompt, 0) if flags.prompt else None,
        plan.numbers("-n", flags.predict, 0) if flags.predict else None,
        [plan.pair(text) for text in flags.pairs],
        plan.numbers("-d", flags.depth, 0),
        plan.numbers("-b", flags.batch, 1),
    )
    return Settings(
        models=flags.models if flags.models or flags.preset else [BOOKS],
        presets=plan.words("--preset", flags.preset, tuple(PRESETS)) if flags.preset else [],
        choice=choice,
        threads=list(dict.fromkeys(check_threads(word.strip()) for word in flags.threads.split(",")))
        if flags.threads
        else [use_threads()],
        repetitions=flags.repetitions,
        wanted=wanted,
        price=flags.price,
        budget=Budget(row=flags.budget, load=max(LOAD, flags.budget)),
        command=["bitnet", *(without_folder(word) for word in arguments)],
    )


def without_folder(word: str) -> str:
    """A word of the command line for the record: of an absolute path only the name."""
    option, equals, value = word.rpartition("=")
    return option + equals + (Path(value).name if value.startswith("/") else value)


def run(settings: Settings, write_gguf: WriteGguf, quiet: bool = False) -> dict[str, Any]:
    """Measure everything. Returns one document of JSON values.

    Raises BitNetError, before anything is loaded, for all that can be known to fail.
    """
    subjects: list[tuple[Subject, Path | None]] = [(_packed(path), path) for path in settings.models]
    subjects += [(_preset(name), None) for name in settings.presets]
    lined_up = contenders.line_up(settings.wanted)
    work = [(one, path, _checked(one, settings, lined_up)) for one, path in subjects]
    others = load_of(cores_first()[: max(settings.threads)])
    if others["busy"]:
        logging.getLogger("bitnet").warning(table.load_line(others))
    before = stolen()
    rows: list[dict[str, Any]] = []
    reports: list[dict[str, Any]] = []
    notes: list[str] = []
    with terminated(), tempfile.TemporaryDirectory(prefix="bitnet-bench-") as folder, _progress(quiet) as (say, tell):
        for subject, path, tests in work:
            files = _files(subject, path, Path(folder), lined_up, write_gguf, say, notes)
            for threads in settings.threads:
                found, seen = measure.group(
                    subject, files, lined_up, tests, threads, settings.repetitions, settings.budget, say, tell
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
    """What else runs on these CPUs now, as JSON values. `busy`: so much that it shows in figures."""
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


def _checked(subject: Subject, settings: Settings, lined_up: list[Contender]) -> list[Test]:
    """The tests of a model, once it is known that they can run."""
    tests = plan.tests(settings.choice, subject.config, subject.name)
    contenders.check_memory(subject.name, subject.config, tests, lined_up)
    contenders.check_batch(tests, lined_up)
    if any(one.script == "llama" for one in lined_up):
        contenders.llama_config(subject.config)
    if subject.config.linear == "float" and any(one.script == "dense" for one in lined_up):
        raise BitNetError(
            f"bench: --against: {subject.name} has plain linears, expected ternary or binary ones for torch-bf16 and "
            "torch-int8; leave them out"
        )
    free, needed = shutil.disk_usage(tempfile.gettempdir()).free, _disk(subject, lined_up)
    if free < needed:
        raise BitNetError(
            f"bench: {subject.name} needs about {needed / 1e9:.1f} GB of disk for temporary files, got "
            f"{free / 1e9:.1f} GB in '{tempfile.gettempdir()}'; set TMPDIR to a larger one"
        )
    return tests


def _disk(subject: Subject, lined_up: list[Contender]) -> float:
    """Bytes that are written to temporary files: a preset's weights, and two GGUF files for llama.cpp."""
    linear, tables = linear_parameters(subject.config), embedding_parameters(subject.config)
    packed = subject.size if subject.source == RANDOM else 0
    gguf = 2 * 0.26 * linear + (2 + 0.83) * tables  # TQ2_0 in both; F16, then Q6_K
    return packed + gguf * any(one.script == "llama" for one in lined_up)


def _files(
    subject: Subject,
    path: Path | None,
    folder: Path,
    lined_up: list[Contender],
    write_gguf: WriteGguf,
    say: measure.Say,
    notes: list[str],
) -> Files:
    """The model as each contender wants it: written here what there is not."""
    files = Files(path or folder / "model.safetensors", folder / "raw.gguf", folder / "model.gguf")
    if path is None:
        say(f"{subject.name}: making a model of random weights")
        write_random(subject.config, files.packed)
    llama = next((one for one in lined_up if one.script == "llama"), None)
    if llama:
        config, differs = contenders.llama_config(subject.config)
        say(f"{subject.name}: writing it for llama.cpp")
        write_gguf(files.packed, config, files.raw)
        if differs:
            notes.append(f"{subject.name} in llama.cpp: the same weights with {differs}: its time, not its text")
    return files


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
    """How far samples lie off the median of their size, three in four and the worst: in "memory" and "smaller" sets."""
    found: dict[str, tuple[float, float]] = {}
    for read in (read for report in reports for read in report["reads"]):
        before = found.get(read["of"], (0.0, 0.0))
        found[read["of"]] = max(before[0], read["off_median"]), max(before[1], read["worst_off_median"])
    return found


def _llama_notes(rows: list[dict[str, Any]], features: list[str]) -> list[str]:
    """Whether llama.cpp was built for less than this CPU can do."""
    systems = {row["system"] for row in rows if row.get("system")}
    if "avx512_f" in features and any("AVX512 = 1" not in system for system in systems):
        return [f"llama.cpp: built without AVX-512, which this CPU has; build it here: {contenders.LLAMA_INSTALL}"]
    return []


@contextmanager
def _progress(quiet: bool) -> Iterator[tuple[measure.Say, measure.Say]]:
    """Two ways to speak on stderr: a line that says what is being done, on a terminal only, and lines that stay."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def tell(text: str) -> None:
            if not quiet:
                bar.console.print(f"bitnet: {text}", markup=False, highlight=False, soft_wrap=True)

        yield lambda text: bar.update(task, description=text), tell


@contextmanager
def terminated() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: child processes stop and temporary files go. Exit code 143."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def show(document: dict[str, Any], output: str) -> str:
    """The document as md, csv, or JSON on one line."""
    if output == "md":
        return table.as_markdown(document)
    return json.dumps(document) if output == "json" else table.as_csv(document["results"])
