"""What a training run survives: kill -9 at random moments, a full disk, a read-only folder, a second writer.

    make reliability                      # KILLS=200; a few minutes on two cores
    python benchmarks/reliability.py --kills 20

Killed runs are started again until they finish, and must then equal a run that was never killed, to the last bit.
After every kill each finished save must verify, and no more than one save interval may be lost; two where saves are
written in the background. The last line of stdout is one JSON document. Exit code 1 where a requirement failed, or
where the time (--minutes) was too short for all kills.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bitnet.benchmarks.bench.machine import describe

INTERVAL, STEPS = 3, 90
SHAPE = "hidden_size=64 intermediate_size=96 num_hidden_layers=2 num_attention_heads=2 num_key_value_heads=1"


def serve() -> None:
    """Fork a process for each request: it starts at once, because all modules are loaded already."""
    import faulthandler
    import resource

    import bitnet.train.pretrain as loop
    from bitnet.cli import main

    loop.plot_run = lambda rows, target, title: []
    while line := sys.stdin.readline():
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.dump_traceback_later(240, exit=True)  # a run takes seconds: this shows where one hangs
            if limit := request.get("limit"):  # bytes that a file may have: longer writes fail as on a full disk
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            if request.get("as_owner"):
                obey_permissions()
            code = main(request["args"])
            os._exit(code)
        print(pid, flush=True)


def obey_permissions() -> None:
    """Give up root's right to ignore permissions (CAP_DAC_OVERRIDE); Linux only. Other users do not have it."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, of capabilities 0 to 31 and 32 to 63
    assert libc.capget(header, sets) == 0, ctypes.get_errno()
    for i in (0, 1, 2):
        sets[i] &= ~(1 << 1)
    assert libc.capset(header, sets) == 0, ctypes.get_errno()


class Trainer:
    """Starts `bitnet train` on a folder, repeatedly."""

    def __init__(self, work: Path) -> None:
        self.work, self.log = work, work / "log"
        words = [random.choice(["fade ", "bag ", "cabbage\n", "hedge "]) for _ in range(2000)]
        (work / "toy.txt").write_text("".join(words))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, out: Path, settings: tuple[str, ...] = (), **how: Any) -> int:
        """Start a run. Returns the id of its process; its parent never waits for it, so the id stays valid."""
        sets = [f"model.{setting}" for setting in (*SHAPE.split(), "max_position_embeddings=32")]
        sets += [f"train.save_every={INTERVAL}", "train.eval_every=7", "train.batch_size=4", *settings]
        flags = f"--data {self.work / 'toy.txt'} --out {out} --steps {STEPS} --tokenizer char --dtype fp32 -q"
        args = ["train", *flags.split(), *[part for setting in sets for part in ("--set", setting)]]
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"args": args, "log": str(self.log), **how}) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def wait(self, pid: int, seconds: float = 300) -> int | None:
        """The exit code, negative for a signal; None where it still runs after so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if state[0] == "Z":
                return os.waitstatus_to_exitcode(int(state[-1]))  # field 52, exit_code, readable by its owner
            time.sleep(0.01)
        return None

    def finish(self, out: Path, settings: tuple[str, ...] = ()) -> None:
        code = self.wait(self.start(out, settings))
        assert code == 0, (code, self.log.read_text())

    def close(self) -> None:
        self._server.kill()
        self._server.wait()


def losses(out: Path) -> list[tuple[int, float, float]]:
    from bitnet.train.runs.run import Run

    return [(row["step"], row["loss"], row["grad_norm"]) for row in Run(out).metrics() if "loss" in row]


_LOST, _LOST_IN_BACKGROUND = "more than an interval lost", "saved in the background: more than two intervals lost"
_BAD = ("damaged saves", _LOST, _LOST_IN_BACKGROUND, "earlier saves lost", "unfinished saves left")
_REFUSED = ("tries", "ended with one line and code 2", "equal after resuming")
_EQUAL = {  # what must have been counted as often as the first of them
    "kill -9": ("runs that finished", "runs equal to the one never killed"),
    "full disk": _REFUSED,
    "read-only folder": _REFUSED,
    "two writers": ("tries", "second one refused", "first one finished", "equal to one alone"),
}


def failures(parts: dict[str, Counter[str]], kills: int) -> list[str]:
    """The requirements that failed, in words."""
    found = []
    for name, counts in parts.items():
        total, *others = _EQUAL[name]
        found += [f"{name}: {counts[bad]} {bad}" for bad in _BAD if counts[bad]]
        found += [f"{name}: {counts[it]} {it}, expected {counts[total]}" for it in others if counts[it] < counts[total]]
    if (done := parts["kill -9"]["kills"]) < kills:
        found.append(f"kill -9: {done} kills, expected {kills}: give it more --minutes")
    return found


def check_saves(out: Path, counts: Counter[str]) -> int:
    """Verify every finished save. Returns the newest one's step."""
    from bitnet.errors import BitNetError
    from bitnet.files.checkpoint import folders, read_save

    newest = 0
    for folder in folders(out / "saves"):
        try:
            newest = max(newest, read_save(folder).step)
            counts["saves verified"] += 1
        except BitNetError as error:
            counts["damaged saves"] += 1
            print(error)
    return newest


