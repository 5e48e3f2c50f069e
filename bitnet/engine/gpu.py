"""The GPU engine: packed weights, Triton kernels, and one CUDA graph for a decode step.

It gives the same ids as `TorchEngine` except near ties. A decode step is nine kernels per layer
(kernels/gpu/decode.py), recorded once into a CUDA graph and replayed with new ids. Positions and ids are in fixed
device buffers; everything else lives in the graph's own memory. On compute capability 9.0 or more the launches of a
step overlap (programmatic dependent launch), which makes a step 4 % faster on an H100.

The sequences of a batch share one step, which always has a row for each of them: kernels then choose the same tiles,
and a sequence gets the same bits whatever runs beside it. Prompts are read one by one.

Prefill runs the same kernels on all rows of a prompt, with int8 tensor cores for the products and torch's attention, in
chunks of a few thousand rows, so that a long prompt takes no more memory than a short one (gpu_sessions.py). Keys and
values are kept in fp32.

Without a GPU, TRITON_INTERPRET=1 runs all of this on the CPU, slowly and without the graph: for tests.

Dimensions: B batch, T time, V vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitnet.device import indexed
from bitnet.engine.base import Engine
from bitnet.engine.gpu_model import GpuModel
from bitnet.engine.gpu_sessions import TritonSequenceBatch, TritonSession
from bitnet.errors import BitNetError
from bitnet.kernels.gpu import device as gpu

if TYPE_CHECKING:
    from bitnet.files.packed import PackedModel

_PDL_CAPABILITY = (9, 0)  # Hopper


class TritonEngine(Engine):
    """Runs a packed ternary or binary model on an NVIDIA GPU.

    graph, pdl: record the decode step into a CUDA graph, overlap its launches. Default: where the device can;
    benchmarks and tests compare.
    Raises BitNetError for a model or a device it cannot run.
    """

    name = "triton"
    max_batch = 64

    def __init__(
        self, packed: "PackedModel", device: torch.device, *, graph: bool | None = None, pdl: bool | None = None
    ) -> None:
        device = indexed(device)
        reason = gpu.why_not(device)
        if reason:
            raise BitNetError(f"triton engine: {reason}; use --device cpu or BITNET_BACKEND=float")
        if packed.config.linear == "float":
            raise BitNetError("triton engine: got a model with float linears, expected packed ones; use TorchEngine")
        on_gpu = device.type == "cuda"
        has_pdl = on_gpu and torch.cuda.get_device_capability(device) >= _PDL_CAPABILITY
        if pdl and not has_pdl:
            raise BitNetError("triton engine: got pdl=True, expected a GPU of compute capability 9.0 or more for it")
        self.tokenizer, self.config, self.device = packed.tokenizer, packed.config, device
        self.model = GpuModel(packed.config, packed.tensors, device, pdl=has_pdl if pdl is None else pdl)
        self._graph = on_gpu if graph is None else graph

    @property
    def weight_bytes(self) -> int:
        """See `Engine.weight_bytes`."""
        return self.model.weight_bytes

    def _session(self, batch: int, limit: int) -> TritonSession:
        return TritonSession(self.model, batch, limit, graph=self._graph)

    def _sequence_batch(self, count: int, limit: int) -> TritonSequenceBatch:
        return TritonSequenceBatch(self.model, count, limit, graph=self._graph)

    @torch.inference_mode()
    def _logits(self, ids: Tensor) -> Tensor:
        return torch.cat([self.session(*rows.shape).score(rows) for rows in ids.split(self.max_batch)])
