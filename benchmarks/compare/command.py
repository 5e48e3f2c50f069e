"""What `bitnet compare` does: make every file, measure each in a separate child, put the figures into one report."""

import datetime
import json
import logging
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
from bitnet.benchmarks.bench.interleaving import in_turn
from bitnet.benchmarks.children import builds
from bitnet.benchmarks.children.process import Child, ChildError, TooSlowError
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
from bitnet.files.tensors import parameters
from bitnet.plotting import check_target
from bitnet.train.data.prepare import tokenize
from bitnet.train.data.windows import spread_windows
from bitnet.train.evaluate import IGNORED
from bitnet.train.runs.run import Run

_log = logging.getLogger("bitnet")
PREFILL, DECODE = 128, 64  # tokens that are timed, fewer where the context is short
# Seconds that a method may take to make its file, and a model to be timed and scored: GPTQ of 100M takes 600.
BUDGET = 1800.0
LEFT_OUT = "left out"  # the status of a method that takes longer
JOBS = "compare/jobs"  # the script of its children


@dataclass(frozen=True)
class Options:
    """The options of the command line. Limits are in tokens, the budget in seconds."""

    data: tuple[str, ...]
    max_tokens: int = 131_072
    kl_tokens: int = 16_384
    rounds: int = 2
    repeats: int = 3
    keep: Path | None = None  # folder for the files of all methods; None: they are deleted at the end
    budget: float = BUDGET

    def __post_init__(self) -> None:
        for name in ("max_tokens", "kl_tokens", "rounds", "repeats", "budget"):
            if getattr(self, name) < 1:
                raise BitNetError(f"compare: got {name} {getattr(self, name)}, expected at least 1")


