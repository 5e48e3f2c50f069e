"""Several processes against one: losses with the same bits, saves that any number of them resumes from, a lost one."""

import json
import random
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import child_process
import pytest
import torch
import torch.distributed as dist
from compiler import why_no_compiler
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from toy_runs import words

from bitnet.cli import main
from bitnet.config import PRESETS, ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.checkpoint import latest_save
from bitnet.files.packed import read_packed
from bitnet.files.tensors import embedding_parameters, linear_parameters, norm_parameters, parameters
from bitnet.model import Transformer
from bitnet.quant import training_precision
from bitnet.train import network
from bitnet.train.config import TrainConfig
from bitnet.train.parallel.batches import micro_batches, rank_sequences, sequences_per_step
from bitnet.train.parallel.distributed import Processes
from bitnet.train.runs.run import Run
from bitnet.train.schedule import quantised_fraction

STEPS, HALF = 50, 25
# Gains in two halves are whole vectors of 16 numbers: torch's fused AdamW rounds a tail another way than vectors.
SHAPE = "hidden_size=64 intermediate_size=96 num_hidden_layers=2 num_attention_heads=2 num_key_value_heads=1"

# Imports once and forks the ranks of each run; `cut`: the rank that dies, the pattern of the file or folder in a save
# that it was about to sync, and the step that training has to reach first (0: none), which a thread waits for.
SERVER = """
import faulthandler, json, os, signal, sys, time
from fnmatch import fnmatch
import bitnet.train.command, bitnet.train.pretrain as loop
from bitnet.files import checkpoint
from bitnet.cli import main
loop.plot_run = lambda rows, target, title: []
def dying(sync, pattern, step):
    def synced(path):
        if fnmatch(path, pattern):
            while step and f'"step": {step},' not in (path.parents[2] / "metrics.jsonl").read_text():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)
    return synced
while line := sys.stdin.readline():
    request = json.loads(line)
    pids = []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        if request["ranks"] > 1:
            os.environ.update({k: str(v) for k, v in {"WORLD_SIZE": request["ranks"], "RANK": rank, "LOCAL_RANK": rank,
                              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": request["port"]}.items()})
        log = os.open(f"{request['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if request["cut"] and rank == request["cut"][0]:
            checkpoint.sync = dying(checkpoint.sync, *request["cut"][1:])
        faulthandler.dump_traceback_later(400, exit=True)  # a hang; compiling takes a minute on a busy machine
        code = main(request["args"])
        sys.stdout.flush()
        os._exit(code)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


Cut = tuple[int, str, int]
RANKS_LIMIT = 1000  # seconds: compiling takes most of a minute; before, `faulthandler` shows where a rank hangs


class Ranks:
    """Runs `bitnet ARGS` as one process, or as several that form a group."""

    def __init__(self, log: Path) -> None:
        self.log = log
        # What is compiled is compiled here, and once; by this process: a pool would import torch in others.
        cache = {"TORCHINDUCTOR_CACHE_DIR": log.with_name("compiled"), "TORCHINDUCTOR_COMPILE_THREADS": 1}
        environment = child_process.environment(**cache, OMP_NUM_THREADS=1)
        self._server = child_process.start([sys.executable, "-c", SERVER], stdin=PIPE, stdout=PIPE, env=environment)

    def __call__(self, ranks: int, args: list[str], cut: Cut | None = None) -> list[int]:
        """Exit codes by rank."""
        codes = self._start(ranks, args, cut)
        if ranks > 1 and "address already in use" in self.log_of(0):
            codes = self._start(ranks, args, cut)
        return codes

    def _start(self, ranks: int, args: list[str], cut: Cut | None) -> list[int]:
        port = random.randrange(20_000, 32_000)  # below those that a system gives to outgoing connections
        request = {"ranks": ranks, "args": args, "port": port, "log": str(self.log), "cut": cut}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return list(json.loads(child_process.line_from(self._server, RANKS_LIMIT)))

    def log_of(self, rank: int) -> str:
        return Path(f"{self.log}.{rank}").read_text()

    def close(self) -> None:
        child_process.end(self._server)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    made = Ranks(tmp_path_factory.mktemp("ranks") / "log")
    yield made
    made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("scale")
    (made / "toy.txt").write_text(words(1500))
    return made


def arguments(folder: Path, out: str, *settings: str, steps: int = STEPS, dtype: str = "fp32") -> list[str]:
    sets = [f"model.{setting}" for setting in (*SHAPE.split(), "max_position_embeddings=16")]
    sets += [f"train.save_every={HALF}", "train.eval_every=0", "train.global_batch=4", *settings]
    flags = f"--data {folder / 'toy.txt'} --out {folder / out} --tokenizer char --dtype {dtype} --steps {steps} -q"
    return ["train", *flags.split(), "--batch-size", "2", *[part for s in sets for part in ("--set", s)]]


def rows(folder: Path, out: str, after: int = 0) -> list[tuple[float, ...]]:
    """(step, loss, gradient norm) of the steps, and the last validation."""
    found = [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["step"], row["loss"], row["grad_norm"]) for row in found if "loss" in row and row["step"] > after]
    return [*steps, *[(row["step"], row["val_loss"]) for row in found if "val_loss" in row]]


def half(folder: Path, run: str, copy: str) -> str:
    """A copy of a finished run as it was after the save at half-time."""
    shutil.copytree(folder / run, folder / copy)
    shutil.rmtree(folder / copy / "saves" / f"step-{STEPS:08d}")
    return copy


@pytest.fixture(scope="module")
def runs(ranks: Ranks, folder: Path) -> Path:
    """The same settings three times: one process, two with the whole model, two with half of its state each."""
    assert ranks(1, arguments(folder, "one")) == [0], ranks.log_of(0)
    assert ranks(2, arguments(folder, "ddp")) == [0, 0], ranks.log_of(0) + ranks.log_of(1)
    assert ranks(2, arguments(folder, "fsdp", "train.parallel=fsdp")) == [0, 0], ranks.log_of(0) + ranks.log_of(1)
    return folder


def test_two_processes_are_one_to_the_last_bit(runs: Path) -> None:
    """Both add the same two gradients of two sequences each; flips of codes and of bf16 would amplify any noise."""
    wanted = rows(runs, "one")
    assert len(wanted) == STEPS + 1
    assert wanted[STEPS - 1][1] < wanted[0][1] - 0.3  # it learns: the comparison is of something
    assert rows(runs, "ddp") == wanted
    assert rows(runs, "fsdp") == wanted


def test_saves_of_all_runs_hold_the_same_weights(runs: Path) -> None:
    for name in ("ddp", "fsdp"):
        assert_same_save(runs / name, runs / "one")


def assert_same_save(run: Path, wanted: Path) -> None:
    """The newest saves of two runs hold the same bits, whoever wrote them."""
    saves = [latest_save(path / "saves") for path in (run, wanted)]
    assert saves[0] is not None
    assert saves[1] is not None
    assert saves[0].step == saves[1].step
    for group in ("model", "optimizer", "random"):
        got, expected = (save.tensors(group) for save in saves if save is not None)
        assert got.keys() == expected.keys()
        assert [name for name, value in expected.items() if not torch.equal(got[name], value)] == []


def test_a_shard_holds_half_and_torch_reads_it(runs: Path) -> None:
    save = latest_save(runs / "fsdp" / "saves")
    assert save is not None
    sizes = [path.stat().st_size for path in sorted(save.path.glob("shard-*-model-*"))]
    assert len(sizes) == 2
    assert abs(sizes[0] - sizes[1]) < 0.1 * max(sizes)
    state = {name: torch.empty_like(value) for name, value in save.tensors("model").items()}
    with pytest.warns(UserWarning, match="single process"):
        load(state, storage_reader=HuggingFaceStorageReader(str(save.path)), no_dist=True)
    assert all(torch.equal(value, save.tensors("model")[name]) for name, value in state.items())


def test_a_run_of_shards_packs_as_one_of_one_process(runs: Path) -> None:
    for name in ("one", "fsdp"):
        assert main(["pack", str(runs / name), "-o", str(runs / f"{name}.safetensors")]) == 0
    one, shards = (read_packed(runs / f"{name}.safetensors").tensors for name in ("one", "fsdp"))
    assert one.keys() == shards.keys()
    assert all(torch.equal(one[name], shards[name]) for name in one)


def test_saved_on_two_ranks_resumes_on_one(ranks: Ranks, runs: Path) -> None:
    copy = half(runs, "fsdp", "two-to-one")
    assert ranks(1, arguments(runs, copy, "train.parallel=fsdp")) == [0], ranks.log_of(0)
    assert rows(runs, copy) == rows(runs, "one")


def test_a_resumed_run_draws_no_random_weights(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = half(runs, "one", "undrawn")
    monkeypatch.setattr(Transformer, "fresh_weights", None)
    monkeypatch.setattr("bitnet.train.pretrain.plot_run", lambda rows, target, title: [])
    assert main(arguments(runs, copy)) == 0
    assert rows(runs, copy) == rows(runs, "one")
    assert_same_save(runs / copy, runs / "one")


def test_saved_with_ddp_resumes_with_fsdp(ranks: Ranks, runs: Path) -> None:
    copy = half(runs, "ddp", "whole-to-shares")
    settings = ("train.parallel=fsdp", "train.async_save=true", "train.recompute=true")
    assert ranks(2, arguments(runs, copy, *settings)) == [0, 0], ranks.log_of(0) + ranks.log_of(1)
    assert rows(runs, copy) == rows(runs, "one")
    assert latest_save(runs / copy / "saves").step == STEPS  # type: ignore[union-attr]


def test_saved_on_two_ranks_resumes_on_three(ranks: Ranks, runs: Path) -> None:
    """Four sequences on three processes: 1, 1 and 2. Sums in another order, which codes and bf16 then amplify."""
    copy = half(runs, "fsdp", "two-to-three")
    assert ranks(3, arguments(runs, copy, "train.parallel=fsdp")) == [0, 0, 0], ranks.log_of(0)
    wanted, got = rows(runs, "one"), rows(runs, copy)
    assert [row[0] for row in got] == [row[0] for row in wanted]
    assert got[:HALF] == wanted[:HALF]
    # The first step after the save: 64 losses from equal weights, summed in another order.
    assert got[HALF][1] == pytest.approx(wanted[HALF][1], rel=64 * 2**-24)
    assert got[-1][1] == pytest.approx(wanted[-1][1], abs=0.05)  # the same text learnt as well


@pytest.mark.parametrize("setting", ["model.linear=float", "train.quant_warmup=0"])
def test_what_the_backward_pass_reads_is_there(setting: str, ranks: Ranks, folder: Path) -> None:
    """Masters of float matrices, codes of ternary ones from the first step: their memory is freed in between.

    All other runs of this file have quantisation warm-up.
    """
    name = setting.partition("=")[0]
    for size, out, *parallel in ((1, f"{name}-one"), (2, f"{name}-fsdp", "train.parallel=fsdp")):
        assert ranks(size, arguments(folder, out, setting, *parallel, steps=6)) == [0] * size, ranks.log_of(0)
    wanted = rows(folder, f"{name}-one")
    assert len(wanted) == 7
    assert rows(folder, f"{name}-fsdp") == wanted


def test_in_bf16_too_they_are_one_to_the_last_bit(ranks: Ranks, runs: Path) -> None:
    """The tolerance is none: products of the same micro-batches, rounded in the same places, and of what they add
    between them, in fp32, a sum of two."""
    report = "train.report_every=2"
    for size, name, *parallel in ((1, "bf16-one"), (2, "bf16-ddp"), (2, "bf16-fsdp", "train.parallel=fsdp")):
        args = arguments(runs, name, report, *parallel, steps=6, dtype="bf16")
        assert ranks(size, args) == [0] * size, ranks.log_of(0)
    wanted = rows(runs, "bf16-one")
    assert len(wanted) == 7
    assert [row[1] for row in wanted[:6]] != [row[1] for row in rows(runs, "one")[:6]]  # they are in bf16
    for name in ("bf16-ddp", "bf16-fsdp"):
        assert rows(runs, name) == wanted
        assert telemetry(runs, name) == telemetry(runs, "bf16-one")


def telemetry(folder: Path, out: str) -> list[list[dict[str, object]]]:
    """Zeros, flips and scales of all layers, from those reports that have something to compare with."""
    reports = [row["telemetry"] for row in Run(folder / out).metrics() if "telemetry" in row]
    assert len(reports) == 3
    assert all(layer["flips"] is not None for report in reports[1:] for layer in report)
    return reports


# ---- torch.compile -----------------------------------------------------------------------------------------

needs_a_compiler = pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.timeout(1200)  # gcc takes most of a minute for what torch.compile writes
def test_compiled_ddp_equals_one_process(ranks: Ranks, folder: Path) -> None:
    """With the whole model on each: one graph, the same micro-batches, the same sums."""
    for size, name in ((1, "one-compiled"), (2, "ddp-compiled")):
        assert ranks(size, arguments(folder, name, "train.compile=true", steps=8)) == [0] * size, ranks.log_of(0)
    wanted = rows(folder, "one-compiled")
    assert len(wanted) == 9
    assert rows(folder, "ddp-compiled") == wanted
    assert_same_save(folder / "ddp-compiled", folder / "one-compiled")


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.timeout(1200)  # gcc takes most of a minute for what torch.compile writes
@pytest.mark.parametrize(("linear", "optimizer"), [("float", "adamw"), ("ternary", "muon")])
def test_compiled_and_sharded_it_learns_the_same(linear: str, optimizer: str, ranks: Ranks, folder: Path) -> None:
    """Block by block within FSDP2, against one process that compiles nothing.

    Each optimiser once: it is no part of the graph, whose compilation is what takes the time.
    """
    settings = [f"model.linear={linear}", f"train.optimizer={optimizer}"]
    settings += ["train.lr=0.001", "train.embedding_lr=0.001"] if optimizer == "adamw" else []
    compiled = [*settings, "train.parallel=fsdp", "train.compile=true"]
    assert ranks(1, arguments(folder, f"{linear}-one", *settings, steps=8)) == [0], ranks.log_of(0)
    assert ranks(2, arguments(folder, f"{linear}-shares", *compiled, steps=8)) == [0, 0], ranks.log_of(
        0
    ) + ranks.log_of(1)
    wanted, got = rows(folder, f"{linear}-one"), rows(folder, f"{linear}-shares")
    assert [row[0] for row in got] == [row[0] for row in wanted]
    assert wanted[7][1] < wanted[0][1] - 0.05  # it learns
    # Fused, norms and losses add in another order: 64 losses, sums of up to 96 terms, 1e-5 in all; AdamW then drifts
    # as in test_distributed.py. Ternary layers amplify it where an activation changes its code: one of 64 tokens then
    # changes its loss by some 1e-3. So does Muon, which rounds to bf16: updates that take 0.6 from a loss of 2.5 take
    # 2^-8 of that more or less where every entry of them is off, 0.002.
    bound = 2e-5 if linear == "float" else 1e-3
    for (step, loss, *_), (_, expected, *_) in zip(got[:-1], wanted[:-1], strict=True):
        assert loss == pytest.approx(expected, rel=bound * (1 if step == 1 or linear == "float" else 10)), step


# ---- one rank of many simulated ones: torch's "fake" process group, whose collectives do nothing ------------


@pytest.fixture
def paper(request: pytest.FixtureRequest) -> Iterator[Processes]:
    """Rank 0 of that many."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield Processes(torch.device("cpu"))
    dist.destroy_process_group()


