"""What `bitnet bench` does with slow contenders, slow kernels and a busy machine. Tests bring clocks and limits."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet import dense_products
from bitnet.benchmarks.bench import command, dense, device_meter, machine, measure, meter, series, table
from bitnet.benchmarks.bench import rows as bench_rows
from bitnet.benchmarks.bench.contenders import Contender, Files
from bitnet.benchmarks.bench.device_meter import DeviceMeter, needed_peaks
from bitnet.benchmarks.bench.plan import Test
from bitnet.benchmarks.bench.random_model import write_random
from bitnet.benchmarks.bench.rows import Subject
from bitnet.benchmarks.bench.series import Budget, Series
from bitnet.benchmarks.children import process
from bitnet.benchmarks.children.process import Child, ChildError, TooSlowError
from bitnet.cli import main
from bitnet.config import ModelConfig
from bitnet.dense_products import Timed, Way
from bitnet.errors import BitNetError
from bitnet.model import linear_parameters

TINY = ModelConfig(300, 64, 96, 2, 4, 2, 64)
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
AMD = {
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"
}  # what oneDNN uses of a CPU that has AVX-512, VNNI and BF16, but no AMX


class FakeChild:
    """Answers at once, and moves a clock as far as a contender of its speed would: seconds a token read and written."""

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


# ---- a contender within its budget


def test_the_short_call_tells_what_a_round_takes() -> None:
    one, child = series_of(0.1, 0.5, Budget(row=60))
    tests = [Test(40, 0), Test(0, 30), Test(20, 10, depth=30)]
    one.calibrate(tests)
    assert [(run["prompt"], run["predict"], run["depth"]) for run in child.asked] == [(16, 2, 0)]
    assert [one.cost[test] for test in tests] == pytest.approx([4.0, 15.0, 10.0])
    assert not one.left_out
    assert all(one.has_time_for(test) for test in tests)


def test_a_row_that_does_not_fit_is_left_out_with_the_rate_that_was_measured() -> None:
    one, child = series_of(0.001, 2.0, Budget(row=60))
    prompt, answer = Test(32, 0), Test(0, 50)
    one.calibrate([prompt, answer])
    assert len(child.asked) == 2  # the first call may have been slow because it was the first
    assert list(one.left_out) == [answer]
    assert one.has_time_for(prompt)
    assert not one.has_time_for(answer)
    macs = linear_parameters(TINY) + TINY.vocab_size * TINY.hidden_size
    macs += 2 * TINY.num_hidden_layers * TINY.hidden_size * sum(range(1, 51)) / 50
    rate = f"{macs / 2.0 / 1e9:.2g} GMAC/s here"
    assert one.left_out[answer] == f"{rate}, one round would take 100 s of its 60 (--budget); no kernel here"


def test_as_many_rounds_as_fit() -> None:
    one, child = series_of(0.0, 1.0, Budget(row=60))
    test = Test(0, 16)
    one.calibrate([test])
    one.warm_up(test, [test])
    rounds = 0
    while one.has_time_for(test):
        assert one.run(test, [test])
        rounds += 1
    assert rounds == 3  # 4 s of warming up and 3 x 16 s; a fourth would end at 68 s
    assert [run["predict"] for run in child.asked] == [2, 4, 16, 16, 16]
    assert one.cut_short[test] == "its 60 s were over (--budget)"
    assert not child.closed


def test_one_round_may_take_the_whole_budget() -> None:
    one, _ = series_of(0.5, 0.0, Budget(row=60))
    test = Test(120, 0)
    one.calibrate([test])
    one.warm_up(test, [test])
    assert one.has_time_for(test)
    one.run(test, [test])
    assert not one.has_time_for(test)
    assert len(one.samples[test]) == 1


def test_the_warm_up_may_show_that_it_does_not_fit() -> None:
    """A short call at an empty context is quicker than one far into it."""
    one, child = series_of(0.5, 0.1, Budget(row=60))
    test = Test(30, 20)
    one.calibrate([test])
    child.writing = 4.0
    one.warm_up(test, [test])
    assert "one round would take 95 s of its 60" in one.left_out[test]
    assert not one.has_time_for(test)


def test_a_call_that_hangs_costs_the_other_tests_of_its_contender_only() -> None:
    one, child = series_of(0.1, 0.1, Budget(row=60))
    first, second, third = tests = [Test(8, 0), Test(0, 8), Test(8, 8)]
    one.calibrate(tests)
    for test in tests:
        one.warm_up(test, tests)
    one.run(first, tests)
    child.writing = 1000.0
    assert not one.run(second, tests)
    assert child.asked[-1]["limit"] == pytest.approx(2 * 60 - 0.4)  # what its warm-up took is spent
    assert child.closed
    assert not any(one.has_time_for(test) for test in tests)
    assert len(one.samples[first]) == 1
    assert set(one.left_out) == {second, third}
    assert "tg8 was ended after 120 s (--budget); no kernel here" in one.left_out[third]
    rows = {test.name: rows_of(one, test, repetitions=5) for test in tests}
    assert rows["pp8"]["median_ts"] == pytest.approx(10.0)
    assert rows["pp8"]["remark"].startswith("1 of 5 rounds: less than ")
    assert (rows["tg8"]["median_ts"], rows["tg8"]["left_out"]) == (None, one.left_out[second])


def test_a_short_call_that_hangs_ends_its_contender() -> None:
    one, child = series_of(1e9, 1.0, Budget(row=60))
    tests = [Test(8, 0), Test(0, 8)]
    one.calibrate(tests)
    assert [run["limit"] for run in child.asked] == [15]
    assert child.closed
    assert set(one.left_out) == {*tests}


@pytest.mark.parametrize("ours", [True, False])
def test_a_failure_of_ours_is_an_error_and_of_another_a_row(ours: bool) -> None:
    one, child = series_of(0.1, 0.1, Budget(), ours)
    test = Test(8, 0)
    child.fails = ChildError("fake", "its process ended with code 3")
    if ours:
        with pytest.raises(BitNetError, match="ended with code 3"):
            one.calibrate([test])
    else:
        one.calibrate([test])
        assert one.left_out == {test: "its process ended with code 3"}


def test_a_short_call_stays_in_a_small_context() -> None:
    one, child = series_of(0.1, 0.1, Budget())
    one.config = TINY.replace(max_position_embeddings=4)
    one.calibrate([Test(4, 0), Test(0, 4)])
    (run,) = child.asked
    assert run["prompt"] > 0
    assert run["predict"] > 0
    assert run["prompt"] + run["predict"] <= 4


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


# ---- what the meter measures


def test_peaks_that_no_row_needs_are_not_measured() -> None:
    prompt, answer, batch = Test(8, 0), Test(0, 8), Test(0, 8, batch=4)
    ours, _ = series_of(0, 0, Budget(), ours=True)
    ours.facts["peak"] = "avx512"
    rival, _ = series_of(0, 0, Budget())
    rival.facts["peak"] = "torch bf16"
    assert needed_peaks([ours, rival], [answer], "cpu") == set()
    assert needed_peaks([ours], [prompt], "cpu") == {"avx512", "torch int8", meter.DOT_PRODUCTS}
    assert needed_peaks([ours], [batch], "cpu") == {"avx512", "torch int8", meter.DOT_PRODUCTS}
    assert needed_peaks([rival], [prompt], "cpu") == {"torch bf16"}
    ours.left_out[prompt] = "too slow"  # then nothing of ours is held against a rival's peak
    assert needed_peaks([ours, rival], [prompt], "cpu") == {"torch bf16"}


def test_a_peak_that_hangs_costs_that_peak_only() -> None:
    meters: list[FakeMeter] = []

    def start() -> Any:
        meters.append(FakeMeter({"b"}))
        return meters[-1]

    device = DeviceMeter("cpu", start)
    for _ in range(2):
        device.product({"a", "b", "c"}, lambda text: None)
    assert device.peaks == {"a": 1e9, "b": None, "c": 1e9}
    assert [one.asked for one in meters] == [["a", "b", "close"], ["c", "a", "c"]]


@pytest.mark.parametrize(
    ("rate", "calls"), [(0.03e9, [3]), (1e9, [6, 6, 6]), (100e9, [6, 6, 6, 6])], ids=["slow", "middling", "fast"]
)
def test_a_peak_takes_its_seconds(rate: float, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest shape comes first; dearer ones only where the time that is left is enough for them."""
    clock = [0.0]
    ran: dict[tuple[int, int, int], int] = {}

    def make(m: int, n: int, k: int) -> Callable[[], object]:
        def product() -> None:
            ran[m, n, k] = ran.get((m, n, k), 0) + 1
            clock[0] += m * n * k / rate

        return product

    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(meter.Meter, "_makes", lambda self, kind: {"the way": make})
    answer = meter.Meter(torch.get_num_threads(), "cpu").product("torch int8")
    assert answer == {"rate": pytest.approx(rate), "how": "the way"}
    assert list(ran.values()) == calls
    shapes = [m * n * k for m, n, k in ran]
    assert shapes == sorted(shapes)
    assert clock[0] < 2 * meter.PRODUCT_SECONDS


