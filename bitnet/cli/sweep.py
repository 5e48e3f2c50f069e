"""`bitnet sweep`: many runs and their float baselines."""

from pathlib import Path
from typing import Annotated

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
from bitnet.cli.terminal import print_json, print_tables
from bitnet.errors import BitNetError


def sweep(
    ladder: Annotated[  # a backslash keeps rich from taking [base] for markup
        Path, typer.Argument(metavar="FILE", help="TOML: seeds, linears, \\[base], \\[grid], [\\[runs]].")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the runs; a sweep that is there goes on.")],
    plan: Annotated[bool, typer.Option("--plan", help="Only list the runs it would make.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Nothing on stderr but warnings and errors.")] = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a ladder of runs, several seeds each, one after the other; compare them with their float twins."""
    from bitnet.benchmarks.sweep.plan import read_sweep
    from bitnet.benchmarks.sweep.plot import plot_curves, plot_scaling, plot_sweep
    from bitnet.benchmarks.sweep.run import run_sweep
    from bitnet.train.runs.run import Run

    if plan:
        for each in read_sweep(ladder):
            typer.echo(each.folder)
        return
    set_threads(threads)
    say = (lambda text: None) if quiet else (lambda text: typer.echo(text, err=True))
    openers = {"open_initial": open_model, "open_teacher": open_teacher, "look": look_at}
    report, code = run_sweep(ladder, out, pick_device(device), say, force=force, **openers)
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
    from bitnet.benchmarks.sweep.table import sweep_table, tuned_gaps

    print_tables(sweep_table(report), *tuned_gaps(report))
