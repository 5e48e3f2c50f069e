"""Our engines as a benchmark drives them; run by children/child.py."""

from typing import Any

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.engine.base import Session
from bitnet.engine.cpu import CpuEngine
from bitnet.engine.load import load as load_packed
from bitnet.errors import BitNetError
from bitnet.files.tensors import kv_cache_bytes
from bitnet.kernels import native, ops


def prepare(engine: str, device: str, threads: int, **_options: Any) -> None:
    """Test the kernels. Raises BitNetError where their sums are wrong: such an engine is not measured."""
    torch.set_num_threads(threads)
    if engine == "cpu":
        check_kernel(ops.CPU, torch.device("cpu"))
    elif engine == "triton":
        check_kernel(ops.TRITON, torch.device(device))
    else:
        check_kernel(ops.select(torch.device(device)), torch.device(device))


class EngineDriver:
    """A packed file in one of our engines. engine, head, cache: as `bitnet.load` takes them.

    Raises BitNetError for an engine that cannot run it.
    """

    def __init__(self, path: str, engine: str, head: str, cache: str, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self._device = torch.device(device)
        self.engine = load_packed(path, device, engine=engine, head=head, cache=cache)
        backend = ops.CPU if self.engine.name == "cpu" else ops.select(torch.device(device))
        config = self.engine.config
        self._session: Session | None = None
        self._ids = torch.empty(0)  # B, capacity
        self.facts: dict[str, Any] = {
            "what": self._what(backend, head, cache),
            "backend": self.engine.name,
            "weight_bytes": self.engine.weight_bytes,
            "kv_bytes": self._kv_bytes(config, cache),
            "gpu": gpu_uuid(self._device),
            "peak": self._peak(backend),
        }

    def _what(self, backend: ops.Backend, head: str, cache: str) -> str:
        if isinstance(self.engine, CpuEngine):
            return f"our C++ engine, {self.engine.instruction_set} kernels, head {head}, cache {cache}"
        if self.engine.name == "triton":
            return "our Triton engine"
        set_ = f" ({native.select()})" if backend is ops.CPU else ""
        return f"our torch engine, {backend.name}{set_} products, fp32 head and cache"

    def _peak(self, backend: ops.Backend) -> str | None:
        """The kind of product it uses, as meter.py names it."""
        if self.engine.config.linear == "float":
            return "torch fp32"
        return (
            native.select()
            if backend is ops.CPU
            else {"triton": "torch int8", "onednn": "torch int8"}.get(backend.name, "torch fp32")
        )

    def _kv_bytes(self, config: ModelConfig, cache: str) -> float:
        """Bytes of keys and values per token of context; int8 has an fp32 scale for each head's vector."""
        width = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 4 / config.head_dim}[cache]
        return kv_cache_bytes(config, 1, 1) * width

    def start(self, batch: int, depth: int, capacity: int) -> None:
        """A session of `batch` sequences of up to `capacity` tokens that has read `depth` tokens."""
        self._session = None  # frees the last session's cache first
        self._session = self.engine.session(batch, capacity)
        self._ids = torch.randint(0, self.engine.config.vocab_size, (batch, capacity))
        if depth:
            self.prefill(depth)

    def prefill(self, tokens: int) -> None:
        """Read `tokens` random ids into each sequence."""
        assert self._session
        at = self._session.position
        self._check(self._session.prefill(self._ids[:, at : at + tokens]))

    def decode(self, tokens: int) -> None:
        """Read `tokens` random ids into each sequence, one at a time."""
        assert self._session
        for at in range(self._session.position, self._session.position + tokens):
            logits = self._session.decode(self._ids[:, at])
        self._check(logits)

    def _check(self, logits: Tensor) -> None:
        if not bool(torch.isfinite(logits).all()):  # on a GPU this also waits for the result
            raise BitNetError("got logits that are not finite, expected numbers; run bitnet doctor")

    def gpu_bytes(self) -> int:
        """The most memory held on the GPU."""
        return torch.cuda.max_memory_allocated(self._device)


def load(**options: Any) -> EngineDriver:
    """The driver that child.py asks for."""
    return EngineDriver(**options)


def gpu_uuid(device: torch.device) -> str | None:
    """The UUID of a GPU; None for another device."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def check_kernel(backend: ops.Backend, device: torch.device) -> None:
    """Raise BitNetError for a backend whose sums differ from the reference's."""
    wrong = ops.self_test(backend, device)
    if wrong:
        raise BitNetError(
            f"the self-test of the '{backend.name}' kernels failed ({wrong}), expected exact sums; run bitnet doctor"
        )
