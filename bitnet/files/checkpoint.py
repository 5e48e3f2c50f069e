"""Saves: folders of safetensors and JSON that are either complete or absent.

    saves/step-00000400/   model.safetensors, optimizer.safetensors, ..., state.json, manifest.json

A save is written into `step-N.tmp`, every file is synced, the manifest (sizes and sha256) last, then the folder is
renamed and its parent synced. A process killed at any moment leaves the earlier saves intact. Loading verifies the
manifest; a damaged newest save is skipped, with a warning, for the one before it. Nothing is ever pickled.

Several processes that each hold rows of every tensor write a file each (`begin`, `write_files` in every one, `finish`):

    saves/step-00000400/   shard-00001-model-00001-of-00001.safetensors, shard-00002-model-..., ...

These are the names and headers of torch.distributed.checkpoint's HuggingFaceStorageWriter, and its reader loads them.
We do not call that writer: it neither syncs nor checks what it wrote, and it sends its plans between processes as
pickles; torch's default storage also writes a pickle to disk. `Save` reads whole tensors or rows of them, however many
processes wrote: a save of two resumes on one or three, sharded or not.
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
        """Fraction of the operands that was quantised in the last step; 1 for a save that does not record it."""
        return float(self.state.get("quantised", 1.0))

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The complete tensors of one group ("model", "optimizer"), on the CPU."""
        if (self.path / f"{group}.safetensors").exists():
            return safetensors.torch.load_file(self.path / f"{group}.safetensors")
        found = self.stored_rows(group)
        return {name: _read_rows(stored, 0, None) for name, stored in found.items()}

    def rows(self, group: str, wanted: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Rows first .. end - 1 of the tensors in `wanted`, {name: (first, end)}; reads nothing else.

        Raises BitNetError for rows or names that the save does not hold.
        """
        found = self.stored_rows(group)
        if missing := wanted.keys() - found.keys():
            raise BitNetError(
                f"{self.path}: got no {group} tensor {min(missing)}, expected one; check that the save is of this model"
            )
        return {name: _read_rows(found[name], *span) for name, span in wanted.items()}

    def stored_rows(self, group: str) -> dict[str, "list[StoredRows]"]:
        """Where the rows of each tensor of a group are stored."""
        paths = sorted(self.path.glob(f"shard-*-{group}-00001-of-00001.safetensors"))
        found: dict[str, list[StoredRows]] = {}
        for path in paths or [self.path / f"{group}.safetensors"]:
            for rows in _stored_rows(path):
                found.setdefault(rows.name, []).append(rows)
        return {name: sorted(stored, key=lambda rows: rows.first) for name, stored in found.items()}


@dataclass(frozen=True)
class StoredRows:
    """Consecutive rows of a tensor in one file: row `first` and those after it, of `shape` together."""

    path: Path
    name: str
    first: int
    shape: tuple[int, ...]


def _stored_rows(path: Path) -> Iterator[StoredRows]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            offsets = json.loads((file.metadata() or {}).get(_OFFSETS, "{}"))
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                first, *others = offsets.get(name, {"saved_offsets": [0]})["saved_offsets"] or [0]
                if not isinstance(first, int) or first < 0 or any(others):
                    raise BitNetError(f"damaged save: {path}: {name} starts at {[first, *others]}, expected rows")
                yield StoredRows(path, name, first, tuple(file.get_slice(name).get_shape()))
    except (safetensors.SafetensorError, OSError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise BitNetError(f"damaged save: {path}: {type(error).__name__}: {error}") from error


def _read_rows(stored: Sequence[StoredRows], first: int, end: int | None) -> Tensor:
    """Rows first .. end - 1 (None: to the last) of a tensor from its parts, which must leave no gap."""
    parts: list[Tensor] = []
    at = 0
    for piece in stored:
        rows = piece.shape[0] if piece.shape else 1
        if piece.first != at or piece.shape[1:] != stored[0].shape[1:]:
            raise BitNetError(f"damaged save: {piece.path}: {piece.name} has rows from {piece.first}, expected {at}")
        at += rows
        low, high = max(first, piece.first), min(at if end is None else end, at)
        if low < high or not parts:  # an empty part still gives the shape of a row
            with safetensors.safe_open(piece.path, "pt") as file:
                if not piece.shape:
                    return file.get_tensor(piece.name)
                part = slice(low - piece.first, max(low, high) - piece.first) if low < high else slice(0, 0)
                parts.append(file.get_slice(piece.name)[part])
    if end is not None and end > at:
        raise BitNetError(f"damaged save: {stored[0].path}: {stored[0].name} has {at} rows, expected {end}")
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def write_save(
    saves: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write a save and drop all but the newest `keep`. Returns its folder.

    groups: tensors by group and name. state: JSON values. Raises OSError when the disk is full or read-only;
    earlier saves are then untouched.
    """
    work = begin(saves, step)
    try:
        files = write_files(work, groups)
        return finish(work, step, files, state, keep)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # a partial save would keep a full disk full
        raise


def begin(saves: Path, step: int) -> Path:
    """An empty folder to write the save of this step into. Raises OSError."""
    saves.mkdir(parents=True, exist_ok=True)
    sync(saves.parent)
    for leftover in saves.glob("step-*.tmp"):  # of a run that was killed while it wrote or removed a save
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
    """Write and sync one file per group. Returns sizes and sha256 by file name, for the manifest.

    shard: rank of the writing process among several; None for one that holds everything. first_rows: by name, the row
    of the complete tensor at which this part starts; 0 by default. Raises OSError.
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
    return {name: _size_and_digest(work / name) for name in names}


def finish(work: Path, step: int, files: Mapping[str, Any], state: Mapping[str, Any], keep: int = 2) -> Path:
    """Turn a folder with all files of a save into that save, and drop all but the newest `keep`. Returns its folder."""
    (work / "state.json").write_text(json.dumps(dict(state), indent=1))
    listed = dict(sorted({**files, "state.json": _size_and_digest(work / "state.json")}.items()))
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": listed}
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for name in ("state.json", "manifest.json"):
        sync(work / name)
    sync(work)
    final = work.with_suffix("")
    _drop(final)  # the same step, written again after a resume from an older save
    work.rename(final)
    sync(final.parent)
    # Saves of later steps were skipped as damaged when this run resumed: they are not among the `keep`.
    newest_first = folders(final.parent)
    for old in newest_first[newest_first.index(final) + max(keep, 1) :]:
        _drop(old)
    return final


def _drop(folder: Path) -> None:
    """Remove a save if it exists; a process killed meanwhile leaves a .tmp, never a partial save."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.old.tmp")), ignore_errors=True)


