"""Damaged and hostile GGUF files: each is refused with one line, and nothing is written."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_models import GGUF_BASE as BASE
from file_models import random_model

from bitnet.errors import BitNetError
from bitnet.files.gguf.export import export_gguf
from bitnet.files.gguf.file import Float32, GgufFile, write_gguf
from bitnet.files.gguf.read import GgufSource
from bitnet.files.sentencepiece_model import read_pieces
from bitnet.files.source import TrainedSource
from bitnet.text.sentencepiece import SentencePieceTokenizer


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: SentencePieceTokenizer
) -> tuple[dict[str, Any], list, list]:
    """Keys, plan and bytes of a good file, to damage."""
    config = BASE.replace(num_hidden_layers=1, vocab_size=tokenizer.vocab_size)
    source = TrainedSource(random_model(config, 1), tokenizer, {})
    file = GgufFile(export_gguf(source, tmp_path_factory.mktemp("made") / "m.gguf", "tq2_0"))
    keys = {}
    for key, value in file.keys.items():
        if isinstance(value, np.ndarray):
            keys[key] = value.tolist()
        else:
            keys[key] = Float32(value) if isinstance(value, float) else value
            keys[key] = value[:] if key.endswith("tokens") else keys[key]
    return keys, [(p.name, p.shape, p.type) for p in file.tensors.values()], [file.read(n) for n in file.tensors]


def without(values: list, at: int) -> list:
    return values[:at] + values[at + 1 :]


def key(name: str, value: Any) -> Callable[..., tuple[dict[str, Any], list, list]]:
    return lambda keys, plan, data: ({**keys, name: value}, plan, data)


def byte_level(**values: Any) -> Callable[..., tuple[dict[str, Any], list, list]]:
    more = {f"tokenizer.ggml.{name}": value for name, value in {"model": "gpt2", "merges": ["a b"], **values}.items()}
    return lambda keys, plan, data: ({**keys, **more}, plan, data)


DAMAGED: dict[str, tuple[Callable[..., tuple[dict[str, Any], list, list]], str]] = {
    "architecture": (key("general.architecture", "mamba"), "mamba"),
    "no architecture": (lambda k, p, d: ({}, p, d), "general.architecture"),
    "architecture of another kind": (key("general.architecture", 7), "expected a string"),
    "no width": (lambda k, p, d: ({x: y for x, y in k.items() if "g_length" not in x}, p, d), "embedding_length"),
    "width of zero": (key("bitnet.embedding_length", 0), "above 0"),
    "another width": (key("bitnet.embedding_length", 512), "expected"),
    "many layers": (key("bitnet.block_count", 2**31 - 1), "layers"),
    "a layer more": (key("bitnet.block_count", 2), "blk.1"),
    "heads": (key("bitnet.attention.head_count", 3), "num_attention_heads"),
    "rotary part": (key("bitnet.rope.dimension_count", 32), "rope.dimension_count"),
    "scaled positions": (key("bitnet.rope.scaling.type", "yarn"), "scaled rotary"),
    "epsilon as a text": (key("bitnet.attention.layer_norm_rms_epsilon", "small"), "expected a number"),
    "too few tokens": (key("tokenizer.ggml.tokens", ["a", "b"]), "got 2 tokens"),
    "scores": (key("tokenizer.ggml.scores", [0.5]), "scores"),
    "token types": (key("tokenizer.ggml.token_type", [9] * 400), "token_type"),
    "another tokenizer": (key("tokenizer.ggml.model", "bert"), "bert"),
    "bos": (key("tokenizer.ggml.bos_token_id", 400_000), "bos_token_id"),
    "alignment": (key("general.alignment", 0), "alignment"),
    "no embedding": (lambda k, p, d: (k, without(p, 0), without(d, 0)), "token_embd"),
    "no last tensor": (lambda k, p, d: (k, p[:-1], d[:-1]), "got no tensor"),
    "a tensor twice": (lambda k, p, d: (k, [*p, p[0]], [*d, d[0]]), "twice"),
    "a tensor more": (lambda k, p, d: (k, [*p, ("extra", (1,), "F32")], [*d, np.zeros(4, np.uint8)]), "'extra'"),
    "a list for the experts": (key("bitnet.expert_count", [0, 0]), "expert_count"),
    "a list for the scaling": (key("bitnet.rope.scaling.type", ["none", "none"]), "rope.scaling.type"),
    "a list for the tokenizer": (key("tokenizer.ggml.model", [1, 2]), "tokenizer.ggml.model"),
    "a number for BOS": (key("tokenizer.ggml.add_bos_token", 1), "add_bos_token"),
    "a list for the pre-tokenizer": (byte_level(pre=["a", "b"]), "pre-tokenizer"),
    "numbers for the pre-tokenizer": (byte_level(pre=[1, 2]), "pre-tokenizer"),
    "code 3": (lambda k, p, d: (k, p, [*d[:-1], np.full_like(d[-1], 0xFF)]), "code 3"),
    "embedding that is none": (lambda k, p, d: (k, p, [np.full_like(d[0], 0xFF), *d[1:]]), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "part"), DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_file_is_refused(
    damage: Callable[..., Any], part: str, made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, plan, data = damage(*made)
    with (tmp_path / "m.gguf").open("wb") as file:
        write_gguf(file, keys, plan, iter(data))
    refused(tmp_path, part, capsys)


def refused(folder: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    from bitnet.cli import main

    before = (folder / "m.gguf").read_bytes()
    assert main(["import", str(folder / "m.gguf"), "-o", str(folder / "m.safetensors")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bitnet: error: ")
    assert captured.err.count("\n") == 1
    assert part in captured.err
    assert [path.name for path in folder.iterdir()] == ["m.gguf"]
    assert (folder / "m.gguf").read_bytes() == before


def header(tensors: int = 0, keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + version.to_bytes(4, "little") + tensors.to_bytes(8, "little") + keys.to_bytes(8, "little") + rest


def text(value: str) -> bytes:
    return len(value).to_bytes(8, "little") + value.encode()


def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "little")


def place(shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """A file that is one tensor's entry."""
    sizes = b"".join(number(length, 8) for length in shape)
    return header(tensors=1, rest=text("t") + number(len(shape)) + sizes + number(kind) + number(offset, 8))


