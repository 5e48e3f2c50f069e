"""Muon over matrices whose rows are spread over the processes.

Newton and Schulz's iteration needs whole matrices. Of every `size` matrices rank i takes the i-th: an all-to-all
brings it the rows of the update from all ranks, it orthogonalises, and a second one takes the rows of the result
home. Per step that is two bytes a parameter there and two back, and each rank does its share of the products.
(Gathering every matrix everywhere would need one exchange less and repeat the products on all ranks: for 2B4T on 64
GPUs half as long as the step itself.)

Nothing is lost on the way: the iteration begins by rounding its input to bf16 and returns bf16, so bf16 is what
travels. The iteration itself is torch.optim.Muon's, called on a stand-in; momentum and weight decay are its formulas
on the rows held here.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitnet.train.parallel.sharding import local_rows


class ShardedMuon(torch.optim.Optimizer):
    """torch.optim.Muon (adjust_lr_fn="match_rms_adamw", Nesterov momentum) for DTensors [N, K] cut by rows."""

    def __init__(self, params: Any, momentum: float) -> None:
        super().__init__(params, {"lr": 1e-3, "weight_decay": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix with a gradient. Collective."""
        assert closure is None
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for first in range(0, len(matrices), dist.get_world_size()):
                self._update(matrices[first : first + dist.get_world_size()], group)

    def _update(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        momentum, updates = group["momentum"], []
        for matrix in matrices:
            state, gradient = self.state[matrix], local_rows(matrix.grad)  # type: ignore[arg-type]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            buffer = local_rows(state["momentum_buffer"]).lerp_(gradient, 1 - momentum)
            updates.append(gradient.lerp(buffer, momentum).bfloat16())
        for matrix, rows in zip(matrices, _orthogonal_rows(matrices, updates), strict=True):
            mine = local_rows(matrix)
            mine.mul_(1 - group["lr"] * group["weight_decay"])
            mine.add_(rows, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))  # arXiv 2502.16982, section 2.2


def _orthogonal_rows(matrices: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
    """This rank's rows of each orthogonalised update, bf16. matrices: at most one a rank; updates: rows held here."""
    rank, size = dist.get_rank(), dist.get_world_size()
    away = [u.numel() for u in updates] + [0] * (size - len(updates))  # to the owner of each matrix
    home = _pieces(matrices[rank].shape, size) if rank < len(matrices) else [0] * size
    whole = updates[0].new_empty(sum(home))
    dist.all_to_all_single(whole, torch.cat([u.flatten() for u in updates]), home, away)
    if rank < len(matrices):
        whole = orthogonalise(whole.view(matrices[rank].shape)).flatten()
    back = updates[0].new_empty(sum(away))
    dist.all_to_all_single(back, whole, away, home)
    return [part.view_as(u) for part, u in zip(back.split(away), updates, strict=False)]


def _pieces(shape: torch.Size, size: int) -> list[int]:
    """Elements of a matrix [N, K] on each rank, as torch.chunk cuts its rows."""
    rows = -(-shape[0] // size)
    return [(min(rows * (i + 1), shape[0]) - min(rows * i, shape[0])) * shape[1] for i in range(size)]


def orthogonalise(update: Tensor) -> Tensor:
    """The orthogonal factor [N, K] of an update, bf16, by torch.optim.Muon's own iteration.

    Taken from one step of it with learning rate 1, no momentum and no decay, on zeros. A tall matrix goes in turned, as
    the iteration would turn it: for a wide one the "original" factor of the learning rate is 1.
    """
    tall = update.shape[0] > update.shape[1]
    wide = (update.T if tall else update).float()
    stand_in = nn.Parameter(torch.zeros_like(wide))
    stand_in.grad = wide
    torch.optim.Muon([stand_in], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, adjust_lr_fn="original").step()
    result = stand_in.detach().neg_().bfloat16()
    return (result.T if tall else result).contiguous()
