"""The parent's end of a contender: start it on its own cores, ask it one thing at a time, and never leave it behind."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bitnet.errors import BitNetError
from bitnet.machine import ROOT, affinity

_WORKER = Path(__file__).with_name("worker.py")
# Read by OpenMP, MKL and OpenBLAS before they have ideas of their own.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DEBUG = "BITNET_BENCH_DEBUG"  # =1: show what contenders print, and their tracebacks


class Worker:
    """A running contender on `threads` cores. `facts` are what it said of itself once it had loaded.

    Raises BitNetError, with its reason, where it cannot load.
    """

    def __init__(
        self,
        name: str,
        script: str,
        options: dict[str, Any],
        threads: int,
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        command = [python, str(_WORKER), script, json.dumps(options), str(os.getpid())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get(DEBUG) else subprocess.DEVNULL,
            text=True,
            env={**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads)), **(environment or {})},
            start_new_session=True,  # Ctrl-C is ours to answer: we end it
        )
        try:
            pin(self._process.pid, threads)
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        """Send one command and wait for its answer. Raises BitNetError where it fails or has died."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"do": do, **command}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BitNetError(f"{self.name}: {answer['error']}")
        return answer

    def _died(self) -> BitNetError:
        code = self._process.wait()
        reason = (
            f"code {code}" if code >= 0 else f"signal {-code}" + (", as when memory runs out" if code == -9 else "")
        )
        return BitNetError(
            f"{self.name}: its process ended with {reason}, expected an answer; leave it out, or see what it says "
            f"with {DEBUG}=1"
        )

    def close(self) -> None:
        """End it at once: it holds nothing worth saving."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            try:
                pipe.close()
            except BrokenPipeError:  # a command it did not read any more
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def pin(process: int, threads: int) -> None:
    """Bind a process to `threads` cores of ours, where the system can and has as many."""
    cores = cores_first()
    if len(cores) >= threads:
        os.sched_setaffinity(process, cores[:threads])


def cores_first(root: Path = ROOT) -> list[int]:
    """The CPUs we may use, one of each core before any second hyperthread; empty where the system cannot tell."""
    seen: Counter[tuple[int, ...]] = Counter()
    places = {}
    for cpu in affinity():
        core = _hyperthreads(cpu, root)
        places[cpu] = seen[core]  # among those that we may use: the first may be another container's, or offline
        seen[core] += 1
    return sorted(places, key=lambda cpu: (places[cpu], cpu))


def _hyperthreads(cpu: int, root: Path) -> tuple[int, ...]:
    """The CPUs that share a core with this one, itself included: "0,128" or "0-1" in a file of Linux."""
    path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    found: list[int] = []
    for part in path.read_text(encoding="ascii").strip().split(",") if path.exists() else ():
        low, _, high = part.partition("-")
        if low:
            found += range(int(low), int(high or low) + 1)
    return tuple(found) or (cpu,)
