"""`--device cuda` without a GPU: every verb that takes it on the stand-in of tests/fake_cuda/, and the stand-in itself.

What runs is the host side: which device is asked for, set and compared, what is copied where. For the kernels there is
tests/kernels/test_gpu.py.
"""

import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from types import ModuleType
from typing import Any

import child_process
import pytest
import torch

from bitnet.benchmarks.children.process import Child
from bitnet.cli import main
from bitnet.cli.options import pick_device
from bitnet.device import indexed
from bitnet.engine.load import load
from bitnet.errors import BitNetError
from bitnet.kernels import ops
from bitnet.train import pretrain
from bitnet.train.parallel.distributed import Processes
from bitnet.train.precision import resolve_dtype

HERE = Path(__file__).parent / "fake_cuda"
Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}


def stand_in() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_cuda", HERE / "fake_cuda.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entered(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> Any:
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return stand_in().install(lambda *args: monkeypatch.setattr(*args, raising=False), capability)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two new GPUs in this process; torch multiplies there, Triton's kernels cannot."""
    monkeypatch.setenv(ops.ENVIRONMENT, "float")
    with entered(monkeypatch, (9, 0)) as mode:
        yield mode


@pytest.fixture
def old_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two GPUs of compute capability 7.5."""
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)
    with entered(monkeypatch, (7, 5)) as mode:
        yield mode


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "toy.txt"
    path.write_text("fade a cabbage\nbag the hedge\n" * 40)
    return path


def train(text: Path, out: Path, *args: object, device: str = "cuda") -> int:
    words = ["train", "-q", "--data", text, "--out", out, "--tokenizer", "char", "--device", device]
    words += [part for key, value in SHAPE.items() for part in ("--set", f"model.{key}={value}")]
    return main([str(word) for word in (*words, "--batch-size", 2, "--set", "data.val_fraction=0.2", *args)])


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on "cuda", and its packed file."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ops.ENVIRONMENT, "float")
        patch.setattr(pretrain, "plot_run", lambda *args: [])
        with entered(patch, (9, 0)):
            assert train(text, folder, "--steps", 3) == 0
            assert main(["pack", str(folder), "-o", str(folder / "model.safetensors")]) == 0
    return folder


def report(capsys: Captured, *args: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main([str(arg) for arg in (*args, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


# ---- the verbs ---------------------------------------------------------------------------------------------


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "auto"])
def test_train_in_fp32_is_as_on_the_cpu(
    device: str, cuda: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "plot_run", lambda *args: [])
    for name in ("cpu", device):
        assert train(text, tmp_path / name.replace(":", ""), "--steps", 3, "--dtype", "fp32", device=name) == 0
    gpu, cpu = (losses(tmp_path / name.replace(":", "")) for name in (device, "cpu"))
    assert len(gpu) == 3
    assert gpu == pytest.approx(cpu, rel=1e-5)  # the backends add in another order
    assert cuda.current == (1 if device == "cuda:1" else 0)


def test_a_run_goes_on_there(cuda: Any, run: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "plot_run", lambda *args: [])
    for options in (["--set", "train.async_save=true"], ["--optimizer", "adamw"]):
        folder = tmp_path / options[-1]
        assert train(text, folder, "--steps", 2, *options) == 0
        assert train(text, folder, "--steps", 3, *options) == 0
        assert len(losses(folder)) == 3


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "auto"])
def test_generate_writes_what_the_cpu_writes(device: str, cuda: Any, run: Path, capsys: Captured) -> None:
    args = ["generate", "-m", run / "model.safetensors", "-p", "fade", "-n", 20, "--temp", 0]
    assert report(capsys, *args, "--device", device)["ids"] == report(capsys, *args, "--device", "cpu")["ids"]
    drawn = report(capsys, *args[:-1], 0.8, "-s", 1, "--device", device)
    assert drawn["engine"] == "torch"
    assert drawn["tokens"] == 20


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_eval_scores_what_the_cpu_scores(device: str, cuda: Any, run: Path, text: Path, capsys: Captured) -> None:
    args = ["eval", "-m", run / "model.safetensors", "--data", text]
    on_gpu, on_cpu = (report(capsys, *args, "--device", one) for one in (device, "cpu"))
    assert on_gpu["tokens"] == on_cpu["tokens"]
    assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], rel=1e-5)


def test_doctor_on_two_old_gpus(old_cuda: Any, capsys: Captured) -> None:
    found = report(capsys, "doctor")
    assert set(found["devices"]) == {"cpu", "cuda:0", "cuda:1"}
    assert found["devices"]["cuda:1"] == "Stand-in"
    for device in ("cuda:0", "cuda:1"):
        assert found["selected"][device] == "float"
        rows = {row["backend"]: row for row in found["backends"] if row["device"] == device}
        assert rows["float"]["status"] == "ok"
        assert "compute capability 7.5, the kernels need 8.0" in rows["triton"]["reason"]


def environment() -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"PYTHONPATH": str(HERE), ops.ENVIRONMENT: "float"}


def test_a_contender_of_bench(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, as bench starts it; the second GPU."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    options = {"path": str(run / "model.safetensors"), "engine": "torch", "head": "file", "cache": "fp32"}
    with Child("torch", "bench/ours", {**options, "threads": 1, "device": "cuda:1"}, 1) as worker:
        assert worker.facts["gpu"] == stand_in().UUID
        assert worker.facts["backend"] == "torch"
        answer = worker.ask("measure", child_process.LIMIT, prompt=5, predict=3, depth=2, batch=2)
        assert answer["peak_bytes"] == 2**20  # what the stand-in says of its memory
    with Child("meter", "bench/meter", {"threads": 1, "device": "cuda:1"}, 1) as meter:
        assert meter.ask("read", child_process.LIMIT, size=2**20)["how"] == "torch sum on the cuda"


def test_serve_starts_and_answers(run: Path) -> None:
    httpx = pytest.importorskip("httpx")
    command = child_process.bitnet("serve", "-m", run / "model.safetensors", "--port", 0, "--device", "cuda")
    with child_process.started(command, env=environment(), stdout=PIPE, stderr=PIPE) as process:
        url = child_process.line_from(process)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        with httpx.Client(base_url=url, timeout=child_process.LIMIT) as http:
            answer = http.post("/v1/completions", json={"prompt": "fade", "max_tokens": 4, "temperature": 0}).json()
            assert answer["usage"]["completion_tokens"] == 4, answer
            engine = http.get("/info").json()["engine"]
            assert (engine["device"], engine["threads"]) == ("cuda:0", None)
        assert child_process.finish(process, signal.SIGTERM)[0] == 143


# ---- which device ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [("cuda", None, "cuda:0"), ("auto", None, "cuda:0"), ("cuda:1", None, "cuda:1"), ("cuda", "1", "cuda:1"),
     ("auto", "1", "cuda:1"), ("cuda:0", "1", "cuda:0"), ("cpu", "1", "cpu")],
)  # fmt: skip
def test_a_gpu_has_a_number(
    name: str, rank: str | None, expected: str, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert pick_device(name) == torch.device(expected)
    assert not torch.cuda.is_initialized(), "asking for a device set it up"


def test_the_current_gpu_is_the_one_meant(cuda: Any) -> None:
    torch.cuda.set_device(1)
    torch.zeros(1, device="cuda")
    assert indexed("cuda") == torch.device("cuda:1")


@pytest.mark.parametrize(
    "name", ["cuda:2", "cuda:256", "cuda:99999999999", "cuda:-1", "cuda:", "cuda:1:1", "mps", "CUDA", ""]
)
def test_gpus_that_are_not_there(name: str, cuda: Any) -> None:
    with pytest.raises(BitNetError, match=rf"device: got '{name}', expected"):
        pick_device(name)


def test_more_processes_than_gpus(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BitNetError, match=r"got process 2 .* each of the 2 GPUs .* lower --nproc-per-node"):
        pick_device("cuda")


@pytest.mark.parametrize(("size", "rank", "expected"), [(1, 0, 1), (2, 0, 0), (2, 1, 1)])
def test_processes_take_the_gpu_of_their_rank(
    size: int, rank: int, expected: int, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, the one that is current; also where the caller has not looked for its number."""
    torch.cuda.set_device(1)
    torch.zeros(1, device="cuda")
    if size > 1:
        for name, value in (("WORLD_SIZE", size), ("RANK", rank), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
    assert Processes(torch.device("cuda")).device == torch.device("cuda", expected)
    assert torch.cuda.current_device() == expected


def test_kernels_run_where_their_arguments_are(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU, whichever holds the tensors."""
    seen = []

    class Products:
        @staticmethod
        def packed_matmul(q: torch.Tensor, weights: object) -> torch.Tensor:
            seen.append(torch.cuda.current_device())
            return q

        codes_matmul = packed_matmul

    monkeypatch.setitem(sys.modules, "bitnet.kernels.gpu.products", Products)
    monkeypatch.setattr("bitnet.kernels.gpu.products", Products, raising=False)
    for gpu in (0, 1):
        q = torch.ones(1, 4, dtype=torch.int8, device=f"cuda:{gpu}")
        ops.TRITON.packed_matmul(q, None)
        ops.TRITON.codes_matmul(q, q)
    assert seen == [0, 0, 1, 1]
    assert torch.cuda.current_device() == 0


def test_an_older_gpu_trains_in_fp32(old_cuda: Any) -> None:
    """It has bf16 by emulation, which torch counts as support unless it is told not to."""
    assert torch.cuda.get_device_capability() == (7, 5)
    assert resolve_dtype("auto", torch.device("cuda:0")) == "fp32"


def test_a_new_gpu_trains_in_bf16(cuda: Any) -> None:
    assert resolve_dtype("auto", torch.device("cuda:0")) == "bf16"


def test_load_takes_the_word(cuda: Any, run: Path) -> None:
    assert load(run / "model.safetensors", "cuda").device == torch.device("cuda:0")


# ---- the stand-in itself -----------------------------------------------------------------------------------


def test_the_stand_in_refuses_what_cuda_refuses(cuda: Any) -> None:
    x, y = torch.ones(3, device="cuda"), torch.ones(3)
    with pytest.raises(ValueError, match=r"Expected a torch.device with a specified index or an integer, but got:cuda"):
        torch.cuda.set_device(torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"Expected all tensors to be on the same device.* cpu and cuda:0"):
        x + y
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.rand(3, device="cuda", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(3, device="cuda:2")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.set_device(7)


def test_the_stand_in_knows_where_tensors_are(cuda: Any) -> None:
    x, y = torch.ones(3, device="cuda:1"), torch.ones(3)
    assert x.device == torch.device("cuda:1") != torch.device("cuda")
    assert (x.is_cuda, y.is_cuda, x.cpu().is_cuda, y.cuda().is_cuda) == (True, False, False, True)
    assert (x * 2).device == torch.empty_like(x).device == x.new_zeros(2).device == x[None].device == x.device
    assert torch.zeros(2, device="cpu").device == x.to("cpu").device == torch.device("cpu")
    assert y.to("cuda").device == y.to(torch.device("cuda", 0)).device == torch.device("cuda:0")
    moved = y.to("cuda")
    moved += 1
    assert y.tolist() == [1.0] * 3  # another memory
    layer = torch.nn.Linear(3, 2).to("cuda:1")
    assert {p.device for p in layer.parameters()} == {torch.device("cuda:1")}
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.device == torch.device("cuda:1")
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32
