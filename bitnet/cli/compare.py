"""`bitnet compare`: a ternary run and its float baseline against other ways to shrink a model."""

from pathlib import Path
from typing import Annotated

import typer

from bitnet.cli.options import Debug, Force, Json, Quiet, Threads, given
from bitnet.cli.terminal import print_json, print_tables


def help_values() -> dict[str, object]:
    """The defaults that the help texts name."""
    from bitnet.benchmarks.compare.command import Options
    from bitnet.benchmarks.compare.method import Settings

    return {"options": Options(()), "settings": Settings(1)}


def compare(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a ternary run.")],
    data: Annotated[
        list[str], typer.Option(metavar="PATH...", help="Held-out text: files, folders, globs or - (standard input).")
    ],
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Its float baseline. Default: RUN with 'float' in place of 'ternary'."),
    ] = None,
    binary: Annotated[Path | None, typer.Option(metavar="RUN", help="A binary (1-bit) run on the same tokens.")] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Methods or families of methods. Default: all.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="JSON report to write.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture to draw, as FILE.png and FILE.svg.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens that every model scores. Default: {options.max_tokens}."),
    ] = None,
    kl_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens compared with the float baseline. Default: {options.kl_tokens}."),
    ] = None,
    qat_steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Steps of quantisation-aware training. Default: {settings.qat_steps}."),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Rounds in which each model is timed once. Default: {options.rounds}."),
    ] = None,
    llama: Annotated[
        str, typer.Option(metavar="PYTHON", help="A Python that has llama-cpp-python. Default: this one.")
    ] = "",
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the compared models in DIR.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=1, metavar="SECONDS", help="Time limit for making or measuring a model. Default: {options.budget:g}."
        ),
    ] = None,
    threads: Threads = None,
    quiet: Quiet = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare a ternary run with other ways to shrink its float baseline: size, quality, speed, memory."""
    from bitnet.benchmarks.compare.command import Options, compare_runs, write_report
    from bitnet.benchmarks.compare.method import Settings
    from bitnet.threads import use_threads

    count = use_threads(threads)
    limits = given(max_tokens=max_tokens, kl_tokens=kl_tokens, rounds=rounds, budget=budget)
    options = Options(tuple(data), keep=keep, **limits)
    settings = Settings(count, llama=llama, **given(qat_steps=qat_steps))
    report = compare_runs(
        run, baseline, binary, methods, options, settings, quiet=quiet, output=output, plot=plot, force=force
    )
    write_report(report, output, plot)
    if as_json:
        print_json(report)
    else:
        from bitnet.benchmarks.compare.table import comparison_tables

        print_tables(*comparison_tables(report))
    raise typer.Exit(1 if any(row["status"] == "failed" for row in report["results"]) else 0)
