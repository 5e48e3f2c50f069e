"""`bitnet eval`: a packed model on text."""

from typing import Annotated, Any

import typer

from bitnet.cli.options import (
    Cache,
    Context,
    Debug,
    Device,
    Engine,
    Force,
    Head,
    Json,
    Model,
    Threads,
    pick_device,
    set_threads,
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
    threads: Threads = 0,
    device: Device = "auto",
    engine: Engine = "auto",
    head: Head = "file",
    cache: Cache = "fp32",
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bits per byte and perplexity of a packed model on text, with standard errors."""
    from bitnet.memory import Work, check_engine
    from bitnet.train.data.windows import batch_for
    from bitnet.train.scoring import score_text

    set_threads(threads)
    place, chosen = pick_device(device), {"engine": engine, "head": head, "cache": cache}

    def plan(config: Any, limit: int) -> Work:
        windows = batch_for(limit, config.vocab_size)
        rows = windows * limit
        return Work(limit, limit, windows, read=rows, logits=2 * rows)  # and their logarithms

    check_engine("eval", model, place, plan, chosen, context=context, force=force)
    report = score_text(
        model,
        data,
        place,
        context=context,
        limit=tokens,
        documents=documents,
        **chosen,
    )
    if as_json:
        print_json(report)
        return
    from bitnet.cli.tables import evaluation_table

    print_tables(evaluation_table(report))
