"""A ladder of runs from one TOML file: every setting, every seed, one after the other; a table, JSON, pictures.

    seeds = [1, 2, 3]
    linears = ["ternary", "plain"]        # with "plain" among them: gaps to the float twin
    preset = "nano"
    test = ["unseen/"]                    # text that every finished run scores once; leave away while tuning
    test_tokens = 200_000                 # of it, spread over it; 0 or nothing: all

    [base]                                # settings of all runs, written as in a run's own file; they outrank a preset
    data.paths = ["books/"]
    train.steps = 400

    [grid]                                # lists: every combination
    train.lr = [0.003, 0.006, 0.012]

    [[runs]]                              # or one by one; with a grid, each of them at every point of it
    name = "zero init"
    train.zero_init = true

    [[runs]]
    name = "eased in"
    linears = ["ternary"]                 # instead of those above: for what the others do not have
    train.ease = 0.3

    [[runs]]
    preset = "mini"                       # instead of that above, with its vocabulary, context and block, but for what
                                          # [base] and [grid] say of them: no widths there, then

A sweep goes on where it stopped: finished runs are read, the one that was under way is resumed. Runs with the same data
share one set of token shards. The test text is scored anew when its files have changed; of a data set only the name is
looked at. A run that diverges is a result, too: it is listed as such and the sweep goes on. To try it again, delete its
folder. `model.linear` and `train.seed` are a sweep's own, and refused among the settings.
"""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import statistics
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bitnet.bench import machine
from bitnet.checkpoint import replacing
from bitnet.config import LINEARS, PRESETS, ModelConfig
from bitnet.errors import BitNetError
from bitnet.model import norm_parameters, parameters
from bitnet.train.command import Values, merge, resolve, run_training
from bitnet.train.config import RunConfig
from bitnet.train.hub_data import is_dataset
from bitnet.train.run import Run
from bitnet.train.scoring import score_run
from bitnet.train.sources import STANDARD_INPUT, find_sources

_KEYS = {"seeds", "linears", "preset", "test", "test_tokens", "base", "grid", "runs"}
_OWN_KEYS = ("name", "linears", "preset")  # of a listed run, beside its settings
_PLANNED = {"model.linear": "linears", "train.seed": "seeds"}  # what a plan sets itself: by which key it is asked for
_DIVERGED = "training diverged"  # how pretrain begins the message


@dataclass(frozen=True)
class Plan:
    """One run of a sweep."""

    point: str  # the settings that make it differ, in words
    linear: str
    seed: int
    preset: str | None
    values: Values

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{re.sub(r'[^A-Za-z0-9.+=-]+', '-', self.point)}-{self.linear}-s{self.seed}"


@dataclass(frozen=True)
class Result:
    """What came of one run: figures of the whole validation split after the last step, and of the test text."""

    point: str
    linear: str
    seed: int
    run: str
    parameters: int
    steps: int
    tokens: int
    loss: float | None = None  # nats a token; None where the run diverged
    bits_per_byte: float | None = None
    test_loss: float | None = None  # None where there is no test text, too
    test_bits_per_byte: float | None = None
    test_bits_per_byte_error: float | None = None  # from window to window of the text, within one model
    weights: int | None = None  # parameters less the gains of norms; files of older versions lack it

    @property
    def size(self) -> int:
        """Equal for runs of one shape, whatever their linears and norms: those are what is tuned."""
        return self.parameters if self.weights is None else self.weights


@dataclass(frozen=True)
class HeldOut:
    """The text that finished runs score."""

    paths: tuple[str, ...]
    tokens: int  # 0: all

    def asked(self) -> dict[str, Any]:
        """What a score is of, with a digest of the files' bytes: a data set would take a download to look at.

        Raises BitNetError for a path that leads nowhere.
        """
        files = [path for path in self.paths if not is_dataset(path)]
        whole = hashlib.sha256()
        for source in find_sources(files, Path(tempfile.gettempdir())):  # the folder is for standard input: none here
            with source.path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return {"paths": list(self.paths), "tokens_asked": self.tokens, "digest": whole.hexdigest()}


