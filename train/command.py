"""`bitnet train` from its flags to its result: resolve the settings, train, summarise."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitnet import schema
from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
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

    Settings, each overriding those before: the existing run in `out`, or the preset; the TOML file; the flags; the
    assignments ("train.lr=1e-3"). flags: {section: {key: value}}, None for a flag that was not given.
    open_initial opens the model that train.init names, open_teacher that of train.teacher; look reads the shape of
    either without its weights. force: train even if memory seems too small; checked: the caller checked memory. Raises
    BitNetError.
    """
    folder = out or _default_folder(preset, config_file, flags, assignments)
    run = Run(folder)
    name = _initial_name(preset, config_file, flags, assignments, run)
    if run.has_saves():
        name = None  # a run with a save resumes from it and does not need the model it started from
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
    is_main = os.environ.get("RANK", "0") == "0"
    display = Display(config.train.report_every, quiet=quiet or not is_main)
    teacher = open_teacher(config.train.teacher) if config.train.teacher and open_teacher else None
    outcome = pretrain(config, folder, device, display, initial, teacher, others)
    if outcome.signal is not None:
        display.note(f"stopped at step {outcome.step} and saved; run the same command again to resume")
        return None, 128 + outcome.signal
    if not is_main:
        return None, 0
    _show_end(display, outcome)
    return summarize(outcome), 0


def _show_end(display: Display, outcome: Outcome) -> None:
    display.sample(outcome.sample)
    if outcome.trained:
        pack = f"bitnet pack {outcome.run} -o {outcome.run / 'model.safetensors'}"
        display.note(f"{duration(outcome.seconds)}, {outcome.tokens_per_second:,.0f} tokens/s; next: {pack}")
    else:
        display.note(f"all {outcome.step} steps were done already; a larger --steps trains for longer")


def resolve(
    preset: str | None,
    config_file: Path | None,
    flags: Values,
    assignments: list[str],
    run: Run,
    initial: ModelConfig | None = None,
) -> RunConfig:
    """The configuration as requested, from all the places that set it (see `run_training`).

    initial: the configuration of the model that the run starts from. Raises BitNetError.
    """
    named, values = read_toml(config_file) if config_file is not None else (None, {})
    preset = preset or named
    if preset is not None:
        base = default_config(preset)
        if run.exists():  # a preset given again must not undo the other settings of the run
            base = run.config().requested().override({"model": _shape(base)})
    elif run.exists() or initial is None:
        base = run.config().requested() if run.exists() else default_config()
    else:
        # Training that starts from a model is short: warm-up costs more than it gains there (specs/9-convert.toml).
        base = RunConfig(model=initial, train=TrainConfig(quant_warmup=0.0))
    # All at once: settings that are valid only together may come from several places.
    return base.override(merge(values, _command_line(flags, assignments)))


def _command_line(flags: Values, assignments: list[str]) -> Values:
    """The settings of the command line: flags that were given, overridden by assignments."""
    given = {section: {k: v for k, v in content.items() if v is not None} for section, content in flags.items()}
    return merge(given, parse_assignments(assignments, RunConfig()))


def _initial_name(
    preset: str | None, config_file: Path | None, flags: Values, assignments: list[str], run: Run
) -> str | None:
    """The model to start from, named by a flag, an assignment, the TOML file or the existing run; None: random weights.

    Raises BitNetError for a preset or a tokenizer beside it, because that model determines both.
    """
    named, values = read_toml(config_file) if config_file is not None else (None, {})
    preset, given = preset or named, _command_line(flags, assignments)
    name = merge(values, given).get("train", {}).get("init", run.config().train.init if run.exists() else "")
    if not name or not isinstance(name, str):
        return None  # a value that is no string is refused with the other settings
    if preset is not None:
        raise BitNetError(f"train: got --preset {preset} and --init {name}, expected one: that model has its shape")
    # The default kind in a TOML file is no choice: a run's own config.toml always contains it.
    kind = given.get("tokenizer", {}).get("kind")
    if kind is None and (written := values.get("tokenizer", {}).get("kind")) != TokenizerConfig().kind:
        kind = written
    if kind is not None:
        raise BitNetError(
            f"train: got --tokenizer {kind} and --init {name}, expected one: that model has its tokenizer; "
            "omit --tokenizer"
        )
    return name


def merge(*layers: Values) -> Values:
    """Settings in one; later layers override earlier ones."""
    merged: Values = {}
    for layer in layers:
        for section, content in layer.items():
            merged[section] = {**merged.get(section, {}), **content}
    return merged


def _shape(config: RunConfig) -> dict[str, Any]:
    """The model settings that a preset decides: all but `linear`, which has its own flag."""
    return {key: value for key, value in config.model.to_dict().items() if key != "linear"}


def parse_assignments(assignments: list[str], config: RunConfig) -> Values:
    """["train.lr=1e-3"] as {"train": {"lr": 0.001}}, with the type of the field in `config`. Raises BitNetError."""
    values: Values = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise BitNetError(f"--set: got '{text}', expected section.key=value, such as train.lr=1e-3")
        (name,) = schema.current({name: value}, section)  # a key may be given by its old name
        current = getattr(getattr(config, section, None), name, None)
        values.setdefault(section, {})[name] = schema.parse(value.strip(), type(current), f"{section}.{name}")
    return values


def summarize(outcome: Outcome) -> dict[str, Any]:
    """The outcome of a run as JSON values."""
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
    """runs/PRESET-LINEAR, from wherever the two are set."""
    parent = Path("runs")
    named, values = read_toml(config_file) if config_file is not None else (None, {})
    model = schema.current(merge(values, _command_line(flags, assignments)).get("model", {}), "model")
    return parent / f"{preset or named or 'nano'}-{model.get('linear', ModelConfig().linear)}"
