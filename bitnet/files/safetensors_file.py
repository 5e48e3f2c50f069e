"""The safetensors container, one file or a folder of shards: a reader that checks everything, a writer that streams.

    u64 length of the header, the header in JSON {name: {dtype, shape, data_offsets}}, the tensors' bytes

The safetensors package is used wherever it will do: our packed files and saves. It cannot do three things, which are
all that is here:
- read one tensor of a file without mapping or holding the whole file, so that a model of any size is imported in the
  memory of its largest tensor (a mapped file counts as memory in use);
- write a file tensor by tensor (`save_file` holds them all);
- refuse a name that the header holds twice, a header that would take much memory, and a shard outside its folder.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.files.json_file import parse_json, read_json

# Python's objects take some ten times a header's text: the count of brackets is checked before it is parsed, so that a
# small file cannot ask for much memory.
MAX_HEADER = 1 << 23  # bytes: 65,536 entries of 128
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 4

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_NAME = 200  # bytes of a shard's name
INDEX = "model.safetensors.index.json"


Plan = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of every tensor of a file to be written


@dataclass(frozen=True)
class TensorEntry:
    """What a header records of a tensor: its dtype and shape, and the bytes it takes from `start` on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def parse_header(data: bytes, file_size: int) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """Metadata and tensors of a header. data: the file's first bytes, header included; file_size: all of its bytes.

    Raises BitNetError unless every tensor has a known dtype and lies within the file, one directly after the other.
    """
    if len(data) < 8:
        raise BitNetError(f"got {len(data)} bytes, expected a safetensors file: it was cut short")
    (length,) = struct.unpack_from("<Q", data)
    if length > min(MAX_HEADER, file_size - 8):
        raise BitNetError(f"got a header of {length:,} bytes, expected at most {MAX_HEADER:,} and what the file holds")
    text = data[8 : 8 + length]
    if text.count(b"{") > MAX_TENSORS + 2 or text.count(b"[") > 2 * MAX_TENSORS or text.count(b",") > 8 * MAX_TENSORS:
        raise BitNetError(f"got a header with more than {MAX_TENSORS:,} tensors")
    header = parse_json(text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BitNetError("__metadata__: got values that are not strings, expected strings only")
    entries = {name: _parse_entry(name, values) for name, values in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != end:
            raise BitNetError(f"tensor '{name}': starts at {entry.start:,}, expected {end:,}, where the last one ends")
        end += entry.size
    if 8 + length + end != file_size:
        raise BitNetError(
            f"got a file of {file_size:,} bytes, expected {8 + length + end:,} by its header: it was cut or altered"
        )
    return metadata, entries


def _parse_entry(name: str, values: Any) -> TensorEntry:
    known = isinstance(values, dict) and set(values) == {"dtype", "shape", "data_offsets"}
    if not known or not isinstance(values["dtype"], str) or values["dtype"] not in DTYPES:
        got = values.get("dtype") if isinstance(values, dict) else values
        raise BitNetError(f"tensor '{name}': got dtype {got!r:.40}, expected one of {', '.join(DTYPES)}")
    shape, offsets = values["shape"], values["data_offsets"]
    if (
        not all(_are_counts(numbers) for numbers in (shape, offsets))
        or len(shape) > MAX_DIMENSIONS
        or len(offsets) != 2
    ):
        raise BitNetError(f"tensor '{name}': got shape {shape!r:.60} at {offsets!r:.60}, expected whole numbers")
    dtype = DTYPES[values["dtype"]]
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise BitNetError(f"tensor '{name}': got {offsets[1] - offsets[0]:,} bytes, expected {size:,} for {shape}")
    return TensorEntry(dtype, tuple(shape), offsets[0], size)


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**48 for number in numbers)


class TensorFiles:
    """The tensors of one safetensors file, or of a folder's single file or shards, read on request."""

    def __init__(self, path: Path) -> None:
        """Raises BitNetError for files that are missing or whose headers are damaged."""
        self.entries: dict[str, tuple[Path, TensorEntry]] = {}
        self.metadata: dict[str, str] = {}
        index = path / INDEX
        listed: dict[str, Any] | None = None
        if not path.is_dir():
            files = [path]
        elif (path / "model.safetensors").is_file():
            files = [path / "model.safetensors"]
        elif index.is_file():
            listed = read_json(index).get("weight_map")
            files = _shards(index, listed)
        else:
            raise BitNetError(
                f"{path}: got no model.safetensors and no {INDEX}, expected one of them; check the folder"
            )
        for file in files:
            self._add(file)
        missing = sorted(set(listed or {}) - set(self.entries))
        if missing:
            raise BitNetError(f"{index}: names the tensor '{missing[0]}', which no shard holds; download it again")

    def _add(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = file.read(8)
                length = int.from_bytes(start, "little")
                metadata, entries = parse_header(start + file.read(min(length, MAX_HEADER)), size)
        except OSError as error:
            raise BitNetError(f"{path}: {error.strerror}; check the path") from error
        except BitNetError as error:
            raise BitNetError(f"{path}: {error}") from error
        for name, entry in entries.items():
            if name in self.entries:
                raise BitNetError(
                    f"{path}: holds the tensor '{name}' a second time; remove the file that is not needed"
                )
            self.entries[name] = path, TensorEntry(entry.dtype, entry.shape, 8 + length + entry.start, entry.size)
        self.metadata.update(metadata)

    def read(self, name: str) -> Tensor:
        """A tensor, copied from its file."""
        path, entry = self.entries[name]
        if not entry.size:
            return torch.empty(entry.shape, dtype=entry.dtype)
        data = torch.empty(entry.size, dtype=torch.uint8)
        with path.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(data.numpy().data) != entry.size:
                raise BitNetError(f"{path}: tensor '{name}': the file became shorter while it was read")
        return data.view(entry.dtype).view(entry.shape)


def _shards(index: Path, listed: Any) -> list[Path]:
    if not isinstance(listed, dict) or not listed or len(listed) > MAX_TENSORS:
        raise BitNetError(f"{index}: got no 'weight_map', expected the shard of every tensor; download it again")
    names = sorted({name if isinstance(name, str) else "" for name in listed.values()})
    for name in names:
        wrong = not name or name != Path(name).name or name in (".", "..") or "\\" in name
        if wrong or not name.isprintable() or len(name.encode()) > _MAX_NAME:
            raise BitNetError(f"{index}: got the shard name {name!r:.80}, expected a file in the same folder")
        if not (index.parent / name).is_file():
            raise BitNetError(f"{index}: names '{name:.80}', which is not there; download it again")
    return [index.parent / name for name in names]


class TensorWriter:
    """Writes one safetensors file tensor by tensor, in any order; nothing is kept in memory."""

    def __init__(self, file: BinaryIO, plan: Plan, metadata: Mapping[str, str]) -> None:
        """Write the header of all tensors in `plan` into `file`, a new one."""
        self._file = file
        self._unwritten = dict(plan)
        # The library's own order: wide types first, so that every tensor is aligned to its type.
        order = sorted(plan, key=lambda name: (-plan[name][0].itemsize, name))
        self._offsets: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name in order:
            dtype, shape = plan[name]
            self._offsets[name] = end
            end += math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [self._offsets[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a planned tensor; its dtype and shape are those of the plan."""
        dtype, shape = self._unwritten.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), (name, tensor.dtype, tensor.shape, shape)
        self._file.seek(self._start + self._offsets[name])
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Assert that every planned tensor is written."""
        assert not self._unwritten, sorted(self._unwritten)
