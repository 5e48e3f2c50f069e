"""The model of a run, and the network that a training step calls: the model with its loss, compiled or parallel."""

import torch
from torch import nn

from bitnet.config import ModelConfig
from bitnet.model import Transformer
from bitnet.train.compiling import compile_blocks, compiled
from bitnet.train.config import TrainConfig
from bitnet.train.initial import Initial, initial_weights
from bitnet.train.objective import Objective
from bitnet.train.parallel.distributed import Processes
from bitnet.train.parallel.sharding import assign, shard


def build_network(
    config: ModelConfig, settings: TrainConfig, processes: Processes, sharded: bool, teacher: Transformer | None = None
) -> tuple[Transformer, nn.Module]:
    """The model with uninitialised weights, and the network that a step calls: int64 ids and targets [B, T] to losses.

    sharded: each rank holds only its shard of every parameter (FSDP). Otherwise several ranks use DDP.
    """
    device = processes.device
    with torch.device("meta"):
        model = Transformer(config, recompute=settings.recompute)
        network = Objective(model, settings, teacher and teacher.to(device))
    if not sharded:
        model.to_empty(device=device)
        model.rotary(0, config.context, device)  # cached now: creating it in a compiled step would compile twice
        return model, processes.wrap(compiled(network) if settings.compile else network)
    if settings.compile:
        compile_blocks(model.blocks())
    shard(network, model.blocks(), device, backward_reads=_backward_reads_masters(config, settings))
    network.to_empty(device=device)  # allocates this rank's shard only
    return model, network


def _backward_reads_masters(config: ModelConfig, settings: TrainConfig) -> bool:
    """Whether the backward pass of a block reads its master weights.

    It does with float projections, and when it repeats the forward pass. With quantised ones it uses the codes that the
    forward pass kept, or during quantisation warm-up the mixed operands. A compiler chooses what to keep: on a CPU,
    inductor keeps the masters of o_proj and down_proj.
    """
    return config.linear == "float" or settings.recompute or settings.compile


def write_first_weights(model: Transformer, settings: TrainConfig, initial: Initial | None = None) -> None:
    """Initialise a model from another one, or at random from the run's seed; one parameter at a time."""
    parameters = dict(model.named_parameters())
    values = initial_weights(model, initial) if initial else model.fresh_weights(settings.seed)
    for name, value in values:
        if settings.zero_init and initial is None and name.endswith(("o_proj.weight", "down_proj.weight")):
            value = torch.zeros_like(value)
        assign(parameters[name], value)
