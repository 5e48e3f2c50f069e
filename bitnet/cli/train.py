"""`bitnet train`: text to a checkpoint."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from bitnet.cli.options import (
    Debug,
    Device,
    Force,
    Json,
    Threads,
    look_at,
    open_model,
    open_teacher,
    pick_device,
    set_threads,
)
from bitnet.cli.terminal import print_json
from bitnet.config import LINEARS, PRESETS


def train(
    preset: Annotated[
        str | None, typer.Option(help=f"Model shape: {', '.join(PRESETS)}. Default: nano.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH...", help="Files, folders, globs or - (stdin). Default: Python's own library."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; an existing run goes on. Default: runs/PRESET-LINEAR.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. Default: 240.", show_default=False)] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of weights and data order. Default: 0.", show_default=False)
    ] = None,
    linear: Annotated[
        str | None, typer.Option(help=f"{', '.join(LINEARS)} (the float twin). Default: ternary.", show_default=False)
    ] = None,
    init: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Train on from this model: a run, or what import reads.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; flags win over it.", metavar="FILE")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, such as train.lr=1e-3.")
    ] = None,
    val_data: Annotated[
        list[str] | None, typer.Option(metavar="PATH...", help="Validate on these; default: a part of --data.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="sentencepiece or char. Default: sentencepiece.", show_default=False)
    ] = None,
    documents: Annotated[
        str | None,
        typer.Option(help="What a document is: file, line, paragraph, row (of data sets).", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences a micro-batch. Default: 16.", show_default=False)
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("-c", "--context", help="Tokens a sequence. Default: the preset's.", show_default=False),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: 0.006.", show_default=False)] = None,
    optimizer: Annotated[str | None, typer.Option(help="muon or adamw. Default: muon.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, fp32 or bf16. Default: auto.", show_default=False)] = None,
    compile: Annotated[  # noqa: A002 - the flag's name
        bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.", show_default=False)
    ] = None,
    tensorboard: Annotated[bool | None, typer.Option("--tensorboard", help="Log to RUN/tensorboard.")] = None,
    wandb: Annotated[bool | None, typer.Option("--wandb", help="Log to Weights & Biases.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Nothing on stderr but warnings and errors.")] = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a model on text; run again with the same --out, it goes on where it stopped."""
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
    set_threads(threads)
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
