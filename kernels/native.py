"""The compiled CPU kernels from Python: the instruction sets, and the product as a torch operator.

The C++ code is in kernels/cpu/ and is installed as bitnet.kernels._cpu if a compiler was found. BITNET_CPU=name forces
an instruction set; one that is unknown, or that this CPU lacks, is an error and never silently replaced.

    torch.ops.bitnet.ternary_matmul(q, prepared, n, isa)     int8 [M, K] x prepared weights -> int32 [M, n], exact

Dimensions: M rows (tokens), N out-features, K in-features.
"""

import importlib
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ENVIRONMENT = "BITNET_CPU"


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("bitnet.kernels._cpu"), ""
    except ModuleNotFoundError:
        return None, "the C++ kernels are not built; install a C++20 compiler and run pip install again"
    except ImportError as error:
        return None, f"the C++ kernels cannot be loaded: {error}; run pip install again"


_module, _reason = _load()


@dataclass(frozen=True)
class InstructionSet:
    """The kernels for one instruction set.

    multiplies: by weights, as the VNNI comparison does. why_not: None if this CPU runs it, else the reason.
    """

    name: str
    summary: str
    multiplies: bool
    why_not: str | None


def module() -> Any:
    """The compiled module. Raises ValueError with the reason if there is none."""
    if _module is None:
        raise ValueError(_reason)
    return _module


def instruction_sets() -> list[InstructionSet]:
    """The instruction sets of this build, best first; empty without compiled kernels."""
    return [InstructionSet(*row) for row in _module.choices()] if _module else []


def select() -> str:
    """The instruction set in use: the one BITNET_CPU names, else the best that this CPU runs.

    Raises ValueError if the named one does not exist or cannot run, and without compiled kernels.
    """
    module()
    known = {one.name: one for one in instruction_sets()}
    forced = os.environ.get(ENVIRONMENT)
    if not forced:
        return next(one.name for one in known.values() if one.why_not is None and not one.multiplies)
    if forced not in known:
        raise ValueError(f"{ENVIRONMENT}: got '{forced}', expected one of {', '.join(known)}")
    reason = known[forced].why_not
    if reason:
        raise ValueError(f"{ENVIRONMENT}={forced} cannot be used: {reason}; unset it to let bitnet choose")
    return forced


def why_not() -> str | None:
    """Why the compiled kernels cannot be used; None if they can."""
    return None if _module else _reason


def read_bandwidth(size: int, repeats: int) -> float:
    """Bytes per second at which torch's threads read `size` bytes of memory: the median of `repeats` passes."""
    return float(module().read_bandwidth(size, torch.get_num_threads(), repeats))


def prepare(packed: Tensor, k: int, isa: str | None = None) -> tuple[Tensor, str]:
    """Rearrange packed weights [N, ceil(k / 4)] uint8. Returns bytes [*] uint8 and the instruction set they are for."""
    isa = isa or select()
    size = module().prepared_bytes(isa, packed.shape[0], k)
    out = torch.empty(size, dtype=torch.uint8)
    module().prepare(isa, packed.contiguous().numpy(), k, out.numpy(), torch.get_num_threads())
    return out, isa


@torch.library.custom_op("bitnet::ternary_matmul", mutates_args=(), device_types="cpu")
def ternary_matmul(q: Tensor, prepared: Tensor, n: int, isa: str) -> Tensor:
    """Integer product of activations [M, K] int8 and prepared weights of `n` rows. Returns [M, n] int32, exact."""
    out = torch.empty(q.shape[0], n, dtype=torch.int32)
    module().matmul(isa, prepared.numpy(), n, q.shape[1], q.contiguous().numpy(), out.numpy(), torch.get_num_threads())
    return out


@ternary_matmul.register_fake
def _(q: Tensor, prepared: Tensor, n: int, isa: str) -> Tensor:  # noqa: ARG001 - the op's arguments
    return q.new_empty((q.shape[0], n), dtype=torch.int32)
