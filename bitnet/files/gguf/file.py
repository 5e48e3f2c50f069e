"""The GGUF container, reader and writer: a header of keys and tensor entries, then the tensors' bytes.

    "GGUF", version u32, tensors u64, keys u64
    keys      string name, u32 type, value         string = u64 length + UTF-8; array = u32 type, u64 count, values
    tensors   string name, u32 dimensions, u64 each (fastest first), u32 type, u64 offset
    padding to general.alignment (32), then each tensor at its offset, with the same padding

Little-endian, versions 2 and 3. The reader checks every count and length against what is left of the file before it
takes memory for it, since parsers of this format had integer overflows (CVE-2026-27940, CVE-2026-33298). Arrays of
strings are kept as offsets into the header: as Python strings they would take ten times the file's size.
"""

import math
import mmap
import os
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from bitnet.errors import BitNetError
from bitnet.files.ternary import Bytes, i2_s_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_HEADER = 100_000_000  # bytes; LLaMA-3's vocabulary and merges take 8 MB
MAX_STRING = 1 << 24
MAX_ENTRIES = 65_536  # tensors, and keys
MAX_DIMENSIONS = 4

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _U32, _F32, _BOOL = 8, 9, 4, 6, 7

# Type number: name, weights a block, bytes a block. I2_S has its own rule (ternary.i2_s_bytes).
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    36: ("I2_S", 128, 32),
    42: ("Q2_0", 64, 18),
}
TYPE_IDS = {name: number for number, (name, _, _) in TYPES.items()}
# Types that are not read, for the error message.
_OTHER_TYPES = {
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    16: "IQ2_XXS",
    18: "IQ3_XXS",
    20: "IQ4_NL",
    23: "IQ4_XS",
    31: "Q4_0_4_4",
    38: "TL1",
    39: "TL2",
}


@dataclass(frozen=True)
class GgufEntry:
    """What a header records of a tensor; `shape` as in torch, slowest dimension first."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int


class StringArray(Sequence[str]):
    """An array of strings, decoded on access."""

    def __init__(self, header: bytes | mmap.mmap, offsets: "array[int]") -> None:
        self._header, self._offsets = header, offsets

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._decode_at(offset) for offset in self._offsets[index]]
        return self._decode_at(self._offsets[index])

    def _decode_at(self, offset: int) -> str:
        (length,) = struct.unpack_from("<Q", self._header, offset)
        return _utf8(self._header[offset + 8 : offset + 8 + length])


class _Cursor:
    """A position in the header that moves forward, never past the end."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data, self.position, self.string_bytes = data, 0, 0
        self.end = min(len(data), MAX_HEADER)

    def skip(self, size: int) -> int:
        """Move over `size` bytes. Returns the position before them."""
        start = self.position
        if size > self.end - start:
            limit = "the limit of 100 MB" if self.end < len(self.data) else f"{self.end:,} bytes"
            raise BitNetError(f"got a header longer than {limit}, expected it to end before")
        self.position = start + size
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code)))[0]

    def string_at(self) -> int:
        """Move over a string. Returns the position before it."""
        start = self.position
        length = self.number("Q")
        if length > MAX_STRING:
            raise BitNetError(f"got a string of {length:,} bytes, expected at most {MAX_STRING:,}")
        self.skip(length)
        return start

    def string(self) -> str:
        start = self.string_at() + 8
        self.string_bytes += self.position - start
        if self.string_bytes > MAX_STRING:  # a decoded string may take four times its bytes
            raise BitNetError(f"got strings of more than {MAX_STRING:,} bytes in total, expected fewer outside arrays")
        return _utf8(self.data[start : self.position])

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.number("I"), self.number("Q"))
        return self.number(_code(kind))

    def _array(self, kind: int, count: int) -> Any:
        if kind == _STRING:
            if count > (self.end - self.position) // 8:
                raise BitNetError(f"got an array of {count:,} strings, expected what fits in the file")
            return StringArray(self.data, array("Q", (self.string_at() for _ in range(count))))
        dtype = np.dtype(_code(kind)).newbyteorder("<")
        start = self.skip(count * dtype.itemsize)
        return np.frombuffer(self.data[start : self.position], dtype)


def _code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise BitNetError(f"got a value of type {kind}, expected 0 to 12, and no array of arrays")
    return _NUMBERS[kind]


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BitNetError(f"got a string that is not UTF-8 (byte {error.start} of {len(data)})") from None


@dataclass(frozen=True)
class Header:
    """The keys and tensors of a file, checked."""

    keys: Mapping[str, Any]
    tensors: Mapping[str, GgufEntry]


