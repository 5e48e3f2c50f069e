"""`bitnet eval`: a packed model on text."""

from typing import Annotated

import typer

from bitnet.cli.options import (
    Cache,
    Context,
    Debug,
    Device,
    Engine,
    Head,
    Json,
    Model,
    Threads,
    pick_device,
)
from bitnet.cli.terminal import print_json, print_tables
from bitnet.included import BOOKS


def evaluate(
    data: Annotated[list[str], typer.Option(metavar="PATH...", help="Files, folders, globs or - (stdin).")],
    model: Model = BOOKS,
    context: Context = 0,
    tokens: Annotated[int, typer.Option("--tokens", min=0, help="Score only the first N tokens; 0: all.")] = 0,
    documents: Annotated[
        str, typer.Option(help="What a document is: file, line, paragraph, row; best as in training.")
    ] = "file",
    threads: Threads = None,
    device: Device = "auto",
    engine: Engine = "auto",
    head: Head = "file",
    cache: Cache = "fp32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bits per byte and perplexity of a packed model on text, with standard errors."""
    from bitnet.threads import use_threads
    from bitnet.train.scoring import score_text

    use_threads(threads)
    report = score_text(
        model,
        data,
        pick_device(device),
        context=context,
        limit=tokens,
        documents=documents,
        engine=engine,
        head=head,
        cache=cache,
    )
    if as_json:
        print_json(report)
        return
    from bitnet.cli.tables import evaluation_table

    print_tables(evaluation_table(report))
