"""The parent's end of a contender: start it on its own cores, ask it one thing at a time, and never leave it behind."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bitnet.errors import BitNetError
from bitnet.machine import ROOT, affinity

_WORKER = Path(__file__).with_name("worker.py")
# Read by OpenMP, MKL and OpenBLAS before they have ideas of their own.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DEBUG = "BITNET_BENCH_DEBUG"  # =1: show what contenders print, and their tracebacks
LOAD = 300.0  # seconds until it has loaded, self-test and files included: 2B4T in torch int8 takes 21


class TooSlowError(BitNetError):
    """A contender gave no answer within its time. Its process has been ended."""

    def __init__(self, name: str, limit: float) -> None:
        super().__init__(f"{name}: no answer within {limit:,.3g} s; its process was ended")
        self.limit = limit


class Worker:
    """A running contender on `threads` cores. `facts` are what it said of itself once it had loaded.

    limit: seconds for the load. Raises BitNetError, with its reason, where it cannot load; TooSlowError past the limit.
    """

    def __init__(
        self,
        name: str,
        script: str,
        options: dict[str, Any],
        threads: int,
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
        limit: float = LOAD,
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
            self.facts = self._answer(limit)
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, limit: float, **command: Any) -> dict[str, Any]:
        """Send one command and wait at most `limit` seconds for its answer.

        Raises BitNetError where it fails or has died, TooSlowError past the limit.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"do": do, **command}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self._answer(limit)

    def _answer(self, limit: float) -> dict[str, Any]:
        assert self._process.stdout
        # A timer and not a wait for the pipe: half a line may be in it, and only the end of the process ends that.
        late = threading.Event()

        def cut_off() -> None:
            late.set()
            self._end()

        timer = threading.Timer(limit, cut_off)
        timer.daemon = True
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set():
            raise TooSlowError(self.name, limit)
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
        self._end()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            try:
                pipe.close()
            except BrokenPipeError:  # a command it did not read any more
                continue

    def _end(self) -> None:
        """Kill it and all it has started, unless it was waited for: its number may then be another's."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

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
