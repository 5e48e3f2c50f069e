"""A run that was stopped, killed or damaged resumes, and ends with the same bits as one that was not."""

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any

import child_process
import pytest
import torch
from torch import Tensor
from toy_runs import toy_config, train, words

from bitnet.cli import main
from bitnet.errors import BitNetError
from bitnet.files import checkpoint
from bitnet.files.checkpoint import latest_save, read_save
from bitnet.train.config import RunConfig
from bitnet.train.report.display import Display
from bitnet.train.report.observer import Observer
from bitnet.train.runs.run import Run

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def corpus(tmp_path: Path, seed: int) -> Path:
    path = tmp_path / "toy.txt"
    path.write_text("abcdefgh\n" + words(700))
    return path


def configured(corpus: Path, linear: str = "ternary", **train: Any) -> RunConfig:
    """Twelve steps, saved after every fourth."""
    return toy_config(corpus, model={"linear": linear}, **{"steps": 12, "save_every": 4, "report_every": 5, **train})


class Stopping(Display):
    """Calls `action` after the step with this number."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        super().__init__(quiet=True)
        self._at, self._action = step, action

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] == self._at:
            self._action()


class PowerCut(BaseException):
    """An exception that the loop must not catch."""


def cut() -> None:
    raise PowerCut


def what_counts(run: Path) -> tuple[list[tuple[Any, ...]], dict[str, Tensor]]:
    """Losses, norms, rates of every step and the newest save's tensors."""
    rows = [row for row in Run(run).metrics() if "loss" in row]
    save = latest_save(run / "saves")
    assert save is not None
    tensors = {f"{group}:{k}": v for group in ("model", "optimizer", "random") for k, v in save.tensors(group).items()}
    tensors["step"] = torch.tensor([save.step, save.state["tokens"], save.state["skipped"]])
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["tokens"]) for row in rows], tensors


def assert_equal_runs(a: Path, b: Path) -> None:
    (rows, tensors), (other_rows, others) = what_counts(a), what_counts(b)
    assert rows == other_rows
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


VARIANTS = {
    "ternary-muon": {},
    "binary-adamw-accumulated": {"linear": "binary", "optimizer": "adamw", "accumulate": 2, "batch_size": 2},
    "float-two-stage": {"linear": "float", "schedule": "two-stage", "optimizer": "adamw"},
    "ternary-bf16": {"dtype": "bf16"},
}