# ---- torch's products: the faster way


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def way(name: str, clock: Clock, rate: Callable[[int, int], float], calls: list[tuple[str, int]], off: int = 0) -> Way:
    """An exact product that takes its time by a clock. rate(rows, out-features): multiply-adds a second."""

    def make(weight: Tensor) -> Callable[[Tensor], Tensor]:
        def product(x: Tensor) -> Tensor:
            calls.append((name, weight.shape[0]))
            clock.now += x.shape[0] * weight.numel() / rate(x.shape[0], weight.shape[0])
            return (x.double() @ weight.double().T + off).float()

        return product

    return Way(name, make)


def refusing(weight: Tensor) -> Callable[[Tensor], Tensor]:
    raise RuntimeError("could not create\na primitive")


def test_reference_code_is_left_out_after_a_small_product() -> None:
    clock, calls = Clock(), []
    slow = way("prepacked", clock, lambda rows, n: 0.03e9, calls)
    quick = way("float", clock, lambda rows, n: 300e9, calls)
    timed = dense_products.compare("int8", 32, 1024, 512, [slow, quick], clock)
    assert [one.way.name for one in timed] == ["float", "prepacked"]
    assert timed[1].rate == pytest.approx(0.03e9)
    assert {n for name, n in calls if name == "prepacked"} == {256}  # never at the size that was asked about
    assert clock.now < 1.0
    assert dense_products.remark(timed) == "prepacked runs reference code here, 0.03 GMAC/s"


