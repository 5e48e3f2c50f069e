"""The engines that `bitnet bench` measures compute the same model; the ways of torch to compute a product."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_fakes import TINY
from torch import Tensor

import bitnet
from bitnet import dense_products
from bitnet.benchmarks.bench import dense, ours
from bitnet.benchmarks.bench.random_model import ZEROS, random_packed, write_random
from bitnet.dense_products import Timed, Way
from bitnet.errors import BitNetError
from bitnet.files.packed import read_config, read_packed
from bitnet.files.tensors import linear_parameters
from bitnet.kernels import native, ops, packing


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 2), (5, 7), (4097, 33), (600, 64)])
def test_random_weights_have_their_zeros(n: int, k: int, seed: int) -> None:
    packed = random_packed(n, k, np.random.default_rng(seed))
    codes = packing.unpack(packed, k)  # refuses code 3 and a fill that is not zero
    assert codes.shape == (n, k)
    for value, chance in ((-1, (1 - ZEROS) / 2), (0, ZEROS), (1, (1 - ZEROS) / 2)):
        share = float((codes == value).float().mean())
        assert abs(share - chance) <= 6 * (chance * (1 - chance) / codes.numel()) ** 0.5  # six standard errors


def test_a_random_model_is_a_model(tiny_model: Path) -> None:
    assert read_config(tiny_model) == read_packed(tiny_model).config == TINY


def here(dtype: str, *names: str) -> tuple[str, ...]:
    """Names of ways to a product; skips where this CPU has them not."""
    lacking = {one.way.name: one.why_not for one in dense_products.probe(dtype) if one.rate is None}
    known = {way.name for way in dense_products.ways(dtype)}
    for name in names:
        if name in lacking or name not in known:
            pytest.skip(f"{name}: {lacking.get(name, 'not in this build of torch')}")
    return names


@pytest.mark.parametrize("act", ["relu2", "silu"])
@pytest.mark.parametrize(
    ("dtype", "few", "many"),
    [
        ("bf16", "mkldnn._linear_pointwise", "mkldnn._linear_pointwise"),
        ("bf16", "linear", "mkldnn._linear_pointwise"),
        ("int8", "_int_mm", "_int_mm"),
        ("int8", "_int_mm", "onednn.qlinear_pointwise"),
    ],
)
def test_dense_torch_computes_the_model(
    dtype: str, few: str, many: str, act: str, tmp_path: Path, rng: torch.Generator
) -> None:
    config = TINY.replace(hidden_act=act, qk_norm=act == "silu", tie_word_embeddings=act == "relu2")
    path = tmp_path / "m.safetensors"
    write_random(config, path, seed=int(torch.randint(2**31, (), generator=rng)))
    driver = dense.DenseDriver(str(path), dtype, 1, *here(dtype, few, many))
    ids = torch.randint(0, config.vocab_size, (2, 21), generator=rng)
    expected = bitnet.load(path, engine="torch").logits(ids)[:, -1]
    driver.start(2, 0, 21)
    driver.forward(ids[:, :17])
    for at in range(17, 21):  # prompt and steps are one text
        got = driver.forward(ids[:, at : at + 1]).float()
    # bf16 rounds by 2^-9 a step, int8 by 1/254 of the largest: some dozen of either a layer stay below 20 %, where
    # another model's logits are off by 140 % (two strangers of one size).
    assert float((got - expected).norm() / expected.norm()) < 0.2
    assert all(f"torch.{name}" in driver.facts["what"] for name in (few, many))


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_ours_counts_what_a_token_reads(engine: str, tiny_model: Path) -> None:
    if engine == "cpu" and native.why_not():
        pytest.skip(native.why_not() or "")
    driver = ours.EngineDriver(str(tiny_model), engine, "file", "fp32", 1, "cpu")
    projections = linear_parameters(TINY) / 4
    head = TINY.vocab_size * TINY.hidden_size * (2 if engine == "cpu" else 4)
    # 1.78 to 8 bits per weight, rows and columns filled up to the blocks of the kernels; norms are small.
    assert head + 0.8 * projections < driver.facts["weight_bytes"] < head + 8 * projections
    kv = 2 * TINY.num_hidden_layers * TINY.num_key_value_heads * TINY.head_dim * 4
    assert driver.facts["kv_bytes"] == kv
    driver.start(3, 5, 12)
    driver.prefill(4)
    driver.decode(3)


def test_a_kernel_that_fails_its_self_test_gets_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "self_test", lambda backend, device: "packed product M1-N1-K1: 1 of 1 sums differ")
    with pytest.raises(BitNetError, match=r"self-test of the '\w+' kernels failed .*1 of 1 sums differ"):
        ours.prepare(engine="auto", device="cpu", threads=1, path="", head="file", cache="fp32")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def way(name: str, clock: Clock, rate: Callable[[int, int], float], calls: list[tuple[str, int]], off: int = 0) -> Way:
    """An exact product that takes its time by a clock. rate(rows, out-features): multiply-adds per second."""

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


def test_ways_that_cannot_run_or_are_wrong_are_reported() -> None:
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


def test_no_way_at_all_is_an_error() -> None:
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
