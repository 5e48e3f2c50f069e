"""Writing GGUF files that llama.cpp runs; models that it would not run, or run wrongly, are refused."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files import ternary
from bitnet.files.checkpoint import replacing
from bitnet.files.gguf.file import MAGIC, Float32, write_gguf
from bitnet.files.gguf.names import BLOCKS, FLOATS, architecture, gguf_name, reorder
from bitnet.files.gguf.tokenizer import tokenizer_keys
from bitnet.files.source import Source
from bitnet.files.tensors import dense_shapes, is_embedding, projection_shape, projections
from bitnet.kernels.reference import WeightCodes

TYPES = ("tq2_0", "tq1_0", "q2_0", "f16", "f32")
_MOST_ROUNDING = 2.0**-11  # of fp16: at most this for a normal number, half of it on average
_FILE_TYPES = {"f32": 0, "f16": 1, "tq1_0": 36, "tq2_0": 37, "q2_0": 41}  # general.file_type


def check_exportable(config: ModelConfig, kind: str) -> None:
    """Raise BitNetError, with the reason and a remedy, for a model that llama.cpp would not run or run wrongly."""
    if kind not in TYPES:
        raise BitNetError(f"export: got type '{kind}', expected one of {', '.join(TYPES)}")
    other = "--to hf" if config.linear == "float" else "--to hf-packed"  # needs codes only
    retrain = "train one that llama.cpp runs: --preset nano-portable, or"
    if config.qk_norm:
        raise BitNetError(
            "export: got a model with QK norm, which llama.cpp supports neither for bitnet nor for llama files; "
            f"{retrain} --set model.qk_norm=false"
        )
    if config.hidden_act != "silu":
        raise BitNetError(
            "export: got a model with ReLU^2; llama.cpp computes SiLU for every such file and gives wrong text without "
            f"a warning; {retrain} --set model.hidden_act=silu; or export {other}, which can hold it"
        )
    if config.sub_norms and not config.tie_word_embeddings:
        raise BitNetError(
            "export: got a model with sub-norms and an untied head, which llama.cpp's bitnet files do not have; "
            f"{retrain} --set model.tie_word_embeddings=true or --set model.sub_norms=false; or export {other}"
        )
    if kind in ("f16", "f32"):
        return
    if config.linear == "float":
        raise BitNetError(f"export: got a model with float weights for {kind}, expected ternary ones; use --type f16")
    blocks = BLOCKS[kind.upper()]
    for key in ("hidden_size", "intermediate_size"):
        size = getattr(config, key)
        if size % blocks.size:
            remedy = "--type q2_0 takes multiples of 64, " if size % 64 == 0 else ""
            raise BitNetError(
                f"export: got {key} {size}, expected a multiple of {blocks.size}, the block of {kind}; "
                f"{remedy}--type f16 takes any size"
            )


def export_gguf(source: Source, path: Path, kind: str) -> Path:
    """Write a GGUF file, its projections in `kind`. Raises BitNetError as `check_exportable` does, before it writes."""
    config = source.config
    check_exportable(config, kind)
    _check_target(path)
    embedding_type = "F32" if kind == "f32" else "F16"
    plan: list[tuple[str, tuple[int, ...], str]] = []
    dense = dense_shapes(config)
    for name, shape in dense.items():
        plan.append((gguf_name(name), shape, embedding_type if is_embedding(name) else "F32"))
    plan += [
        (f"{gguf_name(name)}.weight", projection_shape(config, name), kind.upper()) for name in projections(config)
    ]

    def contents() -> Iterator[ternary.Bytes]:
        for name, (_, _, stored) in zip(dense, plan, strict=False):
            yield _encode_floats(source.dense(name), stored, name)
        for name in projections(config):
            yield _encode_projection(source, name, kind.upper())

    keys = {**_model_keys(config, path.stem, kind), **tokenizer_keys(source.tokenizer)}
    with replacing(path) as work, work.open("wb") as file:
        write_gguf(file, keys, plan, contents())
    return path


def _model_keys(config: ModelConfig, name: str, kind: str) -> dict[str, Any]:
    arch = architecture(config)
    return {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.context,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": Float32(config.rms_norm_eps),
        f"{arch}.rope.freq_base": Float32(config.rope_theta),
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.vocab_size": config.vocab_size,
    }


def _encode_projection(source: Source, name: str, stored: str) -> ternary.Bytes:
    config = source.config
    if config.linear == "float":
        return _encode_floats(reorder(source.master(name), name, config), stored, name)
    codes, scale = source.codes(name)
    codes = reorder(codes, name, config)
    if stored in BLOCKS:
        return BLOCKS[stored].encode(WeightCodes(codes, scale))
    if stored == "F16":
        ternary.check_scale(f"{name}: F16", scale)
    return _encode_floats(codes * scale, stored, name)


def _encode_floats(values: Tensor, stored: str, name: str) -> ternary.Bytes:
    converted = values.to(FLOATS[stored]).contiguous()
    if not bool(torch.isfinite(converted).all()):
        raise BitNetError(f"export: {name} has values that {stored} cannot hold; use --type f32")
    if stored == "F16" and (lost := _relative_error(values, converted)) > _MOST_ROUNDING:
        raise BitNetError(
            f"export: {name}: rounding to F16 changes it by {lost:.2g} of its size, expected at most "
            f"{_MOST_ROUNDING:.2g}: its values are too small for 16 bits; export as f32 (--type f32)"
        )
    data: ternary.Bytes = converted.reshape(-1).view(torch.uint8).numpy()
    return data


def _relative_error(values: Tensor, rounded: Tensor) -> float:
    """|rounded - values| / |values|, in the Euclidean norm."""
    lost = size = 0.0
    for part, exact in zip(rounded.split(4096), values.split(4096), strict=True):  # rows: no second copy
        lost += float((part.float() - exact.float()).square().sum(dtype=torch.float64))
        size += float(exact.float().square().sum(dtype=torch.float64))
    return math.sqrt(lost / size) if size else 0.0


def _check_target(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise BitNetError(f"export: got '{path}', expected a file in an existing folder (-o model.gguf)")
    if path.exists():
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise BitNetError(
                    f"export: '{path}' exists and is not a GGUF file; remove it or choose another name (-o)"
                )
