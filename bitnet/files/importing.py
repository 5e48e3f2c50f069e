"""Any source into our packed file, tensor by tensor: the memory is that of the largest one.

The file is written under another name with room for its checksum, read once more for it, and renamed when it is whole.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.checkpoint import replacing
from bitnet.files.packed import FORMAT, VERSION, check_target, check_tokenizer, content_digest
from bitnet.files.safetensors_file import TensorFiles, TensorWriter
from bitnet.files.source import Source
from bitnet.files.tensors import dense_shapes, projection_shape, projections
from bitnet.kernels import packing
from bitnet.text.tokenizer import Tokenizer

Report = Callable[[int, int], None]  # bytes written, bytes in all
_TOKENIZER = "tokenizer"
_NO_TOKENIZER = "no tokenizer is inside: generate and eval need one (--tokenizer FOLDER), bitnet.load() takes ids"
_NO_DIGEST = "0" * 64  # as long as a sha256: the header keeps its length


class _OnDisk(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for; a map of the file would count as memory in use."""

    def __init__(self, path: Path) -> None:
        self._files = TensorFiles(path)

    def __getitem__(self, name: str) -> Tensor:
        return self._files.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files.places)

    def __len__(self) -> int:
        return len(self._files.places)


def import_model(source: Source, path: Path, tokenizer: Tokenizer | None, report: Report | None = None) -> list[str]:
    """Write a source's model into a packed file. Returns notes for the user, such as what was rounded.

    tokenizer: the one the file shall hold, the source's or another. Raises BitNetError for a damaged source, for a
    tokenizer of another size, and for a target that is something else; nothing is left behind then.
    """
    config = source.config
    check_tokenizer(config, tokenizer)
    check_target(path, "import")
    spelling = None if tokenizer is None else torch.frombuffer(bytearray(tokenizer.to_bytes()), dtype=torch.uint8)
    plan = _plan(config, spelling)
    total = sum(dtype.itemsize * math.prod(shape) for dtype, shape in plan.values())
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "layout": packing.LAYOUT_ID,
        "config": json.dumps(config.to_dict()),
        "tokenizer": "none" if tokenizer is None else tokenizer.kind,
        "info": json.dumps({"imported_from": source.kind, **source.info}),
        "sha256": _NO_DIGEST,
    }
    rounding = _Rounding()
    with replacing(path) as work:
        with work.open("w+b") as file:
            writer, done = TensorWriter(file, plan, metadata), 0
            for name, tensor in _tensors(source, spelling, rounding):
                writer.write(name, tensor)
                done += tensor.numel() * tensor.element_size()
                if report:
                    report(done, total)
            writer.finish()
        _seal(work, metadata)
    missing = [_NO_TOKENIZER] if tokenizer is None else []
    return [*source.notes, *rounding.notes(), *missing]


def _plan(config: ModelConfig, spelling: Tensor | None) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in dense_shapes(config).items():
        plan[name] = (torch.bfloat16 if len(shape) == 2 else torch.float32), shape
    for name in projections(config):
        n, k = projection_shape(config, name)
        if config.linear == "float":
            plan[f"{name}.weight"] = torch.bfloat16, (n, k)
        else:
            plan[f"{name}.weight"] = torch.uint8, (n, packing.packed_width(k))
            plan[f"{name}.weight_scale"] = torch.float32, (1,)
    if spelling is not None:
        plan[_TOKENIZER] = torch.uint8, tuple(spelling.shape)
    return plan


def _tensors(source: Source, spelling: Tensor | None, rounding: "_Rounding") -> Iterator[tuple[str, Tensor]]:
    config = source.config
    for name, shape in dense_shapes(config).items():
        value = source.dense(name)
        _check_finite(name, value)
        yield name, rounding.to_bf16(value) if len(shape) == 2 else value.float()
    for name in projections(config):
        if config.linear == "float":
            value = source.master(name)
            _check_finite(name, value)
            yield f"{name}.weight", rounding.to_bf16(value)
            continue
        codes, scale = source.codes(name)
        _check_finite(f"{name}: scale", scale)
        yield f"{name}.weight", packing.pack(codes)
        yield f"{name}.weight_scale", scale.float().reshape(1)
    if spelling is not None:
        yield _TOKENIZER, spelling


def _check_finite(name: str, value: Tensor) -> None:
    if not all(bool(torch.isfinite(part).all()) for part in value.reshape(-1).split(1 << 22)):  # no second copy
        raise BitNetError(f"{name}: got values that are not finite, expected numbers: the source is damaged")


class _Rounding:
    """Brings tables to bf16, which is what a packed file holds, and remembers what that changed."""

    def __init__(self) -> None:
        self._largest = 0.0

    def to_bf16(self, value: Tensor) -> Tensor:
        rounded = value.to(torch.bfloat16)
        if value.dtype != torch.bfloat16:
            for part, exact in zip(rounded.split(4096), value.split(4096), strict=True):  # rows: no second copy
                exact = exact.float()
                change = (part.float() - exact).abs().amax() / exact.abs().amax().clamp(min=1e-30)
                self._largest = max(self._largest, float(change))
        return rounded

    def notes(self) -> list[str]:
        if not self._largest:
            return []
        return [f"tables and plain weights were rounded to bf16, by at most {self._largest:.2%} of the largest value"]


def _seal(path: Path, metadata: dict[str, str]) -> None:
    """Put the checksum over all that was written into the header."""
    digest = content_digest(metadata, _OnDisk(path))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        old, new = f'"sha256":"{_NO_DIGEST}"'.encode(), f'"sha256":"{digest}"'.encode()
        assert header.count(old) == 1, header[:200]
        file.seek(8 + header.index(old))
        file.write(new)
