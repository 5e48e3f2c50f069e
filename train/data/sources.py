"""Files of text: finding those that a path names, and reading them in parts, compressed or not."""

import codecs
import glob
import gzip
import hashlib
import logging
import lzma
import os
import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from bitnet.errors import BitNetError
from bitnet.train.data.hub import is_dataset, spool_rows

CHUNK = 1 << 20  # bytes read at a time: large enough to hide Python's overhead, small enough for any memory
STANDARD_INPUT = "-"
COMPRESSED = {".gz", ".xz"}
# Suffixes skipped in folders; a file that is named explicitly is read whatever its suffix.
_BINARY = (
    ".7z .a .avi .bin .bmp .bz2 .class .db .dll .doc .docx .dylib .eot .epub .exe .flac .gguf .gif .h5 "
    ".ico .jar .jpeg .jpg .lz4 .mkv .mobi .model .mov .mp3 .mp4 .npy .npz .o .odt .ogg .onnx .otf "
    ".parquet .pdf .pickle .pkl .png .ppt .pptx .pt .pth .pyc .pyd .rar .safetensors .so .sqlite .sqlite3 "
    ".tif .tiff .ttf .wasm .wav .webm .webp .whl .woff .woff2 .xls .xlsx .zip .zst"
)
BINARY_SUFFIXES = set(_BINARY.split())
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz")  # would be read as text, including tar's headers
# Folders of the standard library that are skipped: tests (some badly encoded on purpose), installed packages, GUI
# programs, and encodings, whose code page tables are numbers.
LIBRARY_SKIP = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests"),
    *("encodings", "ensurepip", "idlelib", "lib2to3", "turtledemo"),
}

_log = logging.getLogger("bitnet")


@dataclass(frozen=True)
class Source:
    """One file of text."""

    path: Path
    name: str  # relative to the path that the user gave, with "/": the same on every machine
    size: int  # bytes on disk
    stamp: str  # changes with the content: path and modification time, or the sha256 of a spool file
    python: bool = False  # decoded by its coding line instead of as UTF-8
    rows: bool = False  # one JSON string per line, each a document


def find_sources(names: Iterable[str], spool: Path, skip: frozenset[Path] = frozenset()) -> tuple[Source, ...]:
    """The non-empty files that `names` lead to, each once, in that order, and sorted within a folder or glob.

    spool: the file that standard input is copied to; data sets get files beside it. skip: folders not to search.
    Raises BitNetError for a name that leads to no file.
    """
    found: dict[str, Source] = {}
    for name in names:
        if is_dataset(name):
            # Named by a hash, not a number: training and validation text are found by separate calls.
            path = spool.with_name(f"{spool.name}-{hashlib.sha256(name.encode()).hexdigest()[:16]}")
            sources = [Source(path, name, *spool_rows(name, path), rows=True)]
        else:
            sources = [_spool(spool)] if name == STANDARD_INPUT else _expand(name, skip)
        for source in sources:
            if source.size:
                found.setdefault(source.stamp, source)
    return tuple(found.values())


def standard_library() -> tuple[Source, ...]:
    """The Python sources of the running interpreter: 10 to 15 MB of real text on any machine, without a download."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = []
    undecodable = 0
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - LIBRARY_SKIP)
        for path in (Path(folder, file) for file in sorted(files) if file.endswith(".py")):
            source = _source(path, path.relative_to(root).as_posix(), python=True)
            if not _decodes(path):
                undecodable += 1
            elif source.size:
                sources.append(source)
    if undecodable:
        _log.info("default corpus: skipped %d files that cannot be decoded by their coding line", undecodable)
    if not sources:
        raise BitNetError(
            f"got no Python sources in {root}, expected the standard library; name text files with --data"
        )
    return tuple(sources)


def read_text(source: Source) -> Iterator[str]:
    """The text of a source in parts of about CHUNK bytes, unchanged: newlines and byte order marks stay.

    Raises BitNetError for a file that cannot be read or decoded.
    """
    try:
        yield from _read_python(source.path) if source.python else _read_utf8(source.path)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise BitNetError(
            f"{source.path}: got damaged compressed data ({error}), expected an intact {source.path.suffix} file; "
            "copy it again"
        ) from error
    except OSError as error:
        raise BitNetError(
            f"{source.path}: cannot be read ({error.strerror}); check the file and its permissions"
        ) from error


def _source(path: Path, name: str, python: bool = False) -> Source:
    status = path.stat()
    return Source(path, name, status.st_size, f"{path.resolve()} {status.st_mtime_ns}", python)


def _expand(name: str, skip: frozenset[Path]) -> list[Source]:
    path = Path(name)
    if path.exists():
        return _below(path, skip) if path.is_dir() else [_named(path)]
    if not glob.has_magic(name):
        raise BitNetError(f"got no file or folder {name!r}, expected one that exists; correct the path")
    matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207  # absolute too
    if not matches:
        raise BitNetError(f"got no file that matches {name!r}, expected at least one; correct the pattern")
    return [s for match in matches for s in (_below(match, skip) if match.is_dir() else [_named(match)])]


def _named(path: Path) -> Source:
    if not path.is_file():
        raise BitNetError(
            f"got {str(path)!r}, which is neither file nor folder, expected a file that can be read several times; "
            "send it to standard input and name '-'"
        )
    if _is_archive(path):
        raise BitNetError(f"got the archive {str(path)!r}, expected text; unpack it and name the folder")
    return _source(path, path.name)


def _below(root: Path, skip: frozenset[Path]) -> list[Source]:
    sources = []
    hidden = binary = 0
    name = root.resolve().name
    seen = {root.resolve(), *skip}  # links to folders are followed, and may form loops
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        hidden += sum(file.startswith(".") for file in files)
        below = {Path(folder, f).resolve(): f for f in sorted(folders, reverse=True) if not f.startswith(".")}
        folders[:] = sorted(f for real, f in below.items() if real not in seen)
        seen.update(below)
        for path in (Path(folder, file) for file in sorted(files) if not file.startswith(".")):
            if path.suffix.lower() in BINARY_SUFFIXES or _is_archive(path):
                binary += 1
            elif path.is_file():  # no dangling link, no pipe
                sources.append(_source(path, f"{name}/{path.relative_to(root).as_posix()}"))
    if hidden or binary:
        _log.info("%s: skipped %d hidden and %d binary files", root, hidden, binary)
    return sources


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVES)


def _refuse(error: OSError) -> None:
    raise error  # by default, os.walk silently skips folders that it cannot read


def _spool(path: Path) -> Source:
    """Copy standard input to a file, because it is read more than once."""
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file:
        while part := sys.stdin.buffer.read(CHUNK):
            file.write(part)
            digest.update(part)
            size += len(part)
    return Source(path, "standard input", size, digest.hexdigest())


def _decodes(path: Path) -> bool:
    try:
        for _ in _read_python(path):
            pass
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return False
    return True


def _read_python(path: Path) -> Iterator[str]:
    with tokenize.open(path) as file:
        while part := file.read(CHUNK):
            yield part


def _read_utf8(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0  # bytes given to the decoder so far
    with _open(path) as file:
        while True:
            part = file.read(CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                raise BitNetError(
                    f"{path}: got byte 0x{error.object[error.start]:02x} at byte {position - pending + error.start}, "
                    f"which is not UTF-8 ({error.reason}), expected UTF-8 text; convert it "
                    "(iconv -f ENCODING -t UTF-8) or leave the file out"
                ) from error
            position += len(part)
            if text:
                yield text
            if not part:
                return


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path))
    return path.open("rb")
