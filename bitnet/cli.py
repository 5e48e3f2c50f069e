"""The command line: every verb, from `train` to `doctor`.

Options only; what a verb does lives in its own module, imported when the verb runs, so that `--help` is quick.
Products go to stdout, everything else to stderr. Exit codes: 0, 2 for bad input (one line that says got, expected
and what to do; `--debug` shows the traceback), 130 and 143 for Ctrl-C and SIGTERM.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from bitnet.config import LINEARS, PRESETS
from bitnet.errors import BitNetError

_LISTS = ("--data", "--val-data")  # take one or more values: --data a.txt b.txt


class _Verb(TyperCommand):
    """A command whose list options may be written once with several values, as a shell expands a glob."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread_lists(args))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer would leave without a word
            raise _InterruptedError from None


class _InterruptedError(Exception):
    """Ctrl-C, on its way through typer."""


class _App(TyperGroup):
    """Verbs in the order a newcomer meets them, not in the alphabet's."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


def spread_lists(args: Sequence[str]) -> list[str]:
    """`--data a b` as `--data a --data b`; `-` (standard input) is a value."""
    result: list[str] = []
    option: str | None = None
    for arg in args:
        is_value = arg == "-" or not arg.startswith("-")
        if option and is_value and result[-1] != option:
            result.append(option)
        result.append(arg)
        if not is_value:
            option = arg.partition("=")[0]
            option = option if option in _LISTS else None
    return result


app = typer.Typer(
    cls=_App,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="BitNet b1.58: train small ternary language models, pack them to two bits a weight, run them.",
    epilog="A first run:  bitnet train --out runs/first  ;  bitnet pack runs/first -o model.safetensors  ;  "
    "bitnet generate -m model.safetensors -p 'def '",
)

_state = {"debug": False}


def _set_debug(value: bool) -> None:
    _state["debug"] = _state["debug"] or value


def _show_version(value: bool) -> None:
    if value:
        from bitnet import __version__

        typer.echo(f"bitnet {__version__}")
        raise typer.Exit


Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")]
Model = Annotated[Path, typer.Option("-m", "--model", metavar="FILE", help="Packed model.")]
Threads = Annotated[int, typer.Option("-t", "--threads", min=0, help="CPU threads; 0: as torch finds best.")]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
Context = Annotated[int, typer.Option("-c", "--ctx-size", min=0, help="Context in tokens; 0: the model's.")]

Engine = Annotated[str, typer.Option(help="auto (C++ on a CPU, Triton on a GPU), cpu, triton or torch.")]
Head = Annotated[str, typer.Option(help="Head of the C++ engine: file (exact), int8 or int4 (faster).")]
Cache = Annotated[str, typer.Option(help="Keys and values of the C++ engine: fp32 (exact), bf16 or int8.")]


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Debug = False,
) -> None:
    pass


@app.command(cls=_Verb)
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
    _set_threads(threads)
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
        open_initial=_open_model,
        open_teacher=_open_teacher,
    )
    if summary and as_json:
        _print_json(summary)
    elif summary:
        typer.echo(summary["run"])
    raise typer.Exit(code)


@app.command(cls=_Verb)
def sweep(
    ladder: Annotated[Path, typer.Argument(metavar="FILE", help="TOML: seeds, linears, [base], [grid], [[runs]].")],
    out: Annotated[Path, typer.Option(help="Folder of the runs; a sweep that is there goes on.")],
    plan: Annotated[bool, typer.Option("--plan", help="Only list the runs it would make.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Nothing on stderr but warnings and errors.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a ladder of runs, several seeds each, one after the other; compare them with their float twins."""
    from bitnet.train.sweep import read_sweep, run_sweep
    from bitnet.train.sweep_plot import plot_scaling, plot_sweep

    if plan:
        for each in read_sweep(ladder):
            typer.echo(each.folder)
        return
    _set_threads(threads)
    say = (lambda text: None) if quiet else (lambda text: typer.echo(text, err=True))
    openers = {"open_initial": _open_model, "open_teacher": _open_teacher}
    report, code = run_sweep(ladder, out, pick_device(device), say, **openers)
    if report is None:
        raise typer.Exit(code)
    try:
        plot_sweep(report, out / "sweep")
    except BitNetError as error:  # no matplotlib: the figures are there all the same
        say(str(error))
    if as_json:
        _print_json(report)
        return
    from rich.console import Console

    from bitnet.tables import sweep_table

    Console().print(sweep_table(report))


