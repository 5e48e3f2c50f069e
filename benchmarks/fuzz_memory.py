"""Files of megabytes that are built to take memory; each is read in a separate process, whose peak is measured.

The limit is 2 x the file + 64 MiB above what the process held before.
"""

import json
import multiprocessing
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bitnet.benchmarks.children.child import memory, reset_peak
from bitnet.errors import BitNetError
from bitnet.files import json_file, safetensors_file
from bitnet.files.gguf import file as gguf_file
from bitnet.files.sentencepiece_model import read_pieces

BOUND = 64 << 20
SIZES = (1 << 20, 8 << 20, 20 << 20)


def measure(sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Every case in every size (bytes). Returns the number of inputs, the worst one, and a row for each."""
    rows = []
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        for label, read, build in cases():
            for size in sizes:
                path = Path(name) / "input"
                path.write_bytes(build(size))
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(read, path, sender))
                process.start()
                sender.close()
                try:
                    outcome, grown = receiver.recv()
                except EOFError:
                    outcome, grown = "died", 0
                process.join()
                length = path.stat().st_size
                failed = grown > 2 * length + BOUND or outcome not in ("read", "refused")
                rows.append({"case": label, "bytes": length, "grown": grown, "what": outcome, "failed": failed})
    worst = max(rows, key=lambda row: row["grown"] - 2 * row["bytes"])
    return {"inputs": len(rows), "worst": worst, "rows": rows}


def _child(read: Callable[[Path], object], path: Path, sender: Any) -> None:
    before = memory("VmRSS")
    reset_peak()
    try:
        read(path)
        outcome = "read"
    except BitNetError:
        outcome = "refused"
    except BaseException as error:  # noqa: BLE001  # a panic of a Rust library is not an Exception
        outcome = f"{type(error).__name__}: {error}"[:200]
    sender.send((outcome, memory("VmHWM") - before))


Case = tuple[str, Callable[[Path], object], Callable[[int], bytes]]


def cases() -> Iterator[Case]:
    """Label, reader of a file, and builder of one of about so many bytes."""
    for label, fill in FILLS.items():
        yield f"config.json, {label}", json_file.read_json, lambda size, fill=fill: b'{"a":' + fill(size) + b"}"
        yield f"safetensors, {label}", _safetensors, lambda size, fill=fill: _with_length(b'{"a":' + fill(size) + b"}")
    yield "safetensors, many tensors", _safetensors, _many_tensors
    yield "gguf, many keys", gguf_file.GgufFile, lambda size: _gguf(_keys(size))
    yield "gguf, wide texts", gguf_file.GgufFile, lambda size: _gguf(_texts(size))
    yield "gguf, short strings", _gguf_strings, lambda size: _gguf([_strings(size)])
    yield (
        "gguf, numbers",
        gguf_file.GgufFile,
        lambda size: _gguf([_key("a", 9, struct.pack("<IQ", 0, size) + bytes(size))]),
    )
    yield "gguf, many tensors", gguf_file.GgufFile, _gguf_tensors
    yield (
        "sentencepiece, small pieces",
        lambda path: read_pieces(path.read_bytes()),
        lambda size: b"\x0a\x03\x0a\x01a" * (size // 5),
    )
    yield "sentencepiece, wide text", lambda path: read_pieces(path.read_bytes()), _wide_piece


FILLS: dict[str, Callable[[int], bytes]] = {
    "numbers": lambda size: b"[" + b"1.5," * (size // 4) + b"0]",
    "objects": lambda size: b"[" + b"{}," * (size // 3) + b"0]",
    "lists": lambda size: b"[" + b"[]," * (size // 3) + b"0]",
    "deep lists": lambda size: b"[" * (size // 2) + b"]" * (size // 2),
    "deep objects": lambda size: b'{"a":' * (size // 6) + b"0" + b"}" * (size // 6),
    "names": lambda size: b"{" + b",".join(b'"%x":0' % i for i in range(size // 9)) + b"}",
    "wide text": lambda size: b'"' + "\U0001f600".encode() + b"x" * size + b'"',
    "a long number": lambda size: b"9" * size,
}


def _with_length(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _safetensors(path: Path) -> None:
    safetensors_file.TensorFiles(path)


def _many_tensors(size: int) -> bytes:
    entry = {"dtype": "U8", "shape": [0, 0, 0, 0], "data_offsets": [0, 0]}
    count = min(size // 70, 65_536)
    return _with_length(json.dumps({f"{i:x}": entry for i in range(count)}, separators=(",", ":")).encode())


def _gguf(entries: list[bytes], tensors: list[bytes] | None = None) -> bytes:
    head = gguf_file.MAGIC + struct.pack("<IQQ", 3, len(tensors or ()), len(entries))
    return head + b"".join([*entries, *(tensors or ())]) + bytes(64)


def _key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def _keys(size: int) -> list[bytes]:
    return [_key(f"{i:x}", 10, struct.pack("<Q", 2**63 + i)) for i in range(min(size // 24, 65_536))]


def _texts(size: int) -> list[bytes]:
    text = "\U0001f600".encode() + b"x" * ((1 << 20) - 200)
    return [_key(f"{i:x}", 8, struct.pack("<Q", len(text)) + text) for i in range(size >> 20)]


def _strings(size: int) -> bytes:
    count = size // 9
    return _key("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, count) + (struct.pack("<Q", 1) + b"a") * count)


def _gguf_strings(path: Path) -> None:
    for value in gguf_file.GgufFile(path).keys.values():
        for _ in value:
            pass


def _gguf_tensors(size: int) -> bytes:
    def tensor(i: int) -> bytes:
        name = f"{i:x}".encode()
        return struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 1, 0, 32 * i)

    count = min(size // 64, 65_536)
    return _gguf([], [tensor(i) for i in range(count)]) + bytes(32 * count)


def _wide_piece(size: int) -> bytes:
    text = "\U0001f600".encode() + b"x" * size
    body = b"\x0a" + _varint(len(text)) + text
    return b"\x0a" + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
