"""`bitnet bench`: which tests it runs, what it counts, and what it refuses. No test asserts a time."""

import itertools
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_fakes import TINY

from bitnet.benchmarks.bench import command, contenders, device_meter, limits, plan, series
from bitnet.benchmarks.bench.contenders import EngineChoice
from bitnet.benchmarks.bench.limits import ModelBytes
from bitnet.benchmarks.bench.meter import DOT_PRODUCTS
from bitnet.benchmarks.bench.plan import Test, TestChoice
from bitnet.benchmarks.bench.random_model import write_random
from bitnet.benchmarks.bench.rows import Subject, fastest
from bitnet.benchmarks.bench.series import Budget
from bitnet.cli import main
from bitnet.errors import BitNetError
from bitnet.files.tensors import linear_parameters
from bitnet.kernels import ops

Captured = pytest.CaptureFixture[str]


def error(capsys: Captured, *args: object) -> str:
    """Exit code 2, nothing on stdout, one line on stderr: returns it."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("bitnet: error: ")
    return line


def choice(**changes: Any) -> TestChoice:
    return TestChoice(**{"prompts": [8], "predicts": [4], "pairs": [], "depths": [0], "batches": [1], **changes})


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


def test_bytes_and_products_of_an_answer_are_those_of_its_steps(rng: torch.Generator) -> None:
    """Summed step by step: weights once, and every position before."""
    predict, depth, batch = (int(torch.randint(1, 40, (), generator=rng)) for _ in range(3))
    read = ModelBytes(12_345, 17.5)
    work = limits.work(TINY, read, Test(0, predict, depth, batch))
    steps = range(depth + 1, depth + predict + 1)  # positions seen, the token's own included
    moved = sum(read.weight_bytes + batch * read.kv_bytes * seen for seen in steps)
    head = TINY.vocab_size * TINY.hidden_size
    macs = sum(linear_parameters(TINY) + head + 2 * TINY.num_hidden_layers * TINY.hidden_size * seen for seen in steps)
    assert work.bytes == pytest.approx(moved / (predict * batch), rel=1e-12)
    assert work.macs == pytest.approx(macs / predict, rel=1e-12)


def test_products_of_a_prompt_are_those_of_its_tokens(rng: torch.Generator) -> None:
    prompt, depth = (int(torch.randint(1, 40, (), generator=rng)) for _ in range(2))
    work = limits.work(TINY, ModelBytes(1000, 3.0), Test(prompt, 0, depth))
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
    assert limits.working_set(ModelBytes(1_234_567, 0.0), Test(1, 0)) == 1_200_000
    assert limits.working_set(ModelBytes(3, 0.0), Test(1, 0)) == 3
    assert limits.working_set(ModelBytes(1000, 10.0), Test(0, 50, 50, 2)) == 3000


def test_int8_rows_share_the_fastest_product() -> None:
    peaks = {"avx2": 3.0, DOT_PRODUCTS: 7.0, "torch int8": None, "torch bf16": 9.0}
    assert fastest("avx2", peaks) == fastest("torch int8", peaks) == DOT_PRODUCTS
    assert fastest("torch bf16", peaks) == "torch bf16"
    assert fastest("avx2", {"avx2": None, "torch bf16": 9.0}) == "avx2"


def test_contenders_on_the_cpu_are_held_against_the_cpu() -> None:
    engines = EngineChoice(["torch"], [], ["file"], ["fp32"], ["torch-bf16"], "", torch.device("cuda:0"))
    assert {one.name: one.device for one in contenders.select_contenders(engines)} == {
        "torch": "cuda:0",
        "torch-bf16": "cpu",
    }


def test_a_model_too_big_is_refused_before_loading(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr("bitnet.machine.available_memory", lambda: 10**9)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("loaded or written before memory was checked")

    monkeypatch.setattr(device_meter, "Child", refuse)
    monkeypatch.setattr(series, "Child", refuse)
    monkeypatch.setattr(command, "write_random", refuse)
    line = error(capsys, "bench", "--preset", "2b4t", "--backend", "torch", "--against", "torch-bf16", "-p", 8, "-n", 8)
    assert all(part in line for part in ("2b4t needs about", "torch-bf16", "GB available"))


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
    mine, random_one = (Subject("m", config, size, source) for source in ("m.safetensors", command.RANDOM))
    ours_alone = contenders.select_contenders(
        EngineChoice(["torch"], [], ["file"], ["fp32"], [], "", torch.device("cpu"))
    )
    assert (command._disk(mine, ours_alone), command._disk(random_one, ours_alone)) == (0, size)
    both = [*ours_alone, contenders.llama_contender("python")]
    assert command._disk(mine, both) > 0.5 * linear_parameters(config)


def test_dense_torch_refuses_a_float_model() -> None:
    plain = Subject("m", TINY.replace(linear="float"), 1, "m.safetensors")
    engines = EngineChoice(["torch"], [], ["file"], ["fp32"], ["torch-bf16"], "", torch.device("cpu"))
    settings = command.Settings([], [], choice(), [1], 1, engines, None, Budget(), [])
    with pytest.raises(BitNetError, match="float linear layers"):
        command._check(plain, settings, contenders.select_contenders(engines))


def test_llama_cpp_gets_a_shape_that_it_runs(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    config = TINY.replace(hidden_size=256, intermediate_size=512)
    write_random(config, tmp_path / "m.safetensors")
    seen, differs = contenders.llama_config(config)
    assert differs == "SiLU instead of ReLU², no QK norm"
    command.packed_to_gguf(tmp_path / "m.safetensors", seen, tmp_path / "m.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.1.ffn_down.weight"] == "TQ2_0"
    assert not [name for name in kinds if "attn_q_norm" in name]
    with pytest.raises(BitNetError, match="hidden_size 64, expected a multiple of 256"):
        contenders.llama_config(TINY)


def test_more_threads_than_cores_are_refused(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.threads.usable_cores", lambda: 2)
    for words, got in (("1,3", "3"), ("1,two", "'two'"), ("1,,2", "''"), ("1000000", "1000000")):
        line = error(capsys, "bench", "--preset", "nano", "-t", words)
        assert f"-t: got {got}, expected 1 to the 2 cores" in line


@pytest.mark.parametrize("backends", [["auto", "cpu"], ["cpu", "auto"]])
def test_an_engine_that_is_asked_for_twice_runs_once(backends: list[str]) -> None:
    if ops.select(torch.device("cpu")) is not ops.CPU:
        pytest.skip("auto is the torch engine here")
    engines = EngineChoice(backends, [], ["file"], ["fp32"], [], "", torch.device("cpu"))
    assert [one.name for one in contenders.select_contenders(engines)] == ["cpu"]


def test_a_llama_cpp_without_avx512_is_reported() -> None:
    rows = [{"system": "CPU : AVX2 = 1 | "}]
    assert "without AVX-512" in command._llama_notes(rows, ["avx2", "avx512_f"])[0]
    assert not command._llama_notes(rows, ["avx2"])
    assert not command._llama_notes([{"system": "AVX512 = 1 | "}], ["avx512_f"])
