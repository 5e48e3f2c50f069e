"""Parameters sharded over the ranks: FSDP2 (torch's `fully_shard`) and what the training loop needs around it.

Every parameter, its gradient and its optimiser state are cut along the first dimension; rank r holds the r-th chunk as
torch.chunk cuts. The matrices of a block are gathered for its forward pass and freed after it; embedding, head and
norm weights stay gathered until the backward pass has ended. Gradients are reduced and scattered as they appear.

The backward pass through float matrices gathers them once more. That through quantised ones does not: it uses the
codes that the forward pass kept (bitnet/quant.py) and reads no master, which saves a third of the traffic. It does
read the norm weights, which is why they are gathered with the embedding. During quantisation warm-up it keeps the
operands of all blocks instead, mixed from masters and codes: two bytes a weight in bf16, four in fp32, on every rank.
`train.recompute` keeps those of one block and gathers the masters twice.

Masters are gathered in fp32. In bf16 they would be half the bytes, but would quantise to other codes than those of the
packed file, wherever a weight lies close to the boundary between two codes. The matrix products run in the run's dtype
regardless, by autocast. Gradients are scattered after every micro-batch, not once a step as with DDP: keeping sums
until the last one would take the memory of a full model on every rank, which a sharded run does not have.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def shard(root: nn.Module, blocks: Sequence[nn.Module], device: torch.device, backward_reads: bool = True) -> None:
    """Shard the parameters of `root` over all ranks: the matrices of each block are a unit, everything else is another.

    backward_reads: whether the backward pass of a block reads its matrices. If False and it does, it fails, because
    their memory has been freed. Parameters on the meta device stay there; `to_empty` then allocates this rank's shard
    alone.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    fp32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    matrices = {p for block in blocks for p in block.parameters() if p.dim() == 2}
    # The root first: it skips modules that are sharded already, and with them the norm weights of the blocks.
    fully_shard(root, mesh=mesh, mp_policy=fp32, ignored_params=matrices)
    for block in blocks:
        norm_weights = {p for p in block.parameters() if p.dim() == 1}
        unit = fully_shard(block, mesh=mesh, mp_policy=fp32, ignored_params=norm_weights)
        unit.set_unshard_in_backward(backward_reads)


def local_rows(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this rank holds: a view of a sharded tensor, any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def row_range(tensor: Tensor) -> tuple[int, int]:
    """(first, end) of the rows that this rank holds; equal when it holds none."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0] if tensor.dim() else 1
    rows = tensor.shape[0]
    chunk = -(-rows // tensor.device_mesh.size())
    first = min(chunk * tensor.device_mesh.get_local_rank(), rows)
    return first, min(first + chunk, rows)


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter. value: all of its rows, or only those that this rank holds."""
    target = local_rows(parameter)
    if value.shape != target.shape and isinstance(parameter, DTensor):
        value = value[slice(*row_range(parameter))]
    target.copy_(value)


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm [] fp32 of all gradients together. Collective if they are sharded.

    Squares are summed in fp64. Shards add them in another order, which changes the sum by about 1e-16: after rounding
    to fp32 that shows once in some ten million sums. So equal gradients have bit-equal norms, however they are sharded.
    The gradients of one rank and of two are equal, because a sum of two terms has no order; those of three or more
    are not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(local_rows(g), dtype=torch.float64) for g in gradients]
    total = torch.stack(norms).square().sum()
    if any(isinstance(g, DTensor) for g in gradients):
        dist.all_reduce(total)
    return total.sqrt().float()


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their norm is at most `limit`. Returns the norm [] before scaling."""
    norm = gradient_norm(parameters)
    if not any(isinstance(p.grad, DTensor) for p in parameters):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as clip_grads_with_norm_ computes it
    for parameter in parameters:
        if parameter.grad is not None:
            local_rows(parameter.grad).mul_(scale)
    return norm
