"""`bitnet bench`: speed next to what the machine allows."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bitnet.cli.options import Debug, Device, Quiet, pick_device
from bitnet.cli.terminal import log


def help_values() -> dict[str, object]:
    """The defaults that the help texts name."""
    from bitnet.benchmarks.bench import plan

    return {"plan": plan}


def bench(
    model: Annotated[
        list[Path] | None,
        typer.Option(
            "-m",
            "--model",
            metavar="FILE",
            help="Packed model; may be repeated. Default, without --preset: the included one.",
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(metavar="NAME,...", help="Models of these shapes with random weights: nano, small, 2b4t ...")
    ] = "",
    prompt: Annotated[
        str,
        typer.Option(
            "-p",
            "--n-prompt",
            metavar="N,...",
            help="Prompt lengths in tokens; 0: no such test. Default: {plan.PROMPT}, at most half the context.",
        ),
    ] = "",
    predict: Annotated[
        str,
        typer.Option(
            "-n",
            "--n-gen",
            metavar="N,...",
            help="Tokens to generate; 0: no such test. Default: {plan.PREDICT}, at most half the context.",
        ),
    ] = "",
    pair: Annotated[
        list[str] | None,
        typer.Option("--pg", metavar="PP,TG", help="Prompt and generation as one test; may be repeated."),
    ] = None,
    depth: Annotated[
        str, typer.Option("-d", "--n-depth", metavar="N,...", help="Tokens in the context before a test starts.")
    ] = "0",
    batch: Annotated[str, typer.Option("-b", "--batch", metavar="N,...", help="Sequences in a batch.")] = "1",
    threads: Annotated[
        str,
        typer.Option(
            "-t",
            "--threads",
            metavar="N,...",
            help="CPU threads. Default: torch's choice, at most the cores this process may use.",
        ),
    ] = "",
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", min=1, max=1000, metavar="N", help="Times each test is repeated.")
    ] = 5,
    backend: Annotated[str, typer.Option(metavar="NAME,...", help="auto, cpu (C++), torch, triton.")] = "auto",
    isa: Annotated[str, typer.Option(metavar="NAME,...", help="Instruction sets of the C++ kernels.")] = "",
    head: Annotated[str, typer.Option(metavar="NAME,...", help="Head of the C++ engine: file, int8, int4.")] = "file",
    cache: Annotated[
        str, typer.Option(metavar="NAME,...", help="KV cache of the C++ engine: fp32, bf16, int8.")
    ] = "fp32",
    against: Annotated[
        str, typer.Option(metavar="NAME,...", help="Other engines to measure: torch-bf16, torch-int8, llama.cpp.")
    ] = "",
    llama: Annotated[
        str, typer.Option(metavar="PYTHON", help="A Python that has llama-cpp-python. Default: this one.")
    ] = "",
    price: Annotated[
        float | None,
        typer.Option(min=0, metavar="DOLLARS", help="Price of this machine per hour: adds $ per million tokens."),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="Time limit of a row: it gets fewer repetitions, or is left out with a reason.",
        ),
    ] = 120,
    output: Annotated[str, typer.Option("-o", "--output", metavar="FORMAT", help="md, json or csv.")] = "md",
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw FILE-roofline and FILE-comparison; FILE ends in .png or .svg."),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure tokens per second next to what the machine allows, and other engines in the same run.

    An option with several values, separated by commas, multiplies the tests.
    """
    from bitnet.benchmarks.bench.command import Flags, parse, run, show

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
        budget=budget,
        output=output,
        device=pick_device(device),
    )
    settings = parse(flags, sys.argv[1:])
    if plot:
        from bitnet.plotting import check_target

        check_target(plot)
    document = run(settings, packed_to_gguf, quiet)
    if plot:
        from bitnet.benchmarks.bench.plot import draw

        for path in draw(document, plot):
            log(f"bitnet: wrote {path}")
    typer.echo(show(document, output))


def packed_to_gguf(packed: Path, config: Any, target: Path) -> None:
    """A packed file as GGUF, as if it had the config `config`."""
    from dataclasses import replace

    from bitnet.files.gguf.export import export_gguf
    from bitnet.files.packed import read_packed
    from bitnet.files.source import PackedSource

    export_gguf(PackedSource(replace(read_packed(packed), config=config)), target, "tq2_0")
