"""Load a packed file into an engine: the one asked for, or the best that can run it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bitnet.config import ModelConfig
from bitnet.device import indexed
from bitnet.engine import cpu as engine_cpu
from bitnet.engine.cpu import CpuEngine
from bitnet.engine.torch import TorchEngine
from bitnet.errors import BitNetError
from bitnet.files.packed import build, read_packed
from bitnet.included import BOOKS
from bitnet.kernels import native, ops

if TYPE_CHECKING:
    from bitnet.engine.gpu import TritonEngine

_log = logging.getLogger("bitnet")

ENGINES = ("auto", "cpu", "torch", "triton")


def load(
    path: str | Path = BOOKS,
    device: str | torch.device = "cpu",
    *,
    engine: str = "auto",
    head: str = "file",
    cache: str = "fp32",
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> "TorchEngine | CpuEngine | TritonEngine":
    """Load a packed file into an engine on `device`; its `.tokenizer` is the one in the file.

    path: default, the small pretrained model that is included in the package.
    engine: "cpu" (C++), "triton" (a GPU), "torch" (any device), or "auto", the first of them that runs on the device.
    head, cache, threads: options of CpuEngine alone. progress: called by CpuEngine with each layer that is loaded.
    Raises BitNetError for a file that is not a complete, known model and for an engine that cannot run it.
    """
    if engine not in ENGINES:
        raise BitNetError(f"engine: got '{engine}', expected one of {', '.join(ENGINES)}")
    packed, device = read_packed(path), indexed(device)
    reason = _why_not(engine, packed.config, device)
    if reason:
        raise BitNetError(f"engine: '{engine}' cannot be used: {reason}")
    if engine == "auto":
        engine = _choose_engine(packed.config, device)
    if engine != "cpu":
        _refuse_cpu_options(engine, head, cache, threads)
    if engine == "triton":
        from bitnet.engine.gpu import TritonEngine  # imports Triton, which takes most of a second

        return TritonEngine(packed, device)
    loaded: TorchEngine | CpuEngine
    if engine == "cpu":
        loaded = CpuEngine(packed.config, packed.tensors, head=head, cache=cache, threads=threads, progress=progress)
    else:
        loaded = TorchEngine(build(packed).to(device))
    loaded.tokenizer = packed.tokenizer
    return loaded


def _refuse_cpu_options(engine: str, head: str, cache: str, threads: int | None) -> None:
    """Raise BitNetError for options of CpuEngine that are not at their defaults."""
    if (head, cache) != ("file", "fp32"):
        raise BitNetError(
            f"head, cache: got '{head}', '{cache}' for the {engine} engine, which has no such option; "
            "omit them or use the C++ engine on a CPU"
        )
    if threads is not None:
        raise BitNetError(
            f"threads: got {threads} for the {engine} engine, expected none; omit it and call torch.set_num_threads"
        )


def _why_not(engine: str, config: ModelConfig, device: torch.device) -> str | None:
    if engine == "cpu":
        return ops.CPU.why_not(device) or engine_cpu.why_not(config)
    if engine == "triton":
        return ops.TRITON.why_not(device) or ("it runs no float linears" if config.linear == "float" else None)
    return None


def _choose_engine(config: ModelConfig, device: torch.device) -> str:
    """The engine of the kernels that `ops.select` picks; warns if the C++ kernels are missing."""
    chosen = ops.select(device)
    if chosen is ops.TRITON and config.linear != "float":
        return "triton"
    if chosen is ops.CPU and config.linear != "float":
        return "cpu"
    if device.type == "cpu" and native.why_not() and config.linear != "float":
        _log.warning("%s; until then torch computes, several times slower", native.why_not())
    return "torch"
