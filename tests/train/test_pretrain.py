"""The training loop on a toy text: it learns, it skips steps that are not finite, and what it records is true."""

import json
import math
import random
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy_runs import CPU, toy_config, train

from bitnet.errors import BitNetError
from bitnet.files import checkpoint
from bitnet.files.checkpoint import latest_save
from bitnet.layers import BitLinear
from bitnet.quant import training_precision
from bitnet.train import precision
from bitnet.train import pretrain as loop
from bitnet.train.config import RunConfig, read_config
from bitnet.train.data.preparing import prepare_data
from bitnet.train.data.shards import open_dataset
from bitnet.train.data.windows import Sampler
from bitnet.train.objective import Objective
from bitnet.train.optim import Optimizer
from bitnet.train.parallel.distributed import Processes
from bitnet.train.report.display import Display
from bitnet.train.report.observer import Observer
from bitnet.train.report.overview import duration
from bitnet.train.report.plot import plot_run
from bitnet.train.runs.run import Run
from bitnet.train.setup import Setup


@pytest.fixture(autouse=True)
def without_pictures_unless_asked(request: pytest.FixtureRequest) -> None:
    if "pictures" not in request.fixturenames:
        request.getfixturevalue("without_pictures")


@pytest.fixture
def pictures() -> None:
    """Asks for the loss curve to be drawn."""


def toy_text() -> str:
    """Words in a fixed cycle with random numbers between: much to learn, never all of it, and too long to memorise.

    The numbers have one or two digits, so that windows do not all begin at the same place of the cycle.
    """
    words = ["".join(random.choices("abcdefgh", k=random.randint(3, 5))) for _ in range(6)]
    words.append("abcdefgh")  # every letter occurs
    numbers = ("".join(random.choices("0123", k=random.randint(1, 2))) for _ in range(3000))
    return "".join(f"{words[i % 7]}{number}{' ' if i % 5 else chr(10)}" for i, number in enumerate(numbers))


@pytest.fixture
def corpus(tmp_path: Path, seed: int) -> Path:
    path = tmp_path / "toy.txt"
    path.write_text(toy_text())
    return path


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in Run(run).metrics() if "loss" in row]


# ---- it learns ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("linear", ["ternary", "binary", "float"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_loss_falls_below_the_entropy_of_letters(linear: str, optimizer: str, corpus: Path, tmp_path: Path) -> None:
    """A model without context cannot be better than the entropy of single characters; half of it takes context."""
    lr = 0.02 if optimizer == "muon" else 0.01
    config = toy_config(
        corpus, model={"linear": linear}, steps=150, batch_size=8, optimizer=optimizer, lr=lr, embedding_lr=0.02
    )
    outcome = train(config, tmp_path / "run")
    losses = [row["loss"] for row in steps_of(tmp_path / "run")]
    counts = Counter(corpus.read_text())
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert losses[0] == pytest.approx(math.log(len(counts)), rel=0.2)  # nothing known: all characters alike
    assert outcome.validation is not None
    assert outcome.validation.loss < entropy / 2, (losses[0], losses[-1], entropy)
    assert sum(losses[-10:]) / 10 < entropy / 2


# ---- gradients ---------------------------------------------------------------------------------------------


def trainer(config: RunConfig, out: Path) -> loop.Trainer:
    run, display = Run(out), Display(quiet=True)
    run.path.mkdir(exist_ok=True)
    dataset = prepare_data(config, run, display)
    return loop.Trainer(Setup(config.resolved(dataset.tokenizer.vocab_size), run, dataset, Processes(CPU), display))


