"""Saves: folders of safetensors and JSON that are either whole or not there.

    saves/step-00000400/   model.safetensors, optimizer.safetensors, ..., state.json, manifest.json

A save is written into `step-N.tmp`, every file is synced, the manifest (sizes and sha256) last, then the folder
is renamed and its parent synced. A kill at any moment leaves the saves before it. Loading verifies the manifest;
a damaged newest save is passed over, with a warning, for the one before. Nothing is ever pickled.

Several processes that hold rows of each tensor write a file each (`begin`, `write_files` in each of them, `finish`):

    saves/step-00000400/   shard-00001-model-00001-of-00001.safetensors, shard-00002-model-..., ...

These are the names and headers of torch.distributed.checkpoint's HuggingFaceStorageWriter, and its reader loads them.
We do not call that writer: it neither syncs nor checks what it wrote, and its plans travel between processes as
pickles; torch's default storage has a pickle on the disk as well. `Save` reads whole tensors or rows of them, however
many processes wrote: a save of two goes on with one or three, sharded or not.
"""

import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bitnet.errors import BitNetError

FORMAT, VERSION = "bitnet-save", 1
_NAME = re.compile(r"step-(\d{8,})")
_OFFSETS = "DCP_SHARDING_INFO"  # in a shard's header: {name: {"saved_offsets": [first row, 0, ...]}}
_log = logging.getLogger("bitnet")


@dataclass(frozen=True)
class Save:
    """A verified save on disk."""

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def quantised(self) -> float:
        """Share of the operands that were quantised in the last step; where a save does not say, all were."""
        return float(self.state.get("quantised", 1.0))

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of one group ("model", "optimizer"), on the CPU, whole."""
        if (self.path / f"{group}.safetensors").exists():
            return safetensors.torch.load_file(self.path / f"{group}.safetensors")
        found = self.pieces(group)
        return {name: _read_rows(pieces, 0, None) for name, pieces in found.items()}

    def rows(self, group: str, wanted: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Rows first .. end - 1 of each tensor of a group that is `wanted`: {name: (first, end)}; reads no others.

        Raises BitNetError for rows or names that the save does not hold.
        """
        found = self.pieces(group)
        if missing := wanted.keys() - found.keys():
            raise BitNetError(f"{self.path}: got no {group} tensor {min(missing)}, expected it; is it another model's?")
        return {name: _read_rows(found[name], *span) for name, span in wanted.items()}

    def pieces(self, group: str) -> dict[str, "list[Piece]"]:
        """Where the rows of each tensor of a group lie."""
        paths = sorted(self.path.glob(f"shard-*-{group}-00001-of-00001.safetensors"))
        found: dict[str, list[Piece]] = {}
        for path in paths or [self.path / f"{group}.safetensors"]:
            for piece in _pieces(path):
                found.setdefault(piece.name, []).append(piece)
        return {name: sorted(pieces, key=lambda piece: piece.first) for name, pieces in found.items()}


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor in one file, `first` onwards; `shape` is their own."""

    path: Path
    name: str
    first: int
    shape: tuple[int, ...]


def _pieces(path: Path) -> Iterator[Piece]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            offsets = json.loads((file.metadata() or {}).get(_OFFSETS, "{}"))
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                first, *others = offsets.get(name, {"saved_offsets": [0]})["saved_offsets"] or [0]
                if not isinstance(first, int) or first < 0 or any(others):
                    raise BitNetError(f"damaged save: {path}: {name} starts at {[first, *others]}, expected rows")
                yield Piece(path, name, first, tuple(file.get_slice(name).get_shape()))
    except (safetensors.SafetensorError, OSError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise BitNetError(f"damaged save: {path}: {type(error).__name__}: {error}") from error


def _read_rows(pieces: Sequence[Piece], first: int, end: int | None) -> Tensor:
    """Rows first .. end - 1 (None: the last) of a tensor whose pieces follow one another without a gap."""
    parts: list[Tensor] = []
    at = 0
    for piece in pieces:
        rows = piece.shape[0] if piece.shape else 1
        if piece.first != at or piece.shape[1:] != pieces[0].shape[1:]:
            raise BitNetError(f"damaged save: {piece.path}: {piece.name} has rows from {piece.first}, expected {at}")
        at += rows
        low, high = max(first, piece.first), min(at if end is None else end, at)
        if low < high or not parts:  # an empty one, too, says what shape a row has
            with safetensors.safe_open(piece.path, "pt") as file:
                if not piece.shape:
                    return file.get_tensor(piece.name)
                part = slice(low - piece.first, max(low, high) - piece.first) if low < high else slice(0, 0)
                parts.append(file.get_slice(piece.name)[part])
    if end is not None and end > at:
        raise BitNetError(f"damaged save: {pieces[0].path}: {pieces[0].name} has {at} rows, expected {end}")
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def write_save(
    saves: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write a save and drop all but the newest `keep`. Returns its folder.

    groups: tensors by group and name. state: JSON values. Raises OSError when the disk is full or read-only;
    the saves before this one are then untouched.
    """
    work = begin(saves, step)
    try:
        files = write_files(work, groups)
        return finish(work, step, files, state, keep)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # half a save on a full disk would keep it full
        raise


