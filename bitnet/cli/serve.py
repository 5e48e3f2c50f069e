"""`bitnet serve`: the HTTP server."""

import os
import sys
import threading
from typing import Annotated

import typer

from bitnet.cli.options import (
    Cache,
    Context,
    Debug,
    Device,
    Engine,
    Head,
    Model,
    parse_threads,
    pick_device,
)
from bitnet.included import BOOKS


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
        int | None,
        typer.Option(
            "-t",
            "--threads",
            metavar="N",
            parser=parse_threads,
            help="CPU threads. Default: all but one, which connections need.",
            show_default=False,
        ),
    ] = None,
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
    from bitnet.threads import use_threads

    # Threads of the engine wait for each other many times a token: one that shares its core with the connections holds
    # up all. Two cores, 88M parameters: 360 tokens/s for one client with one thread, 150 to 195 with two.
    found = use_threads(threads)
    if threads is None:
        torch.set_num_threads(max(1, found - 1))
    options = ServerOptions(host, port, api_key, slots, context, queue)
    chosen = {"engine": engine, "head": head, "cache": cache}
    code = serve(model, pick_device(device), options, typer.echo, **chosen)
    if any(thread.daemon for thread in threading.enumerate()):
        # Still reading the model, which may take minutes. Python 3.11 to 3.13 would end that thread inside torch's C++,
        # and C++ would abort the process: exit code 134.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)
