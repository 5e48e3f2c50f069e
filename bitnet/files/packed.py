"""The packed model: one self-contained safetensors file, and the way into and out of it.

    metadata   format "bitnet-packed", version, layout (kernels/packing.py), config (JSON), tokenizer kind,
               sha256 over config, layout, tokenizer kind and all tensors
    tensors    names of transformers' BitNetForCausalLM
      *_proj.weight        [N, ceil(K / 4)] uint8   two bits a weight; bf16 [N, K] in a plain (float) model
      *_proj.weight_scale  [1] fp32                 mean |W|: the output is multiplied by it
      embed_tokens, lm_head [V, D] bf16, or int8 with .scale [V, 1] fp32
      *norm.weight         fp32
      tokenizer            [bytes] uint8            as bitnet/text/tokenizer.py reads it

Everything is checked before it is used: a file that is cut, altered or unknown is refused with one line.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError, is_thread_shortage
from bitnet.files.checkpoint import replacing, write_tensors
from bitnet.kernels import packing, reference
from bitnet.layers import BitLinear, Embedding, PackedLinear
from bitnet.model import Transformer, in_features
from bitnet.text.load import load_tokenizer
from bitnet.text.tokenizer import Tokenizer

FORMAT, VERSION = "bitnet-packed", 1
EMBEDDINGS = ("bf16", "int8")
_TOKENIZER = "tokenizer"
_MAX_TENSORS = 65_536  # a model of 7 x 9,000 layers; a header that claims more is not a model


@dataclass(frozen=True)
class PackedModel:
    """What a packed file holds, checked. `tensors` are on the CPU."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None
    info: dict[str, Any]  # what training said of itself: steps, tokens, validation figures


def write_packed(
    path: Path,
    model: Transformer,
    tokenizer: Tokenizer | None,
    *,
    embedding: str = "bf16",
    info: Mapping[str, Any] | None = None,
) -> Path:
    """Pack a trained model into one file. Atomic; an existing packed file is replaced, anything else refused.

    embedding: "bf16" (exact: training uses bf16 values) or "int8" per row (half the bytes, a small loss).
    """
    if embedding not in EMBEDDINGS:
        raise BitNetError(f"pack: got embedding '{embedding}', expected one of {', '.join(EMBEDDINGS)}")
    check_tokenizer(model.config, tokenizer)
    check_target(path, "pack")
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        tensors.update(_packed_tensors(name, module, embedding))
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "layout": packing.LAYOUT_ID,
        "config": json.dumps(model.config.to_dict()),
        "tokenizer": "none",
        "info": json.dumps(dict(info or {})),
    }
    if tokenizer is not None:
        metadata["tokenizer"] = tokenizer.kind
        tensors[_TOKENIZER] = torch.frombuffer(bytearray(tokenizer.to_bytes()), dtype=torch.uint8)
    metadata["sha256"] = content_digest(metadata, tensors)
    with replacing(path) as work:
        write_tensors(work, tensors, metadata)
    return path


def _packed_tensors(name: str, module: nn.Module, embedding: str) -> Iterable[tuple[str, Tensor]]:
    if isinstance(module, BitLinear):
        codes, scale = module.quantized_weight()
        return [(f"{name}.weight", packing.pack(codes)), (f"{name}.weight_scale", scale.reshape(1))]
    if isinstance(module, nn.Linear):
        return [(f"{name}.weight", module.weight.to(torch.bfloat16))]
    if isinstance(module, Embedding) and embedding == "int8":
        codes, inv_scale = reference.quantize_activations(module.values())
        return [(f"{name}.weight", codes), (f"{name}.scale", inv_scale.reciprocal())]
    if isinstance(module, Embedding):
        return [(f"{name}.weight", module.values().to(torch.bfloat16))]
    return [(f"{name}.{key}", value.float()) for key, value in module.named_parameters(recurse=False)]


def read_packed(path: str | Path) -> PackedModel:
    """Read and check a packed file. Raises BitNetError for anything that is not a whole, known model."""
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "nothing"
        hint = f"; pack the run first: bitnet pack {path} -o model.safetensors" if path.is_dir() else ""
        raise BitNetError(f"model: got {kind} at '{path}', expected a packed model file{hint}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            _check_header(path, metadata, names)
            config = ModelConfig.from_dict(json.loads(metadata["config"]))
            tensors = {name: file.get_tensor(name) for name in names}
        if content_digest(metadata, tensors) != metadata["sha256"]:
            raise BitNetError(f"{path}: the content does not match its checksum: the file is damaged; pack it again")
        spelling = tensors.pop(_TOKENIZER) if metadata["tokenizer"] != "none" else None
        _check_tensors(path, config, tensors)
        tokenizer = None if spelling is None else load_tokenizer(metadata["tokenizer"], spelling.numpy().tobytes())
        check_tokenizer(config, tokenizer)
        return PackedModel(config, tensors, tokenizer, json.loads(metadata["info"]))
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, BitNetError) or is_thread_shortage(error):  # of threads: the file is not to blame
            raise
        raise BitNetError(
            f"{path}: got a file that cannot be read ({type(error).__name__}: {error}), expected a packed model; "
            "it may be cut short: pack or copy it again"
        ) from error