def test_neighbours_are_timed_at_the_size_that_is_asked_about() -> None:
    """Which is the faster one may differ between a small product and a large one."""
    clock, calls = Clock(), []
    first = way("first", clock, lambda rows, n: 100e9 if n > 256 else 50e9, calls)
    second = way("second", clock, lambda rows, n: 60e9, calls)
    assert dense_products.probe("int8", [first, second], clock)[0].way is second
    timed = dense_products.compare("int8", 32, 1024, 512, [first, second], clock)
    assert [one.way for one in timed] == [first, second]
    assert dense_products.remark(timed) == ""


def test_a_large_product_is_cut_where_the_cpu_is_slow() -> None:
    clock, calls = Clock(), []
    ways = [way(name, clock, lambda rows, n: 0.03e9, calls) for name in ("first", "second")]
    dense_products.compare("int8", 128, 13824, 512, ways, clock)
    assert max(n for _, n in calls) < 13824
    assert clock.now < 2.0


def test_ways_that_cannot_run_or_are_wrong_are_said() -> None:
    clock, calls = Clock(), []
    wrong = way("wrong", clock, lambda rows, n: 900e9, calls, off=1)
    right = way("right", clock, lambda rows, n: 1e9, calls)
    timed = dense_products.compare("int8", 1, 64, 64, [wrong, Way("absent", refusing), right], clock)
    assert [one.way.name for one in timed if one.rate] == ["right"]
    said = dense_products.remark(timed)
    assert "wrong computes wrong sums here" in said
    assert "absent cannot run here: could not create a primitive" in said


def timings(**rates: float) -> list[Timed]:
    return [Timed(Way(name, refusing), rate) for name, rate in rates.items()]


@pytest.mark.parametrize(
    ("few", "many", "two", "chosen"),
    [
        (timings(a=9, b=5), timings(a=9, b=5), True, ("a", "a")),
        (timings(a=9, b=5), timings(a=5, b=9), True, ("a", "b")),
        (timings(a=9, b=5), timings(a=5, b=8), False, ("a", "a")),  # no room for two layouts: the better one in all
        (timings(a=9, b=8.9), timings(a=9, b=9.1), True, ("a", "a")),  # that close is noise
        (timings(a=9, b=0.1), timings(a=5, b=9), True, ("a", "b")),
        (timings(a=9, b=0.1), timings(a=0.1, b=9), False, ("a", "b")),  # each is far behind somewhere
    ],
    ids=["one", "two", "no room", "noise", "reference-few", "reference-both"],
)
def test_choice_of_ways(few: list[Timed], many: list[Timed], two: bool, chosen: tuple[str, str]) -> None:
    assert dense.choose(few, many, two) == chosen


def test_no_way_at_all_is_said() -> None:
    none = [Timed(Way("a", refusing), None, "cannot run here: no such CPU")]
    with pytest.raises(BitNetError, match="a cannot run here: no such CPU"):
        dense.choose(none, none, True)


