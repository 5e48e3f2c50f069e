"""What a packed file holds: its metadata, its tensors, and the checks of both.

    metadata   format "bitnet-packed", version, layout (kernels/packing.py), config (JSON), tokenizer kind, info (JSON),
               sha256 over these and all tensors
    tensors    names and shapes of tensors.py
      projections   .weight        [N, ceil(K / 4)] uint8   two bits a weight; bf16 [N, K] in a float model
                    .weight_scale  [1] fp32                 mean |W|: the output is multiplied by it
      embeddings    .weight        [V, D] bf16, or int8 with .scale [V, 1] fp32
      norms         .weight        fp32
      tokenizer                    [bytes] uint8            as bitnet/text/load.py reads it

Everything here works on headers and tensors, not on files.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.safetensors_file import Plan
from bitnet.files.tensors import dense_shapes, is_embedding, projection_shape, projections
from bitnet.kernels import packing
from bitnet.text.tokenizer import Tokenizer

FORMAT, VERSION = "bitnet-packed", 1
EMBEDDINGS = ("bf16", "int8")
TOKENIZER = "tokenizer"  # the tensor that holds its bytes
NO_TOKENIZER = "none"  # its kind, in the metadata
NO_DIGEST = "0" * 64  # as long as a sha256: the header keeps its length when the checksum is put in
_MAX_TENSORS = 65_536  # a model of 7 x 9,000 layers; a header that claims more is not a model

Expected = tuple[tuple[int, ...], frozenset[torch.dtype]]  # shape and allowed dtypes


def make_metadata(config: ModelConfig, tokenizer: Tokenizer | None, info: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file to be written, with `NO_DIGEST` in the place of its checksum."""
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "layout": packing.LAYOUT_ID,
        "config": json.dumps(config.to_dict()),
        "tokenizer": NO_TOKENIZER if tokenizer is None else tokenizer.kind,
        "info": json.dumps(dict(info)),
        "sha256": NO_DIGEST,
    }


def parse_metadata(path: Path, metadata: Mapping[str, str], tensors: int) -> ModelConfig:
    """The config in a file's metadata. tensors: how many the file holds.

    Raises BitNetError for another format, version or layout, and as `ModelConfig.from_dict`; KeyError and ValueError
    for metadata that is incomplete or not JSON.
    """
    if metadata.get("format") != FORMAT:
        raise BitNetError(
            f"{path}: got a safetensors file of format '{metadata.get('format')}', expected '{FORMAT}'; "
            "write one with: bitnet pack RUN -o FILE"
        )
    if metadata.get("version") != str(VERSION) or metadata.get("layout") != packing.LAYOUT_ID:
        raise BitNetError(
            f"{path}: got version {metadata.get('version')}, layout '{metadata.get('layout')}', expected version "
            f"{VERSION}, layout '{packing.LAYOUT_ID}'; pack the run again with this version of bitnet"
        )
    if tensors > _MAX_TENSORS:
        raise BitNetError(f"{path}: got {tensors} tensors, expected at most {_MAX_TENSORS}")
    return ModelConfig.from_dict(json.loads(metadata["config"]))


def expected_tensors(config: ModelConfig) -> dict[str, Expected]:
    """Shape and allowed dtypes of every tensor in a packed file of this config (tokenizer and int8 scales aside)."""
    fp32, bf16 = frozenset({torch.float32}), frozenset({torch.bfloat16})
    expected: dict[str, Expected] = {}
    for name in projections(config):
        n, k = projection_shape(config, name)
        if config.linear == "float":
            expected[f"{name}.weight"] = (n, k), bf16
        else:
            expected[f"{name}.weight"] = (n, packing.packed_width(k)), frozenset({torch.uint8})
            expected[f"{name}.weight_scale"] = (1,), fp32
    for name, shape in dense_shapes(config).items():
        expected[name] = shape, bf16 | {torch.int8} if is_embedding(name) else fp32
    return expected


def packed_bytes(config: ModelConfig) -> int:
    """Bytes of the tensors in a packed file with a bf16 embedding, without its tokenizer."""
    return plan_bytes(plan_tensors(config, "bf16", None))


def plan_tensors(config: ModelConfig, embedding: str, tokenizer: Tensor | None) -> Plan:
    """Dtype and shape of every tensor of a file to be written. tokenizer: its bytes, [size] uint8."""
    plan: Plan = {}
    for name, (shape, dtypes) in expected_tensors(config).items():
        if embedding == "int8" and is_embedding(name):
            plan[name] = torch.int8, shape
            plan[row_scale(name)] = torch.float32, (shape[0], 1)
        else:
            (dtype,) = dtypes - {torch.int8}
            plan[name] = dtype, shape
    if tokenizer is not None:
        plan[TOKENIZER] = torch.uint8, tuple(tokenizer.shape)
    return plan


def plan_bytes(plan: Plan) -> int:
    """Bytes of the tensors of a plan."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in plan.values())


def row_scale(name: str) -> str:
    """The name of the scales that belong to an int8 embedding."""
    return name.removesuffix("weight") + "scale"


def check_tokenizer(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raise BitNetError for a tokenizer that has another number of tokens than the model."""
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        raise BitNetError(
            f"tokenizer and model do not match: got {tokenizer.vocab_size} tokens in the tokenizer, expected "
            f"{config.vocab_size} as in the model; use the tokenizer the model was trained with"
        )


def check_tensors(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise BitNetError unless `tensors` are exactly those of the config, with codes and scales in range."""
    # A config that lies about its size must not make us list its tensors: the file has to hold them.
    if config.num_hidden_layers > len(tensors):
        raise BitNetError(
            f"{path}: got {len(tensors)} tensors for {config.num_hidden_layers} layers, expected seven "
            "projections a layer: the file is damaged"
        )
    expected = expected_tensors(config)
    for name, (shape, dtypes) in expected.items():
        if name not in tensors:
            raise BitNetError(
                f"{path}: got no tensor '{name}', expected one of shape {list(shape)}: the file is damaged"
            )
        got = tensors[name]
        if tuple(got.shape) != shape or got.dtype not in dtypes:
            allowed = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise BitNetError(
                f"{path}: tensor '{name}': got {str(got.dtype).removeprefix('torch.')} {list(got.shape)}, "
                f"expected {allowed} {list(shape)}"
            )
        if got.dtype == torch.uint8:
            packing.check(got, projection_shape(config, name)[1])
        if name.endswith("_scale"):
            _check_scale(path, name, got)
        if got.dtype == torch.int8:
            scale = tensors.get(row_scale(name))
            if scale is None or tuple(scale.shape) != (shape[0], 1) or scale.dtype != torch.float32:
                raise BitNetError(
                    f"{path}: tensor '{name}' is int8, expected a float32 scale of [{shape[0]}, 1] with it"
                )
            _check_scale(path, row_scale(name), scale)
    scales = {row_scale(name) for name in expected if tensors[name].dtype == torch.int8}
    extra = sorted(set(tensors) - set(expected) - scales)
    if extra:
        raise BitNetError(f"{path}: got unknown tensor '{extra[0]}', expected only those of the config")


def _check_scale(path: Path, name: str, scale: Tensor) -> None:
    wrong = scale[~(torch.isfinite(scale) & (scale > 0))]
    if wrong.numel():
        raise BitNetError(f"{path}: tensor '{name}': got {float(wrong[0])}, expected finite scales above 0")


def content_digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over everything a model depends on, in an order that does not depend on the writer."""
    digest = hashlib.sha256()
    for key in sorted(set(metadata) - {"sha256"}):
        digest.update(json.dumps([key, metadata[key]]).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
