"""What `bitnet compare` does: make every file, measure each in its own process, put it all into one report."""

import datetime
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.status import Status

from bitnet import __version__
from bitnet.benchmarks.bench.command import terminated, without_folder
from bitnet.benchmarks.compare import llama
from bitnet.benchmarks.compare.artifact import Artifact
from bitnet.benchmarks.compare.measure import Scores, figures
from bitnet.benchmarks.compare.memory import check_comparison
from bitnet.benchmarks.compare.method import Method, Settings
from bitnet.benchmarks.compare.pair import Pair, find_baseline
from bitnet.benchmarks.compare.plot import plot_comparison
from bitnet.benchmarks.compare.registry import choose
from bitnet.config import ModelConfig
from bitnet.doctor import examine
from bitnet.errors import BitNetError
from bitnet.files.checkpoint import replacing
from bitnet.model import parameters
from bitnet.plotting import check_target
from bitnet.train.data.prepare import tokenize
from bitnet.train.data.windows import spread_windows
from bitnet.train.evaluate import IGNORED
from bitnet.train.runs.run import Run

_log = logging.getLogger("bitnet")
PREFILL, DECODE = 128, 64  # tokens that are timed, fewer where the context is short


@dataclass(frozen=True)
class Options:
    """What the command line decides. Limits are in tokens."""

    data: tuple[str, ...]
    max_tokens: int = 131_072
    kl_tokens: int = 16_384
    rounds: int = 2
    repeats: int = 3
    keep: Path | None = None  # folder for the files of all methods; None: they go when all is measured

    def __post_init__(self) -> None:
        for name in ("max_tokens", "kl_tokens", "rounds", "repeats"):
            if getattr(self, name) < 1:
                raise BitNetError(f"compare: got {name} {getattr(self, name)}, expected at least 1")


