"""`bitnet inspect`: what a packed file contains."""

from pathlib import Path
from typing import Annotated

import typer

from bitnet.cli.inputs import read_stdin
from bitnet.cli.options import Debug, Json
from bitnet.cli.terminal import log, print_json, print_tables
from bitnet.errors import BitNetError
from bitnet.included import BOOKS


def inspect(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="Packed model, or with --plot the folder of a run. Default: the included model."
        ),
    ] = None,
    model: Annotated[Path | None, typer.Option("-m", "--model", metavar="FILE", help="The same as FILE.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Picture of weights, zeros and activations to draw: .png or .svg."),
    ] = None,
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", help="Text for the activations of --plot; -: standard input.")
    ] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a packed model contains: shape, size, bits per weight, zeros by layer."""
    from bitnet.inspection import inspect_packed
    from bitnet.threads import use_threads

    use_threads()
    if path and model:
        raise BitNetError(f"inspect: got '{path}' and -m '{model}', expected one of them; omit the other")
    chosen = path or model or BOOKS
    if prompt and not plot:
        raise BitNetError("inspect: got a text (-p) without --plot, expected both; add --plot FILE")
    if as_json and plot and chosen.is_dir():
        raise BitNetError(f"inspect: got --json for the folder '{chosen}', expected a packed model; omit --json")
    if plot:
        _draw_model(chosen, plot, read_stdin() if prompt == "-" else prompt)
        if chosen.is_dir():  # a report is made of packed files only
            return
    report = inspect_packed(chosen)
    if as_json:
        print_json(report)
        return
    from bitnet.cli.tables import inspection_tables

    print_tables(*inspection_tables(report))


def _draw_model(model: Path, plot: Path, text: str) -> None:
    """Draw a packed file, or the newest save of a run, which has master weights to show too."""
    from bitnet.cli.picture import draw
    from bitnet.files.packed import build, read_packed
    from bitnet.plotting import check_target
    from bitnet.train.runs.run import Run

    check_target(plot)
    run = Run(model)
    if run.exists():
        draw(run.load()[0], run.tokenizer(), text, plot, model.name)
    else:
        packed = read_packed(model)
        draw(build(packed), packed.tokenizer, text, plot, model.name)
    log(f"bitnet: wrote {plot}")
