"""Verbs about files of models: pack, inspect, export, import."""

from pathlib import Path
from typing import Annotated

import typer

from bitnet.cli.options import Debug, Json, Quiet, note_easing, open_model, read_stdin
from bitnet.cli.terminal import print_json, print_tables
from bitnet.errors import BitNetError
from bitnet.shipped import BOOKS


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
    note_easing(folder, save)
    validation = [row for row in folder.metrics() if "val_loss" in row and row["step"] == save.step]
    info = {"steps": save.step, "tokens": save.state["tokens"], "seed": folder.config().train.seed}
    if save.quantised < 1:
        info["quantised"] = save.quantised
    if validation:
        info["val_bits_per_byte"] = validation[-1]["val_bits_per_byte"]
    write_packed(output, model, folder.tokenizer(), embedding=embedding, info=info)
    report = inspect_packed(output)  # reads and verifies what was written
    if as_json:
        print_json(report)
        return
    typer.echo(
        f"{output}: {report['file_bytes'] / 1e6:.2f} MB, {report['ratio_to_float16']:.1f} times smaller than fp16 "
        f"({report['float16_bytes'] / 1e6:.2f} MB); projections at {report['bits_per_weight']:.2f} bits a weight"
    )


def inspect(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="Packed model, or with --plot the folder of a run. Default: the model that comes along.",
        ),
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

    if path and model:
        raise BitNetError(f"inspect: got '{path}' and -m '{model}', expected one of them; leave one away")
    chosen = path or model or BOOKS
    if prompt and not plot:
        raise BitNetError("inspect: got a text (-p) without --plot, expected both; add --plot FILE")
    if as_json and plot and chosen.is_dir():
        raise BitNetError(f"inspect: got --json for the folder '{chosen}', expected a packed model; leave --json away")
    if plot:
        _draw_model(chosen, plot, read_stdin() if prompt == "-" else prompt)
        if chosen.is_dir():  # the report is of packed files
            return
    report = inspect_packed(chosen)
    if as_json:
        print_json(report)
        return
    from bitnet.tables import inspection_tables

    print_tables(*inspection_tables(report))


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

    report = export_model(open_model(model), output, to, type_)
    if as_json:
        print_json(report)
        return
    typer.echo(f"{output}: {report['bytes'] / 1e6:.2f} MB, {report['format']}")
    for tool, runs, why in report["readers"]:
        typer.echo(f"  {'runs in' if runs else 'not in '} {tool}: {why}")


def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Hugging Face folder, GGUF file, or hub name.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Packed model to write.")],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="Take the tokenizer from here; none: leave it out.")
    ] = None,
    weight_scale: Annotated[
        str | None, typer.Option(help="multiply or divide, where config.json says the wrong one.")
    ] = None,
    quiet: Quiet = False,
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
        print_json(result)
        return
    typer.echo(f"{output}: {output.stat().st_size / 1e6:.2f} MB, from {found.kind}")
    for note in notes:
        typer.echo(f"  {note}")