def compare_runs(
    run: Path,
    twin: Path | None,
    binary: Path | None,
    names: str | None,
    options: Options,
    settings: Settings,
    *,
    quiet: bool = False,
    output: Path | None = None,
    plot: Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Compare. Returns the report as JSON values.

    output, plot: what is to be written later; refused now where it could not be. force: compare even where memory looks
    too small. Raises BitNetError for runs that are
    no pair, text that is none, unknown methods and options that lead nowhere.
    """
    check_targets(output, plot)
    chosen = choose(names)
    if settings.llama:
        llama.check_python(settings.llama)
    pair = Pair(run, twin or find_baseline(run), binary)
    if Run(run).exists():  # before its weights are read; what is no run is refused by `check`
        check_comparison(chosen, Run(run).saved_shape(), force=force)
    facts = pair.check()
    config = ModelConfig.from_dict({**facts["model"], "linear": "ternary"})
    console = Console(stderr=True)
    with ExitStack() as stack:
        stack.enter_context(terminated())
        status = None if quiet or not console.is_terminal else stack.enter_context(console.status("reading text"))
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bitnet-compare-")))
        files = options.keep or work / "files"
        files.mkdir(parents=True, exist_ok=True)
        text = cut_text(pair, options, work / "text")
        bench = _Bench(pair, options, settings, config, work, files, _teller(status, quiet))
        rows = bench.all(chosen)
        sizes = np.load(work / "text" / "tokens.npy"), np.load(work / "text" / "sizes.npy")
        _add_figures(rows, bench.scores, *sizes, text["context"])
    return {
        "benchmark": "compare",
        "bitnet": __version__,
        "command": ["bitnet", *(without_folder(word) for word in sys.argv[1:])],
        "machine": _machine(settings),
        "settings": _settings(options, settings, names),
        "models": {key: value for key, value in facts.items() if key != "model"} | {"config": facts["model"]},
        "parameters": parameters(config),
        "text": text,
        "timing": bench.timing | {"rounds": options.rounds},
        "results": rows,
    }


def _teller(status: Status | None, quiet: bool) -> Callable[[str], None]:
    """How progress is told: one line that changes on a terminal, one line each in a log, nothing if quiet."""
    if status is not None:
        return status.update
    return (lambda words: None) if quiet else _log.info


def check_targets(output: Path | None, plot: Path | None) -> None:
    """Raise BitNetError for files that cannot be written and pictures that cannot be drawn: before hours, not after."""
    for path in (output, plot):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise BitNetError(f"compare: got '{path}', expected a file to write in a folder that is there")
    if plot is not None:
        check_target(plot)


def write_report(report: dict[str, Any], output: Path | None, plot: Path | None) -> None:
    """Write the JSON document and the picture that are asked for."""
    if output is not None:
        with replacing(output) as work:
            work.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        plot_comparison(report, plot)


def cut_text(pair: Pair, options: Options, folder: Path) -> dict[str, Any]:
    """Write the windows of held-out text that every model scores into `folder`. Returns what they are.

    They are whole windows, spread evenly over the text when there is more of it than asked for.
    """
    folder.mkdir()
    settings, context = Run(pair.run).config(), Run(pair.run).config().context
    tokenizer = pair.tokenizer()
    stream = tokenize(options.data, tokenizer, folder, documents=settings.data.documents)
    inputs, targets = spread_windows(stream, context, max(1, options.max_tokens // context))
    compared = np.unique(np.linspace(0, len(inputs) - 1, max(1, options.kl_tokens // context)).astype(np.int64))
    scored = targets != IGNORED
    lengths = tokenizer.byte_lengths().astype(np.int64)
    sizes = (lengths[np.where(scored, targets, 0)] * scored).sum(axis=1)
    arrays = {"inputs": inputs, "targets": targets, "compared": compared, "sizes": sizes, "tokens": scored.sum(axis=1)}
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    _warn_of_training_text(pair, options)
    return {
        "data": [Path(path).name for path in options.data],
        "context": context,
        "windows": len(inputs),
        "tokens": int(scored.sum()),
        "bytes": int(sizes.sum()),
        "tokens_in_all": len(stream),
        "compared_positions": len(compared) * context,
    }


def _warn_of_training_text(pair: Pair, options: Options) -> None:
    """Held-out text must not have been trained on: a path that the run was trained on is said aloud."""
    trained = {str(Path(path).resolve()) for path in Run(pair.run).config().data.paths}
    for path in options.data:
        if str(Path(path).resolve()) in trained:
            _log.warning("'%s' is text that the models were trained on: these are no held-out figures", path)


class _Bench:
    """Makes and measures, one process at a time."""

    def __init__(
        self,
        pair: Pair,
        options: Options,
        settings: Settings,
        config: ModelConfig,
        work: Path,
        files: Path,
        progress: Callable[[str], None],
    ) -> None:
        self._pair, self._options, self._settings = pair, options, settings
        self._work, self._files, self._progress = work, files, progress
        self._vocab = config.vocab_size
        self._parameters = parameters(config)
        context = Run(pair.run).config().context
        prefill = min(PREFILL, context // 2)
        self.timing = {"prefill": prefill, "decode": min(DECODE, context - prefill), "repeats": options.repeats}
        self.scores: dict[str, Scores] = {}

    def all(self, chosen: Sequence[Method]) -> list[dict[str, Any]]:
        """A row for every method, measured or with the reason why not."""
        rows = {method.name: self._made(method) for method in chosen}
        able = {name: row for name, row in rows.items() if row["status"] == "ok"}
        reference = rows.get("fp32") or self._made(choose("fp32")[0])
        if reference["status"] == "ok":
            self._measure("fp32", reference, reference=True, score=True)
        if reference["status"] != "ok":  # everything else is held against it
            raise BitNetError(f"compare: the float twin itself cannot be measured: {reference['note']}")
        for turn in range(self._options.rounds):
            for name, row in list(able.items())[:: 1 if turn % 2 == 0 else -1]:
                if row["status"] == "ok" and not (name == "fp32" and turn == 0):
                    self._measure(name, row, reference=False, score=turn == 0)
        features = examine()["cpu"]["features"]
        for row in rows.values():
            _finish(row, self.timing, features)
        return list(rows.values())

    def _made(self, method: Method) -> dict[str, Any]:
        row: dict[str, Any] = {"method": method.name, "family": method.family, "title": method.title}
        reason = method.why_not(self._pair, self._settings)
        if reason is not None:
            return row | {"status": "missing", "note": reason}
        self._progress(f"{method.name}: making")
        folder = self._files / method.name
        folder.mkdir(exist_ok=True)
        pair = {key: None if path is None else str(path) for key, path in asdict(self._pair).items()}
        started = time.perf_counter()
        answer = self._run({"do": "make", "method": method.name, "pair": pair, "folder": str(folder)})
        if isinstance(answer, str):
            return row | {"status": "failed", "note": answer}
        artifact = Artifact(**answer)
        return row | {
            "status": "ok",
            "note": artifact.note,
            "library": artifact.library,
            "file_bytes": artifact.bytes,
            "bits_per_weight": artifact.bytes * 8 / self._parameters,
            "seconds_to_make": time.perf_counter() - started,
            "artifact": answer,
            "times": [],
        }

    def _measure(self, name: str, row: dict[str, Any], *, reference: bool, score: bool) -> None:
        self._progress(f"{name}: {'scoring and timing' if score else 'timing'}")
        scores = self._work / f"{name}.npz"
        job = {"do": "measure", "artifact": row["artifact"], "text": str(self._work / "text"), "vocab": self._vocab}
        answer = self._run(job | self.timing | {"reference": reference, "score": score, "scores": str(scores)})
        if isinstance(answer, str):
            row |= {"status": "failed", "note": answer}
            return
        row["times"] += answer.pop("times")
        row.setdefault("facts", answer)
        if score:
            with np.load(scores) as values:
                self.scores[name] = Scores(values["nats"], values["kl"], values["top1"])

    def _run(self, job: dict[str, Any]) -> dict[str, Any] | str:
        """The answer of a worker, or the last line it left on stderr."""
        answer = self._work / "answer.json"
        answer.unlink(missing_ok=True)
        path = self._work / "job.json"
        path.write_text(json.dumps(job | {"settings": asdict(self._settings), "answer": str(answer)}), encoding="utf-8")
        command = [sys.executable, "-m", "bitnet.benchmarks.compare.worker", str(path), str(os.getpid())]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            values: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return values
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"the process ended with code {done.returncode}"


def _finish(row: dict[str, Any], timing: dict[str, int], features: Sequence[str]) -> None:
    """Turn seconds into tokens a second, and what the runner said into columns. features: of this CPU."""
    if row["status"] != "ok":
        return
    times, facts = row.pop("times"), row.pop("facts")
    for name in ("prefill", "decode"):
        speeds = [timing[name] / seconds[name] for seconds in times]
        row[f"{name}_tokens_per_second"] = float(np.median(speeds))
        row[f"{name}_spread"] = [float(x) for x in np.quantile(speeds, (0.25, 0.75))]
    row["peak_bytes"], row["runtime_bytes"] = facts["peak"], facts["before"]
    row["model_bytes"] = facts["peak"] - facts["before"]
    row["runner"] = row.pop("artifact")["runner"]
    if "library" in facts:
        row["library"] = facts["library"]
    lacks = llama.build_remark(facts["library"], facts["features"], features) if row["runner"] == "llama" else ""
    row["note"] = "; ".join(part for part in (row["note"], facts.get("remark"), lacks) if part)
    for key in ("operators", "instruction_set", "engine", "features"):
        if facts.get(key):
            row[key] = facts[key]
    if "operators" in row:
        row["note"] = "; ".join(part for part in (row["note"], f"decode in {row['operators']['decode']}") if part)
    elif row.get("instruction_set"):
        row["note"] += f"; C++ engine, {row['instruction_set']}"


def _add_figures(
    rows: list[dict[str, Any]], scores: dict[str, Scores], tokens: np.ndarray, sizes: np.ndarray, context: int
) -> None:
    for row in rows:
        if row["status"] == "ok":
            row |= figures(scores[row["method"]], scores["fp32"], tokens, sizes, context)


def _machine(settings: Settings) -> dict[str, Any]:
    report = examine()
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "cpu": report["cpu"]["name"],
        "cores": report["cpu"]["cores"],
        "threads": settings.threads,
        "features": report["cpu"]["features"],
        "torch": torch.__version__,
        "python": report["python"],
    }


def _settings(options: Options, settings: Settings, names: str | None) -> dict[str, Any]:
    return {
        "methods": names or "all",
        "max_tokens": options.max_tokens,
        "kl_tokens": options.kl_tokens,
        "rounds": options.rounds,
        "threads": settings.threads,
        "qat_steps": settings.qat_steps,
        "llama": "named" if settings.llama else "wheel",
    }
