"""Saves: folders of safetensors and JSON that are either whole or not there.

    saves/step-00000400/   model.safetensors, optimizer.safetensors, ..., state.json, manifest.json

A save is written into `step-N.tmp`, every file is synced, the manifest (sizes and sha256) last, then the folder
is renamed and its parent synced. A kill at any moment leaves the saves before it. Loading verifies the manifest;
a damaged newest save is passed over, with a warning, for the one before. Nothing is ever pickled.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from bitnet.errors import BitNetError

FORMAT, VERSION = "bitnet-save", 1
_NAME = re.compile(r"step-(\d{8,})")
_log = logging.getLogger("bitnet")


@dataclass(frozen=True)
class Save:
    """A verified save on disk."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of one group ("model", "optimizer"), on the CPU."""
        return safetensors.torch.load_file(self.path / f"{group}.safetensors")


def write_save(
    saves: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write a save and drop all but the newest `keep`. Returns its folder.

    groups: tensors by group and name. state: JSON values. Raises OSError when the disk is full or read-only;
    the saves before this one are then untouched.
    """
    final = saves / f"step-{step:08d}"
    work = final.with_name(final.name + ".tmp")
    saves.mkdir(parents=True, exist_ok=True)
    sync(saves.parent)
    for leftover in saves.glob("step-*.tmp"):  # of a run that was killed while it saved or dropped a save
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        work.mkdir()
        _write_files(work, step, groups, state)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # half a save on a full disk would keep it full
        raise
    _drop(final)  # the same step again, after a resume from an older save
    work.rename(final)
    sync(saves)
    # A save of a later step was passed over as damaged when this run resumed: it is not one of the `keep`.
    newest_first = folders(saves)
    for old in newest_first[newest_first.index(final) + max(keep, 1) :]:
        _drop(old)
    return final


def _write_files(work: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    for group, tensors in groups.items():
        write_tensors(work / f"{group}.safetensors", tensors, {})
    (work / "state.json").write_text(json.dumps(dict(state), indent=1))
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(work.iterdir())}
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for name in ("state.json", "manifest.json"):
        sync(work / name)
    sync(work)


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


def read_save(folder: Path) -> Save:
    """Verify one save against its manifest. Raises BitNetError when anything is missing or altered."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            got = f"{manifest['format']} version {manifest['version']}"
            raise BitNetError(
                f"{folder}: got {got}, expected {FORMAT} version {VERSION}; use the program that wrote it"
            )
        for name, expected in manifest["files"].items():
            path = folder / Path(name).name
            if path.stat().st_size != expected["size"] or _sha256(path) != expected["sha256"]:
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
    try:
        safetensors.torch.save_file(on_cpu, path, dict(metadata))
    except safetensors.SafetensorError as error:  # what it makes of a full disk
        raise OSError(errno.EIO, str(error), str(path)) from error
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # safetensors creates files as 0600 and does not sync them
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


def folders(saves: Path) -> list[Path]:
    """Finished saves, newest first."""
    if not saves.is_dir():
        return []
    found = [(int(match[1]), path) for path in saves.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
