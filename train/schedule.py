"""Learning rate and weight decay as functions of the step."""

import math

from bitnet.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Share of the peak learning rate at step 0, 1, ... steps - 1.

    cosine     warm-up, cosine to min_lr (Loshchilov and Hutter 2016, arXiv 1608.03983)
    wsd        warm-up, constant, linear descent over the last `decay` (Hu et al. 2024, arXiv 2404.06395)
    linear     warm-up, straight to min_lr
    two-stage  warm-up, linear towards min_lr, and from mid-way the same line at `second_stage_lr` of its height
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
    """Weight decay of a step: "two-stage" switches it off mid-way (b1.58 training tips), the others keep it."""
    return 0.0 if config.schedule == "two-stage" and in_second_stage(config, step) else config.weight_decay


def in_second_stage(config: TrainConfig, step: int) -> bool:
    """Whether a step lies in the second half."""
    return 2 * step >= config.steps


def quantised_share(config: TrainConfig, step: int) -> float:
    """The quantised share of all operands at a step: 0 for `float_share` of the run, 1 after `ease` of the rest."""
    floats = round(config.float_share * config.steps)
    return 0.0 if step < floats else min(1.0, (step + 1 - floats) / (whole_from(config) - floats))


def whole_from(config: TrainConfig) -> int:
    """The first step, counted from 1, whose operands are all quantised; one more than all steps if none is."""
    floats = round(config.float_share * config.steps)
    return floats + max(1, round(config.quant_warmup * (config.steps - floats)))
