"""GGUF files of the twin, quantised by llama.cpp, and of the ternary run; llama.cpp runs in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bitnet.benchmarks.bench import worker
from bitnet.benchmarks.bench.contenders import LLAMA_INSTALL
from bitnet.benchmarks.compare.artifact import Artifact
from bitnet.benchmarks.compare.method import Method, Settings
from bitnet.benchmarks.compare.pair import Pair
from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.gguf.export import check_exportable, export_gguf
from bitnet.files.source import TrainedSource
from bitnet.train.runs.run import Run

CHILD = Path(__file__).with_name("llama_child.py")
# llama.h, enum llama_ftype; and the block of the type, which sizes have to be multiples of.
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
_BETTER = "--llama PYTHON names a better one"


def command(settings: Settings, *words: str) -> list[str]:
    """The child with these words, in the interpreter that has llama.cpp; it ends with this process."""
    return [settings.llama or sys.executable, str(CHILD), str(worker.__file__), str(os.getpid()), *words]


def build_remark(library: str, system: str, features: Sequence[str]) -> str:
    """What a build of llama.cpp lacks. system: what it says of itself, features: of this CPU."""
    if library.startswith("cyllama"):
        return f"prebuilt wheel, not built for this CPU: {_BETTER}"
    if "avx512_f" in features and "AVX512 = 1" not in system:
        return f"built without AVX-512, which this CPU has: {_BETTER}"
    return ""


def check_python(path: str) -> None:
    """Raise BitNetError unless `path` is a Python with llama-cpp-python."""
    try:
        found = subprocess.run([path, "-c", "import llama_cpp, numpy"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BitNetError(f"llama: got '{path}', expected a Python ({error.strerror}) (--llama)") from error
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["it ended with an error"])[-1]
        raise BitNetError(f"llama: '{path}' has no llama-cpp-python ({last}); build it there: {LLAMA_INSTALL}")


def why_not_installed(settings: Settings) -> str | None:
    """Why llama.cpp cannot run here."""
    if settings.llama or any(importlib.util.find_spec(name) for name in ("llama_cpp", "cyllama")):
        return None
    return "cyllama is not installed; pip install 'bitnet-ternary[compare]'"


def why_not_shape(config: ModelConfig, kind: str, block: int) -> str | None:
    """Why llama.cpp cannot hold a model of this shape in this type."""
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


def _quantise(source: Path, target: Path, file_type: int, settings: Settings) -> str:
    words = command(settings, "quantize", str(source), str(target), str(file_type), str(settings.threads))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BitNetError(f"llama.cpp could not quantise the file: {last}")
    return done.stdout.split("\n")[-2]


def _twin_method(kind: str) -> Method:
    file_type, block = _TYPES[kind]

    def why_not(pair: Pair, settings: Settings) -> str | None:
        return why_not_installed(settings) or why_not_shape(_config(pair.twin), "f16", block)

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


def _ternary_why_not(pair: Pair, settings: Settings) -> str | None:
    return why_not_installed(settings) or why_not_shape(_config(pair.run), "tq2_0", 1)


def _make_ternary(pair: Pair, folder: Path, settings: Settings) -> Artifact:
    model, _ = Run(pair.run).load()
    path = export_gguf(TrainedSource(model, pair.tokenizer(), {}), folder / "model.gguf", "tq2_0")
    return Artifact(str(path), "llama", "llama.cpp", "the ternary run in llama.cpp; table F16")


METHODS = [
    *(_twin_method(kind) for kind in _TYPES),
    Method("bitnet-tq2_0", "bitnet", "BitNet b1.58 as GGUF TQ2_0", _ternary_why_not, _make_ternary),
]
