"""Verbs that run a packed model: generate, serve."""

import os
from typing import Annotated, Any

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
    read_stdin,
    set_threads,
)
from bitnet.cli.terminal import print_json, write_now
from bitnet.errors import BitNetError
from bitnet.shipped import BOOKS


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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a text; it appears as it is written."""
    from bitnet.generation import write_text
    from bitnet.sampling import Sampling

    set_threads(threads)
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=int.from_bytes(os.urandom(4)) if seed is None else seed,
    )
    if interactive:
        if as_json or prompt == "-":
            raise BitNetError("generate -i: got --json or -p -, expected a terminal alone; leave one of them away")
        _converse(
            model,
            predict,
            sampling,
            pick_device(device),
            first=prompt,
            context=context,
            ignore_eos=ignore_eos,
            chat=chat,
            engine=engine,
            head=head,
            cache=cache,
        )
        return
    text = read_stdin() if prompt == "-" else prompt
    show = None if as_json else write_now
    report = write_text(
        model,
        text,
        predict,
        sampling,
        pick_device(device),
        context=context,
        ignore_eos=ignore_eos,
        show=show,
        chat=chat,
        engine=engine,
        head=head,
        cache=cache,
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
    from bitnet.chat import converse

    converse(*args, **options, write=write_now, tell=lambda line: typer.echo(line, err=True))


def serve(
    model: Model = BOOKS,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: every one this machine has.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar="BITNET_API_KEY", help="Ask every client for this key; better not by flag."),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=256, help="Texts written at once.")] = 4,
    queue: Annotated[
        int, typer.Option(min=0, metavar="N", help="Texts that may wait; more are told to come again.")
    ] = 64,
    context: Context = 0,
    threads: Annotated[
        int, typer.Option("-t", "--threads", min=0, help="CPU threads; 0: all but one, which connections need.")
    ] = 0,
    device: Device = "auto",
    engine: Engine = "auto",
    head: Head = "file",
    cache: Cache = "fp32",
    debug: Debug = False,
) -> None:
    """Serve a model: OpenAI's API, and a page to try it on."""
    from bitnet.serve import check_packages

    check_packages()
    import torch

    from bitnet.serve.server import ServerOptions, serve

    # Threads of the engine wait for each other many times a token: one that shares its core with the connections holds
    # up all. Two cores, 88M parameters: 360 tokens/s for one client with one thread, 150 to 195 with two.
    set_threads(threads or max(1, torch.get_num_threads() - 1))
    options = ServerOptions(host, port, api_key, slots, context, queue)
    chosen = {"engine": engine, "head": head, "cache": cache}
    code = serve(model, pick_device(device), options, typer.echo, **chosen)
    raise typer.Exit(code)
