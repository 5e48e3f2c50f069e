"""`bitnet serve`: the HTTP server."""

import os
import sys
import threading
from dataclasses import dataclass
from typing import Annotated

import typer

from bitnet.cli.options import Debug, EngineOptions, Model, grouped_options, pick_device, threads_option
from bitnet.included import BOOKS


@dataclass(frozen=True)
class ServerEngineOptions(EngineOptions):
    """EngineOptions with another default for the threads."""

    threads: Annotated[int | None, threads_option("all cores but one, which is left to connections")] = None


@grouped_options
def serve(
    *,
    model: Model = BOOKS,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: every address of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Port to listen on; 0: any free one.")
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="BITNET_API_KEY",
            help="Key that every client has to send; safer in the environment, where other users cannot see it.",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(metavar="N", help="Sequences decoded at once.")] = 4,
    queue: Annotated[int, typer.Option(metavar="N", help="Requests that may wait; further ones get status 429.")] = 64,
    engine: ServerEngineOptions,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP: OpenAI's API, and a page to try it in a browser."""
    from bitnet.serve import check_packages

    check_packages()
    import torch

    from bitnet.serve.server import ServerOptions, serve
    from bitnet.threads import use_threads

    # The engine's threads wait at a barrier many times per token, so one that shares its core with the connections
    # delays all of them. Two cores, 88M parameters, one client: 360 tokens/s with one thread, 150 to 195 with two.
    threads = use_threads(engine.threads)
    if engine.threads is None:
        torch.set_num_threads(max(1, threads - 1))
    options = ServerOptions(host, port, api_key, sequences, engine.context, queue)
    code = serve(model, pick_device(engine.device), options, typer.echo, **engine.load_options())
    if any(thread.daemon for thread in threading.enumerate()):
        # A thread is still reading the model, which may take minutes. Python 3.11 to 3.13 would end it inside torch's
        # C++ code, which would abort the process (exit code 134).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)
