"""Options that several verbs share, each defined once."""

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from bitnet.errors import BitNetError


@dataclass
class Settings:
    """What a command line sets for the program as a whole rather than for its verb."""

    debug: bool = False


def _set_debug(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.find_root().obj.debug = True


def parse_threads(text: str) -> int:
    """The number of a -t value. Raises typer.BadParameter, which adds the names of the option and the verb."""
    from bitnet.threads import check_threads

    try:
        return check_threads(text)
    except BitNetError as error:
        raise typer.BadParameter(str(error).removeprefix("-t: ")) from error


def threads_option(default: str) -> Any:
    """The -t option of a verb; default: how its help describes what happens without it."""
    text = f"CPU threads. Default: {default}."
    return typer.Option("-t", "--threads", metavar="N", parser=parse_threads, help=text, show_default=False)


Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress on stderr.")]
WarningsOnly = Annotated[bool, typer.Option("-q", "--quiet", help="Print only warnings and errors on stderr.")]
Model = Annotated[
    Path,
    typer.Option("-m", "--model", metavar="FILE", help="Packed model. Default: the included one.", show_default=False),
]
Threads = Annotated[int | None, threads_option("torch's choice, at most the cores this process may use")]
Force = Annotated[bool, typer.Option("--force", help="Run even if memory seems too small.")]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]


@dataclass(frozen=True)
class EngineOptions:
    """Which engine runs a packed model, where and how: the options that generate, eval and serve share."""

    context: Annotated[
        int, typer.Option("-c", "--ctx-size", min=0, metavar="N", help="Context in tokens; 0: the model's.")
    ] = 0
    threads: Threads = None
    device: Device = "auto"
    engine: Annotated[str, typer.Option(help="auto (C++ on a CPU, Triton on a GPU), cpu, triton or torch.")] = "auto"
    head: Annotated[str, typer.Option(help="Head of the C++ engine: file (exact), int8 or int4 (faster).")] = "file"
    cache: Annotated[str, typer.Option(help="KV cache of the C++ engine: fp32 (exact), bf16 or int8.")] = "fp32"
    force: Force = False

    def load_options(self) -> dict[str, str]:
        """The keyword arguments of `bitnet.load` that choose the engine."""
        return {"engine": self.engine, "head": self.head, "cache": self.cache}


def grouped_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn each parameter of a verb that is a dataclass of options, such as EngineOptions, into one option per field.

    The verb still receives the dataclass. Parameters have to be keyword-only, so that one without a default may follow
    others that have one.
    """
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        types = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[field.name]
                )
            )

    @wraps(verb)
    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        verb(**values)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def given(**values: Any) -> dict[str, Any]:
    """The options that were given: None stands for one that was not, whose default the config dataclass defines."""
    return {name: value for name, value in values.items() if value is not None}


def pick_device(name: str) -> Any:
    """The torch.device of a --device value, a GPU with its number. Raises BitNetError for one this machine lacks."""
    import torch

    from bitnet.device import indexed

    if name == "auto":
        return indexed("cuda" if torch.cuda.is_available() else "cpu")
    # torch.device accepts more (mps, meta) and truncates large numbers to eight bits.
    found = re.fullmatch(r"cpu|cuda(?::([0-9]{1,9}))?", name)
    if found is None:
        raise BitNetError(f"device: got '{name}', expected auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(found[1] or 0) >= (count := torch.cuda.device_count()):
        raise BitNetError(f"device: got '{name}', expected one of the {count} GPUs torch sees; use --device cpu")
    return indexed(name)
