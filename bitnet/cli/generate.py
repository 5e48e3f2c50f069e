"""`bitnet generate`: continue a text."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitnet.cli.inputs import read_stdin
from bitnet.cli.options import Debug, EngineOptions, Json, Model, given, grouped_options, pick_device
from bitnet.cli.terminal import log, print_json, write_now
from bitnet.errors import BitNetError
from bitnet.included import BOOKS

if TYPE_CHECKING:
    from bitnet.engine.sampling import Sampling


def help_values() -> dict[str, object]:
    """The defaults that the help texts name."""
    from bitnet.engine.sampling import Sampling

    return {"sampling": Sampling()}


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn. None: the default of `Sampling`; for the seed, a random one."""

    seed: Annotated[
        int | None, typer.Option("-s", "--seed", min=0, metavar="N", help="Random seed. Default: a new one.")
    ] = None
    temperature: Annotated[float | None, typer.Option("--temp", help="0: greedy. Default: {sampling.temperature}.")] = (
        None
    )
    top_k: Annotated[int | None, typer.Option("--top-k", help="0: off. Default: {sampling.top_k}.")] = None
    top_p: Annotated[float | None, typer.Option("--top-p", help="1: off. Default: {sampling.top_p}.")] = None
    min_p: Annotated[float | None, typer.Option("--min-p", help="0: off. Default: {sampling.min_p}.")] = None

    def sampling(self) -> "Sampling":
        """The sampling settings. Raises BitNetError for a value out of range."""
        from bitnet.engine.sampling import Sampling

        seed = int.from_bytes(os.urandom(4)) if self.seed is None else self.seed
        filters = given(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        return Sampling(**filters, seed=seed)


@grouped_options
def generate(
    *,
    model: Model = BOOKS,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text to continue; -: standard input.")] = "",
    predict: Annotated[int, typer.Option("-n", "--predict", min=0, metavar="N", help="Most tokens to generate.")] = 128,
    sampling: SamplingOptions,
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat the prompt as a message and apply the model's chat template.")
    ] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue past the end of a document.")] = False,
    interactive: Annotated[
        bool, typer.Option("-i", "--interactive", help="Read prompts from the terminal; Ctrl-C stops a reply.")
    ] = False,
    engine: EngineOptions,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a text, printed as it is generated."""
    from bitnet.engine.memory import Work, check_engine
    from bitnet.generation import write_text
    from bitnet.threads import use_threads

    use_threads(engine.threads)
    drawn, device = sampling.sampling(), pick_device(engine.device)
    text = read_stdin() if prompt == "-" and not interactive else prompt

    def work(config: Any, limit: int) -> Work:
        # A token is at least one byte of the prompt. A conversation may fill the context.
        read = min(limit, len(text.encode()) + 1)
        return Work(limit if interactive else min(limit, read + predict), limit, read=read)

    check_engine("generate", model, device, work, engine.load_options(), context=engine.context, force=engine.force)
    options: dict[str, Any] = {"context": engine.context, "ignore_eos": ignore_eos, "chat": chat}
    options |= engine.load_options()
    if interactive:
        from bitnet.cli.chat import run_chat

        if as_json or prompt == "-":
            raise BitNetError("generate -i: got --json or -p -, expected prompts from a terminal; omit one of them")
        run_chat(model, predict, drawn, device, first=prompt, **options)
        return
    report = write_text(model, text, predict, drawn, device, show=None if as_json else write_now, **options)
    if as_json:
        print_json(report)
        return
    typer.echo()
    log(
        f"{report['prompt_tokens']} prompt tokens at {report['prompt_tokens_per_second']:,.0f}/s, "
        f"{report['tokens']} generated at {report['tokens_per_second']:,.0f}/s; seed {report['seed']}"
    )
