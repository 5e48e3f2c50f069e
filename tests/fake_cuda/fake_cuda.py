"""A stand-in for a machine with two GPUs: torch's own host-side code runs, on tensors that only say they are on one.

What is replaced lies below torch.cuda's Python (`torch._C._cuda_*`), so that what torch checks there is checked here,
in torch's own words: an index is asked for where it is, an unknown device is refused. A `TorchFunctionMode` sees every
call of torch: tensors made for a GPU, or computed from such, are of the class `OnGpu`; they say so when asked for their
device, cannot be taken for NumPy arrays, and do not mix with tensors of the CPU. They are computed on the CPU.

Triton cannot run on them: BITNET_BACKEND=float, or a compute capability below 8.0, which has torch multiply.

In other processes: PYTHONPATH=tests/fake_cuda, where sitecustomize.py installs it. FAKE_CUDA_CAPABILITY=7.5 is an older
GPU.
"""

import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

GPUS = 2
UUID = "11111111-2222-3333-4444-555555555555"
Set = Callable[[object, str, object], object]


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, the one whose number is `gpu`."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # the mode below decides
    gpu: int


def tagged(x: torch.Tensor, gpu: int) -> OnGpu:
    """The same values, on a GPU."""
    if isinstance(x, OnGpu):
        return x
    result = x.as_subclass(OnGpu)
    result.gpu = gpu
    return result


def is_device(value: object) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in ("cuda", "cpu"))


MAY_MIX = {"copy_", "__getitem__", "__setitem__", "to", "type_as", "backward", "__set__", "set_", "is_set_to"}
_TENSOR = torch.Tensor
_GETTERS = {
    _TENSOR.device.__get__: lambda gpu: torch.device("cuda", gpu),
    _TENSOR.is_cuda.__get__: lambda gpu: True,
    _TENSOR.is_cpu.__get__: lambda gpu: False,
    _TENSOR.get_device: lambda gpu: gpu,
}


class FakeCuda(TorchFunctionMode):
    """Has every call of torch in this thread know about OnGpu."""

    def __init__(self) -> None:
        super().__init__()
        self.current = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        gpus = [x.gpu for x in tensors if isinstance(x, OnGpu)]
        if func in (torch.device, torch.Generator) or name == "_parse_to":  # they take the word and make nothing
            return func(*args, **kwargs)
        if func in _GETTERS:
            return self._where(func, args)
        if func is _TENSOR.backward:
            with self:  # backward functions written in Python are to see what forward ones do
                return torch.autograd.backward(*args, kwargs.pop("gradient", None), **kwargs)
        if name == "_has_compatible_shallow_copy_type" and len(gpus) == 1:
            return False  # a module that moves has new parameters
        if name in ("numpy", "__array__") and gpus:
            raise TypeError(
                f"can't convert cuda:{gpus[0]} device type tensor to numpy. Use Tensor.cpu() to copy ... first."
            )
        asked = next((x for x in (*args, kwargs.get("device")) if is_device(x)), None)
        target = self._target(name, asked, gpus)
        self._check(name, tensors, gpus, kwargs, target)
        if target is not None:
            torch.cuda._lazy_init()
        if name in ("cpu", "cuda", "to") and isinstance(args[0], torch.Tensor):
            return self._moved(args, kwargs, target)
        if asked is not None and torch.device(asked).type == "cuda":
            args = ["cpu" if is_device(x) else x for x in args]
            if "device" in kwargs:
                kwargs["device"] = "cpu"
        with autocast(target is not None):
            result = func(*args, **kwargs)
        if target is None:
            return result
        return pytree.tree_map(lambda x: tagged(x, target) if is_here(x) else x, result)

    def _where(self, func: Any, args: Any) -> Any:
        x = args[0]
        # What autograd makes by itself has no class; in these tests all of a backward pass is on the GPU.
        gpu = x.gpu if isinstance(x, OnGpu) else self.current if in_backward() and is_here(x) else None
        return func(*args) if gpu is None else _GETTERS[func](gpu)

    def _target(self, name: str, asked: Any, gpus: list[int]) -> int | None:
        """The GPU a result is on; None for the CPU."""
        if name == "cpu":
            return None
        if name == "cuda" and asked is None:
            return self.current
        if asked is None:
            return gpus[0] if gpus else None
        device = torch.device(asked)
        if device.type != "cuda":
            return None
        known(self.current if device.index is None else device.index)
        return self.current if device.index is None else device.index

    def _check(self, name: str, tensors: list[Any], gpus: list[int], kwargs: Any, target: int | None) -> None:
        generator = kwargs.get("generator")
        if generator is not None and target is not None and generator.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if not gpus or name in MAY_MIX or in_backward():
            return
        strangers = [x for x in tensors if not isinstance(x, OnGpu) and x.dim() > 0 and is_here(x)]
        devices = sorted({f"cuda:{gpu}" for gpu in gpus} | ({"cpu"} if strangers else set()))
        if len(devices) > 1:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {devices[0]} and "
                f"{devices[1]}! (in {name})"
            )

    def _moved(self, args: Any, kwargs: Any, target: int | None) -> Any:
        x, like = args[0], next((a for a in args[1:] if isinstance(a, torch.Tensor)), None)
        if like is not None:
            target = like.gpu if isinstance(like, OnGpu) else None
        dtypes = [
            a for a in (*args[1:], kwargs.get("dtype"), getattr(like, "dtype", None)) if isinstance(a, torch.dtype)
        ]
        result = x.to(dtypes[0]) if dtypes else x
        before = x.gpu if isinstance(x, OnGpu) else None
        if before == target:
            return result if target is None else tagged(result, target)
        result = result.clone().as_subclass(torch.Tensor)  # memory of its own, as on another device
        return result if target is None else tagged(result, target)