@pytest.mark.parametrize("dtype", ["int8", "bf16", "fp32"])
def test_every_way_of_this_torch_computes_the_product(dtype: str, rng: torch.Generator) -> None:
    able = [one.way for one in dense_products.probe(dtype) if one.rate]
    assert able
    print("not on this machine:", [one.why_not for one in dense_products.probe(dtype) if not one.rate] or "none")
    for one, (m, n, k) in itertools.product(able, ((1, 33, 65), (3, 64, 100), (17, 5, 256))):
        x, w = (torch.randint(-1, 2, size, generator=rng, dtype=torch.int8) for size in ((m, k), (n, k)))
        x = x * 127 if dtype == "int8" else x.to({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
        w = w if dtype == "int8" else w.to(x.dtype)
        # Sums of ternary weights stay below 2^15 in int8, and below 2^8, which bf16 holds exactly, in floats.
        assert torch.equal(one.make(w)(x).double(), x.double() @ w.double().T), (one.name, m, n, k)


# ---- real processes

SLOW = """
import time
class Slow:
    def __init__(self, mode):
        if mode == "never loads":
            time.sleep(600)
        self.mode = mode
        self.facts = {"what": mode, "backend": mode, "weight_bytes": 1000, "kv_bytes": 1.0, "peak": "torch fp32"}
    def start(self, batch, depth, capacity): pass
    def prefill(self, tokens): pass
    def decode(self, tokens):
        if self.mode == "never writes":
            time.sleep(600)
load = Slow
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Process numbers by name; what never ends has a short limit and everything else a long one."""
    found: dict[str, int] = {}

    class Limited(Child):
        def __init__(self, name: str, *args: Any, **options: Any) -> None:
            super().__init__(name, *args[:5], limit=0.2 if name == "never loads" else 600.0)
            found[name] = self._process.pid

        def ask(self, do: str, limit: float, **command: Any) -> dict[str, Any]:
            return super().ask(do, 0.2 if self.name == "never writes" else 600.0, **command)

    monkeypatch.setattr(series, "Child", Limited)
    return found


def test_a_contender_that_hangs_is_a_row_and_others_keep_their_figures(
    started: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setattr(machine, "MEMORY", 2**20)
    names = ("well", "never loads", "never writes")
    lined_up = [
        contender(name, script=str(tmp_path / "slow"), options=lambda files, threads, name=name: {"mode": name})
        for name in names
    ]
    said: list[str] = []
    rows, reports = measure.group(
        Subject("tiny", TINY, 1, "tiny"),
        Files(*[tmp_path / "none"] * 3),
        lined_up,
        [Test(0, 3)],
        1,
        2,
        Budget(),
        lambda text: None,
        said.append,
    )
    found = {row["backend"]: row for row in rows}
    assert set(found) == {*names}
    assert len(found["well"]["samples_ts"]) == 2
    assert found["well"]["left_out"] is None
    assert found["never loads"]["left_out"] == "not loaded within 300 s"
    assert "ended after" in found["never writes"]["left_out"]
    assert all(found[name]["median_ts"] is None for name in names[1:])
    assert [line.partition(" on ")[2].partition(":")[0] for line in said] == ["well"]
    assert reports[0]["gigamacs_per_second"] == {}  # nothing but answers: no peak is needed
    for name in ("well", "never writes"):
        assert not Path(f"/proc/{started[name]}").exists()


def verbose(code: str, **environment: str) -> str:
    """What oneDNN says it runs."""
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, "ONEDNN_VERBOSE": "1", **environment},
    )
    return done.stdout


def has_amx_only_int8() -> bool:
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False


PREPACKED = """
import torch
from bitnet import dense_products
way = dense_products.ways("int8")[0]
x, w = dense_products.operands("int8", 16, 256, 256)
way.make(w)(x)
"""


@pytest.mark.skipif(not has_amx_only_int8(), reason="needs a CPU with AVX512-BF16 to be limited to it")
def test_a_cpu_without_amx_runs_reference_code() -> None:
    """The case that is emulated below is the real one: oneDNN's own name for it."""
    assert "matmul,ref_int8" in verbose(PREPACKED, **AMD)


def test_bench_on_a_cpu_without_amx_ends_and_takes_the_faster_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in AMD.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "MEMORY", 2**20)
    write_random(TINY, tmp_path / "m.safetensors")
    args = ["bench", "-m", str(tmp_path / "m.safetensors"), "--backend", "torch", "--against", "torch-int8"]
    args += ["-p", "20", "-n", "3", "-t", "1", "-r", "1", "-q", "-o", "json"]
    monkeypatch.setattr(sys, "argv", ["bitnet", *args])
    assert main(args) == 0
    document = json.loads(capsys.readouterr().out)
    rivals = [row for row in document["results"] if row["backend"] == "torch-int8"]
    assert len(rivals) == 2
    for row in rivals:
        if row["left_out"]:
            assert "GMAC/s here" in row["left_out"]
        else:
            assert "torch._int_mm" in row["what"]
    if has_amx_only_int8():
        assert all("onednn.qlinear_pointwise runs reference code here" in row["what"] for row in rivals)
        assert document["measured"][0]["gigamacs_of"].get("torch int8") in (None, "_int_mm")


