"""What an engine holds of a packed file, and the refusal to load one that does not fit.

Dimensions: V vocabulary, D model, F ffn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.packed import read_config
from bitnet.files.packed_layout import packed_bytes
from bitnet.files.tensors import embedding_parameters, kv_cache_bytes, linear_parameters
from bitnet.kernels import native, ops
from bitnet.memory import INTERPRETER, Need, Way, budget, check, halves, mildest

_KERNELS = 0.2e9  # on a GPU: compiled kernels and cuBLAS workspaces, beside the context that is there already
_PASS_ROWS = 256  # tokens of one pass of the C++ engine (kernels/cpu/engine.cpp)
_CHUNK_ROWS = 8192  # rows the GPU engine reads at a time, at most (bitnet/engine/gpu_sessions.py)
_SHORTEST = 64  # tokens of a context that is worth suggesting


@dataclass(frozen=True)
class Work:
    """What an engine is asked to do: sequences of `tokens` each, of whose `room` only a GPU takes all at once.

    read: tokens that are read in one pass, of all sequences; logits: rows of the vocabulary that are there at once.
    """

    tokens: int
    room: int
    sequences: int = 1
    read: int = 1
    logits: int = 1


def engine_need(
    config: ModelConfig,
    file_bytes: float,
    device: torch.device,
    work: Work,
    *,
    engine: str = "auto",
    head: str = "file",
    cache: str = "fp32",
) -> Need:
    """What an engine holds of a packed file of `file_bytes`. engine, head, cache: as of `bitnet.load`."""
    engine = chosen_engine(engine, config, device)
    on_gpu = device.type == "cuda"
    tokens = work.room + 1 if on_gpu else work.tokens
    return Need(
        {
            "": {
                **_weights(config, file_bytes, engine, head),
                "keys and values": work.sequences * _cache_bytes(config, tokens, engine, cache),
                "logits": 4.0 * config.vocab_size * work.logits,
                "activations": _pass_bytes(config, engine, work),
                "libraries": _KERNELS if on_gpu else INTERPRETER,
            }
        }
    )


def chosen_engine(engine: str, config: ModelConfig, device: torch.device) -> str:
    """The engine that `bitnet.load` takes for "auto"."""
    if engine != "auto":
        return engine
    if config.linear == "float":
        return "torch"
    return {"triton": "triton", "cpu": "cpu"}.get(ops.select(device).name, "torch")


def _weights(config: ModelConfig, file_bytes: float, engine: str, head: str) -> dict[str, float]:
    linear, tables, plain = linear_parameters(config), embedding_parameters(config), config.linear == "float"
    if engine == "triton":  # two bits a weight in tiles, tables as the file has them; the file itself is in host memory
        return {"weights": file_bytes}
    if engine == "cpu":  # the checksum reads the whole mapped file; projections once more in the kernels' layout
        rounded = {"file": 0.0, "int8": 1.0, "int4": 0.5625}.get(head, 0.0)
        return {"file": file_bytes, "weights": linear / 4 + rounded * config.vocab_size * config.hidden_size}
    # torch: tables and float projections in fp32; codes at two bits in C++, as int8 without it
    codes = 4.0 if plain else 0.25 if native.why_not() is None else 1.0
    return {"file": file_bytes, "weights": codes * linear + 4.0 * tables}


def _cache_bytes(config: ModelConfig, tokens: int, engine: str, cache: str) -> float:
    width = {"fp32": 4, "bf16": 2, "int8": 1}.get(cache, 4) if engine == "cpu" else 4
    scales = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * tokens if width == 1 else 0
    return kv_cache_bytes(config, tokens, width) + scales


def _pass_bytes(config: ModelConfig, engine: str, work: Work) -> float:
    d, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    if engine == "cpu":  # x, q, attention and normed states; q/k/v or gate and up; int8 rows (Session's constructor)
        rows = max(work.sequences, min(_PASS_ROWS, work.sequences * work.room))
        return rows * (4.0 * (4 * d + max(d + 2 * kv, 2 * f)) + 2 * max(d, f))
    # Of one layer: x, its norm and attention; gate and up as int32 sums and as floats, their product; and a mask.
    rows = min(work.read, _CHUNK_ROWS) if engine == "triton" else work.read
    return rows * (4.0 * (4 * d + 5 * f) + work.tokens)


def check_engine(
    verb: str,
    model: Path,
    device: torch.device,
    plan: Callable[[ModelConfig, int], Work],
    options: Mapping[str, str],
    *,
    context: int = 0,
    force: bool = False,
    ways: Callable[[Callable[..., float]], Sequence[Way]] = lambda total: (),
) -> None:
    """Refuse to run a packed file that does not fit.

    plan: (config, context) -> what the engine will do; context: in tokens, 0: the model's; options: engine, head and
    cache of `bitnet.load`; ways: (total) -> changes of the verb's own, total(context=..., cache=...) being what is
    needed then. A file that is no whole model is left to the loader, which says why.
    """
    try:
        config, size = read_config(model), model.stat().st_size
    except BitNetError:
        return
    if packed_bytes(config) > 2 * size:  # its header claims more than the file holds
        return
    limit = min(context or config.context, config.context)

    def need(context: int = limit, plan: Callable[[ModelConfig, int], Work] = plan, **changed: str) -> Need:
        return engine_need(config, size, device, plan(config, context), **{**options, **changed})

    def total(**changes: Any) -> float:
        return need(**changes).total

    have = budget(device)
    if have is None or need().total <= have:
        return
    found = [
        *ways(total),
        *mildest("-c", have, [n for n in halves(limit) if n >= _SHORTEST], lambda n: total(context=n)),
    ]
    if chosen_engine(options.get("engine", "auto"), config, device) == "cpu":
        found += [Way(f"--cache {kind}", total(cache=kind)) for kind in ("bf16", "int8")]
    check(f"{verb}: {model.name}", need(), device, ways=found, instead="take a smaller model", force=force)
