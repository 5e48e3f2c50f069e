"""The optimiser: AdamW against its formula in float64, Muon against a singular value decomposition, and its state."""

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bitnet.config import ModelConfig
from bitnet.model import Transformer
from bitnet.train.config import TrainConfig
from bitnet.train.optim import Optimizer
from bitnet.train.schedule import learning_rate

ULP = 2**-24  # largest relative error of one fp32 rounding
EPS = 1e-8  # AdamW's, as in torch


def tiny(**changes: object) -> Transformer:
    shape = {
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16,
    }
    model = Transformer(ModelConfig(**{**shape, **changes}))
    model.init_weights(random.randrange(1000))
    return model


def random_gradients(model: nn.Module, rng: torch.Generator, scale: float = 1.0) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=rng) * scale
        gradients[name] = parameter.grad.clone()
    return gradients


def is_matrix(name: str) -> bool:
    """The seven projections of a block; embedding, head and gains are the rest."""
    return "_proj." in name


@pytest.mark.parametrize("tied", [True, False])
def test_adamw_follows_the_formula(tied: bool, rng: torch.Generator) -> None:
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2), three steps, all in float64."""
    model = tiny(tie_word_embeddings=tied)
    settings = TrainConfig(
        optimizer="adamw", steps=10, warmup=0.3, lr=0.02, embedding_lr=0.007, weight_decay=0.3, beta1=0.8, beta2=0.9
    )
    optimizer = Optimizer(model, settings)
    wanted = {name: p.detach().double() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in wanted.items()}
    v = {name: torch.zeros_like(p) for name, p in wanted.items()}
    for step in range(3):
        optimizer.set_step(step)
        gradients = random_gradients(model, rng, 10.0 ** random.randint(-4, 2))
        optimizer.step()
        for name, gradient in gradients.items():
            g = gradient.double()
            rate = (settings.lr if is_matrix(name) else settings.embedding_lr) * (step + 1) / 3
            decay = settings.weight_decay if is_matrix(name) else 0.0
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g * g
            m_hat, v_hat = m[name] / (1 - 0.8 ** (step + 1)), v[name] / (1 - 0.9 ** (step + 1))
            wanted[name] = wanted[name] * (1 - rate * decay) - rate * m_hat / (v_hat.sqrt() + EPS)
    for name, parameter in model.named_parameters():
        # A step: two roundings of the parameter and about ten of an update of at most rate * |m| / sqrt(v), where
        # |m_hat| / sqrt(v_hat) stays below 4 for three steps with these betas. Three steps, and a factor of two.
        bound = 3 * 2 * ULP * (2 * wanted[name].abs() + 10 * 4 * 0.02)
        difference = (parameter.detach().double() - wanted[name]).abs()
        assert (difference <= bound).all(), (name, float((difference - bound).max()))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_only_the_matrices_of_the_blocks_decay(kind: str, tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied, qk_norm=True, sub_norms=True)
    optimizer = Optimizer(model, TrainConfig(optimizer=kind, schedule="wsd", warmup=0.0, lr=0.25, weight_decay=0.5))
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.set_step(0)
    optimizer.step()
    matrices = 0
    for name, after in model.state_dict().items():
        factor = 1 - 0.25 * 0.5 if is_matrix(name) else 1.0  # a power of two: exact
        assert torch.equal(after, before[name] * factor), name
        matrices += is_matrix(name)
    assert matrices == 7 * 2


def test_second_stage_switches_the_decay_off() -> None:
    model = tiny()
    settings = TrainConfig(optimizer="adamw", schedule="two-stage", warmup=0.0, steps=10, lr=0.5, weight_decay=0.5)
    optimizer = Optimizer(model, settings)
    for step in (4, 5):
        before = copy.deepcopy(model.state_dict())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.set_step(step)
        optimizer.step()
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert bool(changed) == (step == 4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_set_step_returns_the_rate_in_use(kind: str, rng: torch.Generator) -> None:
    """AdamW's first step has the size of the learning rate, whatever the gradient: a table moves by embedding_lr."""
    for step in range(3):
        model = tiny()
        settings = TrainConfig(optimizer=kind, steps=3, warmup=1.0, lr=0.3, embedding_lr=0.01, weight_decay=0.0)
        optimizer = Optimizer(model, settings)
        assert optimizer.set_step(step) == 0.3 * learning_rate(settings, step)
        random_gradients(model, rng, 1000.0)
        table = model.model.embed_tokens.weight
        before = table.detach().clone()
        optimizer.step()
        moved = (table.detach() - before).abs()
        share = (step + 1) / 3
        # |g| of about 1,000 leaves eps = 1e-8 without effect, save for the rare g near 0.
        assert float(moved.median()) == pytest.approx(0.01 * share, rel=1e-4)


