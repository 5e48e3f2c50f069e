"""`bitnet eval`: score a packed model on text."""

from typing import Annotated

import typer

from bitnet.cli.options import Debug, EngineOptions, Json, Model, grouped_options, pick_device
from bitnet.cli.terminal import print_json, print_tables
from bitnet.included import BOOKS


@grouped_options
def evaluate(
    *,
    data: Annotated[
        list[str], typer.Option(metavar="PATH...", help="Text: files, folders, globs or - (standard input).")
    ],
    model: Model = BOOKS,
    tokens: Annotated[
        int, typer.Option("--tokens", min=0, metavar="N", help="Score only the first N tokens; 0: all.")
    ] = 0,
    documents: Annotated[
        str, typer.Option(help="What a document is: file, line, paragraph or row; use the same as in training.")
    ] = "file",
    engine: EngineOptions,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure bits per byte and perplexity of a packed model on text, with standard errors."""
    from bitnet.threads import use_threads
    from bitnet.train.scoring import score_text

    use_threads(engine.threads)
    report = score_text(
        model,
        data,
        pick_device(engine.device),
        context=engine.context,
        limit=tokens,
        documents=documents,
        **engine.load_options(),
    )
    if as_json:
        print_json(report)
        return
    from bitnet.cli.tables import evaluation_table

    print_tables(evaluation_table(report))
