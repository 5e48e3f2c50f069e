"""A child process that loads one script and answers its parent: python child.py SCRIPT JSON-OPTIONS PARENT-ID

Standard library only, so that any Python can run it: llama.cpp may live in another environment. SCRIPT is a Python file
that defines

    def load(**options): ...       returns the object that answers; this call is timed
    def prepare(**options): ...    optional: runs before `load`, untimed, and returns further options for it

The object has `facts`, a dict of JSON values, which are the child's first answer. After that each JSON line on stdin
is answered by one on stdout:

    {"do": NAME, ...}                                                         -> object.NAME(...)
    {"do": "measure", "prompt": 512, "predict": 0, "depth": 0, "batch": 1}    -> seconds, joules and memory of one test
    {"do": "memory"}                                                          -> the most memory the child has held

`measure` needs a `Driver`. The child ends when its stdin does and, on Linux, with its parent. Whatever a script prints
goes to stderr.
"""

import ctypes
import json
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

_PR_SET_PDEATHSIG = 1
_POWERCAP = Path("/sys/class/powercap")
_TICKS = 50  # updates of an energy counter, about a millisecond apart, below which a difference is noise


class Driver(Protocol):
    """A loaded engine as a benchmark drives it. Token counts are those of one sequence.

    It may also have `lay_out(prompt, predict)`, called untimed before a test, and, with a "gpu" in its facts,
    `gpu_bytes()`.
    """

    facts: dict[str, Any]

    def start(self, batch: int, depth: int, capacity: int) -> None:
        """Open a session of `batch` sequences of up to `capacity` tokens and read `depth` tokens into it; untimed."""

    def prefill(self, tokens: int) -> None:
        """Read a prompt up to its last logits."""

    def decode(self, tokens: int) -> None:
        """Write so many tokens, one at a time."""


def end_with_parent(parent: int) -> None:
    """End this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before prctl was called
        sys.exit(1)


def memory(field: str) -> int:
    """Bytes of this process: "VmRSS" resident now, "VmHWM" at most, "VmData" of data; without Linux always the peak."""
    path = Path("/proc/self/status")
    if path.exists():
        lines = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
        return int(lines[field].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(path: Path = Path("/proc/self/clear_refs")) -> None:
    """Let "VmHWM" start again from what is resident now; without Linux the peak stays that of the whole process."""
    if path.exists():
        path.write_text("5", encoding="ascii")


def cpu_counters(folder: Path = _POWERCAP) -> list[Path]:
    """RAPL's energy counters of CPU packages; empty where there are none or only root may read them."""
    found = [path for path in sorted(folder.glob("*rapl:*")) if path.name.count(":") == 1]
    return [path for path in found if os.access(path / "energy_uj", os.R_OK)]


class Energy:
    """Joules drawn by the CPU packages (RAPL) or by one GPU (NVML) during a measurement.

    gpu: the GPU's UUID, or None for the CPU.
    """

    def __init__(self, gpu: str | None, folder: Path = _POWERCAP) -> None:
        self._packages = cpu_counters(folder) if gpu is None else []
        self._nvml: Any = None
        self._gpu: Any = None
        if gpu is not None:
            self._nvml, self._gpu = _nvml(gpu)

    def read(self) -> list[int]:
        """Counters: microjoules of each package, or millijoules of the GPU."""
        if self._nvml is not None:
            value = ctypes.c_ulonglong()
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu, ctypes.byref(value))
            return [value.value]
        return [int((path / "energy_uj").read_text()) for path in self._packages]

    def since(self, before: list[int], seconds: float) -> float | None:
        """Joules since `before`; None where there is no counter or the time is too short for it."""
        after = self.read()
        if not after or seconds < _TICKS * 1e-3:
            return None
        if self._nvml is not None:
            return (after[0] - before[0]) / 1e3
        ranges = [int((path / "max_energy_range_uj").read_text()) for path in self._packages]
        return sum((b - a) % (limit + 1) for a, b, limit in zip(before, after, ranges)) / 1e6


def _nvml(uuid: str) -> tuple[Any, Any]:
    """NVML and its handle of a GPU. By UUID: NVML also counts the GPUs that CUDA_VISIBLE_DEVICES hides."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None, None
    handle, probe = ctypes.c_void_p(), ctypes.c_ulonglong()
    failed = (
        library.nvmlInit_v2()
        or library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(handle))
        or library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(probe))
    )
    return (None, None) if failed else (library, handle)


def measure(driver: Driver, energy: Energy, prompt: int, predict: int, depth: int, batch: int) -> dict[str, Any]:
    """Run one test once. Returns the seconds of reading and of writing, the joules of both, and the peak memory."""
    driver.start(batch, depth, depth + prompt + predict)
    if hasattr(driver, "lay_out"):
        driver.lay_out(prompt, predict)
    before = energy.read()
    started = time.perf_counter()
    if prompt:
        driver.prefill(prompt)
    read = time.perf_counter()
    if predict:
        driver.decode(predict)
    ended = time.perf_counter()
    joules = energy.since(before, ended - started)
    return {"prefill": read - started, "decode": ended - read, "joules": joules, "peak_bytes": peak_bytes(driver)}


def peak_bytes(loaded: Any) -> int:
    """The most memory this process has held: on the GPU where the model is there, else resident."""
    on_gpu = loaded.facts.get("gpu") is not None
    return loaded.gpu_bytes() if on_gpu else memory("VmHWM")


def load(script: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What the script loads, and its facts with the time and memory of loading it."""
    module = runpy.run_path(script)
    if "prepare" in module:
        options = options | (module["prepare"](**options) or {})
        reset_peak()
    base = memory("VmRSS")
    started = time.perf_counter()
    loaded = module["load"](**options)
    seconds = time.perf_counter() - started
    base = 0 if loaded.facts.get("gpu") is not None else base
    facts = {"load_seconds": seconds, "base_bytes": base, "peak_bytes": peak_bytes(loaded)}
    return loaded, facts | loaded.facts


def answer_parent(script: str, options: dict[str, Any]) -> None:
    """Load the script, answer with its facts, then answer line by line."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(reply: dict[str, Any]) -> None:
        out.write(json.dumps(reply) + "\n")
        out.flush()

    def report(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
        text = " ".join(str(error).split())
        expected = isinstance(error, (ValueError, OSError, RuntimeError, MemoryError, ImportError))
        answer({"error": text if text and expected else f"{kind.__name__}: {text}"})
        sys.__excepthook__(kind, error, at)

    sys.excepthook = report
    loaded, facts = load(script, options)
    energy = Energy(facts.get("gpu"))
    answer(facts)
    for line in sys.stdin:
        command = json.loads(line)
        action = command.pop("do")
        if action == "measure":
            answer(measure(loaded, energy, **command))
        elif action == "memory":
            answer({"peak_bytes": peak_bytes(loaded)})
        else:
            answer(getattr(loaded, action)(**command))


def main() -> None:
    """Run the script that the arguments name."""
    # Python puts this file's folder first on the path, where its modules would shadow others of the same name.
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if str(Path(path or ".").resolve()) != here]
    end_with_parent(int(sys.argv[3]))
    answer_parent(sys.argv[1], json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
