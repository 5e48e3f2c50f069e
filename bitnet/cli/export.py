"""`bitnet export`: a model in another tool's format."""

from pathlib import Path
from typing import Annotated

import typer

from bitnet.cli.inputs import look_at, open_model
from bitnet.cli.options import Debug, Force, Json
from bitnet.cli.pack import OTHER_MACHINE
from bitnet.cli.terminal import print_json


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Run, packed file, or anything that import reads.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PATH", help="Folder or file to write.")],
    to: Annotated[
        str,
        typer.Option(metavar="FORMAT", help="hf (full precision, to train), hf-packed (two bits, to run) or gguf."),
    ],
    type_: Annotated[
        str | None,
        typer.Option(
            "--type", help="Type of a GGUF's projections: tq2_0 (default), tq1_0, f16, f32, q2_0 (new llama.cpp only)."
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model for transformers or llama.cpp; a model that the format cannot hold is refused."""
    import torch

    from bitnet.files.exporting import export_model
    from bitnet.files.memory import export_need
    from bitnet.memory import check
    from bitnet.threads import use_threads

    use_threads()
    seen = look_at(model)
    need = export_need(seen.config, trained=seen.trained, mapped=seen.mapped)
    check(f"export: {Path(model).name}", need, torch.device("cpu"), instead=OTHER_MACHINE, force=force)
    report = export_model(open_model(model), output, to, type_)
    if as_json:
        print_json(report)
        return
    typer.echo(f"{output}: {report['bytes'] / 1e6:.2f} MB, {report['format']}")
    for tool, runs, why in report["readers"]:
        typer.echo(f"  {'runs in' if runs else 'not in '} {tool}: {why}")