@pytest.mark.parametrize(("linear", "share"), [("ternary", 1.0), ("ternary", 0.5), ("float", 1.0)])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    linear: str, share: float, corpus: Path, tmp_path: Path
) -> None:
    """1 x 16, 2 x 8 and 16 x 1 sequences against autograd on all 16 at once."""
    dataset = None
    results: list[tuple[float, dict[str, Tensor]]] = []
    step = random.randrange(50)
    for accumulate in (1, 2, 16):
        config = toy_config(corpus, model={"linear": linear}, batch_size=16 // accumulate, accumulate=accumulate)
        made = trainer(config, tmp_path / "run")
        made.progress.step = step
        made.precision = training_precision(share)
        loss = float(made.gradients())
        results.append((loss, {name: p.grad.clone() for name, p in made.model.named_parameters()}))
        dataset, model = made.setup.dataset, made.model
    inputs, targets = Sampler(dataset.train, 16, config.train.seed).windows(step * 16, 16)
    model.zero_grad()
    whole = F.cross_entropy(model(inputs, training_precision(share)).flatten(0, 1), targets.flatten())
    whole.backward()
    expected = float(whole.detach())
    for loss, gradients in results:
        # The same terms, added in another order: 16 * 16 tokens, each sum of 256 fp32 terms off by at most
        # 256 * 2^-24 of the sum of their sizes; that sum may be several times the result, hence by norm and 1e-4.
        assert loss == pytest.approx(expected, rel=256 * 2**-24)
        for name, parameter in model.named_parameters():
            difference = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
            assert float(difference) < 1e-4, name


def test_gradients_are_clipped_and_logged_as_they_were(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    step = Optimizer.step

    def spy(self: Optimizer) -> None:
        grads = [p.grad.double().flatten() for group in self._groups() for p in group["params"]]
        seen.append(float(torch.cat(grads).norm()))
        step(self)

    monkeypatch.setattr(Optimizer, "step", spy)
    for clip in (1e-3, 1e5):
        seen.clear()
        train(toy_config(corpus, clip=clip, steps=4), tmp_path / f"run-{clip}")
        norms = [row["grad_norm"] for row in steps_of(tmp_path / f"run-{clip}")]
        assert all(norm > 1e-2 for norm in norms)
        # torch divides by norm + 1e-6; sums of 5,000 squares in fp32 are good to 1e-4.
        assert seen == pytest.approx([min(norm, clip) for norm in norms], rel=1e-3)


# ---- steps that are not finite -----------------------------------------------------------------------------


class Poison:
    """Makes chosen steps not finite, in one of several ways, and keeps the state before and after every step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, way: str, steps: set[int]) -> None:
        self.way, self.steps = way, steps
        self.now = -1
        self.kept: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}  # step -> state before and after
        original, take_step, set_step = Objective.forward, loop.Trainer.training_step, Optimizer.set_step

        def loss(objective: Objective, *arguments: Any) -> tuple[Tensor, Tensor]:
            value, entropy = original(objective, *arguments)
            if self.now not in self.steps:
                return value, entropy
            if way in ("nan loss", "inf loss"):
                factor = float(way.split(maxsplit=1)[0])
                return value * factor, entropy * factor
            if way == "nan loss alone":  # the gradients stay finite
                return value, entropy + math.nan
            if way == "inf gradient":
                value.register_hook(lambda grad: grad * math.inf)
            else:
                weight = next(m for m in objective.modules() if isinstance(m, BitLinear)).weight
                handle = weight.register_hook(lambda grad: handle.remove() or self._one_nan(grad))
            return value, entropy

        def noted(optimizer: Optimizer, step: int) -> float:
            self.now = step + 1  # as metrics count
            return set_step(optimizer, step)

        def kept(trainer: loop.Trainer) -> None:
            before = self._state(trainer)
            take_step(trainer)
            self.kept[self.now] = (before, self._state(trainer))
            self.now = -1

        monkeypatch.setattr(Objective, "forward", loss)
        monkeypatch.setattr(Optimizer, "set_step", noted)
        monkeypatch.setattr(loop.Trainer, "training_step", kept)

    @staticmethod
    def _one_nan(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[-1, -1] = math.nan
        return grad

    @staticmethod
    def _state(trainer: loop.Trainer) -> dict[str, Tensor]:
        state = {**trainer.model.state_dict(), **trainer.optimizer.tensors()}
        return {name: value.clone() for name, value in state.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("way", ["nan loss", "nan loss alone", "inf loss", "inf gradient", "one nan gradient"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_that_is_not_finite_changes_nothing(
    way: str,
    optimizer: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = {1, 3, 4, 8}
    poison = Poison(monkeypatch, way, bad)
    outcome = train(toy_config(corpus, steps=8, optimizer=optimizer, skip_limit=3, save_every=1), tmp_path / "run")
    for step in range(1, 9):
        assert same(*poison.kept[step]) == (step in bad), step
        for state in poison.kept[step]:
            assert all(bool(value.isfinite().all()) for value in state.values())
    rows = Run(tmp_path / "run").metrics()
    assert [row["step"] for row in rows if "skipped" in row] == sorted(bad)
    assert all(set(row) == {"step", "skipped"} for row in rows if "skipped" in row)
    assert [row["step"] for row in rows if "loss" in row] == [2, 5, 6, 7]
    assert outcome.step == 8
    shown = capsys.readouterr().err  # shown even when quiet
    assert [f"step {step} skipped" in shown for step in range(1, 9)] == [step in bad for step in range(1, 9)]
    save = latest_save(tmp_path / "run" / "saves")
    assert save is not None
    assert same(save.tensors("model"), {k: v for k, v in poison.kept[8][1].items() if "/" not in k})


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_several_in_a_row_stop_the_run(
    background: bool, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, "nan loss", {2, 3, 5, 6, 7, 8})  # two in a row are allowed here, three are not
    original = checkpoint.write_files

    def slow(*args: Any) -> Any:
        time.sleep(0.3 * background)  # still writing when the last step fails
        return original(*args)

    monkeypatch.setattr(checkpoint, "write_files", slow)
    with pytest.raises(BitNetError, match="diverged") as error:
        train(toy_config(corpus, steps=20, skip_limit=3, save_every=2, async_save=background), tmp_path / "run")
    save = latest_save(tmp_path / "run" / "saves")
    assert save is not None
    assert str(save.path) in str(error.value)
    assert "3 steps in a row" in str(error.value)
    assert save.step == 6
    rows = Run(tmp_path / "run").metrics()
    assert [(row["step"], "skipped" in row) for row in rows] == [
        (1, False), (2, True), (3, True), (4, False), (5, True), (6, True), (7, True),
    ]  # fmt: skip


def test_an_error_waits_for_the_file_that_is_being_written(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a thread would write into a folder whose lock is released."""
    original, written = checkpoint.write_files, []

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        written.append(original(*args))
        return written[-1]

    def failing(observer: Observer, *args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint, "write_files", slow)
    monkeypatch.setattr(Observer, "validate", failing)
    with pytest.raises(ZeroDivisionError):
        train(toy_config(corpus, steps=20, save_every=2, eval_every=3, async_save=True), tmp_path / "run")
    assert len(written) == 1


def test_the_count_of_bad_steps_survives_a_resume(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved after the second of them: the first one after the resume is the third in a row."""
    poison = Poison(monkeypatch, "inf loss", {3, 4, 5, 6, 7, 8})
    config = toy_config(corpus, steps=20, skip_limit=3, save_every=4)
    with pytest.raises(BitNetError):
        train(config, tmp_path / "run")
    poison.kept.clear()
    with pytest.raises(BitNetError, match="3 steps in a row"):
        train(config, tmp_path / "run")
    assert list(poison.kept) == []  # it raised inside step 5, before anything was kept
    assert [row["step"] for row in Run(tmp_path / "run").metrics()] == [1, 2, 3, 4, 5]


def test_diverging_before_the_first_save(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(monkeypatch, "nan loss", set(range(1, 30)))
    with pytest.raises(BitNetError, match="no save yet"):
        train(toy_config(corpus, steps=20), tmp_path / "run")


# ---- what is recorded --------------------------------------------------------------------------------------


@pytest.fixture
def finished(corpus: Path, tmp_path: Path) -> tuple[RunConfig, Path, loop.Outcome]:
    config = toy_config(
        corpus,
        steps=11,
        batch_size=3,
        accumulate=2,
        eval_every=4,
        eval_tokens=50,
        report_every=3,
        sample_every=5,
        sample_prompt="ab",
        save_every=4,
        context=12,
    )
    return config, tmp_path / "run", train(config, tmp_path / "run")


def test_metrics_have_one_row_a_step(finished: tuple[RunConfig, Path, loop.Outcome]) -> None:
    _, folder, outcome = finished
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 12))
    data = open_dataset(folder / "data")
    for row in steps:
        # Quantisation warm-up takes 80 % of eleven steps.
        assert row.pop("quantised", 1.0) == pytest.approx(min(1.0, row["step"] / 9))
        assert set(row) == {"step", "loss", "bits_per_byte", "lr", "grad_norm", "tokens", "tokens_per_second"}
        assert all(math.isfinite(value) for value in row.values())
        assert row["tokens"] == row["step"] * 3 * 2 * 12
        per_byte = row["loss"] / math.log(2) * len(data.train) / data.train.text_bytes
        assert row["bits_per_byte"] == pytest.approx(per_byte, rel=1e-12)
    assert [row["step"] for row in rows if "telemetry" in row] == [3, 6, 9]
    validations = [row for row in rows if "val_loss" in row]
    assert [(row["step"], row["val_whole"], row["val_tokens"]) for row in validations] == [
        (4, False, 50), (8, False, 50), (11, True, len(data.val) - 1),
    ]  # fmt: skip
    last = validations[-1]
    assert outcome.validation is not None
    assert last["val_loss"] == outcome.validation.loss
    assert last["val_bits_per_byte"] == outcome.validation.bits_per_byte
    assert (outcome.step, outcome.signal) == (11, None)


def test_final_validation_is_what_the_saved_weights_give(finished: tuple[RunConfig, Path, loop.Outcome]) -> None:
    """Every character of the split but the first, in windows of the training context, in plain float64."""
    _, folder, outcome = finished
    model, save = Run(folder).load()
    assert save.step == 11
    ids = torch.from_numpy(open_dataset(folder / "data").val.read(0, len(open_dataset(folder / "data").val)))
    nats = []
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, 12):
            inputs, targets = ids[start : start + 12], ids[start + 1 : start + 13]
            scores = model(inputs[None])[0, : len(targets)].double().log_softmax(-1)
            nats += [-float(score[target]) for score, target in zip(scores, targets, strict=False)]
    assert outcome.validation is not None
    assert outcome.validation.tokens == len(nats) == len(ids) - 1
    # fp32 logits of a few units, summed in other batches: 2^-24 * 16 each.
    assert outcome.validation.loss == pytest.approx(math.fsum(nats) / len(nats), abs=1e-5)
    assert outcome.validation.bytes == len(nats)  # ASCII, a character a token


def test_the_run_holds_samples_and_the_resolved_config(finished: tuple[RunConfig, Path, loop.Outcome]) -> None:
    config, folder, outcome = finished
    assert read_config(folder / "config.toml") == config.resolved(open_dataset(folder / "data").tokenizer.vocab_size)
    samples = (folder / "samples.txt").read_text()
    heads = [line for line in samples.splitlines() if line.startswith("--- step ")]
    assert heads == ["--- step 5", "--- step 10", "--- step 11"]
    assert outcome.sample.startswith("ab")
    assert len(outcome.sample) == 2 + 120
    assert f"--- step 11\n{outcome.sample}\n" in samples


def test_telemetry_rows_describe_the_weights_of_their_step(
    finished: tuple[RunConfig, Path, loop.Outcome], corpus: Path, tmp_path: Path
) -> None:
    """Rows of step 9 against codes computed here, in numpy's rounding, from runs that stop at steps 6 and 9."""
    config, folder, _ = finished
    weights = {}
    for stop in (6, 9):
        weights[stop] = weights_at(config, tmp_path / f"stop-{stop}", stop)
    (row,) = (row for row in Run(folder).metrics() if "telemetry" in row and row["step"] == 9)
    assert len(row["telemetry"]) == 7
    for layer in row["telemetry"]:
        now, last = (codes(weights[stop][f"model.layers.{layer['layer']}.weight"]) for stop in (9, 6))
        # A weight within 2^-22 of a threshold may round either way: allow one in each layer.
        slack = 1.01 / now[0].numel()
        assert layer["zeros"] == pytest.approx(float((now[0] == 0).double().mean()), abs=slack)
        assert layer["flips"] == pytest.approx(float((now[0] != last[0]).double().mean()), abs=slack)
        assert layer["scale"] == pytest.approx(now[1], rel=1e-6)
    assert any(layer["flips"] > 0 for layer in row["telemetry"])


def codes(weight: Tensor) -> tuple[Tensor, float]:
    scale = float(weight.double().abs().mean())
    return (weight.double() / scale).round().clamp(-1, 1), scale


def weights_at(config: RunConfig, out: Path, stop: int) -> dict[str, Tensor]:
    """The weights after `stop` steps of this run."""
    made = trainer(config, out)
    for _ in range(stop):
        made.training_step()
    return {name: value.detach().clone() for name, value in made.model.state_dict().items()}


def test_looking_at_the_model_does_not_change_it(corpus: Path, tmp_path: Path) -> None:
    """Validation, samples, telemetry and saves at every step: the losses stay the same to the last bit."""
    often = {"eval_every": 1, "sample_every": 1, "report_every": 1, "save_every": 1}
    train(toy_config(corpus, steps=7), tmp_path / "a")
    train(toy_config(corpus, steps=7, **often), tmp_path / "b")
    key = ("step", "loss", "grad_norm", "lr")
    a, b = ([tuple(row[k] for k in key) for row in steps_of(tmp_path / name)] for name in "ab")
    assert a == b


@pytest.mark.parametrize("linear", ["ternary", "float"])
def test_a_seed_decides_everything(linear: str, corpus: Path, tmp_path: Path) -> None:
    losses = {}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        outcome = train(toy_config(corpus, seed=seed, model={"linear": linear}), tmp_path / name)
        losses[name] = [row["loss"] for row in steps_of(tmp_path / name)], outcome.sample
    assert losses["a"] == losses["b"]
    assert losses["a"][0][0] != losses["c"][0][0]


def test_batches_of_a_run_do_not_repeat(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and micro-batches take consecutive samples of one epoch: every window at most once."""
    seen: list[tuple[int, ...]] = []
    original = Objective.forward

    def spy(objective: Objective, inputs: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        seen.extend(tuple(row) for row in inputs.tolist())
        return original(objective, inputs, *others)

    config = toy_config(corpus, batch_size=5, accumulate=3, steps=4)
    monkeypatch.setattr(Objective, "forward", spy)
    monkeypatch.setattr(loop.Trainer, "seconds_per_step", lambda self: 1.0)
    train(config, tmp_path / "run")
    data = open_dataset(tmp_path / "run" / "data")
    wanted, _ = Sampler(data.train, 16, config.train.seed).windows(0, 5 * 3 * 4)
    assert seen == [tuple(row) for row in wanted.tolist()]


def test_bf16_keeps_fp32_masters(corpus: Path, tmp_path: Path) -> None:
    runs = {}
    for dtype in ("fp32", "bf16"):
        train(toy_config(corpus, dtype=dtype, steps=3), tmp_path / dtype)
        runs[dtype] = [row["loss"] for row in steps_of(tmp_path / dtype)]
    save = latest_save(tmp_path / "bf16" / "saves")
    assert save is not None
    assert {t.dtype for t in save.tensors("model").values()} == {torch.float32}
    moments = [t for name, t in save.tensors("optimizer").items() if not name.endswith("/step")]
    assert {t.dtype for t in moments} == {torch.float32}
    assert runs["bf16"] != runs["fp32"]
    # Logits below 1 at the start, each operation good to 2^-9: the first loss differs by little.
    assert runs["bf16"][0] == pytest.approx(runs["fp32"][0], rel=2**-6)


def test_resolve_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision.resolve_dtype("fp32", CPU) == "fp32"
    assert precision.resolve_dtype("bf16", CPU) == "bf16"
    for has, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(precision, "_has_bf16_cpu", lambda has=has: has)
        assert precision.resolve_dtype("auto", CPU) == wanted


def test_a_prompt_the_tokenizer_cannot_hold_is_refused_before_training(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(BitNetError, match="character"):
        train(toy_config(corpus, sample_prompt="Zebra"), tmp_path / "run")
    assert Run(tmp_path / "run").metrics() == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (61, "1 min 01 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---- pictures and trackers ---------------------------------------------------------------------------------


def check_png(data: bytes) -> tuple[int, int]:
    """Signature, chunk lengths and checksums (W3C PNG, section 5). Returns the size in pixels."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds, pixels, size = 8, [], b"", (0, 0)
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        kinds.append(kind)
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
        if kind == b"IDAT":
            pixels += body
        at += 12 + length
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    assert len(set(zlib.decompress(pixels))) > 10  # not an empty sheet
    return size


def test_a_run_ends_with_its_curve(pictures: None, corpus: Path, tmp_path: Path) -> None:
    outcome = train(toy_config(corpus, steps=3), tmp_path / "run")
    assert outcome.pictures == [str(tmp_path / "run" / "loss.png"), str(tmp_path / "run" / "loss.svg")]
    width, height = check_png((tmp_path / "run" / "loss.png").read_bytes())
    assert min(width, height) > 300
    root = ElementTree.fromstring((tmp_path / "run" / "loss.svg").read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 5


@pytest.mark.parametrize("title", ["runs/$\\frac$_^: 1M", "a [b] {c} %d"])
def test_a_curve_of_any_name_and_of_few_rows(title: str, tmp_path: Path) -> None:
    validation = {"step": 1, "val_loss": 2.0, "val_bits_per_byte": 1.0}
    step = {"step": 1, "loss": 2.0, "lr": 0.1}
    for i, rows in enumerate(([], [step], [step, validation], [validation])):
        for path in plot_run(rows, tmp_path / f"loss-{i}", title):
            assert path.stat().st_size > 1000


def test_without_matplotlib_the_run_is_fine(
    pictures: None, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what an absent package looks like to `import`
    outcome = train(toy_config(corpus, steps=2), tmp_path / "run")
    assert outcome.pictures == []
    assert outcome.validation is not None


def test_a_tracker_gets_the_rows_of_the_metrics(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    ended: list[bool] = []

    class FakeRun:
        def log(self, numbers: dict[str, float], step: int) -> None:
            logged.append((step, numbers))

        def finish(self) -> None:
            ended.append(True)

    fake = ModuleType("wandb")
    fake.init = lambda **settings: FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(toy_config(corpus, steps=4, wandb=True, eval_every=2, report_every=2), tmp_path / "run")
    rows = Run(tmp_path / "run").metrics()
    assert [step for step, _ in logged] == [row["step"] for row in rows]
    losses: Callable[[Any], list[float]] = lambda pairs: [n["loss"] for _, n in pairs if "loss" in n]  # noqa: E731
    assert losses(logged) == [row["loss"] for row in rows if "loss" in row]
    assert any("zeros/0.self_attn.q_proj" in numbers for _, numbers in logged)
    assert ended == [True]


def test_a_missing_tracker_stops_the_run_before_it_starts(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BitNetError, match="pip install wandb"):
        train(toy_config(corpus, wandb=True), tmp_path / "run")
    assert steps_of(tmp_path / "run") == []
