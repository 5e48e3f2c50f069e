"""Stand-ins for the children of `bitnet bench`, and the tiny model that its tests measure."""

import time
from pathlib import Path
from typing import Any

import child_process

from bitnet.benchmarks.bench import device_meter
from bitnet.benchmarks.bench import rows as bench_rows
from bitnet.benchmarks.bench.contenders import Contender
from bitnet.benchmarks.bench.device_meter import DeviceMeter
from bitnet.benchmarks.bench.plan import Test
from bitnet.benchmarks.bench.rows import Subject
from bitnet.benchmarks.bench.series import Budget, Series
from bitnet.benchmarks.children.process import TooSlowError
from bitnet.config import ModelConfig

TINY = ModelConfig(300, 64, 96, 2, 4, 2, 64)
LONG = 600.0  # seconds: a limit that is not reached on any machine
SHORT = 0.2  # seconds: a limit for what never ends


FACTS = {
    "what": "a fake",
    "backend": "fake",
    "weight_bytes": 1000,
    "kv_bytes": 1.0,
    "peak": "torch fp32",
    "peak_bytes": 5,
    "base_bytes": 1,
    "load_seconds": 0.5,
    "remark": "no kernel here",
}


class FakeChild:
    """Answers at once, moving a clock as a contender of its speed would. Speeds are seconds per token."""

    def __init__(self, reading: float, writing: float) -> None:
        self.reading, self.writing = reading, writing
        self.now = 0.0
        self.asked: list[dict[str, Any]] = []
        self.closed = False
        self.fails: Exception | None = None

    def clock(self) -> float:
        return self.now

    def ask(self, do: str, limit: float, **run: int) -> dict[str, Any]:
        self.asked.append({"do": do, "limit": limit, **run})
        prefill = run["prompt"] * self.reading
        decode = run["predict"] * self.writing
        if self.fails:
            raise self.fails
        if run["depth"] * self.reading + prefill + decode > limit:
            raise TooSlowError("fake", limit)
        self.now += run["depth"] * self.reading + prefill + decode
        return {"prefill": prefill, "decode": decode, "joules": None, "peak_bytes": 7}

    def close(self) -> None:
        self.closed = True


def contender(name: str = "fake", ours: bool = False, **changes: Any) -> Contender:
    values = {"script": name, "options": lambda files, threads: {}, "needs": lambda config, test: 0.0, **changes}
    return Contender(name, ours=ours, **values)


def series_of(reading: float, writing: float, budget: Budget, ours: bool = False) -> tuple[Series, FakeChild]:
    child = FakeChild(reading, writing)
    one = Series(contender(ours=ours), TINY, budget, child, dict(FACTS), clock=child.clock)  # type: ignore[arg-type]
    return one, child


class FakeMeter:
    """Answers of a meter; kinds in `hangs` give none."""

    def __init__(self, hangs: set[str]) -> None:
        self.hangs = hangs
        self.asked: list[str] = []

    def ask(self, do: str, limit: float, **command: Any) -> dict[str, Any]:
        kind = command.get("kind", do)
        self.asked.append(kind)
        if kind in self.hangs:
            raise TooSlowError("meter", limit)
        return {"rate": 1e9, "how": "a way"}

    def close(self) -> None:
        self.asked.append("close")


def rows_of(one: Series, test: Test, repetitions: int) -> dict[str, Any]:
    device = DeviceMeter("cpu", lambda: FakeMeter(set()))  # type: ignore[arg-type, return-value]
    device.read({device_meter.working_set(one, test)}, lambda text: None)
    return bench_rows.row(Subject("tiny", TINY, 1, "tiny"), one, device, test, 1, repetitions)


def ended(pid: int, within: float = child_process.LIMIT) -> bool:
    """Whether a process ends (or is a zombie nobody has collected yet)."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False
