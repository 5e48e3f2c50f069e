"""What the verbs share: options, and what the words given with them stand for."""

import logging
import os
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
Threads = Annotated[int, typer.Option("-t", "--threads", min=0, help="CPU threads; 0: as torch finds best.")]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
Context = Annotated[int, typer.Option("-c", "--ctx-size", min=0, help="Context in tokens; 0: the model's.")]
Engine = Annotated[str, typer.Option(help="auto (C++ on a CPU, Triton on a GPU), cpu, triton or torch.")]
Force = Annotated[bool, typer.Option("--force", help="Run it although memory looks too small.")]
Head = Annotated[str, typer.Option(help="Head of the C++ engine: file (exact), int8 or int4 (faster).")]
Cache = Annotated[str, typer.Option(help="Keys and values of the C++ engine: fp32 (exact), bf16 or int8.")]


def pick_device(name: str) -> Any:
    """The torch.device of a --device value. Raises BitNetError for one this machine does not have."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BitNetError(f"device: got '{name}', expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise BitNetError(f"device: got '{name}', expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BitNetError(
            f"device: got '{name}', expected one of the {torch.cuda.device_count()} GPUs torch sees; use --device cpu"
        )
    return device


def set_threads(count: int) -> None:
    """Let torch use so many threads; 0 leaves it as it is."""
    if count:
        import torch

        torch.set_num_threads(count)


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


def look_at(name: str) -> Any:
    """What `open_model` would open, as memory sees it; of a run or a packed file no weights are read."""
    from bitnet.files.opening import open_source
    from bitnet.files.packed import read_config
    from bitnet.train.memory import OtherModel
    from bitnet.train.runs.run import Run

    run = Run(Path(name))
    if run.exists():
        return OtherModel(run.saved_shape(), trained=True)
    path = Path(name)
    if path.is_file() and path.suffix == ".safetensors" and not (path.parent / "config.json").is_file():
        return OtherModel(read_config(path), trained=False, mapped=path.stat().st_size)
    return OtherModel(open_source(name).config, trained=False)


def note_quant_warmup(run: Any, save: Any) -> None:
    """Say that a save is of a model which was not yet trained with its codes alone."""
    if save.quantised < 1 and os.environ.get("RANK", "0") == "0":
        logging.getLogger("bitnet").info(
            f"{run.path}: at step {save.step} its quantisers are {save.quantised:.0%} in; "
            "at its end it loses less by them"
        )


def open_teacher(name: str) -> Any:
    """The model behind a path with its tokenizer, to learn from."""
    from bitnet.files.source import as_model
    from bitnet.train.initial import Teacher

    source = open_model(name)
    return Teacher(as_model(source), source.tokenizer)


def read_stdin() -> str:
    """The text that a prompt of `-` stands for. Raises BitNetError for bytes that are not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BitNetError(f"prompt: got bytes that are not UTF-8 at {error.start}, expected UTF-8 text") from error
