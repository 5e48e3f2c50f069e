"""`bitnet eval`: score a packed model on text."""

from typing import Annotated, Any

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
    from bitnet.engine.memory import Work, check_engine
    from bitnet.threads import use_threads
    from bitnet.train.data.windows import batch_for
    from bitnet.train.scoring import score_text

    def work(config: Any, limit: int) -> Work:
        windows = batch_for(limit, config.vocab_size)
        rows = windows * limit
        return Work(limit, limit, windows, read=rows, logits=2 * rows)  # and their logarithms

    use_threads(engine.threads)
    device = pick_device(engine.device)
    check_engine("eval", model, device, work, engine.load_options(), context=engine.context, force=engine.force)
    report = score_text(
        model,
        data,
        device,
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
