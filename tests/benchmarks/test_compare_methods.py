"""The formulas of `bitnet compare` against fp64 loops, and its methods on real files."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bitnet.benchmarks.children import llama
from bitnet.benchmarks.compare import gguf_methods, measure
from bitnet.benchmarks.compare.artifact import pack_nibbles, read_model, unpack_nibbles
from bitnet.benchmarks.compare.method import Settings
from bitnet.benchmarks.compare.pair import Pair
from bitnet.benchmarks.compare.plot import pareto
from bitnet.benchmarks.compare.registry import choose, registry
from bitnet.benchmarks.compare.torchao_methods import activation_ranges
from bitnet.errors import BitNetError

SETTINGS = Settings(threads=1, qat_steps=1, calibration=2)


NEEDS_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


def test_formulas_against_loops(rng: torch.Generator) -> None:
    W, T, V = 5, 7, 11
    logits, reference = torch.randn(2, W, T, V, generator=rng) * 3
    targets = torch.randint(0, V, (W, T), generator=rng)
    targets[1, 3] = targets[4, 0] = -100
    nats, kl, same = np.zeros(W), np.zeros((W, T)), np.zeros((W, T))
    for w in range(W):
        for t in range(T):
            q = [float(x) for x in logits[w, t].double()]
            p = [float(x) for x in reference[w, t].double()]
            log_q = [x - math.log(math.fsum(math.exp(y) for y in q)) for x in q]
            log_p = [x - math.log(math.fsum(math.exp(y) for y in p)) for x in p]
            kl[w, t] = math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
            same[w, t] = p.index(max(p)) == q.index(max(q))
            if targets[w, t] != -100:
                nats[w] -= log_q[int(targets[w, t])]
    # fp32 cross entropy: a few roundings of values below 20, seven of them summed.
    assert np.allclose(measure.window_nats(logits, targets).numpy(), nats, atol=7 * 20 * 2**-22)
    assert np.allclose(measure.divergence(reference, logits).numpy(), kl, atol=1e-12)
    assert np.array_equal(measure.agreement(reference, logits).numpy(), same.astype(bool))


def test_figures_against_their_definition(seed: int) -> None:
    """Standard errors of ratios over stretches (Cochran), and of the difference to the baseline, which is paired."""
    rng = np.random.default_rng(seed)
    W, T = 70, 16
    tokens, sizes = rng.integers(10, T + 1, W), rng.integers(30, 60, W)
    baseline = measure.Scores(rng.uniform(20, 60, W), np.zeros(10), np.full(10, float(T)))
    extra = rng.uniform(0, 1, W)
    row = measure.Scores(baseline.nats + extra, rng.uniform(0, 3, 10), rng.integers(0, T + 1, 10).astype(float))
    got = measure.figures(row, baseline, tokens, sizes, T)

    def expected(total: np.ndarray, weight: np.ndarray, groups: int) -> tuple[float, float]:
        parts = np.array_split(np.arange(len(total)), groups)
        y, x = (np.array([values[part].sum() for part in parts]) for values in (total, weight))
        share = y.sum() / x.sum()
        return share, math.sqrt(groups / (groups - 1) * ((y - share * x) ** 2).sum()) / x.sum()

    for key, total, weight, groups, unit in (
        ("bits_per_byte", row.nats, sizes, 32, math.log(2)),
        ("more_than_baseline", extra, sizes, 32, math.log(2)),
        ("kl", row.kl, np.full(10, T), 10, 1),
        ("top1", row.top1, np.full(10, T), 10, 1),
    ):
        value, error = expected(total, weight, groups)
        assert got[key] == pytest.approx(value / unit, rel=1e-9)
        assert got[f"{key}_error"] == pytest.approx(error / unit, rel=1e-6)
    assert got["more_than_baseline_error"] < got["bits_per_byte_error"]


def test_nibbles_come_back(rng: torch.Generator) -> None:
    values = torch.randint(-8, 8, (63, 130), generator=rng, dtype=torch.int8)
    packed = pack_nibbles(values)
    assert packed.shape == (63, 65)
    assert torch.equal(unpack_nibbles(packed), values)


@pytest.mark.parametrize("lower", [True, False])
def test_front_holds_what_nothing_beats(lower: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in rng.integers(0, 12, (40, 2))]
    better = (lambda a, b: a <= b) if lower else (lambda a, b: a >= b)
    kept = {
        p for p in points if not any(q != p and q[0] <= p[0] and better(q[1], p[1]) for q in points)
    }  # nothing else is as small and as good
    assert set(pareto(points, lower=lower)) == kept


def test_names_and_families() -> None:
    assert [method.name for method in choose("fp32,bf16")] == ["fp32", "bf16"]
    assert {method.family for method in choose("gguf")} == {"gguf"}
    assert choose(None) == list(registry().values())
    with pytest.raises(BitNetError, match="expected some of fp32"):
        choose("fp32,none")


@NEEDS_TORCHAO
@pytest.mark.filterwarnings("ignore")  # torchao's own, at import
@pytest.mark.parametrize(
    ("name", "bits"), [("int8-absmax", 8), ("int8-zeropoint", 8), ("ptq-static", 8), ("ptq-int4", 4)]
)
def test_files_hold_what_was_quantised(name: str, bits: int, pair: Pair, tmp_path: Path) -> None:
    """The file has the bits it claims, and gives a model whose weights are the baseline's up to half a step."""
    artifact = registry()[name].make(pair, tmp_path, SETTINGS)
    model, autocast = read_model(Path(artifact.path))
    baseline = pair.baseline_model()
    assert autocast is None
    linears = 0
    for layer, module in baseline.named_modules():
        if isinstance(module, torch.nn.Linear):
            got, weight = model.get_submodule(layer).weight.dequantize().float(), module.weight.detach()
            linears += weight.numel()
            span = weight.amax(1, keepdim=True).clamp(min=0) - weight.amin(1, keepdim=True).clamp(max=0)
            step = torch.maximum(span, 2 * weight.abs().amax(1, keepdim=True)) / (2**bits - 2)
            assert ((got - weight).abs() <= 0.51 * step + 1e-6).all(), layer
    rest = sum(p.numel() for p in baseline.parameters()) - linears
    least = linears * bits / 8 + 2 * baseline.model.embed_tokens.weight.numel()
    ids = pair.training_windows(2)[:, :-1]
    with torch.no_grad():
        divergence = measure.divergence(baseline(ids), model(ids))
    assert 0 < float(divergence.mean()) < 0.1  # it runs, and nearly as the baseline does
    assert least < artifact.bytes < least + 4 * rest + linears // 4 + 40_000  # scales, norms, tokenizer, header