def read_sweep(path: Path) -> list[Plan]:
    """The runs a sweep file asks for. Raises BitNetError for what it does not know, and for two runs of one name."""
    values = _read(path)
    plans = [
        Plan(
            point,
            linear,
            seed,
            asked.get("preset"),
            merge(settings, {"model": {"linear": linear}, "train": {"seed": seed}}),
        )
        for point, asked, settings in _points(path, values)
        for seed in values.get("seeds", [0])
        for linear in asked.get("linears", ["ternary"])
    ]
    if len({plan.folder for plan in plans}) < len(plans):
        raise BitNetError(
            f"sweep: '{path}': got two runs of one name, expected a `name` of its own for each of [[runs]]"
        )
    return plans


def read_held_out(path: Path) -> HeldOut | None:
    """The test text of a sweep file, if it names one. Raises BitNetError for what cannot be that."""
    values = _read(path)
    paths, tokens = values.get("test"), values.get("test_tokens", 0)
    if paths is None and "test_tokens" not in values:
        return None
    if paths is None or not _list_of(str, paths) or type(tokens) is not int or tokens < 0:
        raise BitNetError(
            f"sweep: '{path}': got test {paths!r}, test_tokens {tokens!r}, expected a list of paths and a number"
        )
    if STANDARD_INPUT in paths:
        raise BitNetError(f"sweep: '{path}': got test '-', expected files: every run reads the text anew")
    return HeldOut(tuple(paths), tokens)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BitNetError(f"sweep: '{path}' cannot be read as TOML: {error}") from error
    if unknown := values.keys() - _KEYS:
        raise BitNetError(f"sweep: '{path}': got '{min(unknown)}', expected {', '.join(sorted(_KEYS))}")
    _check(path, values)
    return values


def _check(path: Path, values: dict[str, Any]) -> None:
    """Raise BitNetError where a sweep file has another form than the one at the head of this module."""
    if not _list_of(int, seeds := values.get("seeds", [0])):
        raise BitNetError(f"sweep: '{path}': got seeds {seeds!r}, expected a list of integers, not empty")
    _check_kind(f"sweep: '{path}'", values)
    for name in ("base", "grid"):
        _check_settings(f"sweep: '{path}': [{name}]", values.get(name, {}))
    runs = values.get("runs", [{}])
    if not _list_of(dict, runs):
        raise BitNetError(f"sweep: '{path}': got runs {runs!r}, expected one or more tables, each under [[runs]]")
    for number, listed in enumerate(runs, 1):
        where = f"sweep: '{path}': [[runs]] {number}"
        _check_kind(where, listed)
        if "name" in listed and not (isinstance(listed["name"], str) and listed["name"]):
            raise BitNetError(f"{where}: got name {listed['name']!r}, expected text")
        _check_settings(where, _settings(listed), f", or {', '.join(_OWN_KEYS)}")


def _check_kind(where: str, values: dict[str, Any]) -> None:
    linears = values.get("linears", ["ternary"])
    if not _list_of(str, linears) or not set(linears) <= set(LINEARS):
        raise BitNetError(f"{where}: got linears {linears!r}, expected a list of {', '.join(LINEARS)}")
    if "preset" in values and values["preset"] not in list(PRESETS):  # a list: what was got may have no hash
        raise BitNetError(f"{where}: got preset {values['preset']!r}, expected one of {', '.join(PRESETS)}")


