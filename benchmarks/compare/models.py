"""One interface to what the methods made: time it, score text with it, ask how much memory it took.

Dimensions: B windows, T time, V vocabulary.
"""

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bitnet.benchmarks.children.child import memory
from bitnet.benchmarks.children.process import Child, DiedError
from bitnet.benchmarks.compare.artifact import Artifact, import_library, read_model
from bitnet.benchmarks.compare.method import Settings
from bitnet.engine.base import Engine
from bitnet.engine.load import load
from bitnet.engine.torch import TorchEngine


class Model(Protocol):
    """A loaded model."""

    def time(self, ids: Tensor, prefill: int) -> dict[str, float]:
        """Seconds of reading the first `prefill` of ids [T], and of reading the rest one by one."""

    def score(self, ids: Tensor) -> Tensor:
        """Ids [B, T] -> logits [B, T, V] fp32."""

    def facts(self) -> dict[str, Any]:
        """JSON values; among them peak and before: bytes of the process at most, and before it loaded the model."""

    def close(self) -> None:
        """Release it."""


class EngineModel:
    """A model in one of our engines: torch modules, or a packed file."""

    def __init__(self, artifact: Artifact) -> None:
        self._autocast: torch.dtype | None = None
        if artifact.loader == "torch":
            import_library(Path(artifact.path))  # before the memory is read: a library counts as runtime, not model
        self._before = memory("VmRSS")
        self.engine: Engine
        if artifact.loader == "torch":
            model, self._autocast = read_model(Path(artifact.path))
            self.engine = TorchEngine(model)
        else:
            self.engine = load(artifact.path, torch.device("cpu"))

    def _context(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast("cpu", self._autocast)

    def time(self, ids: Tensor, prefill: int) -> dict[str, float]:
        session = self.engine.session(1, len(ids))
        with self._context():
            started = time.perf_counter()
            session.prefill(ids[None, :prefill])
            read = time.perf_counter()
            for token in ids[prefill:]:
                session.decode(token[None])
            return {"prefill": read - started, "decode": time.perf_counter() - read}

    def score(self, ids: Tensor) -> Tensor:
        with self._context():
            return self.engine.logits(ids)

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"peak": memory("VmHWM"), "before": self._before, "engine": self.engine.name}
        if isinstance(self.engine, TorchEngine):
            facts["operators"] = self._operators()
        else:
            facts["instruction_set"] = getattr(self.engine, "instruction_set", None)
        return facts

    def _operators(self) -> dict[str, str]:
        """The torch operator that takes most of the time of a prefill and of a decoded token: which kernel runs."""
        ids = torch.zeros(33, dtype=torch.int64)
        session = self.engine.session(1, len(ids))
        found = {}
        with self._context():
            for name, some in (("prefill", ids[:32]), ("decode", ids[32:])):
                with torch.profiler.profile() as profile:
                    session.prefill(some[None])
                longest = max(profile.key_averages(), key=lambda event: event.self_cpu_time_total)
                found[name] = longest.key
        return found

    def close(self) -> None:
        pass


class LlamaModel:
    """A GGUF file in llama.cpp, in a separate child. limit: seconds for each of its answers."""

    def __init__(self, artifact: Artifact, settings: Settings, context: int, logits: Path, limit: float) -> None:
        self._logits, self._limit = logits, limit
        self._python = settings.llama or sys.executable
        self._threads = settings.threads
        self._options: dict[str, Any] = {
            "purpose": "score",
            "path": artifact.path,
            "threads": self._threads,
            "context": context,
            "logits": str(logits),
        }
        self._remark: dict[str, Any] = {}
        self._child = self._start()
        if self._crashes():
            # A build of llama.cpp of 2026 with AMX crashes on weights it has repacked for AMX, at two tokens or more.
            self._child = self._start(repacking=False)
            self._remark["remark"] = "without weight repacking, with which this build of llama.cpp crashes"

    def _start(self, **options: Any) -> Child:
        script, options = "children/llama", self._options | options
        return Child("llama.cpp", script, options, self._threads, self._python, limit=self._limit)

    def _crashes(self) -> bool:
        """Whether the first prefill ends the child by a signal."""
        try:
            self._child.ask("time", self._limit, ids=[0] * 5, prefill=4)
        except DiedError as error:
            self._child.close()
            if error.code >= 0:
                raise
            return True
        return False

    def time(self, ids: Tensor, prefill: int) -> dict[str, float]:
        return self._child.ask("time", self._limit, ids=ids.tolist(), prefill=prefill)

    def score(self, ids: Tensor) -> Tensor:
        vocab = self._child.ask("score", self._limit, rows=ids.tolist())["vocab"]
        values = np.fromfile(self._logits, dtype=np.float32)
        return torch.from_numpy(values).view(*ids.shape, vocab)

    def facts(self) -> dict[str, Any]:
        child = self._child
        peak = child.ask("memory", self._limit)["peak_bytes"]
        known = {"peak": peak, "before": child.facts["base_bytes"]}
        return self._remark | known | {key: child.facts[key] for key in ("library", "features", "load_seconds")}

    def close(self) -> None:
        self._child.close()
        self._logits.unlink(missing_ok=True)


def open_model(artifact: Artifact, settings: Settings, context: int, logits: Path, limit: float) -> Model:
    """Load what a method made. context: positions of a window. logits: a temporary file that llama.cpp writes."""
    if artifact.loader == "llama":
        return LlamaModel(artifact, settings, context, logits, limit)
    return EngineModel(artifact)