class Traffic(TorchDispatchMode):
    """Numbers that are gathered and scattered, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[int] = []
        self.scattered: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered.append(args[0].numel())  # the whole: what comes out
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.scattered.append(args[1].numel())  # the whole: what goes in
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("paper", [2], indirect=True)
@pytest.mark.parametrize(
    ("linear", "settings", "again"),
    [
        ("ternary", {}, False),
        ("binary", {}, False),
        ("ternary", {"loss_chunk": 5}, False),
        ("float", {}, True),
        ("ternary", {"recompute": True}, True),
        ("ternary", {"quant_warmup": 0.5}, False),
        ("ternary", {"float_share": 0.5}, False),
        ("ternary", {"compile": True}, True),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_quantised_masters_are_gathered_once(
    linear: str, settings: dict[str, Any], again: bool, paper: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass gathers masters only where it reads them; gradients are scattered once."""
    monkeypatch.setattr(network, "compile_blocks", lambda blocks: None)  # it makes no difference to what is gathered
    shape = {key: int(value) for key, value in (setting.split("=") for setting in SHAPE.split())}
    config = ModelConfig(vocab_size=30, max_position_embeddings=16, linear=linear, **shape)
    train = TrainConfig(**{"quant_warmup": 0.0, **settings})
    model, objective = network.build_network(config, train, paper, sharded=True)
    precision = training_precision(quantised_fraction(train, 0))
    ids = torch.randint(30, (2, 16))
    rest = embedding_parameters(config) + norm_parameters(config)  # all of them cut evenly by two, so nothing is padded
    block = linear_parameters(config) // 2
    for _ in range(2):  # the second pass starts from the state that the first one left
        with Traffic() as forward:
            loss, _ = objective(ids, ids, precision)
        assert forward.gathered == [rest, block, block]
        assert forward.scattered == []
        with Traffic() as backward:
            loss.backward()
        assert backward.gathered == ([block, block] if again else [])
        assert backward.scattered == [block, block, rest]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has reserved is read in /proc")
