"""Which engines can run, ours and others: what each needs, and why one cannot."""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitnet.benchmarks.bench import machine
from bitnet.benchmarks.bench.plan import Test
from bitnet.benchmarks.children.builds import check_python
from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.packed_layout import packed_bytes
from bitnet.files.tensors import embedding_parameters, kv_cache_bytes, linear_parameters
from bitnet.kernels import native, ops
from bitnet.memory import Need, check

BACKENDS = ("auto", "cpu", "torch", "triton")
OTHERS = ("torch-bf16", "torch-int8", "llama.cpp")
OURS_SCRIPT, DENSE_SCRIPT, LLAMA_SCRIPT = "bench/ours", "bench/dense", "children/llama"
TQ2_0_BYTES = 0.26  # per ternary weight: two bits, and an fp16 scale for 256 of them
Q6_K_BYTES = 0.83  # per weight of an embedding: 6.56 bits
_INTERPRETER = 250e6  # bytes of a process that has imported torch
_UBATCH = 512  # tokens that llama.cpp computes at once, and keeps logits for
_SEQUENCES = 64  # most sequences of a llama.cpp context, and of a session of the GPU engine


@dataclass(frozen=True)
class Files:
    """Where a model is: packed, and as GGUF before and after llama.cpp has quantised its embedding."""

    packed: Path
    raw: Path
    gguf: Path


@dataclass(frozen=True)
class Contender:
    """One way to run a model, in a child.

    script, options, python, environment: what the child loads and how. needs: bytes of memory a test takes.
    """

    name: str
    script: str
    options: Callable[[Files, int], dict[str, Any]]  # of the files and the threads
    needs: Callable[[ModelConfig, Test], float]
    suffix: str = ""  # distinguishes it from the same engine with other options
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)
    ours: bool = True
    device: str = "cpu"

    @property
    def label(self) -> str:
        """Its name with its options."""
        return f"{self.name} {self.suffix}".strip()


@dataclass(frozen=True)
class EngineChoice:
    """The engines that the user asked for, as lists that cross-multiply."""

    backends: list[str]
    isas: list[str]
    heads: list[str]
    caches: list[str]
    against: list[str]
    llama: str
    device: torch.device


def select_contenders(choice: EngineChoice) -> list[Contender]:
    """All contenders, ours first. Raises BitNetError for one that cannot run here."""
    engines = [_engine(name, choice.device) for name in choice.backends]
    for flag, value, default, able in (
        ("--head", choice.heads, ["file"], "cpu" in engines),
        ("--cache", choice.caches, ["fp32"], "cpu" in engines),
        ("--isa", choice.isas, [], any(name != "triton" for name in engines)),
    ):
        if value != default and not able:
            raise BitNetError(
                f"bench: {flag}: got '{','.join(value)}' for {', '.join(choice.backends)}, which has no such option; "
                "use --backend cpu"
            )
    # "auto" beside the engine it stands for would run that engine twice.
    backends = [
        name for name, engine in zip(choice.backends, engines) if name == engine or engine not in choice.backends
    ]
    found = [one for backend in backends for one in _ours(backend, choice)]
    for name in choice.against:
        if name == "llama.cpp":
            check_python(choice.llama, "bench")
            found.append(llama_contender(choice.llama))
        else:
            found.append(_dense(name))
    return list({(one.name, one.suffix): one for one in found}.values())


def _engine(backend: str, device: torch.device) -> str:
    """The engine of a backend; for "auto", the one that a packed ternary model gets."""
    if backend != "auto":
        return backend
    return {"cpu": "cpu", "triton": "triton"}.get(ops.select(device).name, "torch")


