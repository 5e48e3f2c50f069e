"""Two processes on one machine against one process with the same global batch."""

import contextlib
import json
import math
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, CompletedProcess
from typing import Any

import child_process
import pytest
import torch
import torch.distributed as dist
from torch.distributed import DistNetworkError, DistStoreError
from toy_runs import words

from bitnet.cli import main
from bitnet.files.checkpoint import latest_save
from bitnet.train.parallel.distributed import Processes, first_line, is_lost_process

MODEL = "hidden_size=32 intermediate_size=44 num_hidden_layers=1 num_attention_heads=2 num_key_value_heads=1"
SETTINGS = [
    *"--linear float --dtype fp32 --tokenizer char --steps 5 --optimizer adamw --lr 0.001 --json".split(),
    *"--set train.embedding_lr=0.001 --set train.eval_every=2 --set data.val_fraction=0.1".split(),
    *[part for key in MODEL.split() for part in ("--set", f"model.{key}")],
    *"--set model.max_position_embeddings=16".split(),
]


def arguments(out: Path, *settings: str) -> list[str]:
    return ["train", "--data", str(out.parent / "toy.txt"), "--out", str(out), *SETTINGS, *settings]


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_two_processes_train_as_one(threads: None, tmp_path: Path) -> None:
    (tmp_path / "toy.txt").write_text(words(900))
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 -m bitnet.cli".split()
    two = child_process.run(
        [sys.executable, *torchrun, *arguments(tmp_path / "two", "--batch-size", "2", "--set", "train.accumulate=2")],
        env=child_process.environment(OMP_NUM_THREADS=1),
    )
    assert main(arguments(tmp_path / "one", "--batch-size", "8", "--threads", "1")) == 0

    wanted, got = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["step"] for row in got] == [row["step"] for row in wanted]
    for a, b in zip(wanted, got, strict=True):
        assert a.keys() == b.keys()
        for key in {"loss", "grad_norm", "val_loss"} & a.keys():
            # The same 128 losses and gradients added in another order: 128 * 2^-24 = 8e-6 a step. AdamW turns noise
            # in a tiny gradient into part of a step of 1e-3, so that weights and norms drift a little further.
            assert b[key] == pytest.approx(a[key], rel=1e-5 if key != "grad_norm" else 1e-3), (a["step"], key)
        for key in {"lr", "tokens", "val_tokens", "val_whole"} & a.keys():
            assert a[key] == b[key]
    assert all(math.isfinite(row["loss"]) for row in got if "loss" in row)

    # One result on stdout and one copy of each file: only the main process writes.
    assert json.loads(two.stdout)["steps"] == 5
    assert "2 processes" in two.stderr
    assert two.stderr.count("estimate") == 1
    assert (tmp_path / "two" / "samples.txt").read_text().count("--- step 5") == 1
    save = latest_save(tmp_path / "two" / "saves")
    assert save is not None
    assert save.step == 5
    assert not [name for name in save.tensors("model") if name.startswith("module.")]