def test_muon_turns_a_gradient_into_its_polar_factor(rng: torch.Generator) -> None:
    """One step from rest is W - lr * 0.2 * sqrt(max(N, K)) * U V^T (arXiv 2502.16982), roughly: five Newton-Schulz
    iterations bring singular values to 0.68 .. 1.14 (Jordan et al. 2024), computed in bf16."""
    model = tiny()
    optimizer = Optimizer(model, TrainConfig(optimizer="muon", schedule="wsd", warmup=0.0, lr=0.1, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = random_gradients(model, rng)
    optimizer.set_step(0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if not is_matrix(name):
            continue
        update = (before[name] - parameter.detach()).double() / (0.1 * 0.2 * max(parameter.shape) ** 0.5)
        u, s, vh = torch.linalg.svd(gradients[name].double(), full_matrices=False)
        strong = s > 0.05 * s[0]  # the smallest need more than five iterations
        seen = torch.diagonal(u.T @ update @ vh.T)[strong]
        assert float(seen.min()) > 0.5, name
        assert float(seen.max()) < 1.3, name
        across = update - (u @ torch.diag(torch.diagonal(u.T @ update @ vh.T)) @ vh)
        # Nothing but bf16 noise (2^-8 an operation, five iterations) outside of the gradient's own directions.
        assert float(across.norm() / update.norm()) < 0.1, name


def test_muon_is_for_block_matrices_alone(rng: torch.Generator) -> None:
    """Tables and gains take the same step as with AdamW, matrices another one."""
    first = tiny(tie_word_embeddings=False)
    second = copy.deepcopy(first)
    random_gradients(first, rng)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        b.grad = a.grad.clone()
    for model, kind in ((first, "adamw"), (second, "muon")):
        optimizer = Optimizer(model, TrainConfig(optimizer=kind, lr=0.01, embedding_lr=0.01))
        optimizer.set_step(40)
        optimizer.step()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]) == (not is_matrix(name)), name


def test_step_drops_the_gradients(rng: torch.Generator) -> None:
    model = tiny()
    optimizer = Optimizer(model, TrainConfig())
    for drop in (optimizer.step, optimizer.zero_grad):
        random_gradients(model, rng)
        optimizer.set_step(0)
        drop()
        assert all(parameter.grad is None for parameter in model.parameters())


def trained(kind: str, steps: int, rng: torch.Generator) -> tuple[Transformer, Optimizer]:
    model = tiny()
    optimizer = Optimizer(model, TrainConfig(optimizer=kind))
    for step in range(steps):
        optimizer.set_step(step)
        random_gradients(model, rng)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_state_goes_on_bit_equal(kind: str, steps: int, rng: torch.Generator) -> None:
    model, optimizer = trained(kind, steps, rng)
    copied = copy.deepcopy(model)
    other = Optimizer(copied, TrainConfig(optimizer=kind))
    other.load_tensors({name: value.clone() for name, value in optimizer.tensors().items()})
    for step in range(steps, steps + 3):
        for each in (optimizer, other):
            each.set_step(step)
        random_gradients(model, rng)
        for a, b in zip(model.parameters(), copied.parameters(), strict=True):
            b.grad = a.grad.clone()
        optimizer.step()
        other.step()
    for a, b in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(a, b)
    mine, theirs = optimizer.tensors(), other.tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_matters(kind: str, rng: torch.Generator) -> None:
    """The test above can fail: without its state an optimiser goes another way."""
    model, optimizer = trained(kind, 3, rng)
    copied = copy.deepcopy(model)
    other = Optimizer(copied, TrainConfig(optimizer=kind))
    for each in (optimizer, other):
        each.set_step(3)
    random_gradients(model, rng)
    for a, b in zip(model.parameters(), copied.parameters(), strict=True):
        b.grad = a.grad.clone()
    optimizer.step()
    other.step()
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))


def test_state_covers_every_parameter(rng: torch.Generator) -> None:
    keys: dict[str, Callable[[str], set[str]]] = {
        "adamw": lambda name: {"step", "exp_avg", "exp_avg_sq"},
        "muon": lambda name: {"momentum_buffer"} if is_matrix(name) else {"step", "exp_avg", "exp_avg_sq"},
    }
    for kind, of in keys.items():
        model, optimizer = trained(kind, 1, rng)
        wanted = {f"{name}/{key}" for name, _ in model.named_parameters() for key in of(name)}
        assert set(optimizer.tensors()) == wanted


def test_torch_brings_muon() -> None:
    assert issubclass(torch.optim.Muon, torch.optim.Optimizer)