@app.command(cls=_Verb)
def pack(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Packed model to write.")],
    embedding: Annotated[str, typer.Option(help="Of embedding and head: bf16 (exact) or int8 (smaller).")] = "bf16",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Pack a run's newest save to two bits a weight, in one file with its tokenizer."""
    from bitnet.inspection import inspect_packed
    from bitnet.packed import write_packed
    from bitnet.train.run import Run

    folder = Run(run)
    model, save = folder.load()
    validation = [row for row in folder.metrics() if "val_loss" in row and row["step"] == save.step]
    info = {"steps": save.step, "tokens": save.state["tokens"], "seed": folder.config().train.seed}
    if validation:
        info["val_bits_per_byte"] = validation[-1]["val_bits_per_byte"]
    write_packed(output, model, folder.tokenizer(), embedding=embedding, info=info)
    report = inspect_packed(output)  # reads and verifies what was written
    if as_json:
        _print_json(report)
        return
    typer.echo(
        f"{output}: {report['file_bytes'] / 1e6:.2f} MB, {report['ratio_to_float16']:.1f} times smaller than fp16 "
        f"({report['float16_bytes'] / 1e6:.2f} MB); projections at {report['bits_per_weight']:.2f} bits a weight"
    )


@app.command(cls=_Verb)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text to continue; - reads stdin.")] = "",
    predict: Annotated[int, typer.Option("-n", "--predict", min=0, help="Tokens to write.")] = 128,
    context: Context = 0,
    threads: Threads = 0,
    seed: Annotated[int | None, typer.Option("-s", "--seed", min=0, help="Default: another text each time.")] = None,
    temperature: Annotated[float, typer.Option("--temp", help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", help="0 switches it off.")] = 40,
    top_p: Annotated[float, typer.Option("--top-p", help="1 switches it off.")] = 0.95,
    min_p: Annotated[float, typer.Option("--min-p", help="0 switches it off.")] = 0.05,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message: use the model's chat template.")
    ] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Write on past the end of a document.")] = False,
    interactive: Annotated[
        bool, typer.Option("-i", "--interactive", help="Ask for prompts, one after the other; Ctrl-C stops a text.")
    ] = False,
    device: Device = "auto",
    engine: Engine = "auto",
    head: Head = "file",
    cache: Cache = "fp32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a text; it appears as it is written."""
    from bitnet.generation import write_text
    from bitnet.sampling import Sampling

    _set_threads(threads)
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=int.from_bytes(os.urandom(4)) if seed is None else seed,
    )
    if interactive:
        if as_json or prompt == "-":
            raise BitNetError("generate -i: got --json or -p -, expected a terminal alone; leave one of them away")
        _converse(
            model,
            predict,
            sampling,
            pick_device(device),
            first=prompt,
            context=context,
            ignore_eos=ignore_eos,
            chat=chat,
            engine=engine,
            head=head,
            cache=cache,
        )
        return
    text = _read_stdin() if prompt == "-" else prompt
    show = None if as_json else write_now
    report = write_text(
        model,
        text,
        predict,
        sampling,
        pick_device(device),
        context=context,
        ignore_eos=ignore_eos,
        show=show,
        chat=chat,
        engine=engine,
        head=head,
        cache=cache,
    )
    if as_json:
        _print_json(report)
        return
    typer.echo()
    typer.echo(
        f"{report['prompt_tokens']} prompt tokens at {report['prompt_tokens_per_second']:,.0f}/s, "
        f"{report['tokens']} written at {report['tokens_per_second']:,.0f}/s; seed {report['seed']}",
        err=True,
    )


def _converse(*args: Any, **options: Any) -> None:
    from bitnet.chat import converse

    converse(*args, **options, write=write_now, tell=lambda line: typer.echo(line, err=True))


@app.command(cls=_Verb)
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: every one this machine has.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar="BITNET_API_KEY", help="Ask every client for this key; better not by flag."),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=256, help="Texts written at once.")] = 4,
    queue: Annotated[
        int, typer.Option(min=0, metavar="N", help="Texts that may wait; more are told to come again.")
    ] = 64,
    context: Context = 0,
    threads: Threads = 0,
    device: Device = "auto",
    engine: Engine = "auto",
    head: Head = "file",
    cache: Cache = "fp32",
    debug: Debug = False,
) -> None:
    """Serve a model: OpenAI's API, and a page to try it on."""
    from bitnet.serve import check_packages

    check_packages()
    from bitnet.serve.server import ServerOptions, serve

    _set_threads(threads)
    options = ServerOptions(host, port, api_key, slots, context, queue)
    chosen = {"engine": engine, "head": head, "cache": cache}
    code = serve(model, pick_device(device), options, typer.echo, **chosen)
    raise typer.Exit(code)


