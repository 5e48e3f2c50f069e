"""Learning rate, weight decay and quantisation warm-up as functions of the step."""

import math

from bitnet.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate at step 0, 1, ..., steps - 1 as a fraction of its peak. All schedules begin with warm-up, then:

    cosine     cosine to min_lr (Loshchilov and Hutter 2016, arXiv 1608.03983)
    wsd        constant, then linear to min_lr over the last `decay` of the steps (Hu et al. 2024, arXiv 2404.06395)
    linear     linear to min_lr
    two-stage  linear towards min_lr; in the second half scaled by `second_stage_lr`
               (b1.58 training tips: the drop lets the ternary codes settle)
    """
    warmup = max(1, round(config.warmup * config.steps)) if config.warmup else 0
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)  # 0 .. 1
    return config.min_lr + (1 - config.min_lr) * _shape(config, step, progress)


def _shape(config: TrainConfig, step: int, progress: float) -> float:
    if config.schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * progress)
    if config.schedule == "wsd":
        left = config.steps - step
        return min(1.0, left / max(1.0, config.decay * config.steps))
    dropped = config.schedule == "two-stage" and in_second_stage(config, step)
    return (1 - progress) * (config.second_stage_lr if dropped else 1.0)


def weight_decay(config: TrainConfig, step: int) -> float:
    """The weight decay of a step: constant, but 0 in the second half of "two-stage" (b1.58 training tips)."""
    return 0.0 if config.schedule == "two-stage" and in_second_stage(config, step) else config.weight_decay


def in_second_stage(config: TrainConfig, step: int) -> bool:
    """Whether a step lies in the second half."""
    return 2 * step >= config.steps


def quantised_fraction(config: TrainConfig, step: int) -> float:
    """The fraction of every operand that is quantised at step 0, 1, ...: 0 for `float_share` of the run, then linear
    up to 1 over `quant_warmup` of the rest."""
    float_steps = _float_steps(config)
    return 0.0 if step < float_steps else min(1.0, (step + 1 - float_steps) / (warmup_end(config) - float_steps))


def warmup_end(config: TrainConfig) -> int:
    """The first step, counted from 1, with fully quantised operands; steps + 1 if there is none."""
    float_steps = _float_steps(config)
    return float_steps + max(1, round(config.quant_warmup * (config.steps - float_steps)))


def _float_steps(config: TrainConfig) -> int:
    return round(config.float_share * config.steps)
