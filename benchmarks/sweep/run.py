"""A ladder of runs: every setting, every seed, one after the other; a table, JSON, pictures.

sweep_plan.py has the file that asks for them, sweep_summary.py the figures that are made of them.

A sweep goes on where it stopped: finished runs are read, the one that was under way is resumed. Runs with the same data
share one set of token shards. The test text is scored anew when its files have changed; of a data set only the name is
looked at. A run that diverges is a result, too: it is listed as such and the sweep goes on. To try it again, delete its
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
from bitnet.benchmarks.sweep.plan import HeldOut, Plan, read_held_out, read_sweep
from bitnet.benchmarks.sweep.summary import Result, summarize
from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.checkpoint import replacing
from bitnet.model import norm_parameters, parameters
from bitnet.train.command import resolve, run_training
from bitnet.train.config import RunConfig
from bitnet.train.memory import Look, Others, check_run, run_need
from bitnet.train.runs.run import Run
from bitnet.train.scoring import score_run

_DIVERGED = "training diverged"  # how pretrain begins the message


def run_sweep(
    path: Path,
    out: Path,
    device: torch.device,
    say: Callable[[str], None],
    *,
    look: Look | None = None,
    force: bool = False,
    **openers: Any,
) -> tuple[dict[str, Any] | None, int]:
    """Train what is left of a sweep into folders of `out`. Returns (report or None, exit code).

    say: called with a line before and after each run. look, force, openers: as of `run_training`. The report, also in
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
    _check_memory(plans, configs, out, device, look, force)
    results: list[Result] = []
    for number, (plan, config) in enumerate(zip(plans, configs, strict=True), 1):
        run = Run(out / plan.folder)
        if (result := _finished(plan, run, config)) is None:
            say(f"{number}/{len(plans)}  {plan.folder}")
            _share_data(out, [other.folder for other in plans], run, config)
            try:
                _, code = run_training(
                    plan.preset, None, plan.values, [], run.path, device, quiet=True, look=look, checked=True, **openers
                )
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
    report = {"benchmark": "sweep", "machine": here, "spec": path.read_text(encoding="utf-8"), **summarize(results)}
    with replacing(out / "sweep.json") as work:
        work.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report, 0


def _check_memory(
    plans: list[Plan], configs: list[RunConfig], out: Path, device: torch.device, look: Look | None, force: bool
) -> None:
    """Refuse a sweep with a run that does not fit, the largest one named, before the first of them is trained."""
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
