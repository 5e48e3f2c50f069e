"""Train the runs of a sweep spec, one after the other, and report them.

A sweep resumes where it stopped: finished runs are read, an unfinished one is resumed. Runs with the same data share
one set of token shards. The test text is scored again when its files have changed; of a data set on a hub only the name
counts. A run that diverges is a result: it is listed as such, and the sweep continues. To try it again, delete its
folder.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bitnet.benchmarks.bench import machine
from bitnet.benchmarks.sweep.spec import HeldOut, PlannedRun, read_held_out, read_spec
from bitnet.benchmarks.sweep.summary import Result, curve, summarize
from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.checkpoint import replacing
from bitnet.files.tensors import norm_parameters, parameters
from bitnet.train.command import resolve, run_training
from bitnet.train.config import RunConfig
from bitnet.train.memory import Look, Others, check_run, run_need
from bitnet.train.runs.run import Run
from bitnet.train.scoring import score_run

_DIVERGED = "training diverged"  # how the message of pretrain begins


def run_sweep(
    path: Path,
    out: Path,
    device: torch.device,
    log: Callable[[str], None],
    *,
    look: Look | None = None,
    force: bool = False,
    **openers: Any,
) -> tuple[dict[str, Any] | None, int]:
    """Train what is left of a sweep into folders of `out`. Returns (report, exit code); no report after a signal.

    log: called with a line before and after each run. look, force, openers: those of `run_training`. The
    report, also written to `out/sweep.json`, has the machine, the spec, and what `summarize` and `curve` compute.
    Raises BitNetError for settings that differ from those of the runs in `out`, and under `torchrun`.
    """
    _check_processes()
    plans, held_out = read_spec(path), read_held_out(path)
    test = held_out.identity() if held_out else {}  # a path that does not exist is refused before hours of training
    out.mkdir(parents=True, exist_ok=True)
    configs = [resolve(plan.preset, None, plan.values, [], Run(out / "no run yet")) for plan in plans]
    for plan, config in zip(plans, configs, strict=True):  # nothing is trained unless all of them fit
        if not config.train.init:  # otherwise the initial model sets more of the config
            Run(out / plan.folder).check(config)
        _check_steps(Run(out / plan.folder), config)
    _check_memory(plans, configs, out, device, look, force)
    results: list[Result] = []
    for number, (plan, config) in enumerate(zip(plans, configs, strict=True), 1):
        run = Run(out / plan.folder)
        if (result := _finished(plan, run, config)) is None:
            log(f"{number}/{len(plans)}  {plan.folder}")
            _share_data(out, [other.folder for other in plans], run, config)
            if code := _train(plan, run, device, openers | {"look": look}):
                return None, code
            result = _finished(plan, run, config)
            assert result is not None, plan.folder
        if held_out and result.loss is not None:
            result = _with_test(result, run, held_out, test, device)
        log(f"{number}/{len(plans)}  {plan.folder}  {'diverged' if result.loss is None else f'{result.loss:.4f} nats'}")
        results.append(result)
    return _report(path, out, results), 0


def _check_memory(
    plans: list[PlannedRun],
    configs: list[RunConfig],
    out: Path,
    device: torch.device,
    look: Look | None,
    force: bool,
) -> None:
    """Refuse a sweep whose largest remaining run does not fit, before any run is trained."""
    sizes = []
    for plan, config in zip(plans, configs, strict=True):
        run = Run(out / plan.folder)
        if _finished(plan, run, config) is not None:
            continue
        seen = look(config.train.init) if look and config.train.init and not run.exists() else None
        taught = look(config.train.teacher) if look and config.train.teacher else None
        if seen is not None:
            config = resolve(plan.preset, None, plan.values, [], run, seen.config)
        sizes.append((run_need(config, device, run, Others(seen, taught)).total, config, run, Others(seen, taught)))
    if sizes:
        _, config, run, others = max(sizes, key=lambda size: size[0])
        check_run(config, device, run, others, verb=f"sweep: {run.path.name}", force=force)


def _report(path: Path, out: Path, results: list[Result]) -> dict[str, Any]:
    """The report as JSON values, also written to `out/sweep.json`."""
    report = {
        "benchmark": "sweep",
        "machine": machine.describe(bandwidth=False),  # no speeds are reported, so no bandwidth either
        "spec": path.read_text(encoding="utf-8"),
        **summarize(results),
        "curves": {result.run: curve(Run(out / result.run).metrics()) for result in results},
    }
    with replacing(out / "sweep.json") as work:
        work.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def _check_processes() -> None:
    """Raise BitNetError under torchrun, whose processes would all train every run."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BitNetError(
            f"sweep: got {os.environ['WORLD_SIZE']} processes, expected one: start it without torchrun, or start each "
            "run with: torchrun -m bitnet.cli train"
        )


def _train(plan: PlannedRun, run: Run, device: torch.device, openers: dict[str, Any]) -> int:
    """Train or resume one run. Returns its exit code; a run that diverges is marked and returns 0."""
    try:
        return run_training(plan.preset, None, plan.values, [], run.path, device, quiet=True, checked=True, **openers)[
            1
        ]
    except BitNetError as error:
        if not str(error).startswith(_DIVERGED):
            raise
        (run.path / "diverged.txt").write_text(f"{error}\n", encoding="utf-8")
        return 0


def _check_steps(run: Run, config: RunConfig) -> None:
    """Raise BitNetError where a run was started with other steps: its learning rate followed another schedule."""
    if run.exists() and (steps := run.config().train.steps) != config.train.steps:
        raise BitNetError(
            f"sweep: '{run.path}' holds a run with train.steps = {steps}, got {config.train.steps}; expected "
            "the same, which its learning rate followed; choose another folder (--out)"
        )


def _finished(plan: PlannedRun, run: Run, config: RunConfig) -> Result | None:
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
    """The model of a run, with the vocabulary of its tokenizer: that of the config is an upper bound."""
    if not run.exists():
        return config.model
    return run.config().model.replace(vocab_size=run.tokenizer().vocab_size)


def _with_test(result: Result, run: Run, held_out: HeldOut, test: dict[str, Any], device: torch.device) -> Result:
    """The result with figures of the test text, which are stored in the run's folder with the text's identity."""
    file = run.path / "test.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if {key: known.get(key) for key in test} != test:
        known = {**test, **score_run(run, held_out.paths, held_out.tokens, device)}
        with replacing(file) as work:
            work.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return replace(
        result,
        test_loss=known["loss"],
        test_bits_per_byte=known["bits_per_byte"],
        test_bits_per_byte_error=known["bits_per_byte_error"],
    )


def _share_data(out: Path, folders: list[str], run: Run, config: RunConfig) -> None:
    """Link the token shards of another run with the same data: shards are never modified."""
    if run.data.exists():
        return
    wanted = config.data, config.tokenizer, config.model.vocab_size, config.train.init, config.train.teacher
    for other in (Run(out / name) for name in folders):
        if other.exists() and (other.data / "manifest.json").exists():
            theirs = other.config().requested()
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
