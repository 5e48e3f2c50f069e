"""`bitnet serve`: the HTTP server."""

from collections.abc import Callable
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
    Model,
    pick_device,
    set_threads,
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
        int, typer.Option("-t", "--threads", min=0, help="CPU threads; 0: all but one, which connections need.")
    ] = 0,
    device: Device = "auto",
    engine: Engine = "auto",
    head: Head = "file",
    cache: Cache = "fp32",
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Serve a model: OpenAI's API, and a page to try it on."""
    from bitnet.serve import check_packages

    check_packages()
    import torch

    from bitnet.memory import Way, Work, budget, check_engine, halves, mildest
    from bitnet.serve.scheduler import CHUNK
    from bitnet.serve.server import ServerOptions, check_options, serve

    # Threads of the engine wait for each other many times a token: one that shares its core with the connections holds
    # up all. Two cores, 88M parameters: 360 tokens/s for one client with one thread, 150 to 195 with two.
    set_threads(threads or max(1, torch.get_num_threads() - 1))
    options = ServerOptions(host, port, api_key, slots, context, queue)
    chosen = {"engine": engine, "head": head, "cache": cache}
    check_options(options)
    place = pick_device(device)

    def plan(config: Any, limit: int, texts: int = slots) -> Work:
        # A text may ask for the logits of its prompt: a pass of CHUNK tokens.
        return Work(limit, limit, texts, read=CHUNK, logits=texts + CHUNK)

    def ways(total: Callable[..., float]) -> list[Way]:
        def with_slots(count: int) -> float:
            return total(plan=lambda config, limit: plan(config, limit, count))

        return mildest("--slots", budget(place) or 0.0, halves(slots), with_slots)

    check_engine("serve", model, place, plan, chosen, context=context, ways=ways, force=force)
    code = serve(model, place, options, typer.echo, **chosen)
    raise typer.Exit(code)