def count_lost(out: Path, settings: tuple[str, ...], counts: Counter[str]) -> None:
    """Verify the saves of a killed run, and count whether it lost more steps than it may."""
    newest = check_saves(out, counts)
    done = max((row[0] for row in losses(out)), default=0) if (out / "metrics.jsonl").exists() else 0
    if settings:  # the kill loses a save that is being written in the background, and the next one has not begun
        counts["saved in the background: kills"] += 1
        counts["saved in the background: more than one interval lost"] += done > newest + INTERVAL
        counts[_LOST_IN_BACKGROUND] += done > newest + 2 * INTERVAL
    else:
        counts[_LOST] += done > newest + INTERVAL


def kill_often(trainer: Trainer, work: Path, kills: int, deadline: float) -> Counter[str]:
    """Kill runs at random moments until `kills` are counted, half of them with saves written in the background."""
    counts: Counter[str] = Counter()
    for number in range(10_000):
        settings = ("train.async_save=true",) if number % 2 else ()
        if number < 2:
            began = time.monotonic()
            trainer.finish(work / "straight")  # one for both ways of saving, which change no figure
            whole = max(0.3, time.monotonic() - began)
            if number == 0:
                shutil.rmtree(work / "straight")
                trainer.finish(work / "straight")
        out, code, patience = work / f"killed-{number}", None, 0.7
        while code != 0:
            pid = trainer.start(out, settings)
            if counts["kills"] < kills and time.monotonic() < deadline:
                code = trainer.wait(pid, random.uniform(0.0, patience) * whole)
            else:
                code = trainer.wait(pid)
            if code is not None:
                assert code == 0, (code, trainer.log.read_text())
                break
            saving = any(path.suffix == ".tmp" for path in (out / "saves").glob("*"))
            os.kill(pid, signal.SIGKILL)
            trainer.wait(pid)
            counts["kills"] += 1
            counts["kills while a save was being written"] += saving
            patience += 0.05
            count_lost(out, settings, counts)
        counts["runs that finished"] += 1
        counts["runs equal to the one never killed"] += same(work / "straight", out)
        shutil.rmtree(out)
        if counts["kills"] >= kills or time.monotonic() >= deadline:
            return counts
    return counts


def same(a: Path, b: Path) -> bool:
    """Whether losses, weights and optimiser state are equal to the last bit."""
    import torch

    from bitnet.files.checkpoint import latest_save

    saves = [latest_save(run / "saves") for run in (a, b)]
    assert saves[0] is not None
    assert saves[1] is not None
    for group in ("model", "optimizer", "random"):
        mine, theirs = (save.tensors(group) for save in saves if save is not None)
        if mine.keys() != theirs.keys() or any(not torch.equal(mine[name], theirs[name]) for name in mine):
            return False
    return losses(a) == losses(b)