@pytest.mark.parametrize("paper", [64], indirect=True)
def test_2b4t_is_initialised_in_shards(paper: Processes) -> None:
    """Deferred initialisation: one of 64 holds a 64th, and at no time an eighth, which is less than the embedding."""
    config = PRESETS["2b4t"]
    bytes_of_all = 4 * parameters(config)
    assert bytes_of_all > 9e9
    assert (
        4 * embedding_parameters(config) > bytes_of_all // 8
    )  # which leaves room for libraries that are loaded on demand
    before = resource.getrlimit(resource.RLIMIT_AS)
    reserved = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (reserved + bytes_of_all // 8, before[1]))
    try:
        model, _ = network.build_network(config, TrainConfig(), paper, sharded=True)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    held = 0
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        piece = parameter.to_local()
        assert piece.device.type == "cpu"
        assert piece.shape == (parameter.shape[0] // 64, *parameter.shape[1:]), name  # 64 divides them all
        held += piece.nbytes
    assert held * 64 == bytes_of_all


# ---- kill -9 -----------------------------------------------------------------------------------------------


def newest(run: Path) -> int:
    """The step of the save that the run resumes from; steps recorded after it are lost."""
    save = latest_save(run / "saves")
    assert save is not None
    return save.step


def last_step(run: Path) -> int:
    """The last step that was recorded."""
    return max(row["step"] for row in Run(run).metrics())


def test_killed_at_every_moment_of_a_save(ranks: Ranks, runs: Path) -> None:
    """The main process and another one, alternately. The survivor ends with one line about it; a new start resumes."""
    run = half(runs, "fsdp", "killed")
    args = arguments(runs, run, "train.parallel=fsdp", "train.save_every=5")
    moments = [  # which rank, about to sync what; the newest save after that
        (0, "step-00000030.tmp/shard-00001-model-*", 25),  # the folder has just appeared
        (1, "step-00000030.tmp/shard-00002-optimizer-*", 25),
        (0, "step-00000030.tmp/manifest.json", 25),  # all is written
        (0, "step-00000030.tmp", 25),  # and synced
        (0, "saves", 30),  # renamed: it is a save
        (0, "step-00000035.tmp/shard-00001-optimizer-*", 30),
    ]
    for rank, pattern, wanted in moments:
        codes = ranks(2, args, cut=(rank, f"*/{pattern}", 0))
        other = 1 - rank
        assert codes[rank] == -signal.SIGKILL, ranks.log_of(rank)
        assert codes[other] == 2, ranks.log_of(other)
        assert "another process of this run ended" in ranks.log_of(other)
        assert "Traceback" not in ranks.log_of(other)
        assert newest(runs / run) == wanted
        assert last_step(runs / run) <= wanted + 5, "more than a save interval lost"
        folder = "step-00000030" if pattern == "saves" else pattern.partition("/")[0]
        assert (runs / run / "saves" / folder).is_dir()
    assert ranks(2, args) == [0, 0], ranks.log_of(0)
    assert rows(runs, run) == rows(runs, "one")
    assert_same_save(runs / run, runs / "one")


@pytest.mark.parametrize(("size", "killed"), [(1, 0), (2, 0), (2, 1)], ids=["alone", "first of two", "second of two"])
def test_killed_while_a_save_is_written_in_the_background(size: int, killed: int, ranks: Ranks, runs: Path) -> None:
    """Training is three steps further when the kill comes. The save counts for nothing; the one before it does."""
    run = half(runs, "one" if size == 1 else "fsdp", f"background-{size}-{killed}")
    args = arguments(runs, run, "train.parallel=fsdp", "train.save_every=5", "train.async_save=true")
    file = "optimizer.safetensors" if size == 1 else f"shard-{killed + 1:05d}-optimizer-*"
    codes = ranks(size, args, cut=(killed, f"*/step-00000035.tmp/{file}", 38))
    assert codes[killed] == -signal.SIGKILL, ranks.log_of(killed)
    for other in set(range(size)) - {killed}:
        assert codes[other] == 2, ranks.log_of(other)
        assert "another process of this run ended" in ranks.log_of(other)
        assert "Traceback" not in ranks.log_of(other)
    assert (runs / run / "saves" / "step-00000035.tmp").is_dir()
    assert newest(runs / run) == 30
    assert 38 <= last_step(runs / run) <= 40, "more than two save intervals lost"
    assert ranks(size, args) == [0] * size, ranks.log_of(0)
    assert rows(runs, run) == rows(runs, "one")
    assert_same_save(runs / run, runs / "one")


def test_each_sequence_goes_to_one_rank() -> None:
    for _ in range(200):
        size, batch = random.randint(1, 9), random.randint(1, 7)
        total = random.randint(size, 60)
        shares = [rank_sequences(total, rank, size) for rank in range(size)]
        assert [i for part in shares for i in part] == list(range(total))
        cuts = [micro_batches(total, size, batch, len(part)) for part in shares]
        assert [sum(cut) for cut in cuts] == [len(part) for part in shares]
        assert len({len(cut) for cut in cuts}) == 1  # as many collectives on every rank
        assert all(0 <= count <= batch and cut[0] > 0 for cut in cuts for count in cut)


def test_a_global_batch_must_reach_all() -> None:
    assert sequences_per_step(TrainConfig(global_batch=3, batch_size=8), 3) == 3
    with pytest.raises(BitNetError, match="3 sequences for 4 processes"):
        sequences_per_step(TrainConfig(global_batch=3), 4)
    with pytest.raises(BitNetError, match="one of them"):
        TrainConfig(global_batch=8, accumulate=2)


def test_killed_while_a_small_file_is_written(ranks: Ranks, runs: Path) -> None:
    """A new run before it has a configuration, and one that resumes: a partly written file is no obstacle."""
    new, old = "killed-new", half(runs, "one", "killed-old")
    for run, name in ((new, "config.toml"), (old, "metrics.jsonl"), (old, "samples.txt")):
        assert ranks(1, arguments(runs, run), (0, f"*/.{name}.*.tmp", 0)) == [-signal.SIGKILL], ranks.log_of(0)
        assert any(path.name.startswith(f".{name}.") for path in (runs / run).iterdir())
    (runs / new / ".env").touch()
    assert ranks(1, arguments(runs, new)) == [2]
    assert "is not empty and holds no run" in ranks.log_of(0)
    (runs / new / ".env").unlink()
    for run in (new, old):
        assert ranks(1, arguments(runs, run)) == [0], ranks.log_of(0)
        assert not [path for path in (runs / run).iterdir() if path.name.startswith(".")]
        assert rows(runs, run) == rows(runs, "one")
        assert_same_save(runs / run, runs / "one")
