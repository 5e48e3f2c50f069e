"""What the verbs share: options, and what the words given with them stand for."""

import logging
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bitnet.errors import BitNetError

state = {"debug": False}  # as the options of a command line have set it; `main` begins with this


def _set_debug(value: bool) -> None:
    state["debug"] = state["debug"] or value


Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")]
Model = Annotated[
    Path,
    typer.Option(
        "-m", "--model", metavar="FILE", help="Packed model. Default: the one that comes along.", show_default=False
    ),
]


def parse_threads(text: str) -> int:
    """The number of a -t value. Typer names the option and the verb in front of what is wrong with it."""
    from bitnet.threads import check_threads

    try:
        return check_threads(text)
    except BitNetError as error:
        raise typer.BadParameter(str(error).removeprefix("-t: ")) from error


Threads = Annotated[
    int | None,
    typer.Option(
        "-t",
        "--threads",
        metavar="N",
        parser=parse_threads,
        help="CPU threads. Default: as torch finds best, at most the cores this process may use.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
Context = Annotated[int, typer.Option("-c", "--ctx-size", min=0, help="Context in tokens; 0: the model's.")]
Engine = Annotated[str, typer.Option(help="auto (C++ on a CPU, Triton on a GPU), cpu, triton or torch.")]
Head = Annotated[str, typer.Option(help="Head of the C++ engine: file (exact), int8 or int4 (faster).")]
Cache = Annotated[str, typer.Option(help="Keys and values of the C++ engine: fp32 (exact), bf16 or int8.")]


def pick_device(name: str) -> Any:
    """The torch.device of a --device value, a GPU with its number. Raises BitNetError for one this machine lacks."""
    import torch

    from bitnet.device import indexed

    if name == "auto":
        return indexed("cuda" if torch.cuda.is_available() else "cpu")
    # torch.device would take more (mps, meta), and cut large numbers down to eight bits.
    found = re.fullmatch(r"cpu|cuda(?::([0-9]{1,9}))?", name)
    if found is None:
        raise BitNetError(f"device: got '{name}', expected auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(found[1] or 0) >= (count := torch.cuda.device_count()):
        raise BitNetError(f"device: got '{name}', expected one of the {count} GPUs torch sees; use --device cpu")
    return indexed(name)


def open_model(name: str) -> Any:
    """The source behind a path: the newest save of a run, or any model the formats know."""
    from bitnet.files.opening import open_source
    from bitnet.files.source import TrainedSource
    from bitnet.train.runs.run import Run

    run = Run(Path(name))
    if not run.exists():
        return open_source(name)
    model, save = run.load()
    note_quant_warmup(run, save)
    return TrainedSource(model, run.tokenizer(), {"steps": save.step, "tokens": save.state["tokens"]})


def note_quant_warmup(run: Any, save: Any) -> None:
    """Say that a save is of a model which was not yet trained with its codes alone."""
    if save.quantised < 1 and os.environ.get("RANK", "0") == "0":
        logging.getLogger("bitnet").info(
            f"{run.path}: at step {save.step} its quantisers are {save.quantised:.0%} in; "
            "at its end it loses less by them"
        )


def open_teacher(name: str) -> Any:
    """The model behind a path with its tokenizer, to learn from."""
    from bitnet.files.opening import as_model
    from bitnet.train.initial import Teacher

    source = open_model(name)
    return Teacher(as_model(source), source.tokenizer)


def read_stdin() -> str:
    """The text that a prompt of `-` stands for. Raises BitNetError for bytes that are not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BitNetError(f"prompt: got bytes that are not UTF-8 at {error.start}, expected UTF-8 text") from error
