"""Children of the benchmarks: how they answer, what they report, and that none outlives its parent."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from subprocess import PIPE

import child_process
import pytest
from bench_fakes import LONG, SHORT, ended

from bitnet.benchmarks.children import child, process
from bitnet.benchmarks.children.process import Child
from bitnet.errors import BitNetError

FAKE = """
import os, subprocess, sys, time
def prepare(mode, **options):
    if mode == "refuse":
        raise ValueError("got a mode,\\nexpected another")
    if mode == "never loads":
        time.sleep(600)
    bytearray(b"x") * 300_000_000  # more than all that follows
class Fake:
    def __init__(self, mode):
        if mode == "die":
            os._exit(3)
        print("noise on stdout")
        self.facts = {"what": "fake", "backend": "fake", "weight_bytes": 1000, "kv_bytes": 1.0, "peak": "torch fp32"}
        self.calls, self.mode = [], mode
    def start(self, batch, depth, capacity): self.calls.append(["start", batch, depth, capacity])
    def prefill(self, tokens): self.calls.append(["prefill", tokens])
    def decode(self, tokens):
        self.calls.append(["decode", tokens])
        if self.mode == "never answers":
            time.sleep(600)
        if self.mode == "falls":
            os._exit(9)
    def history(self): return {"calls": self.calls, "id": os.getpid(), "path": sys.path}
    def hang(self): time.sleep(600)
    def family(self):
        child = subprocess.Popen(["sleep", "600"])  # holds our stdout open
        print(child.pid, file=open(os.environ["FAMILY"], "w"), flush=True)
        time.sleep(600)
    def fall(self): os._exit(9)
load = Fake
"""


@pytest.fixture
def fake(tmp_path: Path) -> str:
    (tmp_path / "fake.py").write_text(FAKE)
    return str(tmp_path / "fake")


def test_a_child_runs_tests_and_answers(fake: str) -> None:
    with Child("fake", fake, {"mode": "ok"}, threads=1) as one:
        answer = one.ask("measure", LONG, prompt=5, predict=3, depth=7, batch=2)
        assert {"prefill", "decode", "joules", "peak_bytes"} <= set(answer)
        one.ask("measure", LONG, prompt=0, predict=4, depth=0, batch=1)
        history = one.ask("history", LONG)
        expected = [["start", 2, 7, 15], ["prefill", 5], ["decode", 3], ["start", 1, 0, 4], ["decode", 4]]
        assert history["calls"] == expected
        # The folder of worker.py is not on the path: its modules would shadow others.
        assert str(Path(child.__file__).parent) not in history["path"]
        assert one.facts["load_seconds"] >= 0
        assert one.facts["peak_bytes"] > 0
        if sys.platform == "linux":  # what was prepared is no part of it
            assert one.facts["peak_bytes"] < 300_000_000
    assert ended(history["id"])


@pytest.mark.parametrize(
    ("mode", "message"), [("refuse", "got a mode, expected another"), ("die", "ended with code 3")]
)
def test_a_child_that_cannot_load_says_why(mode: str, message: str, fake: str) -> None:
    with pytest.raises(BitNetError, match=rf"fake: .*{message}"):
        Child("fake", fake, {"mode": mode}, threads=1)


def test_a_child_that_dies_is_an_error(fake: str) -> None:
    with Child("fake", fake, {"mode": "ok"}, threads=1) as one, pytest.raises(BitNetError, match="ended with code 9"):
        one.ask("fall", LONG)


def test_an_answer_has_a_limit(fake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that hangs is ended with all that it started."""
    monkeypatch.setenv("FAMILY", str(tmp_path / "child"))
    with Child("fake", fake, {"mode": "ok"}, threads=1) as one:
        pid = one.ask("history", LONG)["id"]
        threading.Thread(target=end_when, args=(one, tmp_path / "child"), daemon=True).start()
        with pytest.raises(BitNetError):
            one.ask("family", LONG)
    assert ended(pid)
    assert ended(int((tmp_path / "child").read_text()))


def end_when(one: Child, written: Path) -> None:
    """Do what the limit does once a file is there: no test waits for a machine's speed."""
    while not (written.exists() and written.read_text().endswith("\n")):
        time.sleep(0.02)
    one._end()


def test_past_its_limit_a_child_is_ended(fake: str) -> None:
    with Child("fake", fake, {"mode": "ok"}, threads=1) as one:
        pid = one.ask("history", LONG)["id"]
        with pytest.raises(process.TooSlowError, match=r"fake: no answer within 0\.2 s") as caught:
            one.ask("hang", SHORT)
        assert caught.value.limit == SHORT
        assert ended(pid)
        with pytest.raises(BitNetError, match="signal 9"):
            one.ask("history", LONG)


def test_past_its_limit_a_load_is_ended(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    pin = process.pin
    monkeypatch.setattr(process, "pin", lambda pid, threads: (started.append(pid), pin(pid, threads)))
    with pytest.raises(process.TooSlowError, match="no answer within"):
        Child("fake", fake, {"mode": "never loads"}, threads=1, limit=SHORT)
    assert ended(*started)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_child_does_not_survive_its_parent(busy: bool, fake: str) -> None:
    code = (
        "import sys, time; from bitnet.benchmarks.children.process import Child\n"
        f"one = Child('fake', {fake!r}, {{'mode': 'ok'}}, threads=1)\n"
        "print(one.ask('history', 600)['id'], flush=True)\n" + ("one.ask('hang', 600)" if busy else "time.sleep(600)")
    )
    with child_process.started([sys.executable, "-c", code], stdout=PIPE) as parent:
        child = int(child_process.line_from(parent))
        parent.kill()
    assert ended(child)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_interrupted(number: signal.Signals, code: int, tiny_model: Path, tmp_path: Path) -> None:
    args = ["bench", "-m", tiny_model, "--backend", "torch", "-p", 60, "-n", 60, "-r", 1000, "-q"]
    environment = child_process.environment(TMPDIR=tmp_path)
    with child_process.started(child_process.bitnet(*args), stdout=PIPE, stderr=PIPE, env=environment) as running:
        listed = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        # The meter and the contender.
        child_process.wait_until(lambda: running.poll() is not None or len(listed.read_text().split()) == 2)
        assert running.poll() is None
        children = [int(child) for child in listed.read_text().split()]
        exit_code, out, _ = child_process.finish(running, number)
    assert exit_code == code
    assert out == ""
    assert all(ended(child) for child in children)
    assert not list(tmp_path.glob("bitnet-bench-*"))


def test_pinned_to_as_many_cores(fake: str) -> None:
    cores = process.cores_first()
    if not cores:
        pytest.skip("this system does not pin")
    assert sorted(cores) == sorted(os.sched_getaffinity(0))
    with Child("fake", fake, {"mode": "ok"}, threads=1) as one:
        assert os.sched_getaffinity(one.ask("history", LONG)["id"]) == {cores[0]}


def test_energy_counters_wrap(tmp_path: Path) -> None:
    for name, value in (("intel-rapl:0", 900), ("intel-rapl:1", 50), ("intel-rapl:0:0", 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(str(value))
        (tmp_path / name / "max_energy_range_uj").write_text("999")
    energy = child.Energy(None, tmp_path)
    before = energy.read()
    assert before == [900, 50]  # packages, not their parts
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100")  # 100 past the end of the range, one step of which is 0
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("80")
    assert energy.since(before, 1.0) == pytest.approx((200 + 30) / 1e6)
    assert energy.since(before, 0.001) is None  # shorter than the counter's updates
    assert child.Energy(None, tmp_path / "nothing").since([], 1.0) is None
