"""`bitnet serve`: the HTTP server."""

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

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

    from bitnet.engine.memory import Work, check_engine
    from bitnet.memory import Way, budget, halves, mildest
    from bitnet.serve.scheduler import CHUNK
    from bitnet.serve.server import ServerOptions, check_options, serve
    from bitnet.threads import use_threads

    # The engine's threads wait at a barrier many times per token, so one that shares its core with the connections
    # delays all of them. Two cores, 88M parameters, one client: 360 tokens/s with one thread, 150 to 195 with two.
    threads = use_threads(engine.threads)
    if engine.threads is None:
        torch.set_num_threads(max(1, threads - 1))
    options = ServerOptions(host, port, api_key, sequences, engine.context, queue)
    check_options(options)
    device = pick_device(engine.device)

    def work(config: Any, limit: int, count: int = sequences) -> Work:
        # A request may ask for the logits of its prompt: a pass of CHUNK tokens.
        return Work(limit, limit, count, read=CHUNK, logits=count + CHUNK)

    def ways(total: Callable[..., float]) -> list[Way]:
        def with_sequences(count: int) -> float:
            return total(plan=lambda config, limit: work(config, limit, count))

        return mildest("--sequences", budget(device) or 0.0, halves(sequences), with_sequences)

    chosen = engine.load_options()
    check_engine("serve", model, device, work, chosen, context=engine.context, ways=ways, force=engine.force)
    code = serve(model, device, options, typer.echo, **chosen)
    if any(thread.daemon for thread in threading.enumerate()):
        # A thread is still reading the model, which may take minutes. Python 3.11 to 3.13 would end it inside torch's
        # C++ code, which would abort the process (exit code 134).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)
