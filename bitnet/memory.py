"""Memory asked first: what a job will hold at its peak, held against what the machine has left before it begins.

A job that does not fit is ended by the kernel without a word, often together with other programs. So each verb that
can become large adds up what it will need (`Need`) and calls `check`, which refuses with the numbers and the ways out,
or lets `--force` run it anyway. Estimates are of resident memory, file pages that are mapped and read included: what
`/usr/bin/time -v` calls the maximum resident set size. benchmarks/memory.py holds them against real runs.

Needs of training are in train/memory.py, of comparing in benchmarks/compare/memory.py, of conversion in formats/memory.py.

Dimensions: V vocabulary, D model, F ffn.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitnet import machine
from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.kernels import native, ops
from bitnet.model import embedding_parameters, kv_cache_bytes, linear_parameters, packed_bytes

_log = logging.getLogger("bitnet")

INTERPRETER = 0.30e9  # bytes of Python with torch and this package imported: 286 MB with torch 2.13, measured
_KERNELS = 0.2e9  # on a GPU: compiled kernels and cuBLAS workspaces, beside the context that is there already
_PASS_ROWS = 256  # tokens of one pass of the C++ engine (kernels/cpu/engine.cpp)
_CHUNK_ROWS = 8192  # rows the GPU engine reads at a time, at most (bitnet/engine/gpu_sessions.py)
_SHORTEST = 64  # tokens of a context that is worth suggesting
_SHOWN = 0.03  # parts of a need below this share are left out of messages


@dataclass(frozen=True)
class Need:
    """Bytes a job holds, by what they are for, in each of its phases; the largest phase counts."""

    phases: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, **terms: float) -> "Need":
        """A need of one phase. Underscores in names become spaces."""
        return cls({"": {name.replace("_", " "): size for name, size in terms.items()}})

    @property
    def terms(self) -> Mapping[str, float]:
        """The parts of the largest phase."""
        return max(self.phases.values(), key=lambda terms: sum(terms.values()))

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.terms.values())

    def __str__(self) -> str:
        parts = sorted(self.terms.items(), key=lambda term: -term[1])
        return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts if size > _SHOWN * self.total)


@dataclass(frozen=True)
class Way:
    """A change that makes a job smaller, as a user writes it, and the bytes it would then need."""

    change: str
    total: float


def gigabytes(count: float) -> str:
    """Bytes as a person says them, in GB."""
    return f"{count / 1e9:.1f} GB"


def available(device: torch.device) -> float | None:
    """Bytes that are left on a device; on a CPU, in the machine and its control groups. None: unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free)
    return machine.available_memory()


def budget(device: torch.device, processes: int = 1) -> float | None:
    """Bytes that `processes` like this one may hold in all: what is left, and the libraries that they hold already."""
    left = available(device)
    if left is None or device.type == "cuda":
        return left
    return left + processes * min(machine.resident_memory(), INTERPRETER)


def check(
    what: str,
    need: Need,
    device: torch.device,
    *,
    ways: Sequence[Way] = (),
    instead: str = "",
    processes: int = 1,
    force: bool | None = False,
) -> None:
    """Raise BitNetError where `processes` processes that each need this do not fit. Under `force`, one warning.

    what: the job, for the message. ways: changes that help, of which the useful ones are named; instead: other ways
    out, in words; force: None for a verb without that option. On a GPU each process has its own device.
    """
    count = 1 if device.type == "cuda" else processes
    have = budget(device, count)
    if have is None or count * need.total <= have:
        return
    several = f" in {count} processes" if count > 1 else ""
    where = " on the GPU" if device.type == "cuda" else ""
    text = (
        f"{what} needs about {gigabytes(count * need.total)} of memory{where}{several} ({need}), expected at most the "
        f"{gigabytes(have)} available"
    )
    if force:
        _log.warning("%s; running it anyway (--force)", text)
        return
    out = [f"{way.change} ({gigabytes(count * way.total)})" for way in useful(ways, need.total, have / count)]
    out += [instead] if instead else []
    out += ["--force runs it anyway"] if force is not None else []
    raise BitNetError(f"{text}; {', '.join(out)}")


def useful(ways: Sequence[Way], total: float, have: float) -> list[Way]:
    """The ways that fit; where none does, those that help by a tenth or more, the best first; four at most."""
    fits = [way for way in ways if way.total <= have]
    helps = sorted((way for way in ways if way.total < 0.9 * total), key=lambda way: way.total)
    return (fits or helps)[:4]


# ---- running a packed model --------------------------------------------------------------------------------


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
    from bitnet.files.packed import read_config

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


def mildest(option: str, have: float, values: Sequence[int], total: Callable[[int], float]) -> list[Way]:
    """The first of falling values with which a job fits, or the last one."""
    if not values:
        return []
    value = next((n for n in values if total(n) <= have), values[-1])
    return [Way(f"{option} {value}", total(value))]


def halves(count: int) -> list[int]:
    """Half of a count, a quarter ... down to 1."""
    return [count >> shift for shift in range(1, count.bit_length())]