def refused(trainer: Trainer, out: Path, counts: Counter[str], **how: Any) -> None:
    """Start a run that cannot write: it must end with one line and exit code 2, and leave the saves as they are."""
    before = check_saves(out, counts)
    code = trainer.wait(trainer.start(out, **how))
    lines = [line for line in trainer.log.read_text().splitlines() if "error:" in line or "Traceback" in line]
    counts["tries"] += 1
    counts["ended with one line and code 2"] += code == 2 and len(lines) == 1 and "Traceback" not in lines[0]
    after = check_saves(out, counts)
    counts["earlier saves lost"] += after < before
    counts["unfinished saves left"] += any(path.suffix == ".tmp" for path in (out / "saves").glob("*"))


def half_done(trainer: Trainer, out: Path) -> None:
    """Make an unfinished run with a few saves."""
    pid = trainer.start(out)
    while trainer.wait(pid, 0.05) is None and len(list((out / "saves").glob("step-????????"))) < 2:
        pass
    os.kill(pid, signal.SIGKILL)
    trainer.wait(pid)


def full_disk(trainer: Trainer, work: Path, tries: int) -> Counter[str]:
    """Files cannot grow beyond a random size: in each try another write of a save fails."""
    counts: Counter[str] = Counter()
    for number in range(tries):
        out = work / f"full-{number}"
        half_done(trainer, out)
        sizes = sorted(path.stat().st_size for path in (out / "saves").glob("*/*.safetensors"))
        refused(trainer, out, counts, limit=random.randrange(20_000, sizes[-1]))
        trainer.finish(out)
        counts["equal after resuming"] += same(work / "straight", out)
    return counts


def read_only(trainer: Trainer, work: Path, tries: int) -> Counter[str]:
    """Nothing in the folder can be written."""
    counts: Counter[str] = Counter()
    for number in range(tries):
        out = work / f"read-only-{number}"
        half_done(trainer, out)
        everything = [out, *out.rglob("*")]
        modes = {path: path.stat().st_mode for path in everything}
        for path in everything:
            path.chmod(0o555 if path.is_dir() else 0o444)
        refused(trainer, out, counts, as_owner=True)
        for path, mode in modes.items():
            if path.exists():
                path.chmod(mode)
        trainer.finish(out)
        counts["equal after resuming"] += same(work / "straight", out)
    return counts


def two_writers(trainer: Trainer, work: Path, tries: int) -> Counter[str]:
    """A second run is started on a folder while the first one trains."""
    counts: Counter[str] = Counter()
    for number in range(tries):
        out = work / f"two-{number}"
        first = trainer.start(out)
        end = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists():
            ended = trainer.wait(first, 0.01)
            assert ended is None, (ended, trainer.log.read_text())
            assert time.monotonic() < end, trainer.log.read_text()
        log, trainer.log = trainer.log, work / "second"
        second = trainer.wait(trainer.start(out))
        counts["tries"] += 1
        counts["second one refused"] += second == 2 and "is being written by process" in trainer.log.read_text()
        trainer.log = log
        counts["first one finished"] += trainer.wait(first) == 0
        counts["equal to one alone"] += same(work / "straight", out)
    return counts


def show(name: str, counts: Counter[str]) -> None:
    print(name)
    for what, count in sorted(counts.items()):
        print(f"  {count:6}  {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--tries", type=int, default=5, help="of each of the other three")
    parser.add_argument("--minutes", type=float, default=8, help="stop killing after so many minutes")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bitnet-reliability-") as folder:
        work = Path(folder)
        work.chmod(0o755)
        trainer = Trainer(work)
        parts: dict[str, Counter[str]] = {}
        try:
            parts["kill -9"] = kill_often(trainer, work, options.kills, began + 60 * options.minutes)
            show("kill -9", parts["kill -9"])
            for name, part in (("full disk", full_disk), ("read-only folder", read_only), ("two writers", two_writers)):
                parts[name] = part(trainer, work, options.tries)
                show(name, parts[name])
        finally:
            trainer.close()
    failed = failures(parts, options.kills)
    report = {name: dict(sorted(counts.items())) for name, counts in parts.items()}
    head = {
        "benchmark": "reliability",
        "command": ["make", "reliability", f"KILLS={options.kills}"],
        "machine": describe(),
    }
    print(json.dumps({**head, "seconds": time.monotonic() - began, "failures": failed, **report}))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
