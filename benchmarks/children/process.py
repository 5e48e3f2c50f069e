"""The parent's end of a child process: start it on its own cores, ask it one thing at a time, end it in any case."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bitnet.errors import BitNetError
from bitnet.machine import ROOT, affinity

_CHILD = Path(__file__).with_name("child.py")
_SCRIPTS = Path(__file__).parents[1]
# Read by OpenMP, MKL and OpenBLAS when they start; without them each takes all cores.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DEBUG = "BITNET_BENCH_DEBUG"  # =1: show what children print, and their tracebacks
LOAD = 300.0  # seconds until it has loaded, self-test and files included: 2B4T in torch int8 takes 21
_SHOWN = 4096  # bytes of stderr that are searched for its last line


class ChildError(BitNetError):
    """A child that answered with an error, died, or took too long. `reason` is the message without the child's name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason = reason


class TooSlowError(ChildError):
    """A child gave no answer within `limit` seconds. Its process has been ended."""

    def __init__(self, name: str, limit: float) -> None:
        super().__init__(name, f"no answer within {limit:,.3g} s; its process was ended")
        self.limit = limit


class DiedError(ChildError):
    """A child ended without an answer. `code` is its exit code, negative for a signal."""

    def __init__(self, name: str, code: int, last_line: str) -> None:
        ended = f"code {code}" if code >= 0 else f"signal {-code}" + ", as when memory runs out" * (code == -9)
        super().__init__(
            name,
            f"its process ended with {ended}{f' ({last_line})' if last_line else ''}, expected an answer; leave it "
            f"out, or see its output with {DEBUG}=1",
        )
        self.code = code


class Child:
    """A running child on `threads` cores. `facts` is its first answer, given once it has loaded.

    script: a file without its `.py`, relative to benchmarks/. limit: seconds for the load.
    Raises ChildError, with its reason, where it cannot load; TooSlowError past the limit.
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
        self._stderr = None if os.environ.get(DEBUG) else tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        command = [python, str(_CHILD), str(_SCRIPTS / f"{script}.py"), json.dumps(options), str(os.getpid())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads)), **(environment or {})},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its children
        )
        try:
            pin(self._process.pid, threads)
            self.facts = self._answer(limit)
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, limit: float, **command: Any) -> dict[str, Any]:
        """Send one command and wait at most `limit` seconds for its answer.

        Raises ChildError where it fails, DiedError where it has ended, TooSlowError past the limit.
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
        # A timer, not a wait for the pipe: the pipe may hold half a line, and only the end of the process ends that.
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
            raise ChildError(self.name, answer["error"])
        return answer

    def _died(self) -> DiedError:
        return DiedError(self.name, self._process.wait(), self._last_line())

    def _last_line(self) -> str:
        """The last line of its stderr; empty where that was shown instead of kept."""
        if self._stderr is None:
            return ""
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - _SHOWN))
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def close(self) -> None:
        """End it at once: it holds nothing that has to be saved."""
        self._end()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            with suppress(BrokenPipeError):  # a command that it did not read
                pipe.close()
        if self._stderr is not None:
            self._stderr.close()

    def _end(self) -> None:
        """Kill it and all it has started, unless it was already waited for: its id may then be another process's."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def pin(process: int, threads: int) -> None:
    """Bind a process to `threads` of our cores, where the system allows it and has as many."""
    cores = cores_first()
    if len(cores) >= threads:
        os.sched_setaffinity(process, cores[:threads])


def cores_first(root: Path = ROOT) -> list[int]:
    """The CPUs we may use, one of each core before any second hyperthread; empty where the system does not say."""
    seen: Counter[tuple[int, ...]] = Counter()
    places = {}
    for cpu in affinity():
        core = _hyperthreads(cpu, root)
        places[cpu] = seen[core]  # among those that we may use: the first may be another container's, or offline
        seen[core] += 1
    return sorted(places, key=lambda cpu: (places[cpu], cpu))


def _hyperthreads(cpu: int, root: Path) -> tuple[int, ...]:
    """The CPUs that share a core with this one, itself included. Linux writes them as "0,128" or "0-1"."""
    path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    found: list[int] = []
    for entry in path.read_text(encoding="ascii").strip().split(",") if path.exists() else ():
        low, _, high = entry.partition("-")
        if low:
            found += range(int(low), int(high or low) + 1)
    return tuple(found) or (cpu,)
