"""`bitnet train`: text to a checkpoint."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from bitnet.cli.inputs import look_at, open_model, open_teacher
from bitnet.cli.options import Debug, Device, Force, Json, Threads, WarningsOnly, pick_device
from bitnet.cli.terminal import print_json
from bitnet.config import LINEARS, PRESETS


def help_values() -> dict[str, object]:
    """The defaults and choices that the help texts name: those of the config dataclasses."""
    from bitnet.train import config

    run = config.default_config()
    preset = next(name for name, shape in PRESETS.items() if shape == run.model)
    return {
        "preset": preset,
        "model": run.model,
        "tokenizer": run.tokenizer,
        "train": run.train,
        "optimizers": " or ".join(config.OPTIMIZERS),
        "dtypes": ", ".join(config.DTYPES),
    }


def option(*names: str, text: str, **more: Any) -> Any:
    """An option that overrides the run, the preset or the TOML file; not given, it is None. text: its help."""
    return typer.Option(*names, help=text, show_default=False, **more)


def train(
    preset: Annotated[str | None, option(text=f"Model shape: {', '.join(PRESETS)}. Default: {{preset}}.")] = None,
    data: Annotated[
        list[str] | None,
        option(
            text="Text: files, folders, globs or - (standard input). Default: Python's standard library.",
            metavar="PATH...",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        option(text="Folder of the run; a run that is there is resumed. Default: runs/PRESET-LINEAR.", metavar="DIR"),
    ] = None,
    steps: Annotated[int | None, option(text="Optimiser steps. Default: {train.steps}.")] = None,
    seed: Annotated[int | None, option(text="Seed of weights and data order. Default: {train.seed}.")] = None,
    linear: Annotated[
        str | None,
        option(text=f"Weights: {', '.join(LINEARS)} (the float baseline). Default: {{model.linear}}."),
    ] = None,
    init: Annotated[
        str | None,
        option(text="Continue training this model: a run, or anything that import reads.", metavar="SOURCE"),
    ] = None,
    config: Annotated[Path | None, option(text="TOML file of settings; options override it.", metavar="FILE")] = None,
    set_: Annotated[
        list[str] | None, option("--set", text="Any setting, such as train.lr=1e-3.", metavar="KEY=VALUE")
    ] = None,
    val_data: Annotated[
        list[str] | None, option(text="Validation text. Default: a part of --data.", metavar="PATH...")
    ] = None,
    tokenizer: Annotated[str | None, option(text="sentencepiece or char. Default: {tokenizer.kind}.")] = None,
    documents: Annotated[
        str | None, option(text="What a document is: file, line, paragraph or row (of a data set).")
    ] = None,
    batch_size: Annotated[int | None, option(text="Sequences in a micro-batch. Default: {train.batch_size}.")] = None,
    context: Annotated[
        int | None, option("-c", "--context", text="Tokens in a sequence. Default: the preset's.")
    ] = None,
    lr: Annotated[float | None, option(text="Peak learning rate. Default: {train.lr}.")] = None,
    optimizer: Annotated[str | None, option(text="{optimizers}. Default: {train.optimizer}.")] = None,
    dtype: Annotated[str | None, option(text="Compute type: {dtypes}. Default: {train.dtype}.")] = None,
    compile: Annotated[  # noqa: A002 - the option's name
        bool | None, option("--compile/--no-compile", text="Use torch.compile.")
    ] = None,
    tensorboard: Annotated[bool | None, option("--tensorboard", text="Log to RUN/tensorboard.")] = None,
    wandb: Annotated[bool | None, option("--wandb", text="Log to Weights & Biases.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    quiet: WarningsOnly = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a model on text. The same command resumes a run that was stopped."""
    from bitnet.threads import use_threads
    from bitnet.train.command import run_training

    flags: dict[str, dict[str, Any]] = {
        "model": {"linear": linear},
        "data": {"paths": data, "val_paths": val_data, "documents": documents},
        "tokenizer": {"kind": tokenizer},
        "train": {
            "steps": steps,
            "seed": seed,
            "init": init,
            "batch_size": batch_size,
            "context": context,
            "lr": lr,
            "optimizer": optimizer,
            "dtype": dtype,
            "compile": compile,
            "tensorboard": tensorboard,
            "wandb": wandb,
        },
    }
    use_threads(threads)
    if quiet:
        logging.getLogger("bitnet").setLevel(logging.WARNING)
    summary, code = run_training(
        preset,
        config,
        flags,
        set_ or [],
        out,
        pick_device(device),
        quiet=quiet,
        open_initial=open_model,
        open_teacher=open_teacher,
        look=look_at,
        force=force,
    )
    if summary and as_json:
        print_json(summary)
    elif summary:
        typer.echo(summary["run"])
    raise typer.Exit(code)
