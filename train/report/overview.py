"""What a run is about to do, one line per subject."""

import torch

from bitnet.files.packed_layout import packed_bytes
from bitnet.files.tensors import float16_bytes, parameters
from bitnet.train.compiling import missing_compiler
from bitnet.train.config import TrainConfig
from bitnet.train.schedule import warmup_end
from bitnet.train.setup import Setup

# Seconds of training above which compilation pays off: it takes half a minute to two, and halves a step on a CPU.
_COMPILE_ABOVE = 600.0


def overview(setup: Setup, tokens: int, warms_up: bool) -> dict[str, str]:
    """Text by subject: sizes of the model and of the data, and what a step of so many tokens is."""
    model, settings, processes, dataset = setup.config.model, setup.config.train, setup.processes, setup.dataset
    several = f", {processes.world_size} processes ({settings.parallel})" if processes.world_size > 1 else ""
    warmup = f", fully {model.linear} from step {warmup_end(settings)} on" if warms_up else ""
    return {
        "model": f"{parameters(model) / 1e6:.2f}M parameters, {model.linear}; packed {size(packed_bytes(model))}, "
        f"fp16 {size(float16_bytes(model))}",
        "data": f"{len(dataset.train):,} training tokens, {len(dataset.val):,} for validation, "
        f"{model.vocab_size:,} in the vocabulary",
        "training": f"{settings.steps} steps of {tokens:,} tokens on {processes.device.type} in {setup.dtype}"
        f"{several}{warmup}",
    }


def estimate(settings: TrainConfig, device: torch.device, left: int, seconds_per_step: float) -> str:
    """How long the remaining steps take. seconds_per_step: of their forward and backward passes."""
    if left <= 0:
        return "all steps are done"
    seconds = left * seconds_per_step
    text = f"{duration(seconds)} for {left} steps (without the optimiser)"
    can_compile = not settings.compile and not missing_compiler(device)
    return text + ("; --compile makes it faster" if seconds > _COMPILE_ABOVE and can_compile else "")


def duration(seconds: float) -> str:
    """Seconds in readable units: 48 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int) -> str:
    """Bytes in readable units."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