def latest_save(saves: Path) -> Save | None:
    """The newest undamaged save, or None where there are no saves.

    Raises BitNetError when every save is damaged.
    """
    found = folders(saves)
    for folder in found:
        try:
            return read_save(folder)
        except BitNetError as error:
            _log.warning("%s; trying the save before it", error)
    if found != folders(saves):
        return latest_save(saves)  # a run in progress dropped what was being read
    if found:
        raise BitNetError(
            f"{saves}: got {len(found)} damaged saves, expected at least one undamaged; train into a new folder (--out)"
        )
    return None


def read_save(folder: Path, verify: bool = True) -> Save:
    """Verify one save against its manifest. Raises BitNetError when anything is missing or altered.

    verify=False: skip the checksums, where another process has just verified them.
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
                raise BitNetError(f"damaged save: {path} does not match its manifest")
        if folder.name != f"step-{manifest['step']:08d}":
            raise BitNetError(f"damaged save: {folder} has the manifest of step {manifest['step']}")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return Save(folder, manifest["step"], dict(state))
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, BitNetError):
            raise
        raise BitNetError(f"damaged save: {folder}: {type(error).__name__}: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file with the permissions that the umask gives, and sync it. Raises OSError."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode & 0o777  # 0666 after the umask; reading the umask itself would change it for all threads
    try:
        safetensors.torch.save_file(on_cpu, path, dict(metadata))
    except safetensors.SafetensorError as error:  # such as a full disk
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
    """A temporary path that is renamed to `path` when the block succeeds, and removed when it fails."""
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield work
        sync(work)
        work.replace(path)
        sync(path.parent)
    finally:
        work.unlink(missing_ok=True)


def unfinished(path: Path) -> list[Path]:
    """The temporary files of `path` that a killed process left."""
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


def _size_and_digest(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
