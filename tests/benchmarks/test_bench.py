"""`bitnet bench`: what it counts, how its contenders live and die, what it refuses, and one tiny run of everything.

No test asserts a time.
"""

import csv
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitnet
from bitnet.benchmarks.bench import command, contenders, dense, limits, measure, ours, plan, process, table, worker
from bitnet.benchmarks.bench.limits import Weights
from bitnet.benchmarks.bench.plan import Choice, Test
from bitnet.benchmarks.bench.process import Worker
from bitnet.benchmarks.bench.random_model import ZEROS, random_packed, write_random
from bitnet.cli import main
from bitnet.cli.bench import packed_to_gguf
from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.packed import read_config, read_packed
from bitnet.kernels import native, ops, packing
from bitnet.model import linear_parameters

Captured = pytest.CaptureFixture[str]
TINY = ModelConfig(300, 64, 96, 2, 4, 2, 64)
_SMALL = 8 * 2**20  # bytes read as the memory: half a GB takes its time
REQUIRED = ("test", "avg_ts", "stddev_ts", "threads", "backend", "bytes_per_token", "percent_of_limit")

needs_native = pytest.mark.skipif(native.why_not() is not None, reason=native.why_not() or "")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.safetensors"
    write_random(TINY, path, seed=random.SystemRandom().randrange(2**31))
    return path


