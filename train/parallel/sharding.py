"""A model whose state is spread over the processes: FSDP2, torch's own `fully_shard`, and what it needs around it.

Every parameter, its gradient and its optimiser state are cut along the first dimension, rank r holding the r-th piece
as torch.chunk cuts. A block's matrices are gathered for its forward pass and dropped behind it; tables and gains stay
until the backward pass has ended. Gradients are summed and scattered as they appear.

A backward pass through float matrices gathers them once more. One through quantised ones does not: their codes were
kept (bitnet/quant.py), and no master is read, so a third of the traffic falls away. Gains are read, which is why they
travel with the tables. While quantisers come in, mixtures are kept instead, of all blocks: two bytes a weight in bf16,
four in fp32, on every process. `train.recompute` keeps those of one block and gathers masters twice.

Masters travel in fp32. Gathered as bf16 they would be half as many bytes, and quantise to other codes than those of
the packed file: a weight on the edge of a code falls on the other side. Matrix products run in the run's dtype all
the same, by autocast. Gradients are scattered after every micro-batch, not once a step as with DDP: sums held back
until the last one would be as large as the whole model on every process, which is what a sharded run has no room for.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def shard(root: nn.Module, blocks: Sequence[nn.Module], device: torch.device, backward_reads: bool = True) -> None:
    """Spread the parameters of `root` over all processes: the matrices of each block a unit, the rest another.

    backward_reads: whether the backward pass of a block reads its matrices. A pass that does so against the caller's
    word fails, for their memory has been given back.

    Parameters on the meta device stay there; `to_empty` then allocates this process's share alone.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    matrices = {p for block in blocks for p in block.parameters() if p.dim() == 2}
    # The root comes first, for it would not look into a block that is spread already, where the gains are.
    fully_shard(root, mesh=mesh, mp_policy=exact, ignored_params=matrices)
    for block in blocks:
        gains = {p for p in block.parameters() if p.dim() == 1}
        unit = fully_shard(block, mesh=mesh, mp_policy=exact, ignored_params=gains)
        unit.set_unshard_in_backward(backward_reads)


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds: a view, or the tensor itself where it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def span(tensor: Tensor) -> tuple[int, int]:
    """First row held here and the one behind the last; may be empty."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0] if tensor.dim() else 1
    rows = tensor.shape[0]
    piece = -(-rows // tensor.device_mesh.size())
    first = min(piece * tensor.device_mesh.get_local_rank(), rows)
    return first, min(first + piece, rows)


@torch.no_grad()
def assign(parameter: Tensor, rows: Tensor) -> None:
    """Write a parameter's value. rows: the whole value, or just the rows held here."""
    target = local(parameter)
    if rows.shape != target.shape and isinstance(parameter, DTensor):
        rows = rows[slice(*span(parameter))]
    target.copy_(rows)


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor. Collective: every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm [] fp32 of all gradients together. Collective where they are spread.

    Squares are summed in fp64. Shares of a gradient add them in another order, which shows at 1e-16 and is lost in the
    rounding to fp32, but for one sum in some ten million that lies on its edge: the same gradients have the same norm
    to the last bit, however they are spread. The gradients of one process and of two are the same, since a sum of two
    terms has no order; those of three or more are not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(local(g), dtype=torch.float64) for g in gradients]
    total = torch.stack(norms).square().sum()
    if any(isinstance(g, DTensor) for g in gradients):
        dist.all_reduce(total)
    return total.sqrt().float()


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their norm is at most `limit`. Returns the norm [] before."""
    norm = gradient_norm(parameters)
    if not any(isinstance(p.grad, DTensor) for p in parameters):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm
    share = (limit / (norm + 1e-6)).clamp(max=1.0)  # torch's own formula
    for parameter in parameters:
        if parameter.grad is not None:
            local(parameter.grad).mul_(share)
    return norm
