"""Learning rate and weight decay against the formulas of their papers, written here a second time in fractions."""

import itertools
import math
import random
from fractions import Fraction

import pytest

from bitnet.train.config import SCHEDULES, TrainConfig
from bitnet.train.schedule import in_second_stage, learning_rate, weight_decay


def random_config(schedule: str, **fixed: float) -> TrainConfig:
    values = {
        "steps": random.randint(1, 400),
        "warmup": random.choice([0.0, 0.01, 0.05, 0.37, 1.0, random.random()]),
        "decay": random.choice([0.0, 0.2, 1.0, random.random()]),
        "second_stage_lr": random.choice([0.0, 0.667, 1.0, random.random()]),
        "min_lr": random.choice([0.0, 0.1, 1.0, random.random()]),
        "weight_decay": random.random(),
    }
    return TrainConfig(schedule=schedule, **{**values, **fixed})


def warmup_steps(config: TrainConfig) -> int:
    return max(1, round(config.warmup * config.steps)) if config.warmup > 0 else 0


def formula(config: TrainConfig, step: int) -> float:
    """The share of the peak, from the definitions; exact where no cosine is in it."""
    warm = warmup_steps(config)
    if step < warm:
        return float(Fraction(step + 1, warm))
    done = Fraction(step - warm, max(1, config.steps - warm))
    floor = Fraction(config.min_lr)
    if config.schedule == "linear":
        shape = 1 - done
    elif config.schedule == "cosine":
        shape = Fraction((1 + math.cos(math.pi * float(done))) / 2)
    elif config.schedule == "wsd":
        tail = max(Fraction(1), Fraction(config.decay) * config.steps)
        shape = min(Fraction(1), (config.steps - step) / tail)
    else:
        shape = (1 - done) * (Fraction(config.second_stage_lr) if step * 2 >= config.steps else 1)
    return float(floor + (1 - floor) * shape)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_follows_the_formula(schedule: str) -> None:
    for _ in range(60):
        config = random_config(schedule)
        for step in range(config.steps):
            # Half a dozen fp64 operations on numbers of at most 1: each adds at most 2^-53, the cosine 2^-52.
            assert learning_rate(config, step) == pytest.approx(formula(config, step), abs=16 * 2**-53), (config, step)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rate_stays_between_nothing_and_the_peak(schedule: str) -> None:
    for _ in range(60):
        config = random_config(schedule)
        rates = [learning_rate(config, step) for step in range(config.steps)]
        assert min(rates) >= 0.0, config
        assert max(rates) <= 1.0 + 2**-52, config


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_climbs_in_equal_steps_to_the_peak(schedule: str) -> None:
    config = random_config(schedule, steps=200, warmup=0.25)
    rates = [learning_rate(config, step) for step in range(50)]
    assert rates == [(step + 1) / 50 for step in range(50)]
    assert rates[-1] == 1.0


def test_a_little_warmup_is_one_step() -> None:
    assert learning_rate(TrainConfig(steps=10, warmup=0.001, schedule="wsd"), 0) == 1.0
    assert learning_rate(TrainConfig(steps=10, warmup=0.0, schedule="linear"), 0) == 1.0


def test_endpoints() -> None:
    """First step after the warm-up and the last step, in closed form."""
    n, warm, floor = 300, 30, 0.125
    values = {"steps": n, "warmup": 0.1, "min_lr": floor, "decay": 0.25, "second_stage_lr": 0.5}
    last = 1 / (n - warm)  # what is left at the last step
    expected = {
        "linear": (1.0, floor + (1 - floor) * last),
        "cosine": (1.0, floor + (1 - floor) * (1 - math.cos(math.pi * last)) / 2),
        "wsd": (1.0, floor + (1 - floor) * 1 / 75),
        "two-stage": (1.0, floor + (1 - floor) * 0.5 * last),
    }
    for schedule, (first, end) in expected.items():
        config = TrainConfig(schedule=schedule, **values)
        assert learning_rate(config, warm) == pytest.approx(first, abs=1e-15)
        assert learning_rate(config, n - 1) == pytest.approx(end, abs=1e-15)


def test_wsd_is_flat_until_its_tail() -> None:
    config = TrainConfig(schedule="wsd", steps=100, warmup=0.1, decay=0.3)
    assert [learning_rate(config, step) for step in range(10, 71)] == [1.0] * 61
    tail = [learning_rate(config, step) for step in range(70, 100)]
    assert all(later < earlier for earlier, later in itertools.pairwise(tail))


def test_two_stage_drops_midway_and_stops_decaying() -> None:
    for steps in (10, 11, 300):
        config = TrainConfig(schedule="two-stage", steps=steps, warmup=0.0, second_stage_lr=0.6, weight_decay=0.1)
        half = -(-steps // 2)  # the first step of the second half
        line = [1 - step / steps for step in range(steps)]
        rates = [learning_rate(config, step) for step in range(steps)]
        assert rates[:half] == pytest.approx(line[:half], abs=1e-15)
        assert rates[half:] == pytest.approx([0.6 * value for value in line[half:]], abs=1e-15)
        decays = [weight_decay(config, step) for step in range(steps)]
        assert decays == [0.1] * half + [0.0] * (steps - half)
        assert [in_second_stage(config, step) for step in range(steps)] == [False] * half + [True] * (steps - half)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_others_keep_their_weight_decay(schedule: str) -> None:
    config = random_config(schedule, weight_decay=0.07)
    assert {weight_decay(config, step) for step in range(config.steps)} == {0.07}