@pytest.mark.parametrize(("name", "size"), [("fp32", 4), ("bf16", 2)])
def test_float_files(name: str, size: int, pair: Pair, tmp_path: Path) -> None:
    artifact = registry()[name].make(pair, tmp_path, SETTINGS)
    baseline = pair.baseline_model()
    model, _ = read_model(Path(artifact.path))
    tolerance = 0 if size == 4 else 2.0**-8
    for key, value in baseline.state_dict().items():
        assert torch.allclose(model.state_dict()[key].float(), value, rtol=tolerance, atol=0), key
    count = sum(p.numel() for p in baseline.parameters())
    assert count * size < artifact.bytes < count * size + 40_000


def test_activation_ranges(pair: Pair) -> None:
    baseline, ids = pair.baseline_model(), pair.training_windows(9)[:, :-1]
    seen: dict[str, list[float]] = {}
    for name, module in baseline.named_modules():
        if isinstance(module, torch.nn.Linear):
            seen[name] = []
            module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(float(args[0].abs().max())))
    ranges = activation_ranges(baseline, ids)
    assert {name: float(value) for name, value in ranges.items()} == {
        name: max(values) for name, values in seen.items()
    }


def test_missing_library_says_how_to_get_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, extra in (("int8-absmax", "compare"), ("gptq-int4", "compare-gptq"), ("gguf-q4_0", "compare")):
        reason = registry()[name].why_not(pair, SETTINGS)
        assert reason is not None
        assert f"pip install '.[{extra}]'" in reason
    assert "--binary RUN" in str(registry()["bitnet-1bit"].why_not(pair, SETTINGS))


def test_shapes_llama_cpp_cannot_hold(pair: Pair) -> None:
    config = pair.baseline_model().config
    assert gguf_methods.why_not_shape(config, "f16", 256) is None
    assert "QK norm" in str(gguf_methods.why_not_shape(config.replace(qk_norm=True), "f16", 1))
    assert "ReLU^2" in str(gguf_methods.why_not_shape(config.replace(hidden_act="relu2"), "f16", 1))
    assert "intermediate_size 320 is not a multiple of 256" in str(
        gguf_methods.why_not_shape(config.replace(intermediate_size=320), "f16", 256)
    )


def test_scores_of_a_shorter_batch_replace_those_before(tmp_path: Path, rng: torch.Generator) -> None:
    class Llama:
        def clear(self) -> None:
            self.cleared = True

        def read(self, ids: list[int], start: int, every: bool) -> np.ndarray:
            assert (self.cleared, start, every) == (True, 0, True)
            self.cleared = False
            return np.array(ids, dtype=np.float32)[:, None] * np.arange(7, dtype=np.float32)

    fake, path = Llama(), tmp_path / "logits"
    for count in (3, 1, 2):
        rows = torch.randint(100, (count, 5), generator=rng)
        assert llama.write_logits(fake, rows.tolist(), str(path)) == {"vocab": 7}
        got = np.fromfile(path, dtype=np.float32).reshape(count, 5, 7)
        assert np.array_equal(got, rows.numpy()[:, :, None].astype(np.float32) * np.arange(7, dtype=np.float32))
