"""Who can run: our engines and those of others, what each needs, and why one cannot."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitnet.benchmarks.bench.machine import MEMORY
from bitnet.benchmarks.bench.plan import Test
from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.kernels import native, ops
from bitnet.memory import Need, check
from bitnet.model import embedding_parameters, kv_cache_bytes, linear_parameters, packed_bytes

BACKENDS = ("auto", "cpu", "torch", "triton")
OTHERS = ("torch-bf16", "torch-int8", "llama.cpp")
_INTERPRETER = 250e6  # bytes of a process with torch in it
LLAMA_INSTALL = "pip install --no-binary llama-cpp-python llama-cpp-python"  # compiles it for this very CPU
_UBATCH = 512  # tokens llama.cpp computes at once, for each of which it keeps room for logits
_SEQUENCES = 64  # that one llama.cpp context takes, and one session of the GPU engine


@dataclass(frozen=True)
class Files:
    """Where a model is: packed, and as a GGUF as written and as llama.cpp wants it."""

    packed: Path
    raw: Path
    gguf: Path


@dataclass(frozen=True)
class Contender:
    """One way to run a model. `options(files, threads)` are those of its script; `bytes(config, test)` it needs."""

    name: str
    script: str
    options: Callable[[Files, int], dict[str, Any]]
    needs: Callable[[ModelConfig, Test], float]
    suffix: str = ""  # what tells it from the same engine with other options
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)
    ours: bool = True
    device: str = "cpu"  # where it runs


@dataclass(frozen=True)
class Wanted:
    """What the user asked for, in lists that cross-multiply."""

    backends: list[str]
    isas: list[str]
    heads: list[str]
    caches: list[str]
    against: list[str]
    llama: str
    device: torch.device


def line_up(wanted: Wanted) -> list[Contender]:
    """All contenders, ours first. Raises BitNetError for one that cannot run here."""
    engines = [_engine(name, wanted.device) for name in wanted.backends]
    for flag, value, default, able in (
        ("--head", wanted.heads, ["file"], "cpu" in engines),
        ("--cache", wanted.caches, ["fp32"], "cpu" in engines),
        ("--isa", wanted.isas, [], any(name != "triton" for name in engines)),
    ):
        if value != default and not able:
            raise BitNetError(
                f"bench: {flag}: got '{','.join(value)}' for {', '.join(wanted.backends)}, which has no such choice; "
                "use --backend cpu"
            )
    # "auto" beside the engine that it is would run that one twice.
    backends = [
        name for name, engine in zip(wanted.backends, engines) if name == engine or engine not in wanted.backends
    ]
    found = [one for backend in backends for one in _ours(backend, wanted)]
    for name in wanted.against:
        if name == "llama.cpp":
            check_llama(wanted.llama)
            found.append(_llama(wanted.llama))
        else:
            found.append(_dense(name))
    return list({(one.name, one.suffix): one for one in found}.values())


def _engine(backend: str, device: torch.device) -> str:
    """The engine of a backend; of "auto" the one it takes for a packed ternary model.

    "cpu", the C++ engine, is the one that rounds head and cache on request.
    """
    if backend != "auto":
        return backend
    return {"cpu": "cpu", "triton": "triton"}.get(ops.select(device).name, "torch")


def _ours(backend: str, wanted: Wanted) -> Iterator[Contender]:
    device = torch.device("cpu") if backend == "cpu" else wanted.device
    reason = {"cpu": ops.CPU, "triton": ops.TRITON}[backend].why_not(device) if backend in ("cpu", "triton") else None
    if reason:
        raise BitNetError(f"bench: backend '{backend}' cannot be used: {reason}")
    choices = _engine(backend, wanted.device) == "cpu"
    heads, caches = (wanted.heads, wanted.caches) if choices else (["file"], ["fp32"])
    isas = [""] if backend == "triton" else wanted.isas or [""]
    for isa, head, cache in itertools.product(isas, heads, caches):
        if isa:
            check_isa(isa)
        shown = [isa] * bool(isa) + [f"head {head}"] * (head != "file") + [f"cache {cache}"] * (cache != "fp32")
        yield Contender(
            backend,
            "ours",
            lambda files, threads, head=head, cache=cache: {  # type: ignore[misc]
                "path": str(files.packed),
                "engine": backend,
                "head": head,
                "cache": cache,
                "threads": threads,
                "device": str(device),
            },
            lambda config, test, head=head: _our_bytes(config, test, backend, head),  # type: ignore[misc]
            suffix=", ".join(shown),
            environment={native.ENVIRONMENT: isa} if isa else {},
            device=str(device),
        )


def check_isa(name: str) -> None:
    """Raise BitNetError for an instruction set that is unknown or not on this CPU."""
    known = {one.name: one for one in native.instruction_sets()}
    if name not in known:
        have = ", ".join(known) or f"none: {native.why_not()}"
        raise BitNetError(f"bench: --isa: got '{name}', expected one of {have}")
    if known[name].why_not:
        raise BitNetError(f"bench: --isa: '{name}' cannot be used: {known[name].why_not}")


def _our_bytes(config: ModelConfig, test: Test, backend: str, head: str) -> float:
    linear, tables = linear_parameters(config), embedding_parameters(config)
    if backend == "torch":  # int8 or two-bit codes, tables in fp32
        size = linear * 1.0 + 4 * tables
    else:
        size = linear / 4 + tables * {"file": 0.0, "int8": 1.0, "int4": 0.5625}[head]
    return _INTERPRETER + packed_bytes(config) + size + test.batch * kv_cache_bytes(config, test.room)


def _dense(name: str) -> Contender:
    dtype = name.removeprefix("torch-")
    width = {"bf16": 2, "int8": 1}[dtype]

    def needs(config: ModelConfig, test: Test) -> float:
        size = width * linear_parameters(config) + (2 + width) * embedding_parameters(config)
        return _INTERPRETER + packed_bytes(config) + size + test.batch * kv_cache_bytes(config, test.room, 2)

    return Contender(
        name,
        "dense",
        lambda files, threads: {"path": str(files.packed), "dtype": dtype, "threads": threads},
        needs,
        ours=False,
    )


def _llama(python: str) -> Contender:
    def needs(config: ModelConfig, test: Test) -> float:
        table = config.vocab_size * config.hidden_size
        made = 10 * table  # a table at a time while it is quantised: F16 as read, fp32, and room for the result
        logits = 4 * config.vocab_size * max(_UBATCH, test.batch)
        run = linear_parameters(config) * 0.26 + embedding_parameters(config) * 0.83  # TQ2_0, Q6_K
        run += logits + test.batch * kv_cache_bytes(config, test.room, 2)
        return _INTERPRETER + max(made, run)

    return Contender(
        "llama.cpp",
        "llama",
        lambda files, threads: {"raw": str(files.raw), "path": str(files.gguf), "threads": threads},
        needs,
        python=python,
        ours=False,
    )


def check_llama(python: str) -> None:
    """Raise BitNetError, with the way to install it, where this Python has no llama-cpp-python."""
    try:
        found = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BitNetError(
            f"bench: --llama: got '{python}', which cannot be run ({error.strerror}), expected a Python interpreter"
        ) from None
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BitNetError(
            f"bench: llama.cpp: {python} cannot import llama_cpp ({last}); build it for this CPU with "
            f"{LLAMA_INSTALL} and name that environment's interpreter with --llama"
        )


def llama_config(config: ModelConfig) -> tuple[ModelConfig, str]:
    """What llama.cpp can run of a config's shape, and how it differs, in words; empty where it does not.

    Raises BitNetError for a shape that its blocks of 256 cannot hold.
    """
    if config.linear == "float":
        raise BitNetError("bench: llama.cpp: got a plain model, expected a ternary one for TQ2_0; leave llama.cpp out")
    for key in ("hidden_size", "intermediate_size"):
        if getattr(config, key) % 256:
            raise BitNetError(
                f"bench: llama.cpp: got {key} {getattr(config, key)}, expected a multiple of 256, the block of TQ2_0; "
                "leave llama.cpp out"
            )
    changes: dict[str, Any] = {}
    notes = []
    if config.hidden_act != "silu":
        changes["hidden_act"] = "silu"
        notes.append("SiLU instead of ReLU²")
    if config.qk_norm:
        changes["qk_norm"] = False
        notes.append("no QK norm")
    if config.sub_norms and not config.tie_word_embeddings:
        changes["sub_norms"] = False
        notes.append("no sub-norms")
    return config.replace(**changes), ", ".join(notes)


def check_memory(model: str, config: ModelConfig, tests: list[Test], contenders: list[Contender]) -> None:
    """Raise BitNetError where the contenders, which are all loaded at once, need more memory than there is."""
    needs = {f"{one.name} {one.suffix}".strip(): max(one.needs(config, test) for test in tests) for one in contenders}
    needs["this process"] = _INTERPRETER
    needs["what measures the bandwidth"] = _INTERPRETER + MEMORY
    check(
        f"bench: {model}",
        Need({"": needs}),
        torch.device("cpu"),
        instead="leave contenders out, or choose a smaller model, -d or -b",
        force=None,
    )


def check_batch(tests: list[Test], contenders: list[Contender]) -> None:
    """Raise BitNetError for more sequences than a contender takes."""
    largest = max(test.batch for test in tests)
    for one in contenders:
        if one.name in ("llama.cpp", "triton") and largest > _SEQUENCES:
            raise BitNetError(f"bench: -b: got {largest}, expected at most {_SEQUENCES} with {one.name}")
