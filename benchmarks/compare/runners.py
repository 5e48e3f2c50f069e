"""One way to drive what the methods made: time it, score text with it, ask what memory it took.

Dimensions: B windows, T time, V vocabulary.
"""

import json
import subprocess
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bitnet.benchmarks.compare import llama
from bitnet.benchmarks.compare.artifact import Artifact, import_library, read_model
from bitnet.benchmarks.compare.llama_child import memory
from bitnet.benchmarks.compare.method import Settings
from bitnet.engine.base import Engine
from bitnet.engine.load import load
from bitnet.engine.torch import TorchEngine


class Runner(Protocol):
    """A loaded model."""

    def time(self, ids: Tensor, prefill: int) -> dict[str, float]:
        """Seconds of reading the first `prefill` of ids [T], and of reading the rest one by one."""

    def score(self, ids: Tensor) -> Tensor:
        """Ids [B, T] -> logits [B, T, V] fp32."""

    def facts(self) -> dict[str, Any]:
        """peak, before: bytes of the process at most, and before it loaded the model; and what else there is to say."""

    def close(self) -> None:
        """Let go of it."""


class EngineRunner:
    """One of our engines: torch modules, or a packed file."""

    def __init__(self, artifact: Artifact) -> None:
        self._autocast: torch.dtype | None = None
        if artifact.runner == "torch":
            import_library(Path(artifact.path))  # which is runtime, not model
        self._before = memory("VmRSS")
        self.engine: Engine
        if artifact.runner == "torch":
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
            for name, part in (("prefill", ids[:32]), ("decode", ids[32:])):
                with torch.profiler.profile() as profile:
                    session.prefill(part[None])
                longest = max(profile.key_averages(), key=lambda event: event.self_cpu_time_total)
                found[name] = longest.key
        return found

    def close(self) -> None:
        pass


class LlamaRunner:
    """llama.cpp in a child process."""

    def __init__(self, artifact: Artifact, settings: Settings, context: int, scratch: Path) -> None:
        self._logits, self._log = scratch.with_suffix(".logits"), scratch.with_suffix(".log")
        words = ("serve", artifact.path, str(settings.threads), str(context), str(self._logits))
        self._command = llama.command(settings, *words)
        self._facts: dict[str, Any] = {}
        self._child = self._start()
        if self._dies():
            # A build of llama.cpp of 2026 with AMX crashes on weights it has repacked for AMX, at two tokens or more.
            self._child = self._start("--no-repacking")
            self._facts["remark"] = "without weight repacking, with which this build of llama.cpp crashes"

    def _start(self, *more: str) -> "subprocess.Popen[str]":
        with self._log.open("w") as log:
            return subprocess.Popen(
                [*self._command, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def _dies(self) -> bool:
        """Whether the first prefill ends the process by a signal."""
        try:
            self._ask(do="time", ids=[0] * 5, prefill=4)
        except RuntimeError:
            if self._child.wait() >= 0:
                raise
            return True
        return False

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, as its silence says too
            self._child.stdin.write(json.dumps(command) + "\n")
            self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            self._let_go()
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
            raise RuntimeError(f"llama.cpp ended with code {self._child.wait()}: {said[-1]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def time(self, ids: Tensor, prefill: int) -> dict[str, float]:
        return self._ask(do="time", ids=ids.tolist(), prefill=prefill)

    def score(self, ids: Tensor) -> Tensor:
        vocab = self._ask(do="score", rows=ids.tolist())["vocab"]
        values = np.fromfile(self._logits, dtype=np.float32)
        return torch.from_numpy(values).view(*ids.shape, vocab)

    def facts(self) -> dict[str, Any]:
        return self._facts | self._ask(do="memory")

    def _let_go(self) -> None:
        """Close both pipes, which ends a child that is well."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.stdout.close()

    def close(self) -> None:
        self._let_go()
        self._child.wait(timeout=60)
        for path in (self._logits, self._log):
            path.unlink(missing_ok=True)


def open_runner(artifact: Artifact, settings: Settings, context: int, scratch: Path) -> Runner:
    """Load what a method made. scratch: beside this path go the files it needs meanwhile."""
    if artifact.runner == "llama":
        return LlamaRunner(artifact, settings, context, scratch)
    return EngineRunner(artifact)
