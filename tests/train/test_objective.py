"""The loss with all that can be added to it, against formulas in fp64; and runs that use it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy_runs import SHAPE, words

from bitnet.cli import main
from bitnet.config import ModelConfig
from bitnet.layers import BitLinear
from bitnet.model import Transformer
from bitnet.quant import QUANTISED, Precision, training_precision
from bitnet.train.config import TrainConfig
from bitnet.train.objective import Objective, distillation
from bitnet.train.runs.run import Run
from bitnet.train.schedule import quantised_fraction, warmup_end

pytestmark = pytest.mark.usefixtures("without_pictures")


def made(seed: int, **changes: Any) -> Transformer:
    model = Transformer(ModelConfig(**{**SHAPE, "vocab_size": 37, **changes}))
    model.init_weights(seed)
    return model


def next_token_loss(model: Transformer, ids: Tensor, precision: Precision = QUANTISED) -> Tensor:
    """Mean cross-entropy [] of every token of ids [B, T] but the first."""
    return F.cross_entropy(model(ids[:, :-1], precision).flatten(0, 1), ids[:, 1:].flatten())


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_chunks_are_the_whole(chunk: int, tied: bool, seed: int, rng: torch.Generator) -> None:
    """Loss and gradients of 39 tokens, 1, 7 or all of them at a time, against all logits at once."""
    model = made(seed, tie_word_embeddings=tied)
    ids = torch.randint(0, 37, (3, 14), generator=rng)
    wanted = next_token_loss(model, ids)
    loss, entropy = Objective(model, TrainConfig(loss_chunk=chunk))(ids[:, :-1], ids[:, 1:])
    # Sums of 39 losses and, in a gradient, of 39 products, in another order.
    assert float(entropy) == pytest.approx(float(wanted.detach()), rel=39 * 2**-23)
    expected, got = gradients(model, wanted), gradients(model, loss)
    for name, gradient in expected.items():
        assert float((got[name] - gradient).norm()) <= 39 * 2**-20 * float(gradient.norm()), name


def test_distillation_is_its_formula(rng: torch.Generator) -> None:
    logits = (4 * torch.randn(11, 23, generator=rng)).requires_grad_()
    wanted = 4 * torch.randn(11, 23, generator=rng)
    for t in (1.0, 0.5, 3.0):
        loss = distillation(logits, wanted, t)
        (gradient,) = torch.autograd.grad(loss, logits)
        p, q = (torch.softmax(x.detach().double() / t, dim=-1) for x in (wanted, logits))
        assert float(loss.detach()) == pytest.approx(float(t * t * (p * (p / q).log()).sum()), rel=1e-4)
        # d/dz of t^2 KL is t (q - p): terms of at most t, computed in fp32.
        assert torch.allclose(gradient.double(), t * (q - p), rtol=0, atol=32 * t * 2**-23)


@pytest.mark.parametrize("chunk", [0, 5])
def test_all_terms_together(chunk: int, seed: int, rng: torch.Generator) -> None:
    model, teacher = made(seed), made(seed + 1, hidden_size=64, linear="float").requires_grad_(False)
    w, t, z = random.random(), random.uniform(0.5, 3.0), random.uniform(0.001, 0.1)
    settings = TrainConfig(loss_chunk=chunk, distill=w, temperature=t, z_loss=z, teacher="x")
    ids = torch.randint(0, 37, (2, 12), generator=rng)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    loss, entropy = Objective(model, settings, teacher)(inputs, targets)
    logits, taught = model(inputs).flatten(0, 1), teacher(inputs).flatten(0, 1)
    cross = F.cross_entropy(logits, targets.flatten())
    divergence = t * t * F.kl_div((logits / t).log_softmax(-1), (taught / t).softmax(-1), reduction="batchmean")
    expected = (1 - w) * cross + w * divergence + z * logits.logsumexp(-1).square().mean()
    assert float(entropy) == pytest.approx(float(cross.detach()), rel=1e-5)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    wanted, got = gradients(model, expected), gradients(model, loss)
    for name, gradient in wanted.items():
        assert float((got[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name


def test_the_teacher_is_nobodys_parameter(seed: int) -> None:
    model, teacher = made(seed), made(seed)
    objective = Objective(model, TrainConfig(teacher="x"), teacher)
    assert {id(p) for p in objective.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(("linear", "share"), [("ternary", 1.0), ("ternary", 0.5), ("float", 1.0)])
def test_recomputed_blocks_have_the_same_gradients(linear: str, share: float, seed: int, rng: torch.Generator) -> None:
    model = made(seed, linear=linear, num_hidden_layers=2)
    again = Transformer(model.config, recompute=True)
    again.load_state_dict(model.state_dict())
    ids, precision = torch.randint(0, 37, (2, 9), generator=rng), training_precision(share)
    wanted = gradients(model, next_token_loss(model, ids, precision))
    got = gradients(again, next_token_loss(again, ids, precision))
    assert all(torch.equal(got[name], gradient) for name, gradient in wanted.items())


def test_how_much_is_quantised() -> None:
    settings = TrainConfig(steps=10, float_share=0.3, quant_warmup=0.3)
    assert [quantised_fraction(settings, step) for step in range(7)] == [0, 0, 0, 0.5, 1, 1, 1]
    assert [quantised_fraction(TrainConfig(steps=4, float_share=0.5, quant_warmup=0.0), step) for step in range(4)] == [
        0,
        0,
        1,
        1,
    ]
    assert [quantised_fraction(TrainConfig(steps=4, quant_warmup=0.5), step) for step in range(4)] == [0.5, 1, 1, 1]
    for steps, float_share, warmup in (
        (7, 0.05, 0.95),
        (7, 0.2, 1.0),
        (100, 0.45, 1.0),
        (100, 0.0, 0.55),
        (1, 0.0, 0.8),
    ):
        settings = TrainConfig(steps=steps, float_share=float_share, quant_warmup=warmup)
        shares = [quantised_fraction(settings, step) for step in range(steps)]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0  # however the two lengths are rounded
        assert shares.index(1.0) + 1 == warmup_end(settings)


# ---- whole runs --------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "toy.txt"
    path.write_text(words(700))
    return path


def train(text: Path, out: str, *settings: str, code: int = 0, steps: int = 6) -> Path:
    sets = [f"model.{key}={value}" for key, value in SHAPE.items()]
    sets += ["train.eval_every=0", "train.batch_size=4", *settings]
    folder = text.parent / out
    flags = ["--data", str(text), "--out", str(folder), "--steps", str(steps), "--dtype", "fp32", "-q"]
    assert main(["train", *flags, *[part for s in sets for part in ("--set", s)]]) == code
    return folder


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in Run(run).metrics() if "loss" in row]


CHAR = "tokenizer.kind=char"


def test_what_costs_memory_only_changes_no_loss(text: Path) -> None:
    wanted = losses(train(text, "a", CHAR))
    assert losses(train(text, "b", CHAR, "train.recompute=true", "train.async_save=true")) == wanted
    assert losses(train(text, "c", CHAR, "train.loss_chunk=10")) == pytest.approx(wanted, rel=1e-3)


def test_zero_init_begins_as_the_identity(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = Objective.forward

    def spy(objective: Objective, *arguments: Any) -> tuple[Tensor, Tensor]:
        weights = {n: bool((m.weight == 0).all()) for n, m in objective.named_modules() if isinstance(m, BitLinear)}
        seen.append(all(zero == n.endswith(("o_proj", "down_proj")) for n, zero in weights.items()))
        return original(objective, *arguments)

    monkeypatch.setattr(Objective, "forward", spy)
    run = train(text, "zero", CHAR, "train.zero_init=true", steps=40)
    assert seen[0]
    assert not seen[-1]  # zeros are no trap: the straight-through gradient leaves them
    assert losses(run)[-1] < losses(run)[0] - 0.3


def test_float_first_then_ternary(text: Path) -> None:
    """While it is float, the losses are those of the float baseline; after the switch they are not."""
    baseline = losses(train(text, "baseline", CHAR, "model.linear=float", steps=8))
    switched = losses(train(text, "switched", CHAR, "train.float_share=0.5", "train.quant_warmup=0", steps=8))
    assert switched[:4] == pytest.approx(baseline[:4], rel=1e-5)
    assert switched[4] != pytest.approx(baseline[4], rel=1e-5)


@pytest.mark.slow
def test_a_student_learns_from_a_run_and_from_its_packed_file(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same teacher twice: masters in memory and codes in a file give one student; a stop leaves no trace."""
    teacher = train(text, "teacher", steps=20)
    packed = text.parent / "teacher.safetensors"
    assert main(["pack", str(teacher), "-o", str(packed)]) == 0
    term = ("train.distill=0.7", "train.temperature=2.0", "train.save_every=3")
    alone = losses(train(text, "alone"))
    runs = {name: train(text, f"from-{name}", f"train.teacher={path}", *term) for name, path in
            (("run", teacher), ("file", packed))}  # fmt: skip
    assert losses(runs["run"])[1:] != alone[1:]
    assert losses(runs["file"]) == pytest.approx(losses(runs["run"]), rel=1e-4)  # sums in another order, flips
    wanted = losses(runs["run"])
    for save in (runs["run"] / "saves").glob("step-*6"):
        save.rename(text.parent / "gone")
    assert losses(train(text, "from-run", f"train.teacher={teacher}", *term)) == wanted

    capsys.readouterr()
    train(text, "teacher", steps=21)  # it went on: its newest save is another model
    train(text, "from-run", f"train.teacher={teacher}", *term, code=2)
    assert "expected the one that step-" in capsys.readouterr().err


def test_a_teacher_of_other_tokens_is_refused(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, other = train(text, "teacher", CHAR, steps=2), train(text, "other", steps=2)
    train(text, "student", CHAR, f"train.teacher={teacher}", steps=2)  # its own: fine
    capsys.readouterr()
    train(text, "wrong", f"train.teacher={teacher}", f"train.init={other}", code=2)
    assert "another tokenizer" in capsys.readouterr().err
    train(text, "long", CHAR, f"train.teacher={teacher}", "model.max_position_embeddings=32", code=2)
    assert "context" in capsys.readouterr().err
    train(text, "none", f"train.teacher={text.parent / 'nothing'}", code=2)
    assert json.dumps("Traceback") not in capsys.readouterr().err
