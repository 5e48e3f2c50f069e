"""Which GPU the word "cuda" stands for."""

import os

import torch

from bitnet.errors import BitNetError


def indexed(device: str | torch.device) -> torch.device:
    """The same device with its number: "cuda" is the GPU that torchrun gave this process, else torch's current one.

    To torch, cuda and cuda:0 are two devices, and `torch.cuda.set_device` refuses the first.
    Raises BitNetError where torchrun started more processes than there are GPUs.
    """
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    if (rank := os.environ.get("LOCAL_RANK")) is None:
        # Asked before anything runs there, torch would set up the whole GPU to answer 0.
        return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)
    if int(rank) >= (count := torch.cuda.device_count()):
        raise BitNetError(
            f"device: got process {rank} of this machine, expected one for each of the {count} GPUs torch sees; "
            "lower --nproc-per-node"
        )
    return torch.device("cuda", int(rank))