def error(capsys: Captured, *args: object) -> str:
    """Exit code 2, nothing on stdout, one line on stderr: returns it."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("bitnet: error: ")
    return line


# ---- which tests


def choice(**changes: Any) -> Choice:
    return Choice(**{"prompts": [8], "predicts": [4], "pairs": [], "depths": [0], "batches": [1], **changes})


def test_names_are_those_of_llama_bench() -> None:
    assert Test(512, 0).name == "pp512"
    assert Test(0, 128).name == "tg128"
    assert Test(512, 128).name == "pp512+tg128"
    assert Test(0, 32, 1024).name == "tg32 @ d1024"
    assert Test(64, 0, 7, 4).name == "pp64 @ d7 x4"


def test_lists_cross_multiply() -> None:
    found = plan.tests(choice(prompts=[8, 16], predicts=[4], pairs=[(5, 3)], depths=[0, 9], batches=[1, 2]), TINY, "m")
    expected = {(p, n, d, b) for (p, n), d, b in itertools.product([(8, 0), (16, 0), (0, 4), (5, 3)], (0, 9), (1, 2))}
    assert len(found) == len(expected) == 16
    assert {(t.prompt, t.predict, t.depth, t.batch) for t in found} == expected


def test_defaults_leave_room_in_a_small_context() -> None:
    assert [t.name for t in plan.tests(choice(prompts=None, predicts=None), TINY, "m")] == ["pp32", "tg32"]
    large = TINY.replace(max_position_embeddings=4096)
    assert [t.name for t in plan.tests(choice(prompts=None, predicts=None), large, "m")] == ["pp512", "tg128"]
    assert [t.name for t in plan.tests(choice(prompts=[0]), TINY, "m")] == ["tg4"]


@pytest.mark.parametrize("text", ["", "1,", "a", "1.5", "-1", "0", "1e3", str(2**40)])
def test_numbers_refuses(text: str) -> None:
    with pytest.raises(BitNetError, match="expected"):
        plan.numbers("-t", text, 1)


@pytest.mark.parametrize("text", ["64", "64,", "1,2,3", "0,5", "a,b"])
def test_pair_refuses(text: str) -> None:
    with pytest.raises(BitNetError, match="--pg"):
        plan.pair(text)


def test_pair_reads_two_numbers() -> None:
    assert plan.pair("64,32") == (64, 32)
    assert plan.pair("64,64") == (64, 64)


# ---- limits


def test_bytes_and_products_of_an_answer_are_those_of_its_steps(rng: torch.Generator) -> None:
    """Summed step by step: weights once, and every position before."""
    predict, depth, batch = (int(torch.randint(1, 40, (), generator=rng)) for _ in range(3))
    weights = Weights(12_345, 17.5)
    work = limits.work(TINY, weights, Test(0, predict, depth, batch))
    steps = range(depth + 1, depth + predict + 1)  # positions seen, the token's own included
    read = sum(weights.weight_bytes + batch * weights.kv_bytes * seen for seen in steps)
    head = TINY.vocab_size * TINY.hidden_size
    macs = sum(linear_parameters(TINY) + head + 2 * TINY.num_hidden_layers * TINY.hidden_size * seen for seen in steps)
    assert work.bytes == pytest.approx(read / (predict * batch), rel=1e-12)
    assert work.macs == pytest.approx(macs / predict, rel=1e-12)


def test_products_of_a_prompt_are_those_of_its_tokens(rng: torch.Generator) -> None:
    prompt, depth = (int(torch.randint(1, 40, (), generator=rng)) for _ in range(2))
    work = limits.work(TINY, Weights(1000, 3.0), Test(prompt, 0, depth))
    attention = 2 * TINY.num_hidden_layers * TINY.hidden_size * sum(range(depth + 1, depth + prompt + 1))
    head = TINY.vocab_size * TINY.hidden_size
    assert work.macs == pytest.approx((prompt * linear_parameters(TINY) + head + attention) / prompt, rel=1e-12)
    assert work.bytes == pytest.approx((1000 + 3.0 * (depth + prompt)) / prompt, rel=1e-12)


def test_the_limit_is_the_slower_of_two() -> None:
    works = [limits.Work(10, bytes=100.0, macs=50.0)]
    slow_memory, slow_arithmetic = limits.limit(works, 1000.0, 1e9), limits.limit(works, 1e9, 100.0)
    assert (slow_memory.by, slow_memory.tokens_per_second) == ("bandwidth", pytest.approx(10.0))
    assert (slow_arithmetic.by, slow_arithmetic.tokens_per_second) == ("arithmetic", pytest.approx(2.0))
    assert limits.limit(works, 1000.0, None).by == "bandwidth"
    both = [limits.Work(30, 1.0, 40.0), limits.Work(10, 20.0, 1.0)]  # 30 x 0.4 s of arithmetic, 10 x 0.2 s of reading
    assert limits.limit(both, 100.0, 100.0).tokens_per_second == pytest.approx(40 / 14.0)


def test_working_sets_have_two_digits() -> None:
    assert limits.working_set(Weights(1_234_567, 0.0), Test(1, 0)) == 1_200_000
    assert limits.working_set(Weights(3, 0.0), Test(1, 0)) == 3
    assert limits.working_set(Weights(1000, 10.0), Test(0, 50, 50, 2)) == 3000


def test_int8_rows_share_the_fastest_product() -> None:
    peaks = {"avx2": 3.0, measure.DOT_PRODUCTS: 7.0, "torch int8": None, "torch bf16": 9.0}
    assert measure.fastest("avx2", peaks) == measure.fastest("torch int8", peaks) == measure.DOT_PRODUCTS
    assert measure.fastest("torch bf16", peaks) == "torch bf16"
    assert measure.fastest("avx2", {"avx2": None, "torch bf16": 9.0}) == "avx2"


def test_who_runs_on_the_cpu_is_held_against_it() -> None:
    wanted = contenders.Wanted(["torch"], [], ["file"], ["fp32"], ["torch-bf16"], "", torch.device("cuda:0"))
    assert {one.name: one.device for one in contenders.line_up(wanted)} == {"torch": "cuda:0", "torch-bf16": "cpu"}


# ---- models of random weights


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 2), (5, 7), (4097, 33), (600, 64)])
def test_random_weights_have_their_zeros(n: int, k: int, seed: int) -> None:
    packed = random_packed(n, k, np.random.default_rng(seed))
    codes = packing.unpack(packed, k)  # refuses code 3 and a fill that is not zero
    assert codes.shape == (n, k)
    for value, chance in ((-1, (1 - ZEROS) / 2), (0, ZEROS), (1, (1 - ZEROS) / 2)):
        share = float((codes == value).float().mean())
        assert abs(share - chance) <= 6 * (chance * (1 - chance) / codes.numel()) ** 0.5  # six standard errors


def test_a_random_model_is_a_model(model: Path) -> None:
    assert read_config(model) == read_packed(model).config == TINY


# ---- contenders: the same model as ours


@pytest.mark.parametrize("act", ["relu2", "silu"])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_dense_torch_computes_the_model(dtype: str, act: str, tmp_path: Path, rng: torch.Generator) -> None:
    config = TINY.replace(hidden_act=act, qk_norm=act == "silu", tie_word_embeddings=act == "relu2")
    path = tmp_path / "m.safetensors"
    write_random(config, path, seed=int(torch.randint(2**31, (), generator=rng)))
    contender = dense.Contender(str(path), dtype, 1)
    ids = torch.randint(0, config.vocab_size, (2, 21), generator=rng)
    expected = bitnet.load(path, engine="torch").logits(ids)[:, -1]
    contender.start(2, 0, 21)
    contender.forward(ids[:, :17])
    for at in range(17, 21):  # prompt and steps are one text
        got = contender.forward(ids[:, at : at + 1]).float()
    # bf16 rounds by 2^-9 a step, int8 by 1/254 of the largest: some dozen of either a layer stay below 20 %, where
    # another model's logits are off by 140 % (two strangers of one size).
    assert float((got - expected).norm() / expected.norm()) < 0.2


def test_dense_int8_sums_are_exact(rng: torch.Generator) -> None:
    for m, n, k in ((1, 33, 65), (3, 64, 100), (17, 5, 256)):
        q = torch.randint(-127, 128, (m, k), generator=rng, dtype=torch.int8)
        w = torch.randint(-127, 128, (n, k), generator=rng, dtype=torch.int8)
        # Sums stay below 2^24, which fp32 holds exactly.
        assert torch.equal(dense.int8_product(w)(q), (q.long() @ w.long().T).float())


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_ours_counts_what_a_token_reads(engine: str, model: Path) -> None:
    if engine == "cpu" and native.why_not():
        pytest.skip(native.why_not() or "")
    contender = ours.Contender(str(model), engine, "file", "fp32", 1, "cpu")
    projections = linear_parameters(TINY) / 4
    head = TINY.vocab_size * TINY.hidden_size * (2 if engine == "cpu" else 4)
    # 1.78 to 8 bits a weight, rows and columns filled up to the blocks of the kernels; norms are small.
    assert head + 0.8 * projections < contender.facts["weight_bytes"] < head + 8 * projections
    kv = 2 * TINY.num_hidden_layers * TINY.num_key_value_heads * TINY.head_dim * 4
    assert contender.facts["kv_bytes"] == kv
    contender.start(3, 5, 12)
    contender.prefill(4)
    contender.decode(3)


def test_a_kernel_that_fails_its_self_test_gets_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "self_test", lambda backend, device: "packed product M1-N1-K1: 1 of 1 sums differ")
    with pytest.raises(BitNetError, match=r"self-test of the '\w+' kernels failed .*1 of 1 sums differ"):
        ours.prepare(engine="auto", device="cpu", threads=1, path="", head="file", cache="fp32")


# ---- processes

FAKE = """
import os, sys, time
def prepare(mode, **options):
    if mode == "refuse":
        raise ValueError("got a mode,\\nexpected another")
    bytearray(b"x") * 300_000_000  # more than all that follows
