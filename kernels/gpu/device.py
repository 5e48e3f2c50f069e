"""Where the Triton kernels can run; imports no Triton, so that it works on a machine without it."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
MIN_CAPABILITY = (8, 0)  # int8 tensor cores with int32 sums, asynchronous copies, bf16


def why_not(device: torch.device) -> str | None:
    """None if Triton kernels run on `device`, else the reason."""
    if INTERPRET:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs the kernels on the CPU; unset it for a GPU"
    if device.type != "cuda":
        return f"Triton kernels run on an NVIDIA GPU, not on {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.cuda is None:
        return "this torch is built for another vendor's GPUs; the kernels are tested on NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        got, need = (".".join(map(str, c)) for c in (capability, MIN_CAPABILITY))
        return f"the GPU has compute capability {got}, the kernels need {need} or more"
    # To find_spec any folder named triton on the path is a package; only the real one has triton.language.
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.language") is None:
        return "Triton is not installed: pip install triton"
    return None


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; in the interpreter a small number that still splits K."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one inside the block: Triton launches there, wherever a kernel's arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
