"""Packed files that are damaged, altered or from elsewhere: none is read."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from packed_models import rewrite
from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.files import packed_layout
from bitnet.files.packed import read_packed, write_packed
from bitnet.model import Transformer
from bitnet.text.characters import CharTokenizer


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(BitNetError, match="got nothing at"):
        read_packed(tmp_path / "none.safetensors")
    with pytest.raises(BitNetError, match=r"got a folder at .*bitnet pack"):
        read_packed(tmp_path)


def test_truncated_files(file: Path) -> None:
    whole = file.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    lengths = {0, 1, 7, 8, 9, 7 + header, 8 + header, 9 + header, len(whole) - 1}
    lengths |= {random.randrange(len(whole)) for _ in range(150)}
    for length in lengths:
        file.write_bytes(whole[:length])
        with pytest.raises(BitNetError):
            read_packed(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(BitNetError):
        read_packed(file)


def test_flipped_bits(file: Path) -> None:
    """One bit anywhere: the checksum, or the reader before it, sees it. The header is flipped more densely."""
    whole = bytearray(file.read_bytes())
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    places = [random.randrange(end) for _ in range(400)] + [random.randrange(len(whole)) for _ in range(300)]
    for place in places:
        bit = 1 << random.randrange(8)
        whole[place] ^= bit
        file.write_bytes(whole)
        with pytest.raises(BitNetError):
            read_packed(file)
        whole[place] ^= bit
    file.write_bytes(whole)
    read_packed(file)


def test_a_shape_that_lost_its_number(file: Path) -> None:
    """[1] turned into [ ] is one byte, and still fits its four bytes of data."""
    raw = file.read_bytes()
    place = raw.index(b'"shape":[1],') + len(b'"shape":[')
    file.write_bytes(raw[:place] + b" " + raw[place + 1 :])
    with pytest.raises(BitNetError):
        read_packed(file)


def test_rewriting_alone_is_accepted(file: Path) -> None:
    """Otherwise the refusals below would prove nothing."""
    read_packed(rewrite(file, lambda metadata, tensors: None))


Q = "model.layers.0.self_attn.q_proj"


def set_config(**changes: object) -> Callable[[dict[str, str], dict[str, Tensor]], None]:
    def change(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | changes)

    return change


REFUSED: dict[str, tuple[Callable[[dict[str, str], dict[str, Tensor]], object], str]] = {
    "other format": (lambda m, t: m.update(format="pt"), r"format 'pt', expected 'bitnet-packed'"),
    "no format": (lambda m, t: m.pop("format"), r"format 'None'"),
    "other version": (lambda m, t: m.update(version="2"), r"got version 2, .*expected version 1"),
    "other layout": (lambda m, t: m.update(layout="k4-msb"), r"layout 'k4-msb', expected .*'k4-lsb'"),
    "no config": (lambda m, t: m.pop("config"), r"KeyError"),
    "no info": (lambda m, t: m.pop("info"), r"KeyError"),
    "config is not JSON": (lambda m, t: m.update(config="{"), r"cannot be read"),
    "config is a list": (lambda m, t: m.update(config="[]"), r"expected a table"),
    "config is deep": (lambda m, t: m.update(config="[" * 200_000), r"cannot be read"),
    "unknown config key": (set_config(wings=2), r"unknown key 'wings'"),
    "impossible config": (set_config(num_attention_heads=5), r"not a multiple"),
    "infinite number": (set_config(rope_theta=float("inf")), r"rope_theta: got inf"),
    "more layers": (set_config(num_hidden_layers=3), r"no tensor 'model\.layers\.2\."),
    "far more layers": (set_config(num_hidden_layers=2**31 - 1), r"for 2147483647 layers"),
    "size beyond all memory": (
        set_config(vocab_size=2**31 - 1, hidden_size=2**31 - 8, intermediate_size=2**31 - 1),
        r"cannot be read|expected",
    ),
    "fewer layers": (set_config(num_hidden_layers=1), r"unknown tensor"),
    "other width": (set_config(intermediate_size=46), r"expected uint8 \[46, 6\]"),
    "missing tensor": (lambda m, t: t.pop(f"{Q}.weight"), rf"no tensor '{Q}\.weight'"),
    "missing scale": (lambda m, t: t.pop(f"{Q}.weight_scale"), rf"no tensor '{Q}\.weight_scale'"),
    "missing norm": (lambda m, t: t.pop("model.norm.weight"), r"no tensor 'model\.norm\.weight'"),
    "extra tensor": (lambda m, t: t.update(wings=torch.zeros(3)), r"unknown tensor 'wings'"),
    "extra scalar": (lambda m, t: t.update(wings=torch.tensor(1.0)), r"unknown tensor 'wings'"),
    "extra empty tensor": (lambda m, t: t.update(wings=torch.zeros(0)), r"unknown tensor 'wings'"),
    "wrong dtype": (lambda m, t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.int8)}), r"got int8 .*uint8"),
    "wrong shape": (lambda m, t: t.update({f"{Q}.weight": t[f"{Q}.weight"].T.contiguous()}), r"got uint8 \[6, 24\]"),
    "scale without dimension": (lambda m, t: t.update({f"{Q}.weight_scale": torch.tensor(1.0)}), r"got float32 \[\]"),
    "code 3": (lambda m, t: t[f"{Q}.weight"][5].bitwise_or_(3), r"code 3 in row 5, byte 0"),
    "fill": (
        lambda m, t: t["model.layers.1.mlp.down_proj.weight"][:, -1].bitwise_and_(0b00111111),
        r"fill behind K = 42 is not zero",
    ),
    "negative scale": (lambda m, t: t[f"{Q}.weight_scale"].neg_(), r"expected finite scales above 0"),
    "zero scale": (lambda m, t: t[f"{Q}.weight_scale"].zero_(), r"got 0\.0, expected finite scales above 0"),
    "NaN scale": (lambda m, t: t[f"{Q}.weight_scale"].fill_(torch.nan), r"got nan, expected finite scales"),
    "infinite scale": (lambda m, t: t[f"{Q}.weight_scale"].fill_(torch.inf), r"got inf, expected finite scales"),
    "int8 embedding without scale": (
        lambda m, t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].to(torch.int8)}),
        r"is int8, expected a float32 scale",
    ),
    "scale without int8 embedding": (
        lambda m, t: t.update({"model.embed_tokens.scale": torch.ones(61, 1)}),
        r"unknown",
    ),
    "other tokenizer kind": (lambda m, t: m.update(tokenizer="words"), r"tokenizer kind 'words'"),
    "tokenizer that is not there": (lambda m, t: t.pop("tokenizer"), r"cannot be read"),
    "tokenizer that nobody announced": (lambda m, t: m.update(tokenizer="none"), r"unknown tensor 'tokenizer'"),
    "damaged tokenizer": (lambda m, t: t["tokenizer"][:5].zero_(), r"char tokenizer"),
    "tokenizer as bf16": (lambda m, t: t.update(tokenizer=torch.zeros(4, dtype=torch.bfloat16)), r"cannot be read"),
    "smaller tokenizer": (
        lambda m, t: t.update(
            tokenizer=torch.frombuffer(bytearray(CharTokenizer("abc").to_bytes()), dtype=torch.uint8)
        ),
        r"got 3 tokens in the tokenizer, expected 61",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(change: Callable[..., object], message: str, file: Path) -> None:
    rewrite(file, change)
    with pytest.raises(BitNetError, match=message) as refusal:
        read_packed(file)
    assert len(str(refusal.value)) < 2000


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_bad_embedding_scale(value: float, model: Transformer, tmp_path: Path) -> None:
    path = write_packed(tmp_path / "m.safetensors", model, None, embedding="int8")
    rewrite(path, lambda m, t: t["model.embed_tokens.scale"][17].fill_(value))
    with pytest.raises(BitNetError, match=r"embed_tokens\.scale': got .*, expected finite scales above 0"):
        read_packed(path)


@pytest.mark.parametrize("key", ["config", "info", "tokenizer", "layout", "version"])
def test_the_checksum_covers_the_metadata(key: str) -> None:
    metadata = {"config": "a", "info": "b", "tokenizer": "c", "layout": "d", "version": "1", "sha256": ""}
    tensors = {"w": torch.arange(4)}
    changed = packed_layout.content_digest({**metadata, key: "other"}, tensors)
    assert changed != packed_layout.content_digest(metadata, tensors)


def test_the_checksum_covers_names_shapes_and_dtypes() -> None:
    base = torch.arange(4, dtype=torch.int32)
    images = [{"w": base}, {"v": base}, {"w": base.view(2, 2)}, {"w": base.view(torch.float32)}, {"w": base + 1}]
    assert len({packed_layout.content_digest({}, tensors) for tensors in images}) == len(images)


def test_too_many_tensors(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_layout, "_MAX_TENSORS", 10)
    with pytest.raises(BitNetError, match=r"got \d+ tensors, expected at most 10"):
        read_packed(file)


def test_not_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for data in (b"", b"\0" * 100, b"\xff" * 100, b"GGUF" + b"\0" * 60, random.randbytes(500)):
        path.write_bytes(data)
        with pytest.raises(BitNetError, match="expected a packed model"):
            read_packed(path)
    foreign = tmp_path / "y"
    safetensors.torch.save_file({"w": torch.zeros(2)}, foreign)
    with pytest.raises(BitNetError, match="format 'None', expected 'bitnet-packed'"):
        read_packed(foreign)
