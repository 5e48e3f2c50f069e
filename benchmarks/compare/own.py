"""Methods that need no other library: the float baseline in three dtypes, and the BitNet runs in our packed file."""

from collections.abc import Callable
from pathlib import Path

import torch

from bitnet import __version__
from bitnet.benchmarks.compare.artifact import Artifact, write_model
from bitnet.benchmarks.compare.method import Method, Settings, always
from bitnet.benchmarks.compare.pair import Pair

Make = Callable[[Pair, Path, Settings], Artifact]


def _float(dtype: torch.dtype, note: str) -> Make:
    def make(pair: Pair, folder: Path, settings: Settings) -> Artifact:
        path = write_model(folder / "model.safetensors", pair.baseline_model(), pair.tokenizer(), dtype=dtype)
        return Artifact(str(path), "torch", f"torch {torch.__version__.partition('+')[0]}", note)

    return make


FLOATS = [
    Method("fp32", "float", "FP32, the float baseline", always, _float(torch.float32, "the reference of KL and top-1")),
    Method("fp16", "float", "FP16", always, _float(torch.float16, "eager, autocast; norms in fp32")),
    Method("bf16", "float", "BF16", always, _float(torch.bfloat16, "eager, autocast; norms in fp32")),
]


def _packed(linear: str, embedding: str, note: str) -> Make:
    def make(pair: Pair, folder: Path, settings: Settings) -> Artifact:
        run = pair.ternary if linear == "ternary" else pair.binary
        assert run is not None, "why_not excludes it"
        path = pair.pack(run, folder / "model.safetensors", embedding)
        return Artifact(str(path), "packed", f"bitnet {__version__}", note)

    return make


def _lacks_binary(pair: Pair, settings: Settings) -> str | None:
    if pair.binary is not None:
        return None
    return "no 1-bit run given: train one like the ternary run, with --linear binary, and name it with --binary RUN"


BITNETS = [
    Method(
        "bitnet-1bit",
        "bitnet",
        "BitNet 1-bit",
        _lacks_binary,
        _packed("binary", "bf16", "trained 1-bit, int8 activations; stored at two bits per weight; embedding bf16"),
    ),
    Method(
        "bitnet-b1.58",
        "bitnet",
        "BitNet b1.58",
        always,
        _packed("ternary", "bf16", "trained ternary, int8 activations; embedding bf16"),
    ),
    Method(
        "bitnet-b1.58-table8",
        "bitnet",
        "BitNet b1.58, int8 embedding",
        always,
        _packed("ternary", "int8", "trained ternary, int8 activations; embedding int8"),
    ),
]
