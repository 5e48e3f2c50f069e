"""What `bitnet train` does between its flags and the loop."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitnet import schema
from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files import checkpoint
from bitnet.train.config import RunConfig, TokenizerConfig, TrainConfig, default_config, read_toml
from bitnet.train.initial import Initial, Teacher
from bitnet.train.memory import Look, Others, check_run
from bitnet.train.pretrain import Outcome, pretrain
from bitnet.train.report.display import Display
from bitnet.train.report.overview import duration
from bitnet.train.runs.run import Run

Values = dict[str, dict[str, Any]]


def run_training(
    preset: str | None,
    config_file: Path | None,
    flags: Values,
    assignments: list[str],
    out: Path | None,
    device: torch.device,
    *,
    quiet: bool = False,
    open_initial: Callable[[str], Initial] | None = None,
    open_teacher: Callable[[str], Teacher] | None = None,
    look: Look | None = None,
    force: bool = False,
    checked: bool = False,
) -> tuple[dict[str, Any] | None, int]:
    """Resolve the configuration and train. Returns (summary or None, exit code).

    Settings, from weak to strong: the run that is in `out` already, or the preset; the TOML file; flags and
    assignments ("train.lr=1e-3"). flags: {section: {key: value}}, None for a flag that was not given.
    open_initial: opens the model that train.init names; open_teacher: the one of train.teacher; look: reads the shape
    of either, and no weights. force: train even where memory looks too small; checked: that has been looked at already.
    """
    folder = out or _default_folder(preset, config_file, flags, assignments)
    run = Run(folder)
    name = _initial_name(preset, config_file, flags, assignments, run)
    if checkpoint.folders(run.saves):
        name = None  # a run goes on from its own save, also where the model it began with is gone
    if name and open_initial is None:
        raise BitNetError(f"train: got train.init '{name}', expected none: this program starts from random weights")
    seen = look(name) if name and look else None
    config = resolve(preset, config_file, flags, assignments, run, seen.config if seen else None)
    others = Others(seen, look(config.train.teacher) if config.train.teacher and look else None)
    if not checked:  # before any weight is read, and before the data is tokenised
        check_run(config, device, run, others, force=force)
    initial = open_initial(name) if name and open_initial else None
    if initial is not None and seen is None:
        config = resolve(preset, config_file, flags, assignments, run, initial.config)
    first = os.environ.get("RANK", "0") == "0"
    display = Display(config.train.report_every, quiet=quiet or not first)
    teacher = open_teacher(config.train.teacher) if config.train.teacher and open_teacher else None
    outcome = pretrain(config, folder, device, display, initial, teacher, others)
    if outcome.signal is not None:
        display.note(f"stopped at step {outcome.step}; saved: the same command goes on from there")
        return None, 128 + outcome.signal
    if not first:
        return None, 0
    display.sample(outcome.sample)
    if outcome.trained:
        display.note(f"{duration(outcome.seconds)}, {outcome.tokens_per_second:,.0f} tokens/s; next: {_next(folder)}")
    else:
        display.note(f"all {outcome.step} steps were done already; --steps with a larger number trains on")
    return summarize(outcome), 0


def resolve(
    preset: str | None,
    config_file: Path | None,
    flags: Values,
    assignments: list[str],
    run: Run,
    initial: ModelConfig | None = None,
) -> RunConfig:
    """The configuration of a run from everything that has a say in it; initial: the model it starts from."""
    named, values = read_toml(config_file) if config_file is not None else (None, {})
    preset = preset or named
    if preset is not None:
        base = default_config(preset)
        if run.exists():  # a preset given again must not undo what was set when the run began
            base = run.config().override({"model": _shape(base)})
    elif run.exists() or initial is None:
        base = run.config() if run.exists() else default_config()
    else:
        # Trained on at a low rate, a model has no time for a long way in: benchmarks/specs/9-convert.toml.
        base = RunConfig(model=initial, train=TrainConfig(quant_warmup=0.0))
    # In one go: settings that fit together only as a whole may come from several places.
    return base.override(merge(values, _spoken(flags, assignments)))


def _spoken(flags: Values, assignments: list[str]) -> Values:
    """What the command line says: flags that were given, and assignments over them."""
    given = {section: {k: v for k, v in content.items() if v is not None} for section, content in flags.items()}
    return merge(given, parse_assignments(assignments, RunConfig()))


def _initial_name(
    preset: str | None, config_file: Path | None, flags: Values, assignments: list[str], run: Run
) -> str | None:
    """The model to start from, wherever it is named: in a flag, an assignment, the TOML file or the run that is there.

    Raises BitNetError for settings that this model brings along: a preset and a tokenizer.
    """
    named, values = read_toml(config_file) if config_file is not None else (None, {})
    preset, spoken = preset or named, _spoken(flags, assignments)
    name = merge(values, spoken).get("train", {}).get("init", run.config().train.init if run.exists() else "")
    if not name or not isinstance(name, str):
        return None  # what is no text is refused with the other settings
    if preset is not None:
        raise BitNetError(f"train: got --preset {preset} and --init {name}, expected one: that model has its shape")
    # A run's own config.toml names the tokenizer's kind in any case.
    kind = spoken.get("tokenizer", {}).get("kind")
    if kind is None and (written := values.get("tokenizer", {}).get("kind")) != TokenizerConfig().kind:
        kind = written
    if kind is not None:
        raise BitNetError(
            f"train: got --tokenizer {kind} and --init {name}, expected one: that model has its tokenizer; "
            "leave --tokenizer away"
        )
    return name


def merge(*layers: Values) -> Values:
    """Settings from weak to strong in one."""
    merged: Values = {}
    for layer in layers:
        for section, content in layer.items():
            merged[section] = {**merged.get(section, {}), **content}
    return merged


def _shape(config: RunConfig) -> dict[str, Any]:
    """What a preset says of the model; the kind of linear is a flag of its own."""
    return {key: value for key, value in config.model.to_dict().items() if key != "linear"}


def parse_assignments(assignments: list[str], config: RunConfig) -> Values:
    """["train.lr=1e-3"] as {"train": {"lr": 0.001}}, typed as the field is. Raises BitNetError."""
    values: Values = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise BitNetError(f"--set: got '{text}', expected section.key=value, such as train.lr=1e-3")
        current = getattr(getattr(config, section, None), name, None)
        values.setdefault(section, {})[name] = schema.parse(value.strip(), type(current), key.strip())
    return values


def summarize(outcome: Outcome) -> dict[str, Any]:
    """The end of a run as JSON values."""
    return {
        "run": str(outcome.run),
        "steps": outcome.step,
        "seconds": outcome.seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "validation": outcome.validation.to_dict() if outcome.validation else None,
        "sample": outcome.sample,
        "pictures": outcome.pictures,
    }


def _default_folder(preset: str | None, config_file: Path | None, flags: Values, assignments: list[str]) -> Path:
    """runs/PRESET-LINEAR, wherever the two were named."""
    parent = Path("runs")
    named = preset or (read_toml(config_file)[0] if config_file is not None else None) or "nano"
    return parent / f"{named}-{resolve(preset, config_file, flags, assignments, Run(parent / named)).model.linear}"


def _next(folder: Path) -> str:
    return f"bitnet pack {folder} -o {folder / 'model.safetensors'}"
