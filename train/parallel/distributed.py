"""One process or many: the few things the loop needs to know of its fellows, on torch.distributed."""

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

START_TIMEOUT = timedelta(minutes=5)  # within which all have started: a peer that died before is not waited for
COLLECTIVE_TIMEOUT = timedelta(days=1)  # then: the others wait while the first one tokenises the corpus and validates


class Processes:
    """This process among those that `torchrun` started (alone without it). A context manager."""

    def __init__(self, device: torch.device) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.first = self.rank == 0  # the one that writes, prints and validates
        self._wrapped: list[DistributedDataParallel] = []
        self.device = device
        if device.type == "cuda":
            if self.size > 1:
                device = torch.device("cuda")  # each its own, whichever was asked for
            self.device = indexed(device)
            torch.cuda.set_device(self.device)

    def __enter__(self) -> "Processes":
        if self.size > 1:
            self._join_group()
        return self

    def _join_group(self) -> None:
        try:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=START_TIMEOUT)
        except dist.DistNetworkError as error:
            if other_ended(error):
                raise
            raise BitNetError(
                "train: got no way to the other processes, expected one at MASTER_ADDR and MASTER_PORT: "
                f"{first_line(error)}"
            ) from error
        self.largest(0)  # NCCL connects in its first collective: now, not while the first process is busy
        dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT)

    def __exit__(self, *exc: object) -> None:
        if self.size > 1:
            # A reducer that outlived the group would end it, waiting for gloo's thread with Python's lock in hand, for
            # which that thread waits in turn (torch 2.13); destroy_process_group lets go of the lock.
            for network in self._wrapped:
                del network.reducer, network.logger, network.process_group
            self._wrapped.clear()
            dist.destroy_process_group()

    @contextmanager
    def others_stop_on_failure(self) -> Iterator[None]:
        """For the first process: the others, which are in `wait_for_first`, learn how the block ended."""
        failed = True
        try:
            yield
            failed = False
        finally:
            self.largest(int(failed))

    def wait_for_first(self) -> None:
        """For the others: wait until the first process has done its part. Raises BitNetError if it failed."""
        if self.largest(0):
            raise BitNetError("train: the first process failed; its message says why")

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over all processes, until these part."""
        if self.size == 1:
            return model
        # Gradients lie in the buckets that travel, instead of beside them: four bytes a parameter less.
        self._wrapped.append(DistributedDataParallel(model, gradient_as_bucket_view=True))
        return self._wrapped[-1]

    def mean(self, value: Tensor) -> Tensor:
        """A value [] averaged over all processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def largest(self, number: int) -> int:
        """The largest of one number a process: what one of them knows, all of them know."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        """A JSON value of every process, by rank; the same list everywhere."""
        if self.size == 1:
            return [value]
        # As bytes of JSON: torch's own all_gather_object would pickle it.
        text = json.dumps(value).encode()
        length = self.largest(len(text))
        mine = torch.frombuffer(bytearray(text.ljust(length)), dtype=torch.uint8).to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return [json.loads(bytes(part.cpu().tolist())) for part in parts]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


# What gloo, NCCL and the store say; none of them has a class of its own for that.
_GONE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|remote process|timed out (after|waiting)|"
    r"timeout (after|caused)|failed to (recv|connect)",
    re.IGNORECASE,
)


def other_ended(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    """The first line of an error, without the place in torch's source that gloo puts before it."""
    return re.sub(r"^\[[^]]*:\d+\] ", "", str(error).strip().partition("\n")[0])


@contextmanager
def lost_processes() -> Iterator[None]:
    """Say in one line that another process has ended, wherever that is noticed."""
    try:
        yield
    except RuntimeError as error:
        if not other_ended(error):
            raise
        raise BitNetError(
            "train: another process of this run ended, so that this one cannot go on; its own last line says why. All "
            f"whole saves are kept: start the same command again ({first_line(error)})"
        ) from error
