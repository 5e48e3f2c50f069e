"""`bitnet pack`: a run's newest save as one packed file."""

from pathlib import Path
from typing import Annotated

import typer

from bitnet.cli.inputs import note_quant_warmup
from bitnet.cli.options import Debug, Json
from bitnet.cli.terminal import print_json

OTHER_MACHINE = "close other programs or convert it on a larger machine"


def pack(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Packed model to write.")],
    embedding: Annotated[str, typer.Option(help="Embedding and head: bf16 (exact) or int8 (smaller).")] = "bf16",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Pack a run's newest save into one file: two bits per weight, tokenizer included."""
    from bitnet.files.packed import write_packed
    from bitnet.inspection import inspect_packed
    from bitnet.threads import use_threads
    from bitnet.train.runs.run import Run

    use_threads()
    folder = Run(run)
    model, save = folder.load()
    note_quant_warmup(folder, save)
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
        f"({report['float16_bytes'] / 1e6:.2f} MB); projections at {report['bits_per_weight']:.2f} bits per weight"
    )
