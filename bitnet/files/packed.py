"""The packed model: one self-contained safetensors file, and the way into and out of it. Its content: packed_layout.py.

A file is written tensor by tensor under a temporary name with room for its checksum, read back for it, and renamed when
it is complete: the memory needed is that of the largest tensor. Reading checks everything before it is used; a file
that is cut, altered or unknown is refused with one line.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError, is_thread_shortage
from bitnet.files.checkpoint import replacing
from bitnet.files.packed_layout import (
    EMBEDDINGS,
    FORMAT,
    NO_DIGEST,
    NO_TOKENIZER,
    TOKENIZER,
    check_tensors,
    check_tokenizer,
    content_digest,
    make_metadata,
    parse_metadata,
    plan_bytes,
    plan_tensors,
    row_scale,
)
from bitnet.files.safetensors_file import TensorFiles, TensorWriter
from bitnet.files.source import Source, TrainedSource, no_masters
from bitnet.files.tensors import dense_shapes, is_embedding, projection_shape, projections
from bitnet.kernels import packing, reference
from bitnet.kernels.reference import WeightCodes
from bitnet.layers import BitLinear, Embedding, PackedLinear
from bitnet.model import Transformer
from bitnet.text.load import load_tokenizer
from bitnet.text.tokenizer import Tokenizer

Report = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class PackedModel:
    """What a packed file holds, checked. `tensors` are on the CPU."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None
    info: dict[str, Any]  # what training recorded: steps, tokens, validation figures


class PackedSource:
    """A packed file as a source: codes, and masters only where the model is a float one."""

    kind = "a packed file"

    def __init__(self, packed: PackedModel) -> None:
        """Raises BitNetError for `info` that is not a JSON object: the file may come from anywhere."""
        self._packed = packed
        self.config, self.tokenizer = packed.config, packed.tokenizer
        if not isinstance(packed.info, Mapping):
            raise BitNetError(
                f"got a packed file whose info is {packed.info!r:.40}, expected a JSON object; pack the model again"
            )
        self.info: Mapping[str, Any] = packed.info
        self.notes: list[str] = []

    def codes(self, name: str) -> WeightCodes:
        tensors = self._packed.tensors
        codes = packing.unpack(tensors[f"{name}.weight"], projection_shape(self.config, name)[1])
        return WeightCodes(codes, tensors[f"{name}.weight_scale"].reshape(()))

    def dense(self, name: str) -> Tensor:
        value = self._packed.tensors[name]
        if value.dtype == torch.int8:
            return value.float() * self._packed.tensors[row_scale(name)]
        return value

    def master(self, name: str) -> Tensor:
        if self.config.linear != "float":
            raise no_masters(self.kind)
        return self._packed.tensors[f"{name}.weight"]


# ---- writing -----------------------------------------------------------------------------------------------


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
    Raises BitNetError for a tokenizer of another size and for a target that is something else; OSError for a full disk.
    """
    if embedding not in EMBEDDINGS:
        raise BitNetError(f"pack: got embedding '{embedding}', expected one of {', '.join(EMBEDDINGS)}")
    check_tokenizer(model.config, tokenizer)
    check_target(path, "pack")
    tensors = packed_tensors(TrainedSource(model, tokenizer, {}), embedding)
    return write_file(path, model.config, tensors, tokenizer, embedding=embedding, info=info)


def packed_tensors(source: Source, embedding: str = "bf16") -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a source's model as a packed file holds them (`expected_tensors`), one at a time."""
    config = source.config
    for name in dense_shapes(config):
        value = source.dense(name)
        if not is_embedding(name):
            yield name, value.float()
        elif embedding == "int8":
            codes, inv_scale = reference.quantize_activations(value)  # one scale a row, as for activations
            yield name, codes
            yield row_scale(name), inv_scale.reciprocal()
        else:
            yield name, value.to(torch.bfloat16)
    for name in projections(config):
        if config.linear == "float":
            yield f"{name}.weight", source.master(name).to(torch.bfloat16)
            continue
        codes, scale = source.codes(name)
        yield f"{name}.weight", packing.pack(codes)
        yield f"{name}.weight_scale", scale.float().reshape(1)


def write_file(
    path: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Tokenizer | None = None,
    *,
    embedding: str = "bf16",
    info: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> Path:
    """Write a packed file from its tensors, in any order and read one at a time. Atomic; raises OSError.

    tensors: all of `packed_tensors`, the tokenizer excluded. report: called after each tensor.
    """
    metadata = make_metadata(config, tokenizer, info or {})
    spelling = None if tokenizer is None else torch.frombuffer(bytearray(tokenizer.to_bytes()), dtype=torch.uint8)
    plan = plan_tensors(config, embedding, spelling)
    total, done = plan_bytes(plan), 0
    with replacing(path) as work:
        with work.open("w+b") as file:
            writer = TensorWriter(file, plan, metadata)
            for name, tensor in tensors:
                writer.write(name, tensor)
                done += tensor.nbytes
                if report:
                    report(done, total)
            if spelling is not None:
                writer.write(TOKENIZER, spelling)
            writer.finish()
        _write_checksum(work, metadata)
    if report:
        report(total, total)
    return path


class _TensorsOnDisk(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for; a map of the file would count as memory in use."""

    def __init__(self, path: Path) -> None:
        self._files = TensorFiles(path)

    def __getitem__(self, name: str) -> Tensor:
        return self._files.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files.entries)

    def __len__(self) -> int:
        return len(self._files.entries)


def _write_checksum(path: Path, metadata: Mapping[str, str]) -> None:
    """Replace the placeholder in the header by the checksum of all that was written."""
    digest = content_digest(metadata, _TensorsOnDisk(path))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        old, new = f'"sha256":"{NO_DIGEST}"'.encode(), f'"sha256":"{digest}"'.encode()
        assert header.count(old) == 1, header[:200]
        file.seek(8 + header.index(old))
        file.write(new)


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


# ---- reading -----------------------------------------------------------------------------------------------


def read_packed(path: str | Path) -> PackedModel:
    """Read and check a packed file. Raises BitNetError for anything that is not a complete, known model."""
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "nothing"
        hint = f"; pack the run first: bitnet pack {path} -o model.safetensors" if path.is_dir() else ""
        raise BitNetError(f"model: got {kind} at '{path}', expected a packed model file{hint}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            config = parse_metadata(path, metadata, len(names))
            tensors = {name: file.get_tensor(name) for name in names}
        if content_digest(metadata, tensors) != metadata["sha256"]:
            raise BitNetError(f"{path}: the content does not match its checksum: the file is damaged; pack it again")
        spelling = tensors.pop(TOKENIZER) if metadata["tokenizer"] != NO_TOKENIZER else None
        check_tensors(path, config, tensors)
        tokenizer = None if spelling is None else load_tokenizer(metadata["tokenizer"], spelling.numpy().tobytes())
        check_tokenizer(config, tokenizer)
        return PackedModel(config, tensors, tokenizer, json.loads(metadata["info"]))
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, BitNetError) or is_thread_shortage(error):  # out of threads: not the file's fault
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
            return parse_metadata(path, file.metadata() or {}, len(file.keys()))
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, BitNetError):
            raise
        raise BitNetError(f"{path}: got a file that cannot be read ({error}), expected a packed model") from error


def build(packed: PackedModel) -> Transformer:
    """The model of a packed file as modules: PackedLinear projections, exact embeddings, fp32 norms."""
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
