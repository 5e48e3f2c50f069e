"""`bitnet bench`: speed beside what the machine allows."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bitnet.cli.options import Debug, Device, Quiet, pick_device


def bench(
    model: Annotated[
        list[Path] | None,
        typer.Option(
            "-m",
            "--model",
            metavar="FILE",
            help="Packed model; may be repeated. Default, without --preset: the one that comes along.",
        ),
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
        str,
        typer.Option(
            "-t", "--threads", metavar="N,...", help="CPU threads. Default: as torch finds best, at most the cores."
        ),
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
    budget: Annotated[
        float,
        typer.Option(min=1, metavar="SECONDS", help="Most a row may take: fewer rounds, or left out with the reason."),
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
    """Measure tokens a second against what the machine allows and against other engines, in turns.

    Lists separated by commas cross-multiply. -p 0 or -n 0 leaves that kind of test out.
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
    document = run(settings, quiet)
    if plot:
        from bitnet.benchmarks.bench.plot import draw

        for path in draw(document, plot):
            typer.echo(f"bitnet: wrote {path}", err=True)
    typer.echo(show(document, output))