# ---- what is shown


def test_nothing_measured_at_all_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = series_of(0.0, 100.0, Budget(row=1))
    test = Test(0, 3)
    one.calibrate([test])
    row = bench_rows.row(
        Subject("tiny", TINY, 1, "tiny"), one, DeviceMeter("cpu", lambda: pytest.fail("asked")), test, 1, 2
    )
    monkeypatch.setattr(measure, "group", lambda *args: ([row], []))
    write_random(TINY, tmp_path / "m.safetensors")
    monkeypatch.setattr(sys, "argv", ["bitnet", "bench"])
    assert main(["bench", "-m", str(tmp_path / "m.safetensors"), "-t", "1"]) == 2


def left_out_beside(tests: list[Test]) -> list[dict[str, Any]]:
    quick, _ = series_of(0.01, 0.01, Budget(row=60))
    slow, _ = series_of(5.0, 5.0, Budget(row=60))
    rows = []
    for one, name in ((quick, "quick"), (slow, "slow")):
        one.facts["backend"] = name
        one.calibrate(tests)
        for test in tests:
            if one.has_time_for(test):
                one.warm_up(test, tests)
                one.run(test, tests)
            rows.append(rows_of(one, test, repetitions=1))
    return rows


def test_tables_show_what_was_left_out() -> None:
    rows = left_out_beside([Test(0, 30)])
    assert [row["left_out"] is None for row in rows] == [True, False]
    lines = table.results_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "remark" in lines[0]
    assert "left out" in lines[3]
    assert "would take 150 s of its 60" in lines[3]
    header, *cells = table.as_csv(rows).splitlines()
    assert "left_out" in header.split(",")
    assert "would take 150 s" in cells[1].replace('"', "")
    assert set(rows[0]) == set(rows[1])
    assert json.loads(json.dumps(rows)) == rows


def test_pictures_leave_it_out(tmp_path: Path) -> None:
    plot = pytest.importorskip("bitnet.benchmarks.bench.plot")
    pytest.importorskip("matplotlib")
    rows = left_out_beside([Test(8, 0), Test(0, 30)])
    for path in plot.draw({"results": rows}, tmp_path / "run.svg"):
        content = path.read_text()
        assert "quick" in content
        assert "slow" not in content


# ---- a busy machine


@pytest.mark.parametrize(
    ("others", "busy"), [(0.1, False), (1.3, True), (None, False)], ids=["quiet", "busy", "unknown"]
)
def test_a_busy_machine_is_said(others: float | None, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "busy", lambda cpus: others)
    monkeypatch.setattr(command, "load", lambda: 2.5)
    told = command.load_of([0, 1])
    assert told == {"others": others, "cpus": 2, "average": 2.5, "busy": busy}
    if others is not None:
        line = table.load_line(told)
        assert line.startswith("a busy machine") == busy
        assert f"{others:.1f} of 2 CPUs busy; load average 2.5" in line


def test_bench_warns_of_a_busy_machine_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any) -> Any:
        raise BitNetError("measuring begins")

    monkeypatch.setattr(command, "busy", lambda cpus: 0.9 * len(cpus))
    monkeypatch.setattr(measure, "group", stop)
    monkeypatch.setattr(sys, "argv", ["bitnet", "bench"])
    write_random(TINY, tmp_path / "m.safetensors")
    assert main(["bench", "-m", str(tmp_path / "m.safetensors"), "-t", "1"]) == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "a busy machine" in first
    assert "measuring begins" in second


@pytest.mark.parametrize(("words", "row", "load"), [([], 120, 300), (["--budget", "900"], 900, 900)])
def test_the_budget_is_an_option(words: list[str], row: float, load: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Budget] = []

    def run(settings: command.Settings, *args: Any) -> Any:
        seen.append(settings.budget)
        raise BitNetError("enough")

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(sys, "argv", ["bitnet", "bench", *words])
    assert main(["bench", *words]) == 2
    assert [(one.row, one.load) for one in seen] == [(row, load)]
    assert process.LOAD == 300
