"""One process or many: the collectives that the training loop needs, on torch.distributed.

Vocabulary: `world_size` processes, each with its `rank`; the main process is rank 0, which alone writes, prints and
validates.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitnet.device import indexed
from bitnet.errors import BitNetError

START_TIMEOUT = timedelta(minutes=5)  # for every rank to join: a rank that died earlier must not be waited for
COLLECTIVE_TIMEOUT = timedelta(days=1)  # after that: ranks wait while the main process tokenises or validates


class Processes:
    """The process group that `torchrun` started, or this process alone without it. A context manager.

    device: the device asked for. With several ranks on GPUs, each takes its own GPU instead.
    """

    def __init__(self, device: torch.device) -> None:
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.is_main = self.rank == 0
        self._wrapped: list[DistributedDataParallel] = []
        self.device = device
        if device.type == "cuda":
            if self.world_size > 1:
                device = torch.device("cuda")
            self.device = indexed(device)
            torch.cuda.set_device(self.device)

    def __enter__(self) -> "Processes":
        if self.world_size > 1:
            self._join_group()
        return self

    def _join_group(self) -> None:
        try:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=START_TIMEOUT)
        except dist.DistNetworkError as error:
            if is_lost_process(error):
                raise
            raise BitNetError(
                "train: got no connection to the other processes, expected one at MASTER_ADDR and MASTER_PORT: "
                f"{first_line(error)}"
            ) from error
        self.all_max(0)  # NCCL connects in its first collective: do that now, not while the main process is busy
        dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT)

    def __exit__(self, *exc: object) -> None:
        if self.world_size > 1:
            # A DDP reducer that outlives the group destroys it while holding the GIL, for which gloo's thread waits:
            # a deadlock (torch 2.13). destroy_process_group releases the GIL, so drop the reducers first.
            for network in self._wrapped:
                del network.reducer, network.logger, network.process_group
            self._wrapped.clear()
            dist.destroy_process_group()

    @contextmanager
    def others_stop_on_failure(self) -> Iterator[None]:
        """On the main process: run the block, then report its outcome to the ranks in `wait_for_main`."""
        failed = True
        try:
            yield
            failed = False
        finally:
            self.all_max(int(failed))

    def wait_for_main(self) -> None:
        """On all other ranks: wait for `others_stop_on_failure`. Raises BitNetError if the main process failed."""
        if self.all_max(0):
            raise BitNetError("train: the main process failed; its error message gives the reason")

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over all ranks (DDP), until the group is left."""
        if self.world_size == 1:
            return model
        # Gradients live in the buckets that are reduced, not beside them: saves four bytes a parameter.
        self._wrapped.append(DistributedDataParallel(model, gradient_as_bucket_view=True))
        return self._wrapped[-1]

    def all_mean(self, value: Tensor) -> Tensor:
        """A value [] averaged over all ranks. Collective."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def all_max(self, number: int) -> int:
        """The largest of the numbers that the ranks pass. Collective."""
        if self.world_size == 1:
            return number
        value = torch.tensor(number, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def all_gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in rank order. Collective."""
        if self.world_size == 1:
            return [value]
        # Sent as JSON: torch's all_gather_object would pickle.
        text = json.dumps(value).encode()
        length = self.all_max(len(text))
        sent = torch.frombuffer(bytearray(text.ljust(length)), dtype=torch.uint8).to(self.device)
        received = [torch.empty_like(sent) for _ in range(self.world_size)]
        dist.all_gather(received, sent)
        return [json.loads(bytes(part.cpu().tolist())) for part in received]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


# The messages of gloo, NCCL and the store; none of them raises a class of its own for a lost peer.
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|remote process|timed out (after|waiting)|"
    r"timeout (after|caused)|failed to (recv|connect)",
    re.IGNORECASE,
)


def is_lost_process(error: BaseException) -> bool:
    """Whether an error means that another rank has ended."""
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    """The first line of an error, without the source location that gloo puts before it."""
    return re.sub(r"^\[[^]]*:\d+\] ", "", str(error).strip().partition("\n")[0])


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turn the error that any collective raises when another rank has ended into one readable line."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise BitNetError(
            "train: another process of this run ended, so this one stops too; the last line of that process gives the "
            f"reason. Completed saves are kept: start the same command again to resume ({first_line(error)})"
        ) from error
