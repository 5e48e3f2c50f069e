"""`bitnet sweep`: many runs and their float baselines."""

from pathlib import Path
from typing import Annotated

import typer

from bitnet.cli.inputs import look_at, open_model, open_teacher
from bitnet.cli.options import Debug, Device, Force, Json, Threads, WarningsOnly, pick_device
from bitnet.cli.terminal import log, print_json, print_tables
from bitnet.errors import BitNetError


def sweep(
    spec: Annotated[  # a backslash keeps rich from reading [base] as markup
        Path, typer.Argument(metavar="FILE", help="Sweep spec in TOML: seeds, linears, \\[base], \\[grid], [\\[runs]].")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the runs; a sweep that is there is resumed.")],
    plan: Annotated[bool, typer.Option("--plan", help="List the runs and exit.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    quiet: WarningsOnly = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train the runs of a sweep spec one after the other and compare them with their float baselines."""
    from bitnet.benchmarks.sweep.plot import plot_curves, plot_scaling, plot_sweep
    from bitnet.benchmarks.sweep.run import run_sweep
    from bitnet.benchmarks.sweep.spec import read_spec
    from bitnet.threads import use_threads

    if plan:
        for each in read_spec(spec):
            typer.echo(each.folder)
        return
    use_threads(threads)
    progress = (lambda text: None) if quiet else log
    openers = {"open_initial": open_model, "open_teacher": open_teacher, "look": look_at}
    report, code = run_sweep(spec, out, pick_device(device), progress, force=force, **openers)
    if report is None:
        raise typer.Exit(code)
    try:
        plot_sweep(report, out / "sweep")
        plot_curves(report, out / "curves")
        if len(report["sizes"]) > 1:
            plot_scaling(report, out / "scaling")
    except BitNetError as error:  # matplotlib is not installed: the figures are still reported
        progress(str(error))
    if as_json:
        print_json(report)
        return
    from bitnet.benchmarks.sweep.table import sweep_table, tuned_gaps

    print_tables(sweep_table(report), *tuned_gaps(report))
