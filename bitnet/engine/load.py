"""From a packed file to an engine that runs it: which one, and why not another."""

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
from bitnet.included import BOOKS
from bitnet.kernels import native, ops

if TYPE_CHECKING:
    from bitnet.engine.gpu import TritonEngine
from bitnet.files.packed import build, read_packed

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
    """Load a packed file into an engine that runs on `device`. Its `.tokenizer` came with the file.

    path: without one, the model that comes with the package.
    engine: "cpu" (C++), "triton" (a GPU), "torch" (any device), or "auto": the first of them that runs there. head,
    cache, threads: see CpuEngine; the others have no such choice. progress: called with each layer that is ready.
    Raises BitNetError for a file that is not a whole, known model and for an engine that cannot run it.
    """
    if engine not in ENGINES:
        raise BitNetError(f"engine: got '{engine}', expected one of {', '.join(ENGINES)}")
    packed, device = read_packed(path), indexed(device)
    reason = _why_not(engine, packed.config, device)
    if reason:
        raise BitNetError(f"engine: '{engine}' cannot be used: {reason}")
    if engine == "auto":
        engine = _choose_engine(packed.config, device)
    if engine != "cpu" and (head, cache) != ("file", "fp32"):
        raise BitNetError(
            f"head, cache: got '{head}', '{cache}' for the {engine} engine, which has no such choice; "
            "leave them out or use the C++ engine on a CPU"
        )
    if engine != "cpu" and threads is not None:
        raise BitNetError(
            f"threads: got {threads} for the {engine} engine, expected none, for it has torch's; leave it out and call "
            "torch.set_num_threads"
        )
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


def _why_not(engine: str, config: ModelConfig, device: torch.device) -> str | None:
    if engine == "cpu":
        return ops.CPU.why_not(device) or engine_cpu.why_not(config)
    if engine == "triton":
        return ops.TRITON.why_not(device) or ("it runs no plain linears" if config.linear == "float" else None)
    return None


def _choose_engine(config: ModelConfig, device: torch.device) -> str:
    """The engine that goes with the kernels `ops.select` picks; one warning where C++ is missing."""
    chosen = ops.select(device)
    if chosen is ops.TRITON and config.linear != "float":
        return "triton"
    if chosen is ops.CPU and config.linear != "float":
        return "cpu"
    if device.type == "cpu" and native.why_not() and config.linear != "float":
        _log.warning("%s; running through torch meanwhile, several times slower", native.why_not())
    return "torch"