def is_here(x: object) -> bool:
    """Whether something is a tensor with memory: not of the meta device."""
    return isinstance(x, torch.Tensor) and not x.is_meta


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class autocast:  # noqa: N801 - used as torch's own
    """What is computed for a GPU follows torch.autocast("cuda")."""

    def __init__(self, on_gpu: bool) -> None:
        self._on = on_gpu and torch.is_autocast_enabled("cuda")

    def __enter__(self) -> None:
        self._before = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        torch.set_autocast_enabled("cpu", self._on)
        torch.set_autocast_dtype("cpu", torch.get_autocast_dtype("cuda"))

    def __exit__(self, *exc: object) -> None:
        torch.set_autocast_enabled("cpu", self._before[0])
        torch.set_autocast_dtype("cpu", self._before[1])


def known(gpu: int) -> int:
    if not 0 <= gpu < GPUS:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return gpu


def install(set_: Set, capability: tuple[int, int] = (9, 0)) -> FakeCuda:
    """Put the stand-in in torch's place, by `set_(object, name, value)`. Returns the mode, which is to be entered."""
    mode = FakeCuda()
    properties = SimpleNamespace(
        name="Stand-in", major=capability[0], minor=capability[1], total_memory=8 * 2**30, uuid=UUID,
        multi_processor_count=4,
    )  # fmt: skip

    def exchange(gpu: int) -> int:
        before, mode.current = mode.current, mode.current if gpu < 0 else known(gpu)
        return before

    def run(thread: threading.Thread) -> None:
        with mode:
            before_run(thread)

    before_run = threading.Thread.run
    cuda, below = torch.cuda, torch._C
    for place, name, value in (
        (torch.version, "cuda", "12.8"),
        (cuda, "is_available", lambda: True),
        (cuda, "device_count", lambda: GPUS),
        (cuda, "_initialized", False),
        (cuda, "_lazy_init", lambda: setattr(cuda, "_initialized", True)),
        (cuda, "_lazy_call", lambda call, **options: None),
        (cuda.random, "_lazy_call", lambda call, **options: None),
        (cuda, "_exchange_device", exchange),
        (cuda, "_maybe_exchange_device", exchange),
        (cuda, "_get_device_properties", lambda gpu: properties),
        (cuda, "cudart", lambda: SimpleNamespace(cudaMemGetInfo=lambda gpu: (4 * 2**30, 8 * 2**30))),
        (below, "_cuda_getDevice", lambda: mode.current),
        (below, "_cuda_setDevice", exchange),
        (below, "_cuda_synchronize", lambda: None),
        (below, "_cuda_memoryStats", lambda gpu: {"allocated_bytes": {"all": {"peak": 2**20, "current": 2**19}}}),
        (threading.Thread, "run", run),  # a mode belongs to a thread
    ):
        set_(place, name, value)
    return mode


def install_for_good() -> None:
    """For a whole process."""
    major, _, minor = os.environ.get("FAKE_CUDA_CAPABILITY", "9.0").partition(".")
    install(setattr, (int(major), int(minor))).__enter__()