class Contender:
    def __init__(self, mode):
        if mode == "die":
            os._exit(3)
        print("noise on stdout")
        self.facts = {"what": "fake", "backend": "fake", "weight_bytes": 1000, "kv_bytes": 1.0, "peak": "torch fp32"}
        self.calls = []
    def start(self, batch, depth, room): self.calls.append(["start", batch, depth, room])
    def prefill(self, tokens): self.calls.append(["prefill", tokens])
    def decode(self, tokens): self.calls.append(["decode", tokens])
    def history(self): return {"calls": self.calls, "id": os.getpid(), "path": sys.path}
    def hang(self): time.sleep(600)
    def fall(self): os._exit(9)
"""


@pytest.fixture
def fake(tmp_path: Path) -> str:
    (tmp_path / "fake.py").write_text(FAKE)
    return str(tmp_path / "fake")


def test_a_worker_runs_tests_and_answers(fake: str) -> None:
    with Worker("fake", fake, {"mode": "ok"}, threads=1) as one:
        answer = one.ask("measure", prompt=5, predict=3, depth=7, batch=2)
        assert {"prefill", "decode", "joules", "peak_bytes"} <= set(answer)
        one.ask("measure", prompt=0, predict=4, depth=0, batch=1)
        history = one.ask("history")
        expected = [["start", 2, 7, 15], ["prefill", 5], ["decode", 3], ["start", 1, 0, 4], ["decode", 4]]
        assert history["calls"] == expected
        # The folder of worker.py is not on the path: its modules would shadow others.
        assert str(Path(worker.__file__).parent) not in history["path"]
        assert one.facts["load_seconds"] >= 0
        assert one.facts["peak_bytes"] > 0
        if sys.platform == "linux":  # what was prepared is no part of it
            assert one.facts["peak_bytes"] < 300_000_000
    assert gone(history["id"])


@pytest.mark.parametrize(
    ("mode", "message"), [("refuse", "got a mode, expected another"), ("die", "ended with code 3")]
)
def test_a_worker_that_cannot_load_says_why(mode: str, message: str, fake: str) -> None:
    with pytest.raises(BitNetError, match=rf"fake: .*{message}"):
        Worker("fake", fake, {"mode": mode}, threads=1)


def test_a_worker_that_dies_is_an_error(fake: str) -> None:
    with Worker("fake", fake, {"mode": "ok"}, threads=1) as one, pytest.raises(BitNetError, match="ended with code 9"):
        one.ask("fall")


def gone(pid: int, within: float = 20.0) -> bool:
    """Whether a process ends (or is a zombie nobody has collected yet)."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_worker_does_not_survive_its_parent(busy: bool, fake: str) -> None:
    code = (
        "import sys, time; from bitnet.benchmarks.bench.process import Worker\n"
        f"one = Worker('fake', {fake!r}, {{'mode': 'ok'}}, threads=1)\n"
        "print(one.ask('history')['id'], flush=True)\n" + ("one.ask('hang')" if busy else "time.sleep(600)")
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        parent.kill()
    assert gone(child)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_interrupted(number: signal.Signals, code: int, model: Path, tmp_path: Path) -> None:
    args = ["bench", "-m", model, "--backend", "torch", "-p", 60, "-n", 60, "-r", 1000, "-q"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    words = [sys.executable, "-m", "bitnet.cli", *map(str, args)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as running:
        children: list[int] = []
        deadline = time.monotonic() + 60
        while len(children) < 2 and time.monotonic() < deadline:  # the meter and the contender
            listed = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
            children = [int(child) for child in listed]
            time.sleep(0.05)
        assert len(children) == 2
        running.send_signal(number)
        out, _ = running.communicate(timeout=60)
    assert running.returncode == code
    assert out == ""
    assert all(gone(child) for child in children)
    assert not list(tmp_path.glob("bitnet-bench-*"))


def test_pinned_to_as_many_cores(fake: str) -> None:
    cores = process.cores_first()
    if not cores:
        pytest.skip("this system does not pin")
    assert sorted(cores) == sorted(os.sched_getaffinity(0))
    with Worker("fake", fake, {"mode": "ok"}, threads=1) as one:
        assert os.sched_getaffinity(one.ask("history")["id"]) == {cores[0]}


# ---- energy and memory


def test_energy_counters_wrap(tmp_path: Path) -> None:
    for name, value in (("intel-rapl:0", 900), ("intel-rapl:1", 50), ("intel-rapl:0:0", 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(str(value))
        (tmp_path / name / "max_energy_range_uj").write_text("999")
    energy = worker.Energy(None, tmp_path)
    before = energy.read()
    assert before == [900, 50]  # packages, not their parts
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100")  # 100 past the end of the range, one step of which is 0
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("80")
    assert energy.since(before, 1.0) == pytest.approx((200 + 30) / 1e6)
    assert energy.since(before, 0.001) is None  # shorter than the counter's updates
    assert worker.Energy(None, tmp_path / "nothing").since([], 1.0) is None


def test_too_big_is_said_before_loading(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr("bitnet.machine.available_memory", lambda: 10**9)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("loaded or written before memory was checked")

    monkeypatch.setattr(measure, "Worker", refuse)
    monkeypatch.setattr(command, "write_random", refuse)
    line = error(capsys, "bench", "--preset", "2b4t", "--backend", "torch", "--against", "torch-bf16", "-p", 8, "-n", 8)
    assert all(part in line for part in ("2b4t needs about", "torch-bf16", "GB available"))


# ---- refusals

BAD = {
    "no such backend": (["--preset", "nano", "--backend", "cuda"], "--backend: got 'cuda'"),
    "no such contender": (["--preset", "nano", "--against", "vllm"], "--against: got 'vllm'"),
    "no such preset": (["--preset", "pico"], "--preset: got 'pico'"),
    "no such instruction set": (["--preset", "nano", "--isa", "mmx"], "--isa: got 'mmx'"),
    "no such format": (["--preset", "nano", "-o", "xml"], "-o: got 'xml'"),
    "no such head": (["--preset", "nano", "--head", "int2"], "--head: got 'int2'"),
    "head of torch": (["--preset", "nano", "--backend", "torch", "--head", "int8"], "--head: got 'int8' for torch"),
    "zero threads": (["--preset", "nano", "-t", "0"], "-t: got 0"),
    "negative prompt": (["--preset", "nano", "-p", "-5"], "-p: got -5"),
    "half a token": (["--preset", "nano", "-n", "0.5"], "-n: got '0.5'"),
    "zero sequences": (["--preset", "nano", "-b", "0"], "-b: got 0"),
    "no test": (["--preset", "nano", "-p", "0", "-n", "0"], "got no test"),
    "beyond the context": (["--preset", "nano", "-p", "8", "-d", "250"], "at most the context of nano, 256"),
    "no file": (["-m", "nowhere.safetensors"], "got nothing to read at 'nowhere.safetensors'"),
    "no rounds": (["--preset", "nano", "-r", "0"], "-r"),
    "no such python": (["--preset", "nano", "--against", "llama.cpp", "--llama", "no-python"], "cannot be run"),
    "no folder": (["--preset", "nano", "--plot", "nowhere/x.png"], "got no folder 'nowhere'"),
    "no picture": (["--preset", "nano", "--plot", "x.gif"], "ends in .png or .svg"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, capsys: Captured) -> None:
    args, message = BAD[case]
    assert message in error(capsys, "bench", *args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys: Captured) -> None:
    assert "backend 'triton' cannot be used" in error(capsys, "bench", "--preset", "nano", "--backend", "triton")


def test_llama_cpp_missing_says_how_to_install(capsys: Captured, tmp_path: Path) -> None:
    python = tmp_path / "python"  # one that has nothing
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    python.chmod(0o755)
    line = error(capsys, "bench", "--preset", "nano", "--against", "llama.cpp", "--llama", python)
    assert "pip install --no-binary llama-cpp-python" in line
    assert "--llama" in line


def test_a_file_that_is_no_model(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(random.randbytes(100))
    assert "cannot be read" in error(capsys, "bench", "-m", tmp_path / "x.safetensors")


def test_a_plot_without_matplotlib(capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = error(capsys, "bench", "--preset", "nano", "--plot", tmp_path / "x.png")
    assert "got no matplotlib" in line
    assert "pip install" in line


def test_disk_is_needed_for_what_is_written() -> None:
    size, config = 10**6, TINY
    mine, random_one = (measure.Subject("m", config, size, source) for source in ("m.safetensors", command.RANDOM))
    ours_alone = contenders.line_up(contenders.Wanted(["torch"], [], ["file"], ["fp32"], [], "", torch.device("cpu")))
    assert (command._disk(mine, ours_alone), command._disk(random_one, ours_alone)) == (0, size)
    both = [*ours_alone, contenders._llama("python")]
    assert command._disk(mine, both) > 0.5 * linear_parameters(config)


def test_dense_torch_refuses_a_plain_model() -> None:
    plain = measure.Subject("m", TINY.replace(linear="float"), 1, "m.safetensors")
    wanted = contenders.Wanted(["torch"], [], ["file"], ["fp32"], ["torch-bf16"], "", torch.device("cpu"))
    settings = command.Settings([], [], choice(), [1], 1, wanted, None, [])
    with pytest.raises(BitNetError, match="plain linears"):
        command._checked(plain, settings, contenders.line_up(wanted))


def test_llama_cpp_gets_a_shape_that_it_runs(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    config = TINY.replace(hidden_size=256, intermediate_size=512)
    write_random(config, tmp_path / "m.safetensors")
    seen, differs = contenders.llama_config(config)
    assert differs == "SiLU instead of ReLU², no QK norm"
    packed_to_gguf(tmp_path / "m.safetensors", seen, tmp_path / "m.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.1.ffn_down.weight"] == "TQ2_0"
    assert not [name for name in kinds if "attn_q_norm" in name]
    with pytest.raises(BitNetError, match="hidden_size 64, expected a multiple of 256"):
        contenders.llama_config(TINY)


# ---- one run


@pytest.fixture(scope="module")
def document(model: Path) -> dict[str, Any]:
    """A whole run on a tiny model, as the command line prints it."""
    backends = "torch" if native.why_not() else "cpu,torch"
    args = ["bench", "-m", str(model), "-p", "8", "-n", "4", "--pg", "6,3", "-d", "0,5", "-t", "1", "-r", "2"]
    args += ["--backend", backends, "--against", "torch-bf16,torch-int8", "--price", "2", "-o", "json"]
    with pytest.MonkeyPatch.context() as patch:
        out = io.StringIO()
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "argv", ["bitnet", *args])
        patch.setattr(measure, "MEMORY", _SMALL)
        assert main(args) == 0
    found: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    return found


def test_every_contender_runs_every_test(document: dict[str, Any]) -> None:
    rows = document["results"]
    backends = {"torch", "torch-bf16", "torch-int8"} | ({"cpu"} if native.why_not() is None else set())
    tests = {f"{kind}{depth}" for kind in ("pp8", "tg4", "pp6+tg3") for depth in ("", " @ d5")}
    assert len(rows) == len(backends) * len(tests)
    assert {(row["backend"], row["test"]) for row in rows} == set(itertools.product(backends, tests))
    assert {row["threads"] for row in rows} == {1}


def test_rows_carry_what_they_promise(document: dict[str, Any]) -> None:
    for row in document["results"]:
        assert all(row[key] is not None for key in REQUIRED)
        assert len(row["samples_ts"]) == 2
        assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 2)
        assert row["percent_of_limit"] == pytest.approx(100 * row["median_ts"] / row["limit_ts"])
        assert row["dollars_per_million"] == pytest.approx(2 / 3600 / row["median_ts"] * 1e6)
        assert (row["first_token_ms"] is None) == (row["n_prompt"] == 0)
        assert row["peak_memory_bytes"] > 0
        assert row["device"] == "cpu"
        assert row["own_peak_of"] == "torch bf16" or row["peak_of"] != "torch bf16"
        assert (row["peak_gigamacs_per_second"] or 0) >= (row["own_peak_gigamacs_per_second"] or 0)
        expected = limits.work(
            TINY,
            Weights(row["model_size"], row["bytes_per_token"]),  # only the sizes of a test are asked of it
            Test(row["n_prompt"], row["n_gen"], row["n_depth"], row["n_batch"]),
        )
        assert row["macs_per_token"] == pytest.approx(expected.macs)


def test_the_machine_is_measured_before_between_and_after(document: dict[str, Any]) -> None:
    (measured,) = document["measured"]
    assert _SMALL in [read["bytes"] for read in measured["reads"]]
    assert all(len(read["samples"]) == 4 for read in measured["reads"])  # before, and after each of three rounds
    assert document["steady"] == (document["bandwidth_off_median"]["memory"][0] <= 0.1)
    assert all(rate is None or rate > 0 for rate in measured["gigamacs_per_second"].values())


def test_the_command_is_kept_without_folders(document: dict[str, Any], model: Path) -> None:
    assert document["command"][:3] == ["bitnet", "bench", "-m"]
    assert document["command"][3] == model.name
    assert str(model.parent) not in json.dumps(document)


def test_tables_show_all_rows(document: dict[str, Any]) -> None:
    rows = document["results"]
    lines = table.as_markdown(document).splitlines()
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header[:3] == ["model", "backend", "test"]
    assert "t/s" in header
    assert "J/token" not in header or any(row["joules_per_token"] for row in rows)
    assert sum(line.startswith("| tiny") for line in lines) == len(rows)
    assert len({len(line) for line in lines if line.startswith("|")}) == 1  # columns line up
    read = list(csv.DictReader(io.StringIO(table.as_csv(rows))))
    assert [row["test"] for row in read] == [row["test"] for row in rows]
    assert float(read[0]["avg_ts"]) == rows[0]["avg_ts"]


def test_one_sample_that_a_neighbour_took_is_told_and_moves_no_verdict() -> None:
    assert measure.off_median([100, 102, 99, 30, 101, 100, 98]) == (pytest.approx(0.02), pytest.approx(0.7))
    assert measure.off_median([100, 50, 99, 30, 101, 100, 98]) == (pytest.approx(49 / 99), pytest.approx(69 / 99))
    assert measure.off_median([5.0]) == (0, 0)


def test_an_unsteady_machine_is_said(document: dict[str, Any]) -> None:
    """By its memory; what caches did is told, and gives no verdict: neighbours share them."""
    shaken = document | {"steady": False, "bandwidth_off_median": {"memory": (0.37, 0.5), "smaller": (0.1, 0.7)}}
    told = "\n".join(table.notes(shaken))
    assert "37.0% (50%) in memory, 10.0% (70%) in smaller sets" in told
    assert "unsteady" in told
    assert "unsteady" not in "\n".join(table.notes(shaken | {"steady": True}))


def test_spreads_are_those_of_memory_and_of_caches() -> None:
    def read(of: str, off: float, worst: float) -> dict[str, Any]:
        return {"of": of, "off_median": off, "worst_off_median": worst}

    one = {"reads": [read("memory", 0.01, 0.3), read("smaller", 0.02, 0.1)]}
    two = {"reads": [read("smaller", 0.4, 0.09), read("memory", 0.03, 0.05)]}
    assert command.bandwidth_spread([one, two]) == {"memory": (0.03, 0.3), "smaller": (0.4, 0.1)}


def test_more_threads_than_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "cores_first", lambda: [0, 1])
    command.check_cores([1, 2])
    with pytest.raises(BitNetError, match="-t: got 3, expected at most the 2 cores"):
        command.check_cores([1, 3])
    monkeypatch.setattr(command, "cores_first", list)  # where the system does not tell
    command.check_cores([64])


@pytest.mark.parametrize("backends", [["auto", "cpu"], ["cpu", "auto"]])
def test_an_engine_that_is_asked_for_twice_runs_once(backends: list[str]) -> None:
    if ops.select(torch.device("cpu")) is not ops.CPU:
        pytest.skip("auto is the torch engine here")
    wanted = contenders.Wanted(backends, [], ["file"], ["fp32"], [], "", torch.device("cpu"))
    assert [one.name for one in contenders.line_up(wanted)] == ["cpu"]


def test_a_llama_cpp_without_avx512_is_said() -> None:
    rows = [{"system": "CPU : AVX2 = 1 | "}]
    assert "without AVX-512" in command._llama_notes(rows, ["avx2", "avx512_f"])[0]
    assert not command._llama_notes(rows, ["avx2"])
    assert not command._llama_notes([{"system": "AVX512 = 1 | "}], ["avx512_f"])


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures(document: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    plot = pytest.importorskip("bitnet.benchmarks.bench.plot")
    pytest.importorskip("matplotlib")
    paths = plot.draw(document, tmp_path / f"run{suffix}")
    assert [path.name for path in paths] == [f"run-roofline{suffix}", f"run-comparison{suffix}"]
    for path in paths:
        content = path.read_bytes()
        if suffix == ".svg":
            assert all(row["backend"].encode() in content for row in document["results"])
        else:
            assert content.startswith(b"\x89PNG")
            assert len(content) > 10_000