def read_config(path: Path) -> ModelConfig:
    """The config in a packed file's header; nothing else is read. Raises BitNetError for anything but a packed file."""
    if not path.is_file():
        raise BitNetError(f"model: got nothing to read at '{path}', expected a packed model file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
        _check_header(path, metadata, names)
        return ModelConfig.from_dict(json.loads(metadata["config"]))
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, BitNetError):
            raise
        raise BitNetError(f"{path}: got a file that cannot be read ({error}), expected a packed model") from error


def build(packed: PackedModel) -> Transformer:
    """The model of a packed file as modules: PackedLinear projections, exact tables, fp32 norms."""
    with torch.device("meta"):
        model = Transformer(packed.config, exact_embeddings=True)
    for name, module in list(model.named_modules()):
        if isinstance(module, BitLinear):
            weight, scale = packed.tensors[f"{name}.weight"], packed.tensors[f"{name}.weight_scale"]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(weight, scale, module.in_features))
            continue
        for key, _ in list(module.named_parameters(recurse=False)):
            value = packed.tensors[f"{name}.{key}"].float()
            if isinstance(module, Embedding):
                value = value * packed.tensors.get(f"{name}.scale", 1.0)
            setattr(module, key, nn.Parameter(value, requires_grad=False))
    return model


def expected_tensors(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], frozenset[torch.dtype]]]:
    """Shape and allowed dtypes of every tensor in a packed file of this config (tokenizer and int8 scales aside)."""
    with torch.device("meta"):
        model = Transformer(config)
    expected: dict[str, tuple[tuple[int, ...], frozenset[torch.dtype]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            shape = (module.out_features, packing.packed_width(module.in_features))
            expected[f"{name}.weight"] = (shape, frozenset({torch.uint8}))
            expected[f"{name}.weight_scale"] = ((1,), frozenset({torch.float32}))
            continue
        tables = (
            frozenset({torch.bfloat16, torch.int8}) if isinstance(module, Embedding) else frozenset({torch.float32})
        )
        dtypes = frozenset({torch.bfloat16}) if isinstance(module, nn.Linear) else tables
        for key, value in module.named_parameters(recurse=False):
            expected[f"{name}.{key}"] = (tuple(value.shape), dtypes)
    return expected


def _check_header(path: Path, metadata: Mapping[str, str], names: list[str]) -> None:
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
    if len(names) > _MAX_TENSORS:
        raise BitNetError(f"{path}: got {len(names)} tensors, expected at most {_MAX_TENSORS}")


def _check_tensors(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    # A config that lies about its size must not make us build a huge skeleton: the file has to hold its layers.
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
            packing.check(got, in_features(config, name))
        if name.endswith("_scale"):
            _check_scale(path, name, got)
        if got.dtype == torch.int8:
            scale = tensors.get(name.removesuffix("weight") + "scale")
            if scale is None or tuple(scale.shape) != (shape[0], 1) or scale.dtype != torch.float32:
                raise BitNetError(
                    f"{path}: tensor '{name}' is int8, expected a float32 scale of [{shape[0]}, 1] with it"
                )
            _check_scale(path, name.removesuffix("weight") + "scale", scale)
    scales = {name.removesuffix("weight") + "scale" for name in expected if tensors[name].dtype == torch.int8}
    extra = sorted(set(tensors) - set(expected) - scales)
    if extra:
        raise BitNetError(f"{path}: got unknown tensor '{extra[0]}', expected only those of the config")


def _check_scale(path: Path, name: str, scale: Tensor) -> None:
    wrong = scale[~(torch.isfinite(scale) & (scale > 0))]
    if wrong.numel():
        raise BitNetError(f"{path}: tensor '{name}': got {float(wrong[0])}, expected finite scales above 0")


def check_tokenizer(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raise BitNetError for a tokenizer that has another number of tokens than the model."""
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        raise BitNetError(
            f"tokenizer and model do not match: got {tokenizer.vocab_size} tokens in the tokenizer, expected "
            f"{config.vocab_size} as in the model; use the tokenizer the model was trained with"
        )


def check_target(path: Path, verb: str) -> None:
    """Raise BitNetError unless a packed file may be written at `path`: over nothing but another one."""
    if path.is_dir():
        raise BitNetError(
            f"{verb}: got a folder '{path}', expected a file to write, such as {path / 'model.safetensors'}"
        )
    if not path.parent.is_dir():
        raise BitNetError(f"{verb}: got no folder '{path.parent}', expected an existing one; create it first")
    if path.exists():
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                ours = (file.metadata() or {}).get("format") == FORMAT
        except (safetensors.SafetensorError, OSError):
            ours = False
        if not ours:
            raise BitNetError(
                f"{verb}: '{path}' exists and is not a packed model; remove it or choose another name (-o)"
            )


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
