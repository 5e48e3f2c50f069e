"""`bitnet generate`: continue a text."""

import os
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
    read_stdin,
    set_threads,
)
from bitnet.cli.terminal import print_json, write_now
from bitnet.errors import BitNetError
from bitnet.included import BOOKS


def generate(
    model: Model = BOOKS,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text to continue; - reads stdin.")] = "",
    predict: Annotated[int, typer.Option("-n", "--predict", min=0, help="Tokens to write.")] = 128,
    context: Context = 0,
    threads: Threads = 0,
    seed: Annotated[int | None, typer.Option("-s", "--seed", min=0, help="Default: another text each time.")] = None,
    temperature: Annotated[float, typer.Option("--temp", help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", help="0 switches it off.")] = 40,
    top_p: Annotated[float, typer.Option("--top-p", help="1 switches it off.")] = 0.95,
    min_p: Annotated[float, typer.Option("--min-p", help="0 switches it off.")] = 0.05,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message: use the model's chat template.")
    ] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Write on past the end of a document.")] = False,
    interactive: Annotated[
        bool, typer.Option("-i", "--interactive", help="Ask for prompts, one after the other; Ctrl-C stops a text.")
    ] = False,
    device: Device = "auto",
    engine: Engine = "auto",
    head: Head = "file",
    cache: Cache = "fp32",
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a text; it appears as it is written."""
    from bitnet.engine.sampling import Sampling
    from bitnet.generation import write_text
    from bitnet.memory import Work, check_engine

    set_threads(threads)
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=int.from_bytes(os.urandom(4)) if seed is None else seed,
    )
    text = read_stdin() if prompt == "-" and not interactive else prompt
    place, chosen = pick_device(device), {"engine": engine, "head": head, "cache": cache}

    def plan(config: Any, limit: int) -> Work:
        # A token is a byte or more. A conversation may fill the context.
        read = min(limit, len(text.encode()) + 1)
        return Work(limit if interactive else min(limit, read + predict), limit, read=read)

    check_engine("generate", model, place, plan, chosen, context=context, force=force)
    if interactive:
        if as_json or prompt == "-":
            raise BitNetError("generate -i: got --json or -p -, expected a terminal alone; leave one of them away")
        _converse(
            model,
            predict,
            sampling,
            place,
            first=prompt,
            context=context,
            ignore_eos=ignore_eos,
            chat=chat,
            **chosen,
        )
        return
    show = None if as_json else write_now
    report = write_text(
        model,
        text,
        predict,
        sampling,
        place,
        context=context,
        ignore_eos=ignore_eos,
        show=show,
        chat=chat,
        **chosen,
    )
    if as_json:
        print_json(report)
        return
    typer.echo()
    typer.echo(
        f"{report['prompt_tokens']} prompt tokens at {report['prompt_tokens_per_second']:,.0f}/s, "
        f"{report['tokens']} written at {report['tokens_per_second']:,.0f}/s; seed {report['seed']}",
        err=True,
    )


def _converse(*args: Any, **options: Any) -> None:
    from bitnet.cli.chat import converse

    converse(*args, **options, write=write_now, tell=lambda line: typer.echo(line, err=True))
