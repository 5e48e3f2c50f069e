"""The answer of /info: the engine, its options, and what the model's file contains."""

import contextlib
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from bitnet.engine.base import Engine, SequenceBatch
from bitnet.errors import BitNetError
from bitnet.inspection import inspect_packed
from bitnet.kernels import ops
from bitnet.text.tokenizer import Tokenizer

_WAIT_SECONDS = 0.5  # of the first request for the inspection, which takes less for a small model


class ModelInfo:
    """The answer of /info. The file is inspected once, in a thread that starts with the first request."""

    def __init__(
        self, model: Path, engine: Engine, batch: SequenceBatch, tokenizer: Tokenizer, options: dict[str, str]
    ) -> None:
        self._model, self._lock = model, threading.Lock()
        self._inside: Future[dict[str, Any]] | None = None
        self._info = {
            "name": model.stem,
            "context": batch.limit,
            "sequences": batch.count,
            "slots": batch.count,  # its name in earlier versions
            "chat": tokenizer.chat_template is not None,
            "engine": describe_engine(engine, options),
        }

    def __call__(self) -> dict[str, Any]:
        """JSON values; `inside`, the result of the inspection, is None until that is done."""
        with self._lock:
            if self._inside is None:
                self._inside = Future()
                threading.Thread(target=self._inspect, args=(self._inside,), daemon=True).start()
        with contextlib.suppress(TimeoutError):
            return {**self._info, "inside": self._inside.result(timeout=_WAIT_SECONDS)}
        return {**self._info, "inside": None}

    def _inspect(self, future: Future[dict[str, Any]]) -> None:
        try:
            report = inspect_packed(self._model)
        except BitNetError as error:  # the file has changed since it was loaded
            future.set_result({"error": str(error)})
            return
        del report["file"]  # clients have no business with paths of this machine
        future.set_result(report)


def describe_engine(engine: Engine, options: dict[str, str]) -> dict[str, Any]:
    """Name, kernels and options of an engine as JSON values. options: engine, head and cache of `bitnet.load`."""
    device = torch.device(getattr(engine, "device", "cpu"))
    kernels = getattr(engine, "instruction_set", None)
    if kernels is None:
        kernels = "triton" if engine.name == "triton" else ops.select(device).name
    return {
        "name": engine.name,
        "kernels": kernels,
        "device": str(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "head": options["head"],
        "cache": options["cache"],
    }
