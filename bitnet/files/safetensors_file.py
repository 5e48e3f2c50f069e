"""The safetensors container, one file or a folder of shards: a reader that trusts nothing, a writer that streams.

    u64 length of the header, the header in JSON {name: {dtype, shape, data_offsets}}, the tensors' bytes

The library's own reader holds a whole file in memory or maps it; here a tensor is read when it is asked for, so that
a model of any size is imported in the memory of its largest tensor. And JSON with a name twice is refused, where the
library takes the last one.
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

# 65,536 entries of 128 bytes. Python's objects take some ten times a header's text: the count of brackets is checked
# before it is parsed, so that a small file cannot ask for much memory.
MAX_HEADER = 1 << 23
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 4
MAX_JSON = 1 << 23  # bytes; other JSON files of a folder
_BYTES = 12  # of JSON for a value, at least, in files that are what they say
MAX_VALUES = MAX_JSON // _BYTES

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


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def parse_header(data: bytes, file_size: int) -> tuple[dict[str, str], dict[str, Place]]:
    """Metadata and tensors of a header. data: the file's first bytes, header included; file_size: all of its bytes.

    Raises BitNetError for anything out of line; what passes can be read without looking twice.
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
        raise BitNetError("__metadata__: got other values, expected texts")
    places = {name: _place(name, entry) for name, entry in header.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1].start):
        if place.start != end:
            raise BitNetError(f"tensor '{name}': starts at {place.start:,}, expected {end:,}, where the last one ends")
        end += place.size
    if 8 + length + end != file_size:
        raise BitNetError(
            f"got a file of {file_size:,} bytes, expected {8 + length + end:,} as its header says: cut or altered"
        )
    return metadata, places


def _place(name: str, entry: Any) -> Place:
    known = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    if not known or not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        got = entry.get("dtype") if isinstance(entry, dict) else entry
        raise BitNetError(f"tensor '{name}': got dtype {got!r:.40}, expected one of {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not all(_is_counts(numbers) for numbers in (shape, offsets)) or len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise BitNetError(f"tensor '{name}': got shape {shape!r:.60} at {offsets!r:.60}, expected whole numbers")
    dtype = DTYPES[entry["dtype"]]
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise BitNetError(f"tensor '{name}': got {offsets[1] - offsets[0]:,} bytes, expected {size:,} for {shape}")
    return Place(dtype, tuple(shape), offsets[0], size)


def _is_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**48 for number in numbers)


def parse_json(text: bytes, most: int = MAX_VALUES) -> dict[str, Any]:
    """A JSON object. Raises BitNetError for anything else, for a name twice, and for more than `most` values."""
    values = text.count(b",") + text.count(b"{") + text.count(b"[")
    if values > most:
        raise BitNetError(f"got JSON of {values:,} values, expected at most {most:,}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise BitNetError(f"got '{name:.80}' twice in one JSON object")
            found[name] = value
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BitNetError):
            raise
        raise BitNetError(f"got JSON that cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise BitNetError(f"got JSON of a {type(value).__name__}, expected an object")
    return value


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object from a file. Raises BitNetError for one that is not there, too large, or not JSON."""
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1)
        if len(text) > limit:
            raise BitNetError(f"got more than {limit:,} bytes of JSON")
        return parse_json(text, limit // _BYTES)
    except OSError as error:
        raise BitNetError(f"{path}: {error.strerror}; check the path") from error
    except BitNetError as error:
        raise BitNetError(f"{path}: {error}") from error


class TensorFiles:
    """The tensors of one safetensors file, or of a folder's single file or shards, read on request."""

    def __init__(self, path: Path) -> None:
        """Raises BitNetError for files that are missing or whose headers are out of line."""
        self.places: dict[str, tuple[Path, Place]] = {}
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
        missing = sorted(set(listed or {}) - set(self.places))
        if missing:
            raise BitNetError(f"{index}: names the tensor '{missing[0]}', which no shard holds; download it again")

    def _add(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = file.read(8)
                length = int.from_bytes(start, "little")
                metadata, places = parse_header(start + file.read(min(length, MAX_HEADER)), size)
        except OSError as error:
            raise BitNetError(f"{path}: {error.strerror}; check the path") from error
        except BitNetError as error:
            raise BitNetError(f"{path}: {error}") from error
        for name, place in places.items():
            if name in self.places:
                raise BitNetError(
                    f"{path}: holds the tensor '{name}' a second time; remove the file that is not needed"
                )
            self.places[name] = path, Place(place.dtype, place.shape, 8 + length + place.start, place.size)
        self.metadata.update(metadata)

    def read(self, name: str) -> Tensor:
        """A tensor, copied from its file."""
        path, place = self.places[name]
        if not place.size:
            return torch.empty(place.shape, dtype=place.dtype)
        data = torch.empty(place.size, dtype=torch.uint8)
        with path.open("rb") as file:
            file.seek(place.start)
            if file.readinto(data.numpy().data) != place.size:
                raise BitNetError(f"{path}: tensor '{name}': the file became shorter while it was read")
        return data.view(place.dtype).view(place.shape)


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

    def __init__(
        self, file: BinaryIO, plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        """plan: dtype and shape of every tensor to come."""
        self._file = file
        self._left = dict(plan)
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
        dtype, shape = self._left.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), (name, tensor.dtype, tensor.shape, shape)
        self._file.seek(self._start + self._offsets[name])
        self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Refuse to end before every planned tensor is written."""
        assert not self._left, sorted(self._left)
