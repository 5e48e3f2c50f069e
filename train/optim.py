"""The optimiser: Muon for the matrices of the blocks and AdamW for the rest, or AdamW for everything.

Muon (Jordan et al. 2024; torch.optim.Muon) orthogonalises the momentum of each matrix. Its updates are scaled to the
size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that the same learning rates suit both. It is the default
because ternary models gain more from it than from any other setting that we measured (benchmarks/results).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bitnet.layers import Embedding
from bitnet.train.config import TrainConfig
from bitnet.train.muon import ShardedMuon
from bitnet.train.schedule import learning_rate, weight_decay


class Optimizer:
    """One optimiser over all parameters of a model, with the configuration's schedule.

    The matrices of the blocks have learning rate `lr` and weight decay; embedding, head and norm weights have
    `embedding_lr` and no weight decay.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
        named = dict(model.named_parameters())
        matrices = [p for p in named.values() if p.dim() == 2 and id(p) not in embeddings]
        rest = [p for p in named.values() if p.dim() != 2 or id(p) in embeddings]
        self._config, self._names = config, {id(p): name for name, p in named.items()}
        betas = (config.beta1, config.beta2)
        adamw = torch.optim.AdamW(
            [{"params": rest, "peak": config.embedding_lr, "decays": False}], betas=betas, fused=True
        )
        matrix_group = {"params": matrices, "peak": config.lr, "decays": True}
        self._optimizers: list[torch.optim.Optimizer] = [adamw]
        if config.optimizer == "muon" and any(isinstance(p, DTensor) for p in matrices):
            self._optimizers.append(ShardedMuon([matrix_group], config.momentum))
        elif config.optimizer == "muon":
            muon = torch.optim.Muon([matrix_group], momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
            self._optimizers.append(muon)
        else:
            adamw.add_param_group(matrix_group)

    def set_step(self, step: int) -> float:
        """Set the learning rates and the weight decay of a step. Returns the learning rate of the matrices."""
        fraction = learning_rate(self._config, step)
        decay = weight_decay(self._config, step)
        for group in self._groups():
            group["lr"] = group["peak"] * fraction
            group["weight_decay"] = decay if group["decays"] else 0.0
        return self._config.lr * fraction

    def step(self) -> None:
        """Update all parameters from their gradients and drop the gradients."""
        for optimizer in self._optimizers:
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state as {"parameter/key": tensor}."""
        return {
            f"{self._names[id(parameter)]}/{key}": value
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned; for a sharded model, only the rows that this rank holds."""
        owners = {
            self._names[id(parameter)]: (optimizer, parameter)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition("/")
            optimizer, parameter = owners[name]
            value = value.to(parameter.device)
            if isinstance(parameter, DTensor) and value.dim():
                value = DTensor.from_local(
                    value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
                )
            optimizer.state[parameter][key] = value

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]
