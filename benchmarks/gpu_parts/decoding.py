"""Decoding the 2B4T shape with the Triton engine, end to end."""

import time

import torch
from torch import Tensor

from bitnet.benchmarks.gpu_parts.timing import EXPECTED, Result
from bitnet.config import ModelConfig, preset
from bitnet.engine.gpu import TritonEngine
from bitnet.engine.sampling import GREEDY
from bitnet.files.packed import PackedModel
from bitnet.files.packed_layout import expected_tensors
from bitnet.kernels import packing

_WARM_UP, _STEPS = 5, 128


def random_model(config: ModelConfig, embedding: str) -> PackedModel:
    """A packed model of random codes, made on the GPU. embedding: dtype of embedding and head, int8 or bf16."""
    tensors = {}
    for name, (shape, kinds) in expected_tensors(config).items():
        if torch.uint8 in kinds:
            k = config.intermediate_size if "down_proj" in name else config.hidden_size
            codes = torch.randint(-1, 2, (shape[0], k), dtype=torch.int8, device="cuda")
            tensors[name] = packing.pack(codes)
        elif name.endswith("_scale"):
            tensors[name] = torch.full(shape, 0.02, device="cuda")
        elif torch.int8 in kinds and embedding == "int8":
            tensors[name] = torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
            tensors[name.removesuffix("weight") + "scale"] = torch.full((shape[0], 1), 2e-4, device="cuda")
        elif torch.int8 in kinds:
            tensors[name] = (torch.randn(shape, device="cuda") * 0.02).bfloat16()
        else:
            tensors[name] = torch.ones(shape, device="cuda")
    return PackedModel(config, tensors, None, {})


def decode() -> Result:
    """Tokens per second of the 2B4T shape, end to end: ids in, logits, greedy choice on the device, ids in again.

    With the head in int8 and bf16, and with and without overlapped launches (pdl) where the GPU has them.
    """
    config, rows = preset("2b4t"), []
    for embedding in ("int8", "bf16"):
        packed, written = random_model(config, embedding), {}
        for pdl in (False, True):
            if pdl and torch.cuda.get_device_capability() < (9, 0):
                continue
            engine = TritonEngine(packed, torch.device("cuda"), pdl=pdl)
            for batch in (1, 8, 64) if pdl else (1,):
                row: Result = {"head": embedding, "pdl": pdl, "batch": batch, "weight_bytes": engine.weight_bytes}
                prompt = torch.arange(batch * 512).view(batch, 512) % config.vocab_size
                if batch == 1:
                    row["prefill_512_tokens_per_second"] = 512 / prefill_seconds(engine, prompt)
                seconds, ids = decode_seconds(engine, prompt if batch == 1 else prompt[:, :32])
                row |= {"us_per_step": seconds / _STEPS * 1e6, "tokens_per_second": batch * _STEPS / seconds}
                row["floor_us"] = engine.weight_bytes / EXPECTED["copy"] * 1e6
                if batch == 1:
                    written[pdl] = ids
                    started = time.perf_counter()
                    count = len(list(engine.stream([1, 2, 3], _STEPS, GREEDY, limit=256)))
                    row["stream_tokens_per_second"] = count / (time.perf_counter() - started)
                rows.append(row)
            del engine
        if True in written:
            rows[-1]["pdl_same_ids"] = torch.equal(written[False], written[True])
    return {"rows": rows}


def prefill_seconds(engine: TritonEngine, prompt: Tensor) -> float:
    """Seconds of a prefill of ids [B, T], after one that warms up."""
    engine.session(*_session(prompt)).prefill(prompt)
    session = engine.session(*_session(prompt))
    torch.cuda.synchronize()
    started = time.perf_counter()
    session.prefill(prompt)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def decode_seconds(engine: TritonEngine, prompt: Tensor) -> tuple[float, Tensor]:
    """Seconds of _STEPS greedy steps after a prompt [B, T] and a few steps, and all ids [steps, B] that were chosen."""
    session = engine.session(*_session(prompt))
    ids, chosen = session.prefill(prompt).argmax(dim=-1), []
    for step in range(_WARM_UP + _STEPS):
        if step == _WARM_UP:
            torch.cuda.synchronize()
            started = time.perf_counter()
        ids = session.decode(ids).argmax(dim=-1)
        chosen.append(ids)
    torch.cuda.synchronize()
    return time.perf_counter() - started, torch.stack(chosen)


def _session(prompt: Tensor) -> tuple[int, int]:
    """Sequences and capacity of a session for a prompt [B, T]."""
    return len(prompt), 1024