def _check_settings(where: str, settings: Any, or_else: str = "") -> None:
    if not isinstance(settings, dict):
        raise BitNetError(f"{where}: got {settings!r}, expected a table of settings such as train.lr")
    for section, content in settings.items():
        if not isinstance(content, dict):
            raise BitNetError(
                f"{where}: got {section} = {content!r}, expected settings with their section, such as train.lr{or_else}"
            )
        for key in content:
            if way := _PLANNED.get(f"{section}.{key}"):  # the plan's own would take its place without a word
                raise BitNetError(f"{where}: got {section}.{key}, expected none; {way} = [...] says for which to run")


def _settings(listed: dict[str, Any]) -> dict[str, Any]:
    """A listed run less what it says about itself."""
    return {section: content for section, content in listed.items() if section not in _OWN_KEYS}


def _list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(element) is kind for element in value)


def _points(path: Path, values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], Values]]:
    """Name, wishes (linears, preset) and settings of every point: each listed run at every combination of the grid."""
    axes = [[(f"{section}.{key}", value) for value in _as_list(path, section, key, listed)]
            for section, content in values.get("grid", {}).items() for key, listed in content.items()]  # fmt: skip
    for listed in values.get("runs", [{}]):
        own = _settings(listed)
        _check_apart(path, own, values.get("grid", {}))
        for chosen in itertools.product(*axes):
            grid: Values = {}
            for name, value in chosen:
                section, _, key = name.partition(".")
                grid.setdefault(section, {})[key] = value
            words = _words(listed) + [f"{name.partition('.')[2]}={_text(value)}" for name, value in chosen]
            yield " ".join(words) or "base", {**values, **listed}, merge(values.get("base", {}), own, grid)


def _check_apart(path: Path, own: Values, grid: Values) -> None:
    """Raise BitNetError for a setting of a listed run that the grid would overrule, and the run's name still tell."""
    for section, content in own.items():
        if twice := content.keys() & grid.get(section, {}).keys():
            raise BitNetError(
                f"sweep: '{path}': got {section}.{min(twice)} in [grid] and in [[runs]], expected it in one of them"
            )