def _ours(backend: str, choice: EngineChoice) -> Iterator[Contender]:
    device = torch.device("cpu") if backend == "cpu" else choice.device
    reason = {"cpu": ops.CPU, "triton": ops.TRITON}[backend].why_not(device) if backend in ("cpu", "triton") else None
    if reason:
        raise BitNetError(f"bench: backend '{backend}' cannot be used: {reason}")
    rounds_on_request = _engine(backend, choice.device) == "cpu"  # head and cache: the C++ engine alone
    heads, caches = (choice.heads, choice.caches) if rounds_on_request else (["file"], ["fp32"])
    isas = [""] if backend == "triton" else choice.isas or [""]
    for isa, head, cache in itertools.product(isas, heads, caches):
        if isa:
            check_isa(isa)
        shown = [isa] * bool(isa) + [f"head {head}"] * (head != "file") + [f"cache {cache}"] * (cache != "fp32")
        yield Contender(
            backend,
            OURS_SCRIPT,
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
    linear, embedding = linear_parameters(config), embedding_parameters(config)
    if backend == "torch":  # int8 or two-bit codes, embedding and head in fp32
        size = linear * 1.0 + 4 * embedding
    else:
        size = linear / 4 + embedding * {"file": 0.0, "int8": 1.0, "int4": 0.5625}[head]
    return _INTERPRETER + packed_bytes(config) + size + test.batch * kv_cache_bytes(config, test.positions)


def _dense(name: str) -> Contender:
    dtype = name.removeprefix("torch-")
    width = {"bf16": 2, "int8": 1}[dtype]

    def needs(config: ModelConfig, test: Test) -> float:
        size = width * linear_parameters(config) + (2 + width) * embedding_parameters(config)
        return _INTERPRETER + packed_bytes(config) + size + test.batch * kv_cache_bytes(config, test.positions, 2)

    return Contender(
        name,
        DENSE_SCRIPT,
        lambda files, threads: {"path": str(files.packed), "dtype": dtype, "threads": threads},
        needs,
        ours=False,
    )


def llama_contender(python: str) -> Contender:
    """llama.cpp in this Python."""

    def needs(config: ModelConfig, test: Test) -> float:
        matrix = config.vocab_size * config.hidden_size
        quantising = 10 * matrix  # the embedding in F16 as read, in fp32, and as the result
        logits = 4 * config.vocab_size * max(_UBATCH, test.batch)
        running = linear_parameters(config) * TQ2_0_BYTES + embedding_parameters(config) * Q6_K_BYTES
        running += logits + test.batch * kv_cache_bytes(config, test.positions, 2)
        return _INTERPRETER + max(quantising, running)

    return Contender(
        "llama.cpp",
        LLAMA_SCRIPT,
        lambda files, threads: {
            "purpose": "drive",
            "raw": str(files.raw),
            "path": str(files.gguf),
            "threads": threads,
        },
        needs,
        python=python,
        ours=False,
    )


def llama_config(config: ModelConfig) -> tuple[ModelConfig, str]:
    """The nearest config that llama.cpp can run, and how it differs in words; "" where it does not.

    Raises BitNetError for a shape that its blocks of 256 cannot hold.
    """
    if config.linear == "float":
        raise BitNetError("bench: llama.cpp: got a float model, expected a ternary one for TQ2_0; leave llama.cpp out")
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
    """Raise BitNetError where the contenders need more memory than there is; all are loaded at once."""
    needs = {one.label: max(one.needs(config, test) for test in tests) for one in contenders}
    needs["the bandwidth meter"] = _INTERPRETER + machine.MEMORY
    needs["this process"] = _INTERPRETER
    check(
        f"bench: {model}",
        Need({"": needs}),
        torch.device("cpu"),
        instead="leave contenders out, or choose a smaller model, -d or -b",
        force=None,
    )


def check_batch(tests: list[Test], contenders: list[Contender]) -> None:
    """Raise BitNetError for more sequences than a contender can hold."""
    largest = max(test.batch for test in tests)
    for one in contenders:
        if one.name in ("llama.cpp", "triton") and largest > _SEQUENCES:
            raise BitNetError(f"bench: -b: got {largest}, expected at most {_SEQUENCES} with {one.name}")
