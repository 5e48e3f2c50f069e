"""GGUF files: what we write, gguf reads; what gguf writes, we read; and what cannot be exported."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from file_models import GGUF_BASE as BASE
from file_models import GGUF_VARIANTS as VARIANTS
from file_models import random_model, write_i2_s

from bitnet.engine.load import load
from bitnet.errors import BitNetError
from bitnet.files.gguf.export import TYPES, export_gguf
from bitnet.files.gguf.file import Float32, GgufFile, write_gguf
from bitnet.files.gguf.names import gguf_name
from bitnet.files.gguf.read import GgufSource
from bitnet.files.importing import import_model
from bitnet.files.packed import PackedSource, read_packed, write_packed
from bitnet.files.source import TrainedSource
from bitnet.files.tensors import dense_shapes, projection_shape, projections
from bitnet.model import Transformer
from bitnet.text.characters import train_char
from bitnet.text.sentencepiece import SentencePieceTokenizer

# ---- the container -----------------------------------------------------------------------------------------


def test_gguf_reads_the_container(tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf comes with the extra `interop`")
    model = random_model(BASE.replace(vocab_size=tokenizer.vocab_size), seed)
    path = export_gguf(TrainedSource(model, tokenizer, {}), tmp_path / "m.gguf", "tq2_0")
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "bitnet"
    assert reader.get_field("bitnet.vocab_size").contents() == tokenizer.vocab_size
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == tokenizer.vocab_size
    ours = GgufFile(path)
    assert {tensor.name for tensor in reader.tensors} == set(ours.tensors)
    for tensor in reader.tensors:
        assert np.array_equal(tensor.data.view(np.uint8).reshape(-1), ours.read(tensor.name))
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    import os

    value = os.umask(0)
    os.umask(value)
    return value


def test_files_of_gguf_are_read(tmp_path: Path) -> None:
    """Every kind of key its writer has, F32, F16 and ternary tensors."""
    gguf = pytest.importorskip("gguf", reason="gguf comes with the extra `interop`")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    keys: dict[str, Any] = {"a": 255, "b": -128, "c": 65535, "d": -1, "e": 2**32 - 1, "f": -(2**31), "g": 1.5}
    keys |= {"h": True, "i": "text é", "j": 2**63, "k": -(2**62), "l": 1e300}
    kinds = "UINT8 INT8 UINT16 INT16 UINT32 INT32 FLOAT32 BOOL STRING UINT64 INT64 FLOAT64".split()
    for (key, value), kind in zip(keys.items(), kinds, strict=True):
        writer.add_key_value(key, value, gguf.GGUFValueType[kind])
    writer.add_array("texts", ["", "x", "yé" * 300])
    writer.add_array("numbers", [1, 2, 300])
    values = torch.randn(3, 512).numpy()
    writer.add_tensor("float", values)
    writer.add_tensor("half", values.astype(np.float16))
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.TQ1_0)
    writer.add_tensor("ternary", packed, raw_dtype=gguf.GGMLQuantizationType.TQ1_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "m.gguf")
    assert {key: file.keys[key] for key in keys} == keys
    assert list(file.keys["texts"]) == ["", "x", "yé" * 300]
    assert file.keys["texts"][1:] == ["x", "yé" * 300]
    assert file.keys["numbers"].tolist() == [1, 2, 300]
    assert file.tensors["ternary"].shape == (3, 512)
    assert np.array_equal(file.read("float").view(np.float32).reshape(3, 512), values)
    assert np.array_equal(file.read("half").view(np.float16).reshape(3, 512), values.astype(np.float16))
    assert np.array_equal(file.read("ternary"), packed.reshape(-1))


# ---- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant: str, kind: str, tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path) -> None:
    model = random_model(BASE.replace(vocab_size=tokenizer.vocab_size, **VARIANTS[variant]), seed)
    source = TrainedSource(model, tokenizer, {})
    back = GgufSource(export_gguf(source, tmp_path / "m.gguf", kind))
    assert back.config == model.config.replace(initializer_range=0.02)
    assert not import_model(back, tmp_path / "m.safetensors", back.tokenizer)
    packed = read_packed(tmp_path / "m.safetensors")
    assert packed.tokenizer is not None
    again = PackedSource(packed)
    for name in projections(model.config):
        codes, scale = source.codes(name)
        assert torch.equal(again.codes(name).codes, codes), name
        assert float(again.codes(name).scale) == float(scale if kind == "f32" else scale.half())
    for name, parameter in model.named_parameters():
        if "_proj" not in name:
            expected = parameter
            if parameter.dim() == 2:  # training uses bf16 values, which fp16 holds down to 2^-17
                expected = parameter.bfloat16()
                expected = (expected if kind == "f32" else expected.half().bfloat16()).float()
            assert torch.equal(again.dense(name).float(), expected), name
    text = "ab 한국\n cd<s>\u2581x"
    assert packed.tokenizer.encode(text) == tokenizer.encode(text)
    # And from the packed file to the same bytes again.
    if kind != "f16":
        export_gguf(again, tmp_path / "again.gguf", kind)
        names = GgufFile(tmp_path / "again.gguf").tensors
        first, second = GgufFile(tmp_path / "m.gguf"), GgufFile(tmp_path / "again.gguf")
        assert all(np.array_equal(first.read(name), second.read(name)) for name in names)


def test_i2_s_of_the_published_2b4t(seed: int, tmp_path: Path) -> None:
    """Architecture bitnet-b1.58: ReLU^2, rotary halves, ternary weights as I2_S, a tied F16 embedding."""
    config = BASE.replace(hidden_act="relu2", num_key_value_heads=1)
    model = random_model(config, seed)
    source = TrainedSource(model, None, {})
    float_model = Transformer(config.replace(hidden_act="silu"))  # whose file lends its keys, norms and embedding
    float_model.load_state_dict(model.state_dict())
    path = export_gguf(TrainedSource(float_model, None, {}), tmp_path / "m.gguf", "f32")
    file = GgufFile(path)
    keys = {key.replace("bitnet.", "bitnet-b1.58."): value for key, value in file.keys.items()}
    keys["general.architecture"] = "bitnet-b1.58"
    keys = {key: Float32(value) if isinstance(value, float) else value for key, value in keys.items()}
    data = {name: file.read(name) for name in file.tensors}
    kinds = {name: place.type for name, place in file.tensors.items()}
    for projection in projections(config):
        codes, scale = source.codes(projection)
        name = f"{gguf_name(projection)}.weight"
        data[name], kinds[name] = write_i2_s(codes, float(scale)), "I2_S"
    with path.open("wb") as out:
        write_gguf(out, keys, [(n, file.tensors[n].shape, kinds[n]) for n in data], iter(data.values()))
    back = GgufSource(path)
    assert back.config == config.replace(initializer_range=0.02)
    import_model(back, tmp_path / "m.safetensors", None)
    ids = torch.randint(400, (2, 30))
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "m.safetensors", engine="torch").logits(ids), model(ids))


@pytest.mark.parametrize("exact", [True, False], ids=["d1", "scale"])
def test_a_scale_in_a_separate_tensor(exact: bool, seed: int, tmp_path: Path) -> None:
    """Newer converters write d = 1 and an F32 tensor `.scale`: the scale keeps all of its bits."""
    source = TrainedSource(random_model(BASE, seed), None, {})
    path = export_gguf(source, tmp_path / "m.gguf", "tq2_0")
    file = GgufFile(path)
    data, plan = [], []
    for name, place in file.tensors.items():
        plan.append((name, place.shape, place.type))
        data.append(file.read(name))
        if place.type == "TQ2_0" and exact:
            data[-1].reshape(-1, 66)[:, 64:] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    for projection in projections(BASE):
        scale = float(source.codes(projection).scale) if exact else 1.0
        plan.append((f"{gguf_name(projection)}.scale", (1,), "F32"))
        data.append(np.frombuffer(np.float32(scale).tobytes(), np.uint8))
    keys = {key: Float32(value) if isinstance(value, float) else value for key, value in file.keys.items()}
    with path.open("wb") as out:
        write_gguf(out, keys, plan, iter(data))
    back = GgufSource(path)
    for projection in projections(BASE):
        codes, scale = source.codes(projection)
        assert torch.equal(back.codes(projection).codes, codes)
        assert float(back.codes(projection).scale) == float(scale if exact else scale.half())


# ---- what is refused ---------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "ReLU^2": ({"hidden_act": "relu2"}, "tq2_0", r"ReLU\^2.*hidden_act=silu.*--to hf-packed,"),
    "float ReLU^2": ({"hidden_act": "relu2", "linear": "float"}, "f16", r"ReLU\^2.*--to hf,"),
    "QK norm": ({"qk_norm": True}, "tq2_0", r"QK norm.*nano-portable"),
    "untied": ({"tie_word_embeddings": False}, "f32", r"untied head.*--to hf-packed"),
    "width": ({"hidden_size": 320, "num_attention_heads": 2}, "tq2_0", r"hidden_size 320.*q2_0"),
    "ffn": ({"intermediate_size": 500}, "tq1_0", r"intermediate_size 500, expected a multiple of 256.*f16"),
    "float": ({"linear": "float"}, "tq2_0", "expected ternary ones"),
    "type": ({}, "q4_k", "expected one of tq2_0"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED.values(), ids=list(REFUSED))
def test_export_refuses(changes: dict[str, Any], kind: str, message: str, seed: int, tmp_path: Path) -> None:
    source = TrainedSource(random_model(BASE.replace(**changes), seed), None, {})
    with pytest.raises(BitNetError, match=message):
        export_gguf(source, tmp_path / "m.gguf", kind)
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_no_file(seed: int, tmp_path: Path) -> None:
    model = random_model(BASE.replace(vocab_size=3), seed)
    with pytest.raises(BitNetError, match="kind 'char'"):
        export_gguf(TrainedSource(model, train_char(["abc"]), {}), tmp_path / "m.gguf", "tq2_0")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()  # its scale is 1e-5, too small for fp16
    with pytest.raises(BitNetError, match="weight scale of 1e-05"):
        export_gguf(TrainedSource(model, None, {}), tmp_path / "m.gguf", "tq2_0")
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = 1e6
    with pytest.raises(BitNetError, match=r"embed_tokens.*F16 cannot hold"):
        export_gguf(TrainedSource(model, None, {}), tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BitNetError, match="is not a GGUF file"):
        export_gguf(TrainedSource(model, None, {}), tmp_path / "mine.txt", "f32")


def test_values_too_small_for_f16_are_refused(seed: int, tmp_path: Path) -> None:
    """Small numbers keep a bit or two in fp16: refused, where f32 writes them as they are."""
    config = BASE.replace(num_hidden_layers=1)
    for linear, name, factor, part in (
        ("ternary", "model.layers.0.mlp.up_proj.weight", 1e-4, r"up_proj: F16: got a weight scale.*export as f32"),
        ("float", "model.layers.0.mlp.up_proj.weight", 1e-5, r"up_proj: rounding to F16.*export as f32"),
        ("float", "model.embed_tokens.weight", 1e-5, r"embed_tokens.weight: rounding to F16.*export as f32"),
    ):
        model = random_model(config.replace(linear=linear), seed)
        with torch.no_grad():
            model.get_parameter(name).mul_(factor)
        source = TrainedSource(model, None, {})
        with pytest.raises(BitNetError, match=part):
            export_gguf(source, tmp_path / "m.gguf", "f16")
        assert not (tmp_path / "m.gguf").exists()
        back = GgufSource(export_gguf(source, tmp_path / "m.gguf", "f32"))
        if linear == "float":
            assert torch.equal(back.master("model.layers.0.mlp.up_proj"), source.master("model.layers.0.mlp.up_proj"))
        (tmp_path / "m.gguf").unlink()


def test_a_file_of_many_tensors_is_read_quickly(tmp_path: Path) -> None:
    """30,000 of them with their scales: seconds if each is looked up, a minute if a set is built for each."""
    config = BASE.replace(
        vocab_size=2, hidden_size=2, intermediate_size=1, num_attention_heads=1, num_key_value_heads=1
    ).replace(num_hidden_layers=1500, sub_norms=False)
    shapes = {gguf_name(name): shape for name, shape in dense_shapes(config).items()}
    for name in projections(config):
        shapes[f"{gguf_name(name)}.weight"] = projection_shape(config, name)
        shapes[f"{gguf_name(name)}.scale"] = (1,)
    keys: dict[str, Any] = {"general.architecture": "llama", "llama.attention.layer_norm_rms_epsilon": Float32(1e-5)}
    keys |= {"llama.block_count": 1500, "llama.context_length": 8, "llama.embedding_length": 2}
    keys |= {"llama.feed_forward_length": 1, "llama.attention.head_count": 1}
    with (tmp_path / "m.gguf").open("wb") as file:
        data = (np.ones(math.prod(shape), np.float32).view(np.uint8) for shape in shapes.values())
        write_gguf(file, keys, [(name, shape, "F32") for name, shape in shapes.items()], data)
    started = time.process_time()
    assert GgufSource(tmp_path / "m.gguf").config.num_hidden_layers == 1500
    assert time.process_time() - started < 5


def test_any_packed_file_can_be_exported(seed: int, tmp_path: Path) -> None:
    """int8 embeddings and binary weights: a packed layout holds both unchanged."""
    model = random_model(BASE.replace(linear="binary"), seed)
    packed = read_packed(write_packed(tmp_path / "m.safetensors", model, None, embedding="int8"))
    back = GgufSource(export_gguf(PackedSource(packed), tmp_path / "m.gguf", "tq2_0"))
    codes = back.codes("model.layers.1.self_attn.q_proj").codes
    assert torch.equal(codes, PackedSource(packed).codes("model.layers.1.self_attn.q_proj").codes)
    assert set(codes.unique().tolist()) == {-1, 1}