def begin(saves: Path, step: int) -> Path:
    """An empty folder to write the save of this step into. Raises OSError."""
    saves.mkdir(parents=True, exist_ok=True)
    sync(saves.parent)
    for leftover in saves.glob("step-*.tmp"):  # of a run that was killed while it saved or dropped a save
        shutil.rmtree(leftover, ignore_errors=True)
    work = work_folder(saves, step)
    work.mkdir()
    return work


def write_files(
    work: Path,
    groups: Mapping[str, Mapping[str, Tensor]],
    shard: int | None = None,
    first_rows: Mapping[str, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Write one file a group and sync it. Returns sizes and sha256 by file name, for the manifest.

    shard: number of the writing process among several, from 0; None for one that holds everything. first_rows: the row
    of the whole tensor with which a tensor begins, by name; 0 where it is left out. Raises OSError.
    """
    names = []
    for group, tensors in groups.items():
        metadata = {}
        name = f"{group}.safetensors"
        if shard is not None:
            name = f"shard-{shard + 1:05d}-{group}-00001-of-00001.safetensors"
            starts = first_rows or {}
            offsets = {k: [starts.get(k, 0), *[0] * (t.dim() - 1)] if t.dim() else [] for k, t in tensors.items()}
            info = {key: {"saved_offsets": offset} for key, offset in offsets.items()}
            metadata = {_OFFSETS: json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
        write_tensors(work / name, tensors, metadata)
        names.append(name)
    return {name: _measure(work / name) for name in names}


def finish(work: Path, step: int, files: Mapping[str, Any], state: Mapping[str, Any], keep: int = 2) -> Path:
    """Make a save of a folder that all files are in, and drop all but the newest `keep`. Returns its folder."""
    (work / "state.json").write_text(json.dumps(dict(state), indent=1))
    listed = dict(sorted({**files, "state.json": _measure(work / "state.json")}.items()))
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": listed}
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for name in ("state.json", "manifest.json"):
        sync(work / name)
    sync(work)
    final = work.with_suffix("")
    _drop(final)  # the same step again, after a resume from an older save
    work.rename(final)
    sync(final.parent)
    # A save of a later step was passed over as damaged when this run resumed: it is not one of the `keep`.
    newest_first = folders(final.parent)
    for old in newest_first[newest_first.index(final) + max(keep, 1) :]:
        _drop(old)
    return final


def _drop(folder: Path) -> None:
    """Remove a save, if it is there; a kill in between leaves a .tmp and never half a save."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.old.tmp")), ignore_errors=True)


def latest_save(saves: Path) -> Save | None:
    """The newest save that is whole, or None where there is none at all.

    Raises BitNetError when there are saves and every one of them is damaged.
    """
    found = folders(saves)
    for folder in found:
        try:
            return read_save(folder)
        except BitNetError as error:
            _log.warning("%s; trying the save before it", error)
    if found != folders(saves):
        return latest_save(saves)  # the run went on while we read and dropped what we looked at
    if found:
        raise BitNetError(
            f"{saves}: got {len(found)} damaged saves, expected at least one whole; train into a new folder (--out)"
        )
    return None


def read_save(folder: Path, verify: bool = True) -> Save:
    """Verify one save against its manifest. Raises BitNetError when anything is missing or altered.

    verify=False: another process has just done so; files are not read through once more.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            got = f"{manifest['format']} version {manifest['version']}"
            raise BitNetError(
                f"{folder}: got {got}, expected {FORMAT} version {VERSION}; use the program that wrote it"
            )
        for name, expected in manifest["files"].items():
            path = folder / Path(name).name
            if path.stat().st_size != expected["size"] or (verify and _sha256(path) != expected["sha256"]):
                raise BitNetError(f"damaged save: {path} is not what its manifest says")
        if folder.name != f"step-{manifest['step']:08d}":
            raise BitNetError(f"damaged save: {folder} says that it is step {manifest['step']}")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return Save(folder, manifest["step"], dict(state))
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, BitNetError):
            raise
        raise BitNetError(f"damaged save: {folder}: {type(error).__name__}: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, readable by everybody the umask allows, and sync it."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode & 0o777  # what the umask makes of 0666; asked for, it is changed for all threads
    try:
        safetensors.torch.save_file(on_cpu, path, dict(metadata))
    except safetensors.SafetensorError as error:  # what it makes of a full disk
        raise OSError(errno.EIO, str(error), str(path)) from error
    path.chmod(mode)  # safetensors creates files as 0600 and does not sync them
    sync(path)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block succeeds and disappears when it does not."""
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield work
        sync(work)
        work.replace(path)
        sync(path.parent)
    finally:
        work.unlink(missing_ok=True)


def unfinished(path: Path) -> list[Path]:
    """What `replacing` left of `path` where it was killed."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


def save_folder(saves: Path, step: int) -> Path:
    """Where the finished save of a step lies."""
    return saves / f"step-{step:08d}"


def work_folder(saves: Path, step: int) -> Path:
    """Where the save of a step lies while it is written."""
    return saves / f"step-{step:08d}.tmp"


def folders(saves: Path) -> list[Path]:
    """Finished saves, newest first."""
    if not saves.is_dir():
        return []
    found = [(int(match[1]), path) for path in saves.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _measure(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