def compare_runs(
    run: Path,
    baseline: Path | None,
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
    """Compare a ternary run and its baseline by all methods. Returns the report as JSON values.

    output, plot: files that `write_report` will write; checked here, before anything is measured. force: compare even
    if memory seems too small.
    Raises BitNetError for runs that cannot be compared, text without tokens, unknown methods and bad options.
    """
    check_targets(output, plot)
    chosen = choose(names)
    if settings.llama:
        builds.check_python(settings.llama, "compare")
    pair = Pair(run, baseline or find_baseline(run), binary)
    if Run(run).exists():  # before its weights are read; `check` refuses what is no run
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
        comparison = _Comparison(pair, options, settings, config, work, files, _progress(status, quiet))
        rows = comparison.rows(chosen)
        sizes = np.load(work / "text" / "tokens.npy"), np.load(work / "text" / "sizes.npy")
        _add_figures(rows, comparison.scores, *sizes, text["context"])
    return {
        "benchmark": "compare",
        "bitnet": __version__,
        "command": ["bitnet", *(without_folder(word) for word in sys.argv[1:])],
        "machine": _machine(settings),
        "settings": _settings(options, settings, names),
        "models": {key: value for key, value in facts.items() if key != "model"} | {"config": facts["model"]},
        "parameters": parameters(config),
        "text": text,
        "timing": comparison.timing | {"rounds": options.rounds},
        "results": rows,
    }


def _progress(status: Status | None, quiet: bool) -> Callable[[str], None]:
    """How progress is shown: one line that changes on a terminal, one line each in a log, nothing if quiet."""
    if status is not None:
        return status.update
    return (lambda text: None) if quiet else _log.info


def check_targets(output: Path | None, plot: Path | None) -> None:
    """Raise BitNetError for files that cannot be written and pictures that cannot be drawn, before hours of work."""
    for path in (output, plot):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise BitNetError(f"compare: got '{path}', expected a file to write in an existing folder")
    if plot is not None:
        check_target(plot)


def write_report(report: dict[str, Any], output: Path | None, plot: Path | None) -> None:
    """Write the JSON document and the picture, each where it is asked for."""
    if output is not None:
        with replacing(output) as work:
            work.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        plot_comparison(report, plot)


def cut_text(pair: Pair, options: Options, folder: Path) -> dict[str, Any]:
    """Write the windows of held-out text that every model scores into `folder`. Returns their facts as JSON values.

    Windows are full, and spread evenly over the text where it is longer than asked for.
    """
    folder.mkdir()
    settings = Run(pair.ternary).config()
    context = settings.context
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
    """Warn of a path that the run was trained on: its figures would not be those of held-out text."""
    trained = {str(Path(path).resolve()) for path in Run(pair.ternary).config().data.paths}
    for path in options.data:
        if str(Path(path).resolve()) in trained:
            _log.warning(
                "'%s' is text that the models were trained on, expected held-out text: the figures are too good", path
            )


class _Comparison:
    """Makes and measures, one child at a time."""

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
        context = Run(pair.ternary).config().context
        prefill = min(PREFILL, context // 2)
        self.timing = {"prefill": prefill, "decode": min(DECODE, context - prefill), "repeats": options.repeats}
        self.scores: dict[str, Scores] = {}

    def rows(self, chosen: Sequence[Method]) -> list[dict[str, Any]]:
        """A row for every method, measured or with the reason why not."""
        rows = {method.name: self.make(method) for method in chosen}
        able = {name: row for name, row in rows.items() if row["status"] == "ok"}
        reference = rows.get("fp32") or self.make(choose("fp32")[0])
        if reference["status"] == "ok":
            self._measure("fp32", reference, reference=True, score=True)
        if reference["status"] != "ok":  # everything else is held against it
            raise BitNetError(
                f"compare: got no figures of the float baseline ({reference['note']}), expected them: every row is "
                "compared with it"
            )
        for turn in range(self._options.rounds):
            for name, row in in_turn(list(able.items()), turn + 1):
                if row["status"] == "ok" and not (name == "fp32" and turn == 0):
                    self._measure(name, row, reference=False, score=turn == 0)
        features = examine()["cpu"]["features"]
        for row in rows.values():
            _finish(row, self.timing, features)
        return list(rows.values())

    def make(self, method: Method) -> dict[str, Any]:
        """Let a method make its file. Returns the beginning of its row."""
        row: dict[str, Any] = {"method": method.name, "family": method.family, "title": method.title}
        reason = method.why_not(self._pair, self._settings)
        if reason is not None:
            return row | {"status": "missing", "note": reason}
        self._progress(f"{method.name}: making")
        folder = self._files / method.name
        folder.mkdir(exist_ok=True)
        pair = {key: None if path is None else str(path) for key, path in asdict(self._pair).items()}
        started = time.perf_counter()
        answer = self._ask("make", method=method.name, pair=pair, folder=str(folder))
        if isinstance(answer, _NoFigures):
            return row | asdict(answer)
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
        job = {"artifact": row["artifact"], "text": str(self._work / "text"), "vocab": self._vocab}
        job |= {"reference": reference, "score": score, "scores": str(scores), "budget": self._options.budget}
        answer = self._ask("measure_model", **job, **self.timing)
        if isinstance(answer, _NoFigures):
            row |= asdict(answer)
            return
        row["times"] += answer.pop("times")
        row.setdefault("facts", answer)
        if score:
            with np.load(scores) as values:
                self.scores[name] = Scores(values["nats"], values["kl"], values["top1"])

    def _ask(self, do: str, **job: Any) -> "dict[str, Any] | _NoFigures":
        """The answer of a child that does one job, or why there is none."""
        budget, started = self._options.budget, time.perf_counter()
        options = {"settings": asdict(self._settings)}
        try:
            with Child("compare", JOBS, options, self._settings.threads, limit=budget) as child:
                answer = child.ask(do, max(1.0, budget - (time.perf_counter() - started)), **job)
        except TooSlowError:
            what = do.removesuffix("_model")
            return _NoFigures(LEFT_OUT, f"{what}: not done within {budget:,.3g} s (--budget); its process was ended")
        except ChildError as error:
            return _NoFigures("failed", error.reason)
        return _NoFigures(LEFT_OUT, answer["too_slow"]) if "too_slow" in answer else answer


@dataclass(frozen=True)
class _NoFigures:
    """Why a method has no figures."""

    status: str
    note: str


def _finish(row: dict[str, Any], timing: dict[str, int], features: Sequence[str]) -> None:
    """Turn seconds into tokens per second, and the facts of the model into columns. features: of this CPU."""
    if row["status"] != "ok":
        return
    times, facts = row.pop("times"), row.pop("facts")
    for name in ("prefill", "decode"):
        speeds = [timing[name] / seconds[name] for seconds in times]
        row[f"{name}_tokens_per_second"] = float(np.median(speeds))
        row[f"{name}_spread"] = [float(x) for x in np.quantile(speeds, (0.25, 0.75))]
    row["peak_bytes"], row["runtime_bytes"] = facts["peak"], facts["before"]
    row["model_bytes"] = facts["peak"] - facts["before"]
    row["runner"] = row.pop("artifact")["loader"]
    if "library" in facts:
        row["library"] = facts["library"]
    lacks = builds.lacks(facts["library"], facts["features"], features) if row["runner"] == "llama" else ""
    row["note"] = "; ".join(text for text in (row["note"], facts.get("remark"), lacks) if text)
    for key in ("operators", "instruction_set", "engine", "features"):
        if facts.get(key):
            row[key] = facts[key]
    if "operators" in row:
        row["note"] = "; ".join(text for text in (row["note"], f"decode in {row['operators']['decode']}") if text)
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
        "budget_seconds": options.budget,
        "threads": settings.threads,
        "qat_steps": settings.qat_steps,
        "llama": "named" if settings.llama else "wheel",
    }
