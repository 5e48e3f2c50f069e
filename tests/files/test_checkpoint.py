"""Saves: complete or absent. Crashes at every system call that matters, damage of every file, no pickle anywhere."""

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.files import checkpoint
from bitnet.files.checkpoint import latest_save, read_save, replacing, write_save


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test may catch it."""


def groups(step: int) -> dict[str, dict[str, Tensor]]:
    value = torch.full((3, 5), float(step))
    return {"model": {"w": value, "b": value[0].clone()}, "optimizer": {"w.m": value * 2, "t": torch.tensor(step)}}


def save(saves: Path, step: int, **options: int) -> Path:
    return write_save(saves, step, groups(step), {"step": step, "rng": [1, 2, 3]}, **options)


def assert_is(found: checkpoint.Save | None, step: int) -> None:
    assert found is not None
    assert found.step == found.state["step"] == step
    assert found.path.name == f"step-{step:08d}"
    for group, expected in groups(step).items():
        tensors = found.tensors(group)
        assert set(tensors) == set(expected)
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- writing -----------------------------------------------------------------------------------------------


def test_there_and_back(tmp_path: Path) -> None:
    folder = save(tmp_path / "new" / "saves", 400)
    assert folder == tmp_path / "new" / "saves" / "step-00000400"
    assert names(folder) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert_is(latest_save(folder.parent), 400)
    assert_is(read_save(folder), 400)


def test_manifest_and_formats_are_plain(tmp_path: Path) -> None:
    """Read with the standard library and safetensors alone; nothing in a save is anything else."""
    folder = save(tmp_path, 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["step"]) == ("bitnet-save", 1, 7)
    assert set(manifest["files"]) == set(names(folder)) - {"manifest.json"}
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if name.endswith(".json"):
            json.loads(data)
        else:
            assert safetensors.torch.load(data)
        for magic in (b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05"):  # zip and pickle protocols
            assert not data.startswith(magic)
    assert torch.equal(safetensors.torch.load_file(folder / "model.safetensors")["w"], groups(7)["model"]["w"])


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    for step in range(100, 800, 100):
        save(tmp_path, step, keep=keep)
        assert_is(latest_save(tmp_path), step)
    assert names(tmp_path) == [f"step-{step:08d}" for step in range(100, 800, 100)][-keep:]


def test_order_is_by_number(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert_is(latest_save(tmp_path), 100_000_000)


def test_same_step_again(tmp_path: Path) -> None:
    save(tmp_path, 100)
    write_save(tmp_path, 100, {"model": {"w": torch.zeros(2)}}, {"again": True})
    found = latest_save(tmp_path)
    assert found is not None
    assert found.state == {"again": True}
    assert names(found.path) == ["manifest.json", "model.safetensors", "state.json"]


def test_views_and_gradients_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4).requires_grad_()
    folder = write_save(tmp_path, 1, {"model": {"t": base.T, "row": base[1]}}, {})
    tensors = read_save(folder).tensors("model")
    assert tensors["t"].tolist() == base.T.tolist()
    assert tensors["row"].tolist() == [4.0, 5.0, 6.0, 7.0]


def test_no_saves_at_all(tmp_path: Path) -> None:
    assert latest_save(tmp_path / "nowhere") is None
    assert latest_save(tmp_path) is None
    (tmp_path / "step-00000005.tmp").mkdir()  # a kill in the very first save
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-x").mkdir()
    assert latest_save(tmp_path) is None


def test_leftovers_are_ignored_and_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 100)
    whole = save(tmp_path, 200)
    shutil.copytree(whole, tmp_path / "step-00000300.tmp")
    (tmp_path / "step-00000300.tmp" / "stray").write_text("x")
    assert_is(latest_save(tmp_path), 200)
    save(tmp_path, 300)
    assert_is(latest_save(tmp_path), 300)
    assert names(tmp_path) == ["step-00000200", "step-00000300"]
    assert "stray" not in names(tmp_path / "step-00000300")


# ---- damage ------------------------------------------------------------------------------------------------

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def turned_into_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: tuple[Callable[[Path], None], ...] = (truncated, flipped, grown, Path.unlink, turned_into_a_folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_newest_save_is_skipped(
    name: str, damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 100)
    newest = save(tmp_path, 200)
    copy = tmp_path / "copy"
    shutil.copytree(newest, copy)
    for _ in range(60 if damage in (truncated, flipped) else 1):
        damage(newest / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="bitnet"):
            assert_is(latest_save(tmp_path), 100)
        assert len(caplog.records) == 1
        assert caplog.records[0].levelno == logging.WARNING
        assert "step-00000200" in caplog.text
        assert "trying the save before it" in caplog.text
        with pytest.raises(BitNetError):
            read_save(newest)
        shutil.rmtree(newest)
        shutil.copytree(copy, newest)
    assert_is(latest_save(tmp_path), 200)


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    for step in (100, 200):
        truncated(save(tmp_path, step) / "model.safetensors")
    with pytest.raises(
        BitNetError, match=r"got 2 damaged saves, expected at least one undamaged; train into a new folder"
    ):
        latest_save(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "3", "null", "{}", '{"format": "bitnet-save"}', "[" * 100_000,
        '{"format": "bitnet-save", "version": 1, "step": 200, "files": []}',
        '{"format": "bitnet-save", "version": 1, "step": 200, "files": {"model.safetensors": 3}}',
        '{"format": "bitnet-save", "version": 1, "step": "200", "files": {}}',
        '{"format": "bitnet-save", "version": 1, "step": 100, "files": {}}',
        '{"format": "bitnet-save", "version": 2, "step": 200, "files": {}}',
        '{"format": "other", "version": 1, "step": 200, "files": {}}',
    ],
    ids=lambda text: text[:70],
)  # fmt: skip
def test_wrong_manifests(text: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 200)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(BitNetError):
        read_save(folder)


def test_manifest_cannot_point_elsewhere(tmp_path: Path) -> None:
    """A name in a manifest is looked for inside the save, whatever path it spells."""
    folder = save(tmp_path, 200)
    outside = tmp_path / "secret"
    outside.write_bytes(b"x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BitNetError):
        read_save(folder)


# ---- crashes -----------------------------------------------------------------------------------------------

CALLS = [
    (os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text"),
    (Path, "chmod"), (shutil, "rmtree"), (safetensors.torch, "save_file"),
]  # fmt: skip


def crash_at(n: int, patch: pytest.MonkeyPatch, error: BaseException, after: bool) -> None:
    """Let the n-th of all these calls, counted together, raise: before it did its work or after."""
    count = 0

    def wrapped(call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            now = count == n
            if now and not after:
                raise error
            result = call(*args, **kwargs)
            if now:
                raise error
            return result

        return run

    for owner, name in CALLS:
        patch.setattr(owner, name, wrapped(getattr(owner, name)))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")], ids=["kill", "full"])
@pytest.mark.parametrize("again", [False, True], ids=["new", "same-step"])
def test_crash_at_every_call(error: BaseException, after: bool, again: bool, tmp_path: Path) -> None:
    """The newest save or the one before is always complete, and the next save succeeds whatever a crash left."""
    for n in range(1, 200):
        saves = tmp_path / str(n)
        for step in (100, 200, *((300,) if again else ())):
            save(saves, step, keep=3)
        crashed = True
        with pytest.MonkeyPatch.context() as patch:
            crash_at(n, patch, error, after)
            try:
                save(saves, 300)
                crashed = False
            except (Killed, OSError) as raised:
                assert raised is error  # noqa: PT017 - neither swallowed nor replaced
        found = latest_save(saves)
        assert_is(found, found.step if found else 0)
        assert found is not None
        assert found.step in (200, 300)
        assert found.step == 300 or crashed
        save(saves, 400)
        assert_is(latest_save(saves), 400)
        if not crashed:
            assert n > 10  # it did crash at many places before
            return
    pytest.fail("200 calls and still crashing")


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that survives a power cut: each file and its folder, then the rename, then the parent."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_sync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def noted_rename(self: Path, target: Path) -> Path:
        events.append(f"rename {self.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see what is synced")
    save(tmp_path / "saves", 5)
    at = events.index("rename step-00000005.tmp")
    assert set(FILES) <= set(events[:at])
    assert events[at - 1] == "step-00000005.tmp"
    assert events[at + 1 :] == ["saves"]


def test_read_only_folder(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    save(tmp_path, 100)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OSError, match="Permission denied"):
            save(tmp_path, 200)
    finally:
        tmp_path.chmod(0o755)
    assert_is(latest_save(tmp_path), 100)


# ---- replacing one file ------------------------------------------------------------------------------------


def test_replacing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with replacing(path) as work:
        work.write_text("1")
        assert not path.exists()
    assert path.read_text() == "1"

    def fail() -> None:
        with replacing(path) as work:
            work.write_text("2")
            raise Killed

    with pytest.raises(Killed):
        fail()
    assert path.read_text() == "1"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_files_are_as_readable_as_the_umask_allows(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}
