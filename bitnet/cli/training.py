"""Verbs that train: train, sweep, and eval, which scores what came of it."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from bitnet.cli.options import (
    Cache,
    Context,
    Debug,
    Device,
    Engine,
    Head,
    Json,
    Model,
    Threads,
    open_model,
    open_teacher,
    pick_device,
    set_threads,
)
from bitnet.cli.terminal import print_json, print_tables
from bitnet.config import LINEARS, PRESETS
from bitnet.errors import BitNetError
from bitnet.shipped import BOOKS


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
    )
    if summary and as_json:
        print_json(summary)
    elif summary:
        typer.echo(summary["run"])
    raise typer.Exit(code)


def sweep(
    ladder: Annotated[  # a backslash keeps rich from taking [base] for markup
        Path, typer.Argument(metavar="FILE", help="TOML: seeds, linears, \\[base], \\[grid], [\\[runs]].")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the runs; a sweep that is there goes on.")],
    plan: Annotated[bool, typer.Option("--plan", help="Only list the runs it would make.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Nothing on stderr but warnings and errors.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a ladder of runs, several seeds each, one after the other; compare them with their float twins."""
    from bitnet.train.run import Run
    from bitnet.train.sweep import run_sweep
    from bitnet.train.sweep_plan import read_sweep
    from bitnet.train.sweep_plot import plot_curves, plot_scaling, plot_sweep

    if plan:
        for each in read_sweep(ladder):
            typer.echo(each.folder)
        return
    set_threads(threads)
    say = (lambda text: None) if quiet else (lambda text: typer.echo(text, err=True))
    openers = {"open_initial": open_model, "open_teacher": open_teacher}
    report, code = run_sweep(ladder, out, pick_device(device), say, **openers)
    if report is None:
        raise typer.Exit(code)
    try:
        plot_sweep(report, out / "sweep")
        plot_curves({each["run"]: Run(out / each["run"]).metrics() for each in report["runs"]}, report, out / "curves")
        if len(report["sizes"]) > 1:
            plot_scaling(report, out / "scaling")
    except BitNetError as error:  # no matplotlib: the figures are there all the same
        say(str(error))
    if as_json:
        print_json(report)
        return
    from bitnet.tables import sweep_table, tuned_gaps

    print_tables(sweep_table(report), *tuned_gaps(report))


def evaluate(
    data: Annotated[list[str], typer.Option(metavar="PATH...", help="Files, folders, globs or - (stdin).")],
    model: Model = BOOKS,
    context: Context = 0,
    tokens: Annotated[int, typer.Option("--tokens", min=0, help="Score only the first N tokens; 0: all.")] = 0,
    documents: Annotated[
        str, typer.Option(help="What a document is: file, line, paragraph, row; best as in training.")
    ] = "file",
    threads: Threads = 0,
    device: Device = "auto",
    engine: Engine = "auto",
    head: Head = "file",
    cache: Cache = "fp32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bits per byte and perplexity of a packed model on text, with standard errors."""
    from bitnet.train.scoring import score_text

    set_threads(threads)
    report = score_text(
        model,
        data,
        pick_device(device),
        context=context,
        limit=tokens,
        documents=documents,
        engine=engine,
        head=head,
        cache=cache,
    )
    if as_json:
        print_json(report)
        return
    from bitnet.tables import evaluation_table

    print_tables(evaluation_table(report))