# ---- N steps at once against N/2 + N/2 ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
@pytest.mark.parametrize("way", ["SIGTERM", "power cut"])
def test_a_stop_leaves_no_trace(way: str, variant: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    config = configured(corpus, **variant)
    train(config, tmp_path / "straight")
    at = random.randint(5, 11)
    if way == "SIGTERM":
        outcome = train(config, tmp_path / "halves", Stopping(at, lambda: signal.raise_signal(signal.SIGTERM)))
        assert (outcome.signal, outcome.step, outcome.validation) == (signal.SIGTERM, at, None)
        save = latest_save(tmp_path / "halves" / "saves")
        assert save is not None
        assert save.step == at
    else:
        with pytest.raises(PowerCut):
            train(config, tmp_path / "halves", Stopping(at, cut))
        assert len(Run(tmp_path / "halves").metrics()) >= at  # rows after the save, which are written again
    outcome = train(config, tmp_path / "halves")
    assert outcome.signal is None
    assert_equal_runs(tmp_path / "straight", tmp_path / "halves")


def test_the_comparison_sees_a_difference(corpus: Path, tmp_path: Path) -> None:
    """A change of 2^-7 in one matrix at half-time ends in other losses: the tests here can fail."""
    config = configured(corpus)
    train(config, tmp_path / "a")
    train(config, tmp_path / "b", Stopping(6, lambda: signal.raise_signal(signal.SIGINT)))
    save = latest_save(tmp_path / "b" / "saves")
    assert save is not None
    groups = {group: dict(save.tensors(group)) for group in ("model", "optimizer", "random")}
    weight = groups["model"]["model.embed_tokens.weight"]
    weight *= 1 + 2**-7
    checkpoint.write_save(tmp_path / "b" / "saves", save.step, groups, save.state)
    train(config, tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_equal_runs(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("fate", ["gone", "changed"])
def test_a_run_resumes_without_its_text(fate: str, corpus: Path, tmp_path: Path) -> None:
    """The tokens are in the run, so later changes of the files have no effect."""
    config = configured(corpus)
    train(config, tmp_path / "straight")
    train(config, tmp_path / "run", Stopping(6, lambda: signal.raise_signal(signal.SIGTERM)))
    if fate == "gone":
        corpus.unlink()
    else:
        corpus.write_text("hedge " + corpus.read_text())
    train(config, tmp_path / "run")
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


def test_the_random_state_comes_from_the_save(corpus: Path, tmp_path: Path) -> None:
    """Nothing in the loop draws from it today; dropout would."""
    config = configured(corpus)
    train(config, tmp_path / "run", Stopping(6, lambda: signal.raise_signal(signal.SIGTERM)))
    save = latest_save(tmp_path / "run" / "saves")
    assert save is not None
    state = torch.Generator().manual_seed(random.randrange(2**40)).get_state()
    groups = {**{group: save.tensors(group) for group in ("model", "optimizer")}, "random": {"cpu": state}}
    checkpoint.write_save(tmp_path / "run" / "saves", save.step, groups, save.state)
    train(config, tmp_path / "run")
    assert torch.equal(what_counts(tmp_path / "run")[1]["random:cpu"], state)


def test_another_number_of_processes_is_refused(corpus: Path, tmp_path: Path) -> None:
    """Their batches together make a step, so the order of the data depends on their number."""
    config = configured(corpus)
    train(config, tmp_path / "run", Stopping(6, lambda: signal.raise_signal(signal.SIGINT)))
    save = latest_save(tmp_path / "run" / "saves")
    assert save is not None
    groups = {group: save.tensors(group) for group in ("model", "optimizer", "random")}
    state = {**save.state, "sequences": 2 * save.state["sequences"]}  # as two processes would have left it
    checkpoint.write_save(tmp_path / "run" / "saves", save.step, groups, state)
    before = snapshot(tmp_path / "run")
    with pytest.raises(BitNetError, match="8 sequences a step, got 4"):
        train(config, tmp_path / "run")
    assert snapshot(tmp_path / "run") == before


def test_signal_handlers_come_back(corpus: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(configured(corpus), tmp_path / "run", Stopping(2, lambda: signal.raise_signal(signal.SIGINT)))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_ends_the_run_at_once(corpus: Path, tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(configured(corpus), tmp_path / "run", Stopping(3, twice))


def test_more_steps_resume_where_the_run_ended(corpus: Path, tmp_path: Path) -> None:
    train(configured(corpus, steps=5), tmp_path / "run")
    first = [row for row in Run(tmp_path / "run").metrics() if "loss" in row]
    outcome = train(configured(corpus, steps=9), tmp_path / "run")
    rows = [row for row in Run(tmp_path / "run").metrics() if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert rows[:5] == first
    # Warm-up took 80 % of five steps. Of nine it would take longer, but it does not go back.
    assert [row.get("quantised", 1.0) for row in rows] == [0.25, 0.5, 0.75, *[1.0] * 6]
    assert outcome.step == 9
    assert Run(tmp_path / "run").config().train.steps == 9


def test_fewer_steps_do_not_make_a_model_ternary(corpus: Path, tmp_path: Path) -> None:
    """A save records how far quantisation warm-up was, whatever the configuration says later."""
    train(configured(corpus, steps=10), tmp_path / "run", Stopping(4, lambda: signal.raise_signal(signal.SIGTERM)))
    assert train(configured(corpus, steps=4), tmp_path / "run").step == 4
    _, save = Run(tmp_path / "run").load()
    assert save.state["quantised"] == 0.5


def test_a_finished_run_trains_no_further(corpus: Path, tmp_path: Path) -> None:
    train(configured(corpus), tmp_path / "run")
    before = snapshot(tmp_path / "run")
    outcome = train(configured(corpus), tmp_path / "run")
    assert (outcome.step, outcome.trained) == (12, False)
    assert outcome.validation is not None
    assert snapshot(tmp_path / "run") == before  # metrics and samples are not written a second time


def test_after_a_kill_after_the_last_save_the_next_start_writes_the_last_figures(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(corpus, eval_every=5)
    train(config, tmp_path / "straight")
    validate = Observer.validate

    def killed(observer: Observer, step: int, tokens: int | None, **options: Any) -> Any:
        return cut() if tokens is None else validate(observer, step, tokens, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Observer, "validate", killed)
        with pytest.raises(PowerCut):
            train(config, tmp_path / "run")
    for _ in range(2):  # written by the first start, and not again by the second
        train(config, tmp_path / "run")
        validations = [
            [row for row in Run(tmp_path / name).metrics() if "val_loss" in row] for name in ("straight", "run")
        ]
        assert validations[0] == validations[1]
        assert [row["step"] for row in validations[1]] == [5, 10, 12]
        samples = [(tmp_path / name / "samples.txt").read_text() for name in ("straight", "run")]
        assert samples[0] == samples[1]


def test_changed_settings_are_refused_and_nothing_is_touched(corpus: Path, tmp_path: Path) -> None:
    train(configured(corpus), tmp_path / "run")
    before = snapshot(tmp_path / "run")
    with pytest.raises(BitNetError, match=r"train\.lr"):
        train(configured(corpus, lr=0.5), tmp_path / "run")
    assert snapshot(tmp_path / "run") == before
    with pytest.raises(BitNetError, match="'Z'"):  # may change, but the run's characters have no Z
        train(configured(corpus, sample_prompt="Zebra", steps=20), tmp_path / "run")
    assert snapshot(tmp_path / "run") == before


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# ---- saves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [2, 3])
def test_at_least_so_many_saves_are_kept(keep: int, corpus: Path, tmp_path: Path) -> None:
    train(configured(corpus, save_every=2, keep=keep), tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "saves").iterdir())
    assert names == [f"step-{step:08d}" for step in range(12, 0, -2)][:keep][::-1]
    for name in names:
        read_save(tmp_path / "run" / "saves" / name)


def damage(path: Path) -> None:
    """Flip one bit, or cut the file."""
    data = bytearray(path.read_bytes())
    if random.random() < 0.5:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    else:
        del data[random.randrange(len(data)) :]
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
def test_a_damaged_newest_save_is_passed_over(
    file: str, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(corpus)
    train(config, tmp_path / "straight")
    train(config, tmp_path / "run", Stopping(9, lambda: signal.raise_signal(signal.SIGTERM)))
    damage(tmp_path / "run" / "saves" / "step-00000009" / file)
    train(config, tmp_path / "run")
    assert any("step-00000009" in record.message for record in caplog.records)
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


def test_only_damaged_saves_are_an_error_and_stay(corpus: Path, tmp_path: Path) -> None:
    config = configured(corpus)
    train(config, tmp_path / "run")
    for save in (tmp_path / "run" / "saves").iterdir():
        damage(save / "model.safetensors")
    before = snapshot(tmp_path / "run")
    with pytest.raises(BitNetError, match="damaged"):
        train(config, tmp_path / "run")
    assert snapshot(tmp_path / "run") == before


def test_a_partial_save_is_never_picked_up(corpus: Path, tmp_path: Path) -> None:
    config = configured(corpus)
    train(config, tmp_path / "straight")
    train(config, tmp_path / "run", Stopping(6, lambda: signal.raise_signal(signal.SIGTERM)))
    partial = tmp_path / "run" / "saves" / "step-00000008.tmp"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"\0" * 100)
    train(config, tmp_path / "run")
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


def test_other_tokens_than_those_trained_on_are_refused(corpus: Path, tmp_path: Path) -> None:
    config = configured(corpus)
    train(config, tmp_path / "run")
    manifest = tmp_path / "run" / "data" / "manifest.json"
    content = json.loads(manifest.read_text())
    for save in (tmp_path / "run" / "saves").iterdir():
        state = json.loads((save / "state.json").read_text())
        assert state["data"] == content["fingerprint"]
    content["fingerprint"] = "0" * 64
    manifest.write_text(json.dumps(content))
    with pytest.raises(BitNetError, match="are not those the save"):
        train(config, tmp_path / "run")


def test_a_full_disk(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(corpus)
    train(config, tmp_path / "straight")
    write, out = checkpoint.write_tensors, tmp_path / "run"
    train(config, out, Stopping(5, lambda: signal.raise_signal(signal.SIGTERM)))
    before = snapshot(out / "saves")

    def full(path: Path, tensors: Any, metadata: Any) -> None:
        if path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, tensors, metadata)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    capsys.readouterr()
    assert main(["train", "--out", str(out), "-q"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("bitnet: error:")
    assert "No space left" in captured.err
    assert snapshot(out / "saves") == before  # half a save would keep the disk full
    monkeypatch.setattr(checkpoint, "write_tensors", write)
    assert main(["train", "--out", str(out), "-q"]) == 0  # with space again, the same command resumes
    assert_equal_runs(tmp_path / "straight", out)


def test_one_writer_at_a_time(corpus: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.lock():
        before = snapshot(run.path)
        with pytest.raises(BitNetError, match=str(os.getpid())):
            train(configured(corpus), run.path)
        assert snapshot(run.path) == before
    train(configured(corpus), run.path)


def test_metrics_cut_short_are_read_without_the_last_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    rows = [{"step": step, "loss": 1.0 / 3 + step} for step in range(1, 6)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for cut_at in range(text.rindex("{"), len(text) - 1):
        run.metrics_file.write_text(text[:cut_at])
        assert run.metrics() == rows[:4]
    run.rewind(3)
    assert run.metrics() == rows[:3]


def test_samples_after_the_save_are_dropped(tmp_path: Path) -> None:
    run = Run(tmp_path)
    texts = {2: "one\r\nline\n", 4: "", 6: "--- step six\n\nnot a heading\x0b"}
    for step, text in texts.items():
        run.append_sample(step, text)
    before = run.samples_file.read_bytes()
    run.rewind(6)
    assert run.samples_file.read_bytes() == before
    run.rewind(5)
    assert [step for step, _ in run.samples()] == [2, 4]
    run.append_sample(6, texts[6])
    assert run.samples_file.read_bytes() == before


# ---- real processes ----------------------------------------------------------------------------------------

# Imports once and forks for each run: a fresh process without three seconds of imports.
SERVER = """
import json, os, sys
import bitnet.train.command, bitnet.train.pretrain as loop
from bitnet.cli import main
loop.plot_run = lambda rows, target, title: []
while line := sys.stdin.readline():
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = main(request["args"])
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    sys.stdin.readline()  # until then a process that has ended keeps its id: no kill can hit another one
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Processes:
    """Runs `bitnet ARGS` in real processes, one after the other."""

    def __init__(self, log: Path) -> None:
        self.log = log
        environment = child_process.environment(OMP_NUM_THREADS=1)
        self._server = child_process.start([sys.executable, "-c", SERVER], stdin=PIPE, stdout=PIPE, env=environment)

    def start(self, args: list[str]) -> int:
        """Returns the process id."""
        self._say(json.dumps({"args": args, "log": str(self.log)}))
        return int(child_process.line_from(self._server))

    def wait(self) -> int:
        """The exit code of the process; -N when signal N killed it."""
        self._say("")
        return int(child_process.line_from(self._server))

    def close(self) -> None:
        child_process.end(self._server)

    def _say(self, line: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    made = Processes(tmp_path_factory.mktemp("processes") / "log")
    yield made
    made.close()


def command(corpus: Path, out: Path, **train: Any) -> list[str]:
    config = configured(corpus, **train)
    file = corpus.with_name("config.toml")
    file.write_text(config.to_toml())
    return ["train", "--config", str(file), "--out", str(out)]


def steps_written(run: Path) -> list[int]:
    return [row["step"] for row in Run(run).metrics() if "loss" in row]


def has_written(run: Path, step: int) -> bool:
    return max(steps_written(run), default=0) >= step


@pytest.mark.slow
def test_kill_minus_nine_at_any_moment(processes: Processes, corpus: Path, tmp_path: Path) -> None:
    """Killed again and again at random moments, data preparation included, until one run reaches its end."""
    settings = {"steps": 45, "save_every": 3, "eval_every": 7, "report_every": 4, "sample_every": 25}
    processes.start(command(corpus, tmp_path / "straight", **settings))
    began = time.perf_counter()
    assert processes.wait() == 0, processes.log.read_text()
    whole = time.perf_counter() - began
    args, run, kills = command(corpus, tmp_path / "run", **settings), tmp_path / "run", 0
    for attempt in range(200):
        pid = processes.start(args)
        # Longer and longer, so that it ends on a slow disk too.
        time.sleep(random.uniform(0.1, 0.7 + 0.1 * attempt) * whole)
        os.kill(pid, signal.SIGKILL)
        code = processes.wait()
        assert code in (0, -signal.SIGKILL), processes.log.read_text()
        if code == 0 and kills < 2:  # the machine was busier when the straight run was timed
            shutil.rmtree(run)
            whole, kills = whole / 2, 0
            continue
        if code == 0:
            break
        kills += 1
        saves = [path for path in (run / "saves").glob("step-*") if path.suffix != ".tmp"]
        newest = max((read_save(path).step for path in saves), default=0)  # raises when one is not whole
        assert max(steps_written(run), default=0) <= newest + 3, "more than a save interval lost"
    assert code == 0
    assert kills >= 2
    assert_equal_runs(tmp_path / "straight", run)
    assert steps_written(run) == list(range(1, 46))
    final = [row for row in Run(run).metrics() if row.get("val_whole")]
    assert final[-1] == [row for row in Run(tmp_path / "straight").metrics() if row.get("val_whole")][-1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stop_signals_save_and_say_so(
    number: signal.Signals, code: int, processes: Processes, corpus: Path, tmp_path: Path
) -> None:
    args, run = command(corpus, tmp_path / "run", steps=1_000_000, save_every=1_000_000), tmp_path / "run"
    reached = 0
    for _ in range(2):  # the second run resumes from the save of the first
        pid = processes.start(args)
        child_process.wait_until(partial(has_written, run, reached + 3), processes.log.read_text)
        os.kill(pid, number)
        assert processes.wait() == code, processes.log.read_text()
        save = latest_save(run / "saves")
        assert save is not None
        assert save.step == steps_written(run)[-1] > reached
        assert steps_written(run) == list(range(1, save.step + 1))
        reached = save.step
    assert "Traceback" not in processes.log.read_text()
    assert processes.log.read_text().count("run the same command again to resume") >= 2