@pytest.mark.slow
def test_all_processes_end_when_the_main_process_fails(tmp_path: Path) -> None:
    """Each prints one line and exits with code 2; without that, the others would wait forever."""
    shared = {"OMP_NUM_THREADS": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = child_process.bitnet(*arguments(tmp_path / "run"), "-q")  # there is no toy.txt
    with contextlib.ExitStack() as stack:
        ranks = [child_process.environment(**shared, RANK=rank, LOCAL_RANK=rank) for rank in range(2)]
        started = [stack.enter_context(child_process.started(command, stderr=PIPE, env=env)) for env in ranks]
        for process, part in zip(started, ("toy.txt", "main process"), strict=True):
            code, _, err = child_process.finish(process)
            assert code == 2, err
            (line,) = (line for line in err.splitlines() if line.startswith("bitnet: error:"))
            assert part in line
            assert "Traceback" not in err


# Arguments: what rank 1 does ("dead" or "alive"), then rank 0's START_TIMEOUT and COLLECTIVE_TIMEOUT in milliseconds.
JOINING_RANKS = """
import os, sys, torch
from datetime import timedelta
from bitnet.train.parallel import distributed
from bitnet.train.parallel.distributed import Processes, lost_processes
distributed.START_TIMEOUT, distributed.COLLECTIVE_TIMEOUT = (timedelta(milliseconds=int(word)) for word in sys.argv[2:])
end, held = os.pipe()
if os.fork():
    os.close(end)
    os.environ["RANK"] = "0"
    if sys.argv[1] == "dead":
        os.wait()
else:
    os.close(held)
    os.environ["RANK"] = "1"
    if sys.argv[1] == "dead":
        os._exit(0)
with lost_processes(), Processes(torch.device("cpu")) as processes:
    if processes.rank:
        os.read(end, 1)  # until rank 0 has ended
        os._exit(0)
    processes.all_max(0)
"""


# The network outlives the process group, as when the trainer of a run or the frames of an error still hold it.
LEAVING_RANKS = """
import os, sys, time, torch, torch._dynamo  # before there is a group: functions of it take "the group" as a default
from pathlib import Path
from bitnet.train.parallel.distributed import Processes
os.environ.update(RANK=str(0 if os.fork() else 1))
with Processes(torch.device("cpu")) as processes:
    network = processes.wrap(torch.nn.Linear(2, 2))
    network(torch.ones(2)).sum().backward()
    processes.barrier()
def gloo():
    return [task.name for task in Path("/proc/self/task").iterdir() if "gloo" in (task / "comm").read_text()]
while gloo():  # a thread that was waited for is listed for a moment longer; one that stays runs into the limit
    time.sleep(0.05)
"""


def run_ranks(ranks: str, *words: object) -> CompletedProcess[str]:
    environment = child_process.environment(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return child_process.run([sys.executable, "-c", ranks, *words], check=False, env=environment)


def free_port() -> int:
    """Below those that a system gives to outgoing connections, so that none of them takes it before it is used."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("none of 100 ports is free")


def test_a_rank_that_never_joined_is_not_waited_for() -> None:
    found = run_ranks(JOINING_RANKS, "dead", 2000, 10**8)
    assert found.returncode == 1
    assert "BitNetError: train: another process of this run ended" in found.stderr
    assert "Timed out" in found.stderr.splitlines()[-1]


def test_a_rank_that_joined_is_waited_for_by_the_second_timeout() -> None:
    """Its work may take days, so the timeout for joining no longer applies."""
    found = run_ranks(JOINING_RANKS, "alive", 10**8, 1234)
    assert found.returncode == 1
    assert "BitNetError: train: another process of this run ended" in found.stderr
    assert "Timed out waiting 1234ms" in found.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_nothing_of_a_process_group_is_left_after_it() -> None:
    """Destroyed later, it would hold the GIL that gloo's thread waits for: a deadlock."""
    assert run_ranks(LEAVING_RANKS).returncode == 0


def test_gradients_live_in_the_buckets_that_are_reduced() -> None:
    """Beside them, they would take four more bytes per parameter."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    processes, model = Processes(torch.device("cpu")), torch.nn.Linear(2, 2)
    processes.world_size = 2  # with a world of one, nothing is wrapped
    processes.wrap(model)(torch.ones(2)).sum().backward()
    places = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    processes.__exit__()
    assert len(places) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:9"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:9] Read error [::1]:9: Connection reset by peer"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (DistStoreError("Timed out after 4 seconds waiting for clients. 1/2 clients joined."), True),
        (DistNetworkError("failed to listen: EADDRINUSE, message: address already in use"), False),
        (RuntimeError("gloo: tensor sizes do not match"), False),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_which_errors_are_those_of_a_lost_process(error: Exception, expected: bool) -> None:
    assert is_lost_process(error) is expected
    assert first_line(error) in str(error)
    assert ".cc" not in first_line(error)


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    model = torch.nn.Linear(2, 2)
    with Processes(torch.device("cpu")) as processes:
        assert (processes.world_size, processes.rank, processes.is_main) == (1, 0, True)
        assert processes.wrap(model) is model
        assert float(processes.all_mean(torch.tensor(2.5))) == 2.5
        assert processes.all_max(15) == 15
        processes.barrier()
