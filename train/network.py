"""The model of a run and what its loop calls: with its loss, compiled, on one process or on all."""

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
    """The model, its weights yet to be written, and the network around it that a step calls.

    sharded: spread the parameters over all processes; this one holds its share and no more.
    """
    device = processes.device
    with torch.device("meta"):
        model = Transformer(config, recompute=settings.recompute)
        network = Objective(model, settings, teacher and teacher.to(device))
    if not sharded:
        model.to_empty(device=device)
        model.rotary(0, config.context, device)  # made inside of a graph, it would cost the next step another graph
        return model, processes.wrap(compiled(network) if settings.compile else network)
    if settings.compile:
        compile_blocks(model.blocks())
    shard(network, model.blocks(), device, backward_reads=_backward_reads_masters(config, settings))
    network.to_empty(device=device)  # this process's share and no more
    return model, network


def _backward_reads_masters(config: ModelConfig, settings: TrainConfig) -> bool:
    """Whether the backward pass of a block needs its matrices; quantised ones have kept their codes for it.

    Float ones are read, and all are when a forward pass runs again; while quantisers come in, mixtures have been kept.
    A compiler decides for itself what it keeps: on a CPU, inductor keeps the masters of o_proj and down_proj.
    """
    return config.linear == "float" or settings.recompute or settings.compile


def write_first_weights(model: Transformer, settings: TrainConfig, initial: Initial | None = None) -> None:
    """Give a model the weights of another one, or random ones of the run's seed; one parameter at a time."""
    parameters = dict(model.named_parameters())
    values = initial_weights(model, initial) if initial else model.fresh_weights(settings.seed)
    for name, value in values:
        if settings.zero_init and initial is None and name.endswith(("o_proj.weight", "down_proj.weight")):
            value = torch.zeros_like(value)
        assign(parameters[name], value)