def _as_list(path: Path, section: str, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BitNetError(f"sweep: '{path}': grid.{section}.{key}: got {value!r}, expected a list of values")
    return value


def _words(listed: dict[str, Any]) -> list[str]:
    """What a listed run is called: its name, or what it sets."""
    if "name" in listed:
        return [listed["name"]]
    preset = [f"preset={listed['preset']}"] if "preset" in listed else []
    return preset + [f"{key}={_text(v)}" for content in _settings(listed).values() for key, v in content.items()]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_sweep(
    path: Path, out: Path, device: torch.device, say: Callable[[str], None], **openers: Any
) -> tuple[dict[str, Any] | None, int]:
    """Train what is left of a sweep into folders of `out`. Returns (report or None, exit code).

    say: called with a line before and after each run. openers: as of `run_training`. The report, also in
    `out/sweep.json`, has the machine, the file, every run, and each point's mean and spread over seeds; None when a
    signal stopped the sweep.
    Raises BitNetError for what does not fit the runs in `out`, and under `torchrun`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BitNetError(
            f"sweep: got {os.environ['WORLD_SIZE']} processes, expected one: start it without torchrun, or each run "
            "with: torchrun -m bitnet.cli train"
        )
    plans, held_out = read_sweep(path), read_held_out(path)
    asked = held_out.asked() if held_out else {}  # a path that leads nowhere is named before hours of training
    out.mkdir(parents=True, exist_ok=True)
    configs = [resolve(plan.preset, None, plan.values, [], Run(out / "a run not there yet")) for plan in plans]
    for plan, config in zip(plans, configs, strict=True):  # all fit, or nothing is trained
        if not config.train.init:  # the model it starts from decides on more settings
            Run(out / plan.folder).check(config)
        _check_steps(Run(out / plan.folder), config)
    results: list[Result] = []
    for number, (plan, config) in enumerate(zip(plans, configs, strict=True), 1):
        run = Run(out / plan.folder)
        if (result := _finished(plan, run, config)) is None:
            say(f"{number}/{len(plans)}  {plan.folder}")
            _share_data(out, [other.folder for other in plans], run, config)
            try:
                _, code = run_training(plan.preset, None, plan.values, [], run.path, device, quiet=True, **openers)
            except BitNetError as error:
                if not str(error).startswith(_DIVERGED):
                    raise
                (run.path / "diverged.txt").write_text(f"{error}\n", encoding="utf-8")
                code = 0
            if code:
                return None, code
            result = _finished(plan, run, config)
            assert result is not None, plan.folder
        if held_out and result.loss is not None:
            result = _tested(result, run, held_out, asked, device)
        say(f"{number}/{len(plans)}  {plan.folder}  {'diverged' if result.loss is None else f'{result.loss:.4f} nats'}")
        results.append(result)
    here = machine.describe(bandwidth=False)  # its time is no figure here
    report = {"benchmark": "sweep", "machine": here, "ladder": path.read_text(encoding="utf-8"), **summarize(results)}
    with replacing(out / "sweep.json") as work:
        work.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report, 0


def _check_steps(run: Run, config: RunConfig) -> None:
    """A run may go on for more steps than it was begun with; but its schedule was then that of a shorter one."""
    if run.exists() and (steps := run.config().train.steps) != config.train.steps:
        raise BitNetError(
            f"sweep: '{run.path}' holds a run with train.steps = {steps}, got {config.train.steps}; its learning rate "
            "followed the former: choose another folder (--out)"
        )


def _finished(plan: Plan, run: Run, config: RunConfig) -> Result | None:
    """The result of a run that has nothing left to do, or None."""
    steps = config.train.steps
    rows = run.metrics()
    tokens = max((row["tokens"] for row in rows if "tokens" in row), default=0)
    model = _model(run, config)
    size = parameters(model)
    weights = size - norm_parameters(model)
    result = Result(plan.point, plan.linear, plan.seed, plan.folder, size, steps, tokens, weights=weights)
    if (run.path / "diverged.txt").exists():
        return result
    last = [row for row in rows if row.get("val_whole") and row["step"] == steps]
    if not run.exists() or not last:
        return None
    return replace(result, loss=last[-1]["val_loss"], bits_per_byte=last[-1]["val_bits_per_byte"])


def _model(run: Run, config: RunConfig) -> ModelConfig:
    """The model of a run: the vocabulary asked for is an upper bound, of which its tokenizer may use little."""
    if not run.exists():
        return config.model
    return run.config().model.replace(vocab_size=run.tokenizer().vocab_size)


def _tested(result: Result, run: Run, held_out: HeldOut, asked: dict[str, Any], device: torch.device) -> Result:
    """The result with figures of the test text, which are kept in the run's folder with what was asked for."""
    file = run.path / "test.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if {key: known.get(key) for key in asked} != asked:
        known = {**asked, **score_run(run, held_out.paths, held_out.tokens, device)}
        with replacing(file) as work:
            work.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return replace(
        result,
        test_loss=known["loss"],
        test_bits_per_byte=known["bits_per_byte"],
        test_bits_per_byte_error=known["bits_per_byte_error"],
    )


def _share_data(out: Path, folders: list[str], run: Run, config: RunConfig) -> None:
    """Link the token shards of a run with the same data: they are never written to."""
    if run.data.exists():
        return
    wanted = config.data, config.tokenizer, config.model.vocab_size, config.train.init, config.train.teacher
    for other in (Run(out / name) for name in folders):
        if other.exists() and (other.data / "manifest.json").exists():
            theirs = other.config()
            found = theirs.data, theirs.tokenizer, theirs.model.vocab_size, theirs.train.init, theirs.train.teacher
            if found == wanted:
                work = run.path / "data.tmp"
                shutil.rmtree(work, ignore_errors=True)
                shutil.copytree(other.data, work, copy_function=_link)
                work.rename(run.data)
                return


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


FIGURES = ("loss", "bits_per_byte", "test_loss", "test_bits_per_byte")  # of a point; each with its gap


Groups = dict[tuple[str, str], list[Result]]  # by point and linears


def summarize(results: list[Result]) -> dict[str, Any]:
    """Every run; of each point and linear mean and standard error over seeds, and the gap to the float twin; sizes.

    A gap is paired: the twin of a run has its seed, and `pairs` says how many there are.
    """
    groups: Groups = {}
    for result in results:
        groups.setdefault((result.point, result.linear), []).append(result)
    points = [_point(mine, groups.get((point, "plain"), [])) for (point, _), mine in groups.items()]
    sizes = [_size(size, points, groups) for size in sorted({result.size for result in results})]
    return {"points": points, "sizes": sizes, "runs": [asdict(result) for result in results]}


def summarized_anew(report: dict[str, Any]) -> dict[str, Any]:
    """A stored report with points and sizes as this version has them: those of its runs."""
    return {**report, **summarize([Result(**run) for run in report["runs"]])}


def _point(mine: list[Result], twins: list[Result]) -> dict[str, Any]:
    """The runs of one point and linear, and how far they are from their twins."""
    figures = {name: mean_and_error([v for r in mine if (v := getattr(r, name)) is not None]) for name in FIGURES}
    return {
        "point": mine[0].point,
        "linear": mine[0].linear,
        "parameters": mine[0].parameters,
        "size": mine[0].size,
        "tokens": mine[0].tokens,
        "seeds": len(mine),
        "diverged": sum(r.loss is None for r in mine),
        **figures,
        **_gaps(mine, twins if mine[0].linear != "plain" else []),
    }


def _size(size: int, points: list[dict[str, Any]], groups: Groups) -> dict[str, Any]:
    """Of one size the best point of each kind of linears, and the gaps with each kind at its best.

    So no badly set twin flatters. `tried` says out of how many points the best was taken: a kind that was tried more
    often does better for that alone. The choice is by validation, never by the test text.
    """
    mine = [point for point in points if point["size"] == size]
    tried = {linear: [p for p in mine if p["linear"] == linear] for linear in dict.fromkeys(p["linear"] for p in mine)}
    sound = {linear: [p for p in all_ if p["loss"] and not p["diverged"]] for linear, all_ in tried.items()}
    best = {linear: min(some, key=lambda p: p["loss"]["mean"])["point"] for linear, some in sound.items() if some}
    gaps = {
        linear: _gaps(groups[point, linear], groups[best["plain"], "plain"])
        for linear, point in best.items()
        if linear != "plain" and "plain" in best
    }
    return {
        "size": size,
        "tried": {linear: len(all_) for linear, all_ in tried.items()},
        "best": best,
        "tuned_gaps": gaps,
    }


def _gaps(runs: list[Result], twins: list[Result]) -> dict[str, Any]:
    """Of every figure the mean difference of runs to the twins with their seeds."""
    gaps: dict[str, Any] = {}
    for name in FIGURES:
        ours, theirs = ({r.seed: getattr(r, name) for r in side} for side in (runs, twins))
        differences = _differences(ours, theirs)
        gaps.setdefault("pairs", len(differences))  # by the first figure, which every run has that did not diverge
        gaps[_gap(name)] = mean_and_error(differences)
    return gaps


def _gap(name: str) -> str:
    """loss -> gap, test_bits_per_byte -> test_bits_per_byte_gap."""
    return name.replace("loss", "gap") if "loss" in name else f"{name}_gap"


def _differences(mine: dict[int, float | None], twins: dict[int, float | None]) -> list[float]:
    pairs = ((loss, twins.get(seed)) for seed, loss in mine.items())
    return [loss - twin for loss, twin in pairs if loss is not None and twin is not None]


def mean_and_error(values: list[float]) -> dict[str, float | None] | None:
    """Mean and standard error; no error for one value, nothing for none."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "error": error}