HOSTILE = {
    "empty": (b"", "expected a GGUF file"),
    "no magic": (b"GGML" + bytes(40), "GGUF"),
    "version 1": (header(version=1) + bytes(8), "version 1"),
    "big-endian": (b"GGUF" + (3).to_bytes(4, "big") + bytes(24), "little-endian"),
    "many tensors": (header(tensors=2**63), "tensors"),
    "many keys": (header(keys=2**32), "keys"),
    "a long name": (header(keys=1, rest=number(2**40, 8)), "string of"),
    "a name past the end": (header(keys=1, rest=number(2**20, 8)), "header longer than"),
    "a length that wraps": (header(keys=1, rest=number(2**64 - 1, 8)), "string of"),
    "a value of no type": (header(keys=1, rest=text("a") + number(99)), "type 99"),
    "an array of arrays": (header(keys=1, rest=text("a") + number(9) + number(9) + number(1, 8)), "type 9"),
    "a huge array": (header(keys=1, rest=text("a") + number(9) + number(12) + number(2**61, 8)), "header longer than"),
    "a huge array of texts": (header(keys=1, rest=text("a") + number(9) + number(8) + number(2**61, 8)), "strings"),
    "a key twice": (header(keys=2, rest=(text("a") + number(0) + b"x") * 2), "twice"),
    "a name that is no text": (header(keys=1, rest=number(1, 8) + b"\xff" + number(0) + b"x"), "UTF-8"),
    "no dimensions": (place(()), "dimensions"),
    "many dimensions": (place((1,) * 5), "dimensions"),
    "sizes whose product wraps": (place((2**33, 2**33)), "cut short"),
    "a size of zero": (place((0,)), "shape"),
    "an unknown type": (place((32,), kind=14), "Q6_K"),
    "an offset off the grid": (place((8,), offset=3), "multiple"),
    "past the end": (place((8,), offset=2**40), "cut short"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "part"), HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_header_is_refused(raw: bytes, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(raw + bytes(24 if raw and len(raw) < 24 else 0))
    if raw[:4] == b"GGUF":
        refused(tmp_path, part, capsys)
    else:
        with pytest.raises(BitNetError, match=part):
            GgufFile(tmp_path / "m.gguf")


def test_texts_that_would_take_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is allowed by itself; decoded, one wide character makes a text four times as large."""
    value = "\U0001f600" + "x" * (1 << 20)
    entry = b"".join([number(8), number(len(value.encode()), 8), value.encode()])
    (tmp_path / "m.gguf").write_bytes(header(keys=17, rest=b"".join(text(f"{i:02}") + entry for i in range(17))))
    refused(tmp_path, "strings of more than", capsys)


@pytest.mark.slow
def test_pieces_that_would_take_memory() -> None:
    with pytest.raises(BitNetError, match="more than 524,288 pieces"):
        read_pieces(b"\x0a\x03\x0a\x01a" * ((1 << 19) + 1))
    with pytest.raises(BitNetError, match="a piece of more than"):
        read_pieces(b"\x0a\x84\x20\x0a\x81\x20" + b"a" * 4097)


def test_a_truncated_file_is_refused(made: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        write_gguf(file, made[0], made[1], iter(made[2]))
    whole = path.read_bytes()
    for _ in range(50):
        path.write_bytes(whole[: random.randrange(len(whole) - 31)])
        with pytest.raises(BitNetError, match=r"cut short|header longer than|expected"):
            GgufSource(path)
