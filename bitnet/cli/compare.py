"""`bitnet compare`: one trained pair against other ways to shrink a model."""

from pathlib import Path
from typing import Annotated

import typer

from bitnet.cli.options import Debug, Force, Json, Quiet, Threads, set_threads
from bitnet.cli.terminal import print_json, print_tables


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
    quiet: Quiet = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One trained pair against every way to shrink a model: size, quality, speed, memory."""
    import torch

    from bitnet.benchmarks.compare.command import Options, compare_runs, write_report
    from bitnet.benchmarks.compare.method import Settings

    set_threads(threads)
    options = Options(tuple(data), max_tokens, kl_tokens, rounds, keep=keep)
    settings = Settings(torch.get_num_threads(), qat_steps, llama=llama)
    report = compare_runs(
        run, twin, binary, methods, options, settings, quiet=quiet, output=output, plot=plot, force=force
    )
    write_report(report, output, plot)
    if as_json:
        print_json(report)
    else:
        from bitnet.benchmarks.compare.table import comparison_tables

        print_tables(*comparison_tables(report))
    raise typer.Exit(1 if any(row["status"] == "failed" for row in report["results"]) else 0)
