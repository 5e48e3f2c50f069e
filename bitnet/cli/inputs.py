"""What the words on a command line refer to: a model by its path, a prompt on standard input."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

from bitnet.errors import BitNetError


def open_model(name: str) -> Any:
    """The model source at a path: the newest save of a run, or any format that `bitnet import` reads."""
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
    """The shape of what `open_model` would open, for checks of memory; no weights of a run or packed file are read."""
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
    """Log that a save was made during the quantisation warm-up; on the main process only."""
    if save.quantised < 1 and os.environ.get("RANK", "0") == "0":
        logging.getLogger("bitnet").info(
            f"{run.path}: at step {save.step} the quantisation warm-up is at {save.quantised:.0%}; "
            "quantising costs less quality once training is complete"
        )


def open_teacher(name: str) -> Any:
    """The model at a path with its tokenizer, as a teacher for distillation."""
    from bitnet.files.opening import as_model
    from bitnet.train.initial import Teacher

    source = open_model(name)
    return Teacher(as_model(source), source.tokenizer)


def read_stdin() -> str:
    """The text on standard input, for a prompt of `-`. Raises BitNetError for bytes that are not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BitNetError(f"prompt: got bytes that are not UTF-8 at {error.start}, expected UTF-8 text") from error