def parse_header(data: bytes | mmap.mmap) -> Header:
    """Parse and check a header. data: the whole file. Raises BitNetError for anything invalid."""
    cursor = _Cursor(data)
    if data[:4] != MAGIC:
        raise BitNetError(f"got {data[:4]!r} at the start, expected {MAGIC!r}: not a GGUF file")
    cursor.skip(4)
    version = cursor.number("I")
    if version not in VERSIONS:
        raise BitNetError(
            f"got GGUF version {version}, expected 2 or 3, little-endian; convert it with a newer llama.cpp"
        )
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    for what, count in (("tensors", tensor_count), ("keys", key_count)):
        if count > MAX_ENTRIES:
            raise BitNetError(f"got {count:,} {what}, expected at most {MAX_ENTRIES:,}")
    keys: dict[str, Any] = {}
    for _ in range(key_count):
        name = cursor.string()
        if name in keys:
            raise BitNetError(f"got the key '{name}' twice")
        keys[name] = cursor.value(cursor.number("I"))
    alignment = keys.get("general.alignment", ALIGNMENT)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or not 1 <= alignment <= 65_536:
        raise BitNetError(f"general.alignment: got {alignment!r}, expected 1 to 65,536")
    entries = [_read_entry(cursor, alignment) for _ in range(tensor_count)]
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufEntry] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if entry.name in tensors:
            raise BitNetError(f"got the tensor '{entry.name}' twice")
        if entry.offset < end:
            raise BitNetError(f"tensor '{entry.name}': overlaps the one before it")
        end = entry.offset + entry.size
        if start + end > len(data):
            raise BitNetError(
                f"tensor '{entry.name}': ends at byte {start + end:,}, got a file of {len(data):,}: it was cut short"
            )
        tensors[entry.name] = GgufEntry(entry.name, entry.shape, entry.type, start + entry.offset, entry.size)
    return Header(keys, tensors)


def _read_entry(cursor: _Cursor, alignment: int) -> GgufEntry:
    name = cursor.string()
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise BitNetError(f"tensor '{name}': got {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    number, offset = cursor.number("I"), cursor.number("Q")
    if number not in TYPES:
        got = _OTHER_TYPES.get(number, f"number {number}")
        known = ", ".join(name for name, _, _ in TYPES.values())
        raise BitNetError(
            f"tensor '{name}': got type {got}, expected one of {known}; convert the model again, to one of these"
        )
    kind, block, _ = TYPES[number]
    if not math.prod(shape) or (shape[-1] % block and kind != "I2_S"):
        raise BitNetError(f"tensor '{name}': got shape {list(shape)} as {kind}, expected rows in blocks of {block}")
    if offset % alignment:
        raise BitNetError(f"tensor '{name}': starts at {offset}, expected a multiple of {alignment}")
    return GgufEntry(name, shape, kind, offset, _size(shape, kind))


def _size(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor; Python's integers do not overflow."""
    count = math.prod(shape)
    _, block, block_bytes = TYPES[TYPE_IDS[kind]]
    return i2_s_bytes(1, count) if kind == "I2_S" else count // block * block_bytes


class GgufFile:
    """A GGUF file open for reading: `keys`, `tensors`, and their bytes on request."""

    def __init__(self, path: Path) -> None:
        """Raises BitNetError for a missing file and for an invalid header."""
        self.path = path
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < 24:
                    raise BitNetError(f"got {os.fstat(file.fileno()).st_size} bytes, expected a GGUF file")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header = parse_header(mapped)
        except OSError as error:
            raise BitNetError(f"{path}: {error.strerror}; check the path") from error
        except BitNetError as error:
            raise BitNetError(f"{path}: {error}") from error
        self.keys, self.tensors = header.keys, header.tensors

    def read(self, name: str) -> Bytes:
        """The bytes of a tensor, [size] uint8."""
        entry = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            data = np.empty(entry.size, np.uint8)
            if file.readinto(data.data) != entry.size:
                raise BitNetError(f"{self.path}: tensor '{name}': the file became shorter while it was read")
        return data


# ---- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Float32:
    """A value to be stored as a 32-bit float."""

    value: float


def write_gguf(
    file: BinaryIO, keys: Mapping[str, Any], tensors: Sequence[tuple[str, tuple[int, ...], str]], data: Iterator[Bytes]
) -> None:
    """Write a complete file; `data` gives the bytes of each tensor in order.

    keys: values may be str, bool, int (as u32), Float32, and lists of str, int (as i32) or float (as f32); an empty
    list counts as one of str.
    tensors: name, shape (slowest first) and type name of each.
    """
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(keys)))
    for name, value in keys.items():
        header += _string(name) + _value(value)
    offset = 0
    sizes = []
    for name, shape, kind in tensors:
        size = _size(shape, kind)
        header += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", TYPE_IDS[kind], offset)
        offset += _padded(size)
        sizes.append(size)
    file.write(header + bytes(_padded(len(header)) - len(header)))
    for (name, _, _), size, content in zip(tensors, sizes, data, strict=True):
        assert content.nbytes == size, (name, content.nbytes, size)
        file.write(np.ascontiguousarray(content).data)
        file.write(bytes(_padded(size) - size))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, Float32):
        return struct.pack("<If", _F32, value.value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    assert isinstance(value, list), value
    kind, items = {
        str: (_STRING, lambda: b"".join(map(_string, value))),
        int: (5, lambda: struct.pack(f"<{len(value)}i", *value)),
        float: (_F32, lambda: struct.pack(f"<{len(value)}f", *value)),
    }[type(value[0]) if value else str]
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + items()
