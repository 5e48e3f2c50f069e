"""The streaming safetensors reader and writer against the library's own."""

import json
import os
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bitnet.errors import BitNetError
from bitnet.files.json_file import read_json
from bitnet.files.safetensors_file import DTYPES, INDEX, MAX_HEADER, TensorFiles, TensorWriter

TENSORS = {
    "a": torch.randn(3, 5),
    "b.weight": torch.randn(7, 2).bfloat16(),
    "c": torch.randint(0, 255, (11,), dtype=torch.uint8),
    "d": torch.randn(()).half(),
    "empty": torch.empty(0, 4),
    "é": torch.arange(9),
}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    with (tmp_path / "x.safetensors").open("wb") as file:
        writer = TensorWriter(file, plan, {"format": "pt"})
        for name in random.sample(list(TENSORS), len(TENSORS)):
            writer.write(name, TENSORS[name])
        writer.finish()
    back = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert set(back) == set(TENSORS)
    assert all(torch.equal(back[name], TENSORS[name]) for name in TENSORS)
    # Byte for byte the library's own file: the same order, the same padding.
    safetensors.torch.save_file(TENSORS, tmp_path / "y.safetensors", {"format": "pt"})
    assert len((tmp_path / "x.safetensors").read_bytes()) == len((tmp_path / "y.safetensors").read_bytes())


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        files = TensorFiles(path)
        assert files.metadata == {"format": "pt"}
        for name, tensor in TENSORS.items():
            assert torch.equal(files.read(name), tensor)
            assert files.read(name).dtype == tensor.dtype


def test_shards(tmp_path: Path) -> None:
    halves = [dict(list(TENSORS.items())[::2]), dict(list(TENSORS.items())[1::2])]
    for i, half in enumerate(halves):
        safetensors.torch.save_file(half, tmp_path / f"{i}.safetensors")
    listed = {name: f"{i}.safetensors" for i, half in enumerate(halves) for name in half}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    files = TensorFiles(tmp_path)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in TENSORS.items())
    safetensors.torch.save_file(TENSORS, tmp_path / "1.safetensors")
    with pytest.raises(BitNetError, match="a second time"):
        TensorFiles(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(BitNetError, match="weight_map"):
        TensorFiles(tmp_path)


def test_a_plan_is_kept(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        writer = TensorWriter(file, {"a": (torch.float32, (2,)), "b": (torch.float32, (1,))}, {})
        with pytest.raises(AssertionError):
            writer.write("a", torch.zeros(3))
        writer.write("b", torch.zeros(1))
        with pytest.raises(KeyError):
            writer.write("b", torch.zeros(1))


def raw(header: Any, data: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut short"),
    "seven bytes": (bytes(7), "cut short"),
    "a length of everything": (b"\xff" * 8 + b"{}", "header of 18,446,744,073,709,551,615"),
    "a length past the end": (struct.pack("<Q", 100) + b"{}", "header of 100"),
    "a large header": (raw(b" " * (MAX_HEADER + 1)), "header of"),
    "no JSON": (raw(b"{"), "JSON"),
    "no UTF-8": (raw(b'{"\xff":1}'), "JSON"),
    "deep": (raw(b"[" * 100_000), "JSON"),
    "deeper": (raw(b"[" * 200_000), "more than 65,536 tensors"),
    "many objects": (raw(b'{"a":[' + b"{}," * 70_000 + b"0]}"), "more than 65,536 tensors"),
    "many numbers": (raw(b'{"a":[' + b"0," * 600_000 + b"0]}"), "more than 65,536 tensors"),
    "a list": (raw([]), "expected an object"),
    "a name twice": (raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), 8), "'a' twice"),
    "a key twice": (raw(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "'dtype' twice"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "an entry that is none": (raw({"a": 7}), "dtype"),
    "a part missing": (raw({"a": {"dtype": "F32"}}), "dtype"),
    "a part more": (raw({"a": {**entry(), "x": 1}}, 8), "dtype"),
    "an unknown dtype": (raw({"a": entry("F4")}, 8), "F4"),
    "a dtype that is no text": (raw({"a": entry([])}, 8), "dtype"),
    "a negative size": (raw({"a": entry(shape=[-2, -1])}, 8), "whole numbers"),
    "a fraction": (raw({"a": entry(shape=[2.0])}, 8), "whole numbers"),
    "true": (raw({"a": entry(shape=[True, 2])}, 8), "whole numbers"),
    "a size that overflows": (raw({"a": entry(shape=[2**63, 2])}, 8), "whole numbers"),
    "a product that overflows": (raw({"a": entry(shape=[2**40, 2**40])}, 8), "bytes, expected"),
    "five dimensions": (raw({"a": entry(shape=[2, 1, 1, 1, 1])}, 8), "whole numbers"),
    "three offsets": (raw({"a": entry(offsets=[0, 8, 8])}, 8), "whole numbers"),
    "backwards": (raw({"a": entry(offsets=[8, 0])}, 8), "bytes, expected"),
    "another size": (raw({"a": entry(offsets=[0, 4])}, 8), "bytes, expected"),
    "a hole": (raw({"a": entry(offsets=[8, 16])}, 16), "starts at 8"),
    "one over another": (raw({"a": entry(), "b": entry(offsets=[4, 12])}, 12), "starts at 4"),
    "too short": (raw({"a": entry()}, 7), "cut or altered"),
    "too long": (raw({"a": entry()}, 9), "cut or altered"),
}


@pytest.mark.parametrize(("data", "part"), HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_file_is_refused(data: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(BitNetError, match=part) as caught:
        TensorFiles(tmp_path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400


def test_many_names_and_the_last_one_twice(tmp_path: Path) -> None:
    """One pass over them: looking for each name among all of them would take a minute."""
    names = [f'"{i}":0' for i in range(200_000)]
    (tmp_path / "x.json").write_text("{" + ",".join([*names, names[-1]]) + "}")
    started = time.process_time()
    with pytest.raises(BitNetError, match="'199999' twice"):
        read_json(tmp_path / "x.json")
    assert time.process_time() - started < 5


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BitNetError, match=r"no model\.safetensors"):
        TensorFiles(tmp_path)
    with pytest.raises(BitNetError, match="check the path"):
        TensorFiles(tmp_path / "nothing")
    with pytest.raises(BitNetError, match="check the path"):
        read_json(tmp_path / "nothing")
    (tmp_path / "large.json").write_text(" " * 101)
    with pytest.raises(BitNetError, match="more than 100 bytes"):
        read_json(tmp_path / "large.json", limit=100)


def test_json_that_would_take_memory(tmp_path: Path) -> None:
    """Eight megabytes of `{}` would become 200 in Python's objects."""
    for value in (b"{}", b"[]", b"1"):
        (tmp_path / "x.json").write_bytes(b'{"a":[' + b",".join([value] * 1_000_000) + b"]}")
        with pytest.raises(BitNetError, match="values, expected at most"):
            read_json(tmp_path / "x.json")


def test_a_file_that_shrinks_under_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    files = TensorFiles(path)
    os.truncate(path, path.stat().st_size - 40)
    with pytest.raises(BitNetError, match="became shorter"):
        files.read("c")  # bytes come last


def test_every_dtype(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3).to(dtype) for name, dtype in DTYPES.items()}
    safetensors.torch.save_file(tensors, tmp_path / "x")
    assert all(torch.equal(TensorFiles(tmp_path / "x").read(name), tensor) for name, tensor in tensors.items())
