"""Methods that make GGUF files: the float baseline, quantised by llama.cpp, and the ternary run."""

import importlib.util
import sys
from pathlib import Path

from bitnet.benchmarks.children.process import Child
from bitnet.benchmarks.compare.artifact import Artifact
from bitnet.benchmarks.compare.method import Method, Settings
from bitnet.benchmarks.compare.pair import Pair
from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.gguf.export import check_exportable, export_gguf
from bitnet.files.source import TrainedSource
from bitnet.train.runs.run import Run

# llama.h, enum llama_ftype; and the block of the type, of which sizes have to be multiples.
_TYPES = {
    "f16": (1, 1),
    "q8_0": (7, 32),
    "q6_k": (18, 256),
    "q5_k_m": (17, 256),
    "q4_k_m": (15, 256),
    "q4_0": (2, 32),
    "iq4_xs": (30, 256),
    "q3_k_m": (12, 256),
    "q2_k": (10, 256),
}
_QUANTISING = 1800.0  # seconds; the method's own budget ends it earlier


def why_not_installed(settings: Settings) -> str | None:
    """Why llama.cpp cannot run here, None where it can."""
    if settings.llama or any(importlib.util.find_spec(name) for name in ("llama_cpp", "cyllama")):
        return None
    return "cyllama is not installed; from a clone: pip install '.[compare]'"


def why_not_shape(config: ModelConfig, kind: str, block: int) -> str | None:
    """Why llama.cpp cannot hold a model of this shape in this type, None where it can."""
    try:
        check_exportable(config, kind)
    except BitNetError as error:
        return str(error).removeprefix("export: ")
    for key in ("hidden_size", "intermediate_size"):
        if getattr(config, key) % block:
            return f"{key} {getattr(config, key)} is not a multiple of {block}, the block of this type"
    return None


def _config(run: Path) -> ModelConfig:
    return Run(run).saved_shape()


def _quantise(source: Path, target: Path, file_type: int, settings: Settings) -> None:
    python = settings.llama or sys.executable
    paths = {"source": str(source), "target": str(target)}
    with Child("llama.cpp", "children/llama", {"purpose": "quantize"}, settings.threads, python) as child:
        child.ask("quantize", _QUANTISING, **paths, file_type=file_type, threads=settings.threads)
    if not target.is_file():
        raise BitNetError("llama.cpp: got no file after quantisation, expected one")


def _baseline_method(kind: str) -> Method:
    file_type, block = _TYPES[kind]

    def why_not(pair: Pair, settings: Settings) -> str | None:
        return why_not_installed(settings) or why_not_shape(_config(pair.baseline), "f16", block)

    def make(pair: Pair, folder: Path, settings: Settings) -> Artifact:
        exact = "f16" if kind == "f16" else "f32"
        source, target = folder / "float.gguf", folder / "model.gguf"
        export_gguf(TrainedSource(pair.baseline_model(), pair.tokenizer(), {}), source, exact)
        if kind == "f16":
            source.rename(target)
        else:
            _quantise(source, target, file_type, settings)
            source.unlink()
        return Artifact(str(target), "llama", "llama.cpp", "")

    return Method(f"gguf-{kind}", "gguf", f"GGUF {kind.upper()}", why_not, make)


def _why_not_ternary(pair: Pair, settings: Settings) -> str | None:
    return why_not_installed(settings) or why_not_shape(_config(pair.ternary), "tq2_0", 1)


def _make_ternary(pair: Pair, folder: Path, settings: Settings) -> Artifact:
    model, _ = Run(pair.ternary).load()
    path = export_gguf(TrainedSource(model, pair.tokenizer(), {}), folder / "model.gguf", "tq2_0")
    return Artifact(str(path), "llama", "llama.cpp", "the ternary run in llama.cpp; embedding F16")


METHODS = [
    *(_baseline_method(kind) for kind in _TYPES),
    Method("bitnet-tq2_0", "bitnet", "BitNet b1.58 as GGUF TQ2_0", _why_not_ternary, _make_ternary),
]