@app.command("eval", cls=_Verb)
def evaluate(
    model: Model,
    data: Annotated[list[str], typer.Option(metavar="PATH...", help="Files, folders, globs or - (stdin).")],
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

    _set_threads(threads)
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
        _print_json(report)
        return
    from rich.console import Console

    from bitnet.tables import evaluation_table

    Console().print(evaluation_table(report))


@app.command(cls=_Verb)
def bench(
    model: Annotated[
        list[Path] | None, typer.Option("-m", "--model", metavar="FILE", help="Packed model; may be repeated.")
    ] = None,
    preset: Annotated[
        str, typer.Option(metavar="NAME,...", help="Random weights in the shape of nano, small, 2b4t ...")
    ] = "",
    prompt: Annotated[
        str, typer.Option("-p", "--n-prompt", metavar="N,...", help="Tokens to read. Default: 512 or half a context.")
    ] = "",
    predict: Annotated[
        str, typer.Option("-n", "--n-gen", metavar="N,...", help="Tokens to write. Default: 128 or half a context.")
    ] = "",
    pair: Annotated[
        list[str] | None, typer.Option("--pg", metavar="PP,TG", help="Read and write as one test; may be repeated.")
    ] = None,
    depth: Annotated[
        str, typer.Option("-d", "--n-depth", metavar="N,...", help="Tokens in the context before a test starts.")
    ] = "0",
    batch: Annotated[str, typer.Option("-b", "--batch", metavar="N,...", help="Sequences at once.")] = "1",
    threads: Annotated[
        str, typer.Option("-t", "--threads", metavar="N,...", help="CPU threads. Default: as torch finds best.")
    ] = "",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, max=1000, help="Rounds.")] = 5,
    backend: Annotated[str, typer.Option(metavar="NAME,...", help="auto, cpu (C++), torch, triton.")] = "auto",
    isa: Annotated[str, typer.Option(metavar="NAME,...", help="Instruction sets of the C++ kernels.")] = "",
    head: Annotated[str, typer.Option(metavar="NAME,...", help="Head of the C++ engine: file, int8, int4.")] = "file",
    cache: Annotated[str, typer.Option(metavar="NAME,...", help="Its keys and values: fp32, bf16, int8.")] = "fp32",
    against: Annotated[
        str, typer.Option(metavar="NAME,...", help="Others in the same run: torch-bf16, torch-int8, llama.cpp.")
    ] = "",
    llama: Annotated[
        str, typer.Option(metavar="PYTHON", help="The Python that has llama-cpp-python. Default: this one.")
    ] = "",
    price: Annotated[
        float | None, typer.Option(min=0, help="Of this machine in dollars an hour: adds $ per million tokens.")
    ] = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="FORMAT", help="md, json or csv.")] = "md",
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw FILE-roofline and FILE-comparison; FILE ends in .png or .svg."),
    ] = None,
    device: Device = "auto",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")] = False,
    debug: Debug = False,
) -> None:
    """Measure tokens a second against what the machine allows and against other engines, in turns.

    Lists separated by commas cross-multiply. -p 0 or -n 0 leaves that kind of test out.
    """
    from bitnet.bench.command import Flags, parse, run, show

    flags = Flags(
        models=model or [],
        preset=preset,
        prompt=prompt,
        predict=predict,
        pairs=pair or [],
        depth=depth,
        batch=batch,
        threads=threads,
        repetitions=repetitions,
        backend=backend,
        isa=isa,
        head=head,
        cache=cache,
        against=against,
        llama=llama,
        price=price,
        output=output,
        device=pick_device(device),
    )
    settings = parse(flags, sys.argv[1:])
    if plot:
        from bitnet.plotting import check_target

        check_target(plot)
    document = run(settings, _write_gguf, quiet)
    if plot:
        from bitnet.bench.plot import draw

        for path in draw(document, plot):
            typer.echo(f"bitnet: wrote {path}", err=True)
    typer.echo(show(document, output))


