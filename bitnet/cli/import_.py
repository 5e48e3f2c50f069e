"""`bitnet import`: another tool's model as a packed file."""

from pathlib import Path
from typing import Annotated

import typer

from bitnet.cli.options import Debug, Force, Json, Quiet
from bitnet.cli.pack import OTHER_MACHINE
from bitnet.cli.terminal import print_json


def import_(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Hugging Face folder, GGUF file, or name on the hub.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Packed model to write.")],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="Tokenizer to use instead; none: omit it.")
    ] = None,
    weight_scale: Annotated[
        str | None, typer.Option(help="multiply or divide, for a config.json that is wrong about it.")
    ] = None,
    quiet: Quiet = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a model of another tool to a packed file, one tensor at a time."""
    import torch

    from bitnet.files.importing import import_model
    from bitnet.files.memory import import_need
    from bitnet.files.opening import choose_tokenizer, open_source
    from bitnet.memory import check
    from bitnet.tables import progress
    from bitnet.threads import use_threads

    use_threads()
    found = open_source(source, weight_scale)  # of another tool's model only headers are read here
    need = import_need(found.config, Path(source).stat().st_size if found.kind == "a packed file" else 0.0)
    check(f"import: {Path(source).name}", need, torch.device("cpu"), instead=OTHER_MACHINE, force=force)
    with progress(f"importing {found.kind}", quiet=quiet) as report:
        notes = import_model(found, output, choose_tokenizer(found, tokenizer), report)
    result = {"file": str(output), "bytes": output.stat().st_size, "source": found.kind, "notes": notes}
    result["config"] = found.config.to_dict()
    if as_json:
        print_json(result)
        return
    typer.echo(f"{output}: {output.stat().st_size / 1e6:.2f} MB, from {found.kind}")
    for note in notes:
        typer.echo(f"  {note}")