def _write_gguf(packed: Path, config: Any, target: Path) -> None:
    """A packed file as GGUF, as if it had the config `config`."""
    from dataclasses import replace

    from bitnet.formats.gguf_export import export_gguf
    from bitnet.formats.source import PackedSource
    from bitnet.packed import read_packed

    export_gguf(PackedSource(replace(read_packed(packed), config=config)), target, "tq2_0")


@app.command(cls=_Verb)
def compare(
    run: Annotated[Path, typer.Argument(help="Folder of a ternary run.")],
    data: Annotated[list[str], typer.Option(metavar="PATH...", help="Held-out text: files, folders, globs or -.")],
    twin: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Its float twin; default: by the default names.")
    ] = None,
    binary: Annotated[Path | None, typer.Option(metavar="RUN", help="A 1-bit run on the same tokens.")] = None,
    methods: Annotated[str | None, typer.Option(metavar="A,B,...", help="Methods or families; default: all.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="JSON to write.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Picture to draw, as .png and .svg.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens every model scores.")] = 131_072,
    kl_tokens: Annotated[int, typer.Option("--kl-tokens", min=1, help="Of them compared with the twin.")] = 16_384,
    qat_steps: Annotated[int, typer.Option("--qat-steps", min=1, help="Steps of quantisation-aware training.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Turns in which all models are timed.")] = 2,
    llama: Annotated[
        str, typer.Option(metavar="PYTHON", help="A Python with llama-cpp-python; default: the wheel here.")
    ] = "",
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the models that are made.")] = None,
    threads: Threads = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One trained pair against every way to shrink a model: size, quality, speed, memory."""
    import torch

    from bitnet.train.compare.command import Options, compare_runs, write_report
    from bitnet.train.compare.methods import Settings

    _set_threads(threads)
    options = Options(tuple(data), max_tokens, kl_tokens, rounds, keep=keep)
    settings = Settings(torch.get_num_threads(), qat_steps, llama=llama)
    report = compare_runs(run, twin, binary, methods, options, settings, quiet=quiet, output=output, plot=plot)
    write_report(report, output, plot)
    if as_json:
        _print_json(report)
    else:
        from rich.console import Console

        from bitnet.train.compare.table import WIDTH, comparison_tables

        console = Console()
        console = console if console.is_terminal else Console(width=WIDTH)
        console.print(*comparison_tables(report), sep="\n")
    raise typer.Exit(1 if any(row["status"] == "failed" for row in report["results"]) else 0)


@app.command(cls=_Verb)
def inspect(
    path: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Packed model; with --plot also the folder of a run.")
    ] = None,
    model: Annotated[Path | None, typer.Option("-m", "--model", metavar="FILE", help="The same, by option.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw weights, zeros and activations: .png or .svg.")
    ] = None,
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", help="Text for the activations of --plot; - reads stdin.")
    ] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a packed model holds: shape, size, bits per weight, zeros per layer."""
    from bitnet.inspection import inspect_packed

    chosen = path or model
    if chosen is None:
        raise BitNetError("inspect: got no file, expected a packed model: bitnet inspect model.safetensors")
    if prompt and not plot:
        raise BitNetError("inspect: got a text (-p) without --plot, expected both; add --plot FILE")
    if as_json and plot and chosen.is_dir():
        raise BitNetError(f"inspect: got --json for the folder '{chosen}', expected a packed model; leave --json away")
    if plot:
        _draw_model(chosen, plot, _read_stdin() if prompt == "-" else prompt)
        if chosen.is_dir():  # the report is of packed files
            return
    report = inspect_packed(chosen)
    if as_json:
        _print_json(report)
        return
    from rich.console import Console

    from bitnet.tables import inspection_tables

    Console().print(*inspection_tables(report), sep="\n")


def _draw_model(model: Path, plot: Path, text: str) -> None:
    """The picture of a packed file, or of the newest save of a run, whose masters it shows too."""
    from bitnet.packed import build, read_packed
    from bitnet.picture import draw
    from bitnet.plotting import check_target
    from bitnet.train.run import Run

    check_target(plot)
    run = Run(model)
    if run.exists():
        draw(run.load()[0], run.tokenizer(), text, plot, model.name)
    else:
        packed = read_packed(model)
        draw(build(packed), packed.tokenizer, text, plot, model.name)
    typer.echo(f"bitnet: wrote {plot}", err=True)


@app.command(cls=_Verb)
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Run folder, packed file, or anything import reads.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PATH", help="Folder or file to write.")],
    to: Annotated[
        str, typer.Option(help="hf (masters, to train on), hf-packed (two bits, to run) or gguf (llama.cpp).")
    ],
    type_: Annotated[
        str | None,
        typer.Option(
            "--type", help="Of a GGUF's projections: tq2_0 (default), tq1_0, f16, f32, q2_0 (new llama.cpp only)."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model for transformers or llama.cpp; what a target cannot hold is refused with the way out."""
    from bitnet.formats.exporting import export_model

    report = export_model(_open_model(model), output, to, type_)
    if as_json:
        _print_json(report)
        return
    typer.echo(f"{output}: {report['bytes'] / 1e6:.2f} MB, {report['format']}")
    for tool, runs, why in report["readers"]:
        typer.echo(f"  {'runs in' if runs else 'not in '} {tool}: {why}")


@app.command("import", cls=_Verb)
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Hugging Face folder, GGUF file, or hub name.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Packed model to write.")],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="Take the tokenizer from here; none: leave it out.")
    ] = None,
    weight_scale: Annotated[
        str | None, typer.Option(help="multiply or divide, where config.json says the wrong one.")
    ] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn another tool's model into a packed file, tensor by tensor."""
    from bitnet.formats.opening import choose_tokenizer, open_source
    from bitnet.formats.packing import import_model
    from bitnet.tables import progress

    found = open_source(source, weight_scale)
    with progress(f"importing {found.kind}", quiet=quiet) as report:
        notes = import_model(found, output, choose_tokenizer(found, tokenizer), report)
    result = {"file": str(output), "bytes": output.stat().st_size, "source": found.kind, "notes": notes}
    result["config"] = found.config.to_dict()
    if as_json:
        _print_json(result)
        return
    typer.echo(f"{output}: {output.stat().st_size / 1e6:.2f} MB, from {found.kind}")
    for note in notes:
        typer.echo(f"  {note}")


def _open_model(name: str) -> Any:
    """The source behind a path: the newest save of a run, or any model the formats know."""
    from bitnet.formats.opening import open_source
    from bitnet.formats.source import TrainedSource
    from bitnet.train.run import Run

    run = Run(Path(name))
    if not run.exists():
        return open_source(name)
    model, save = run.load()
    return TrainedSource(model, run.tokenizer(), {"steps": save.step, "tokens": save.state["tokens"]})


def _open_teacher(name: str) -> Any:
    from bitnet.formats.source import as_model
    from bitnet.train.initial import Teacher

    source = _open_model(name)
    return Teacher(as_model(source), source.tokenizer)


@app.command(cls=_Verb)
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Print versions, devices and kernels, and test the kernels against the reference."""
    from bitnet.doctor import examine

    report = examine()
    if as_json:
        _print_json(report)
    else:
        from rich.console import Console

        from bitnet.tables import doctor_tables

        Console().print(*doctor_tables(report), sep="\n")
    raise typer.Exit(0 if report["healthy"] else 1)


def pick_device(name: str) -> Any:
    """The torch.device of a --device value. Raises BitNetError for one this machine does not have."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BitNetError(f"device: got '{name}', expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise BitNetError(f"device: got '{name}', expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BitNetError(
            f"device: got '{name}', expected one of the {torch.cuda.device_count()} GPUs torch sees; use --device cpu"
        )
    return device


def _set_threads(count: int) -> None:
    if count:
        import torch

        torch.set_num_threads(count)


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BitNetError(f"prompt: got bytes that are not UTF-8 at {error.start}, expected UTF-8 text") from error


def write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_json(report: dict[str, Any]) -> None:
    typer.echo(json.dumps(report, indent=2))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    _state["debug"] = False
    return guarded(lambda: app(args=argv, prog_name="bitnet", standalone_mode=False))


def guarded(action: Callable[[], int | None]) -> int:
    """Run a program of ours: log to stderr, and turn every error a user can cause into one line and an exit code."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("bitnet: %(message)s"))
    logging.getLogger("bitnet").addHandler(handler)
    logging.getLogger("bitnet").setLevel(logging.INFO)
    try:
        return int(action() or 0)
    except typer.TyperException as error:
        if message := usage_error(error):
            print(f"bitnet: error: {message}", file=sys.stderr)
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt, _InterruptedError):
        print("bitnet: interrupted", file=sys.stderr)
        return 130
    except (BrokenPipeError, SystemExit) as error:
        # typer leaves with code 1 when the reader of our output went away (`| head`). To us that is no error, but
        # nothing may be flushed to it any more.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        # BitNetError is a ValueError, as are the kernels' refusals. Of torch's RuntimeErrors only a lack of memory is
        # the user's; another one is a mistake of ours and wants its traceback.
        if _state["debug"] or (isinstance(error, RuntimeError) and not is_out_of_memory(error)):
            raise
        print(f"bitnet: error: {describe(error)}", file=sys.stderr)
        return 2
    finally:
        logging.getLogger("bitnet").removeHandler(handler)


def usage_error(error: typer.TyperException) -> str:
    """A mistake in the command line in one line. Empty where typer has shown the help instead."""
    read = getattr(error, "format_message", None)
    message = " ".join((read() if read else str(error)).split())
    context = getattr(error, "ctx", None)
    return f"{message.rstrip('.')}; see: {context.command_path} -h" if message and context else message


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is Python's or torch's way to say that memory ran out."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words


def describe(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and not isinstance(error, BitNetError):
        where = f"'{error.filename}': " if error.filename else ""
        return f"{where}{error.strerror or error}; nothing saved before is lost"
    if is_out_of_memory(error):
        return "out of memory; use a smaller model, batch or context"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
