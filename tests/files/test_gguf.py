"""GGUF files against the tools that define them: gguf's quantiser byte for byte, llama.cpp running what we write."""

import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet.config import ModelConfig
from bitnet.engine.load import load
from bitnet.errors import BitNetError
from bitnet.files import ternary
from bitnet.files.gguf.export import TYPES, export_gguf
from bitnet.files.gguf.file import Float32, GgufFile, write_gguf
from bitnet.files.gguf.names import gguf_name
from bitnet.files.gguf.read import GgufSource
from bitnet.files.importing import import_model
from bitnet.files.packed import PackedSource, read_packed, write_packed
from bitnet.files.sentencepiece_model import read_pieces
from bitnet.files.source import TrainedSource
from bitnet.files.tensors import dense_shapes, projection_shape, projections
from bitnet.kernels import packing
from bitnet.kernels.reference import WeightCodes
from bitnet.model import Transformer
from bitnet.text.characters import train_char
from bitnet.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece

BASE = ModelConfig(
    vocab_size=400,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    hidden_act="silu",
    qk_norm=False,
    initializer_range=0.05,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "bitnet": {},
    "bitnet-2": {"num_key_value_heads": 4, "rope_theta": 500_000.0, "rms_norm_eps": 1e-6},
    "llama": {"sub_norms": False},
    "llama-untied": {"sub_norms": False, "tie_word_embeddings": False, "num_key_value_heads": 1},
}
BLOCKS = {"TQ2_0": ternary.TQ2_0, "TQ1_0": ternary.TQ1_0, "Q2_0": ternary.Q2_0}


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    lines = ["".join(random.choices("abcdefghij 한국어말은 ", k=60)) for _ in range(400)]
    return train_sentencepiece(["\n".join(lines)], 400)


def drawn(config: ModelConfig, seed: int) -> Transformer:
    model = Transformer(config)
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def drawn_codes(n: int, k: int, seed: int) -> torch.Tensor:
    """Codes with whole stretches of one value among them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)
    fill = int(torch.randint(-1, 3, (1,), generator=generator))
    if fill < 2:
        codes.view(-1)[: int(torch.randint(n * k + 1, (1,), generator=generator))] = fill
    return codes


# ---- bytes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=10_000)
@given(st.integers(1, 9), st.integers(1, 3), st.floats(1e-4, 1e4), st.integers(0, 2**31))
def test_pack_unpack_pack(n: int, blocks: int, scale: float, seed: int) -> None:
    """Every layout, 10,000 cases: the codes come back, and the bytes with them."""
    codes = drawn_codes(n, 256 * blocks, seed)
    weights = WeightCodes(codes, torch.tensor(scale))
    for layout in BLOCKS.values():
        data = layout.encode(weights)
        back = layout.decode(data, n, codes.shape[1], "x")
        assert torch.equal(back.codes, codes)
        assert np.array_equal(layout.encode(back), data)
    rows = drawn_codes(4 * n, 7 * blocks, seed)
    packed = ternary.pack_hf(rows)
    assert torch.equal(ternary.unpack_hf(packed, "x"), rows)
    assert torch.equal(ternary.pack_hf(ternary.unpack_hf(packed, "x")), packed)
    assert torch.equal(packing.unpack(packing.pack(rows), rows.shape[1]), rows)
    i2_s = write_i2_s(codes, scale)
    back = ternary.decode_i2_s(i2_s, n, codes.shape[1], "x")
    assert torch.equal(back.codes, codes)
    assert np.array_equal(write_i2_s(back.codes, float(back.scale)), i2_s)


def write_i2_s(codes: torch.Tensor, scale: float) -> np.ndarray:
    """bitnet.cpp's x86 layout, element by element as its quantiser loops."""
    flat = (codes.reshape(-1, 4, 32) + 1).numpy().astype(np.uint8)  # block, group, byte
    data = flat[:, 0] << 6 | flat[:, 1] << 4 | flat[:, 2] << 2 | flat[:, 3]
    return np.concatenate([data.reshape(-1), np.frombuffer(np.float32(scale).tobytes() + bytes(28), np.uint8)])


@pytest.mark.parametrize("name", ["TQ2_0", "TQ1_0"])
@pytest.mark.parametrize("shape", [(1, 256), (7, 512), (63, 768), (5, 2560)], ids=lambda s: f"N{s[0]}-K{s[1]}")
def test_bytes_are_those_of_gguf(name: str, shape: tuple[int, int]) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf comes with the extra `interop`")
    kind = gguf.GGMLQuantizationType[name]
    for _ in range(50):
        codes = torch.randint(-1, 2, shape, dtype=torch.int8)
        scale = torch.empty(()).uniform_(1e-3, 5)
        ours = BLOCKS[name].encode(WeightCodes(codes, scale))
        assert np.array_equal(ours, gguf.quants.quantize((codes * scale).numpy(), kind))
        dequantized = torch.from_numpy(gguf.quants.dequantize(ours, kind))
        assert torch.equal(dequantized, codes * scale.half().float())


def test_a_block_of_zeros_keeps_the_scale() -> None:
    """gguf writes 0 there, since it knows no scale but the block's; the codes are the same."""
    gguf = pytest.importorskip("gguf", reason="gguf comes with the extra `interop`")
    codes = torch.zeros(3, 512, dtype=torch.int8)
    codes[0, 300] = 1
    theirs = gguf.quants.quantize((codes * 0.5).float().numpy(), gguf.GGMLQuantizationType.TQ2_0)
    ours = ternary.TQ2_0.encode(WeightCodes(codes, torch.tensor(0.5)))
    assert np.array_equal(ours.reshape(-1, 66)[:, :64], theirs.reshape(-1, 66)[:, :64])
    for data in (ours, theirs):
        back = ternary.TQ2_0.decode(data, 3, 512, "x")
        assert torch.equal(back.codes, codes)
        assert float(back.scale) == 0.5


def test_q2_0_by_hand() -> None:
    """Four neighbours a byte, lowest bits first, behind an fp16 scale: no other package knows this type yet."""
    codes = torch.tensor([[-1, 0, 1, 1] + [0] * 60], dtype=torch.int8)
    data = ternary.Q2_0.encode(WeightCodes(codes, torch.tensor(0.25)))
    assert data.tobytes() == np.float16(0.25).tobytes() + bytes([0b10_10_01_00]) + bytes([0b01010101] * 15)


@pytest.mark.parametrize("name", BLOCKS)
def test_damaged_blocks(name: str) -> None:
    layout = BLOCKS[name]
    codes = torch.randint(-1, 2, (2, 512), dtype=torch.int8)
    codes[:, ::64] = 1
    whole = layout.encode(WeightCodes(codes, torch.tensor(0.5)))
    at = 0 if layout.scale_first else layout.bytes - 2
    for scale in (np.nan, np.inf, 0.0, -1.0):
        data = whole.copy().reshape(-1, layout.bytes)
        data[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        with pytest.raises(BitNetError, match="block scale of"):
            layout.decode(data, 2, 512, "x")
    data = whole.copy().reshape(-1, layout.bytes)
    data[1, at : at + 2] = np.frombuffer(np.float16(0.75).tobytes(), np.uint8)
    with pytest.raises(BitNetError, match=r"0\.5 to 0\.75, expected one for the whole tensor"):
        layout.decode(data, 2, 512, "x")
    data = whole.copy().reshape(-1, layout.bytes)
    data[1, 5] = 0xFF if name != "TQ1_0" else 1  # TQ1_0: no number is stored as 1
    with pytest.raises(BitNetError, match="code 3"):
        layout.decode(data, 2, 512, "x")
    for scale in (1e-6, 1e6, float("nan")):
        with pytest.raises(BitNetError, match="what 16 bits hold; export as f32"):
            layout.encode(WeightCodes(codes, torch.tensor(scale)))


# ---- the container -----------------------------------------------------------------------------------------


def test_gguf_reads_the_container(tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf comes with the extra `interop`")
    model = drawn(BASE.replace(vocab_size=tokenizer.vocab_size), seed)
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
    model = drawn(BASE.replace(vocab_size=tokenizer.vocab_size, **VARIANTS[variant]), seed)
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
    model = drawn(config, seed)
    source = TrainedSource(model, None, {})
    twin = Transformer(config.replace(hidden_act="silu"))  # whose file lends its keys, norms and embedding
    twin.load_state_dict(model.state_dict())
    path = export_gguf(TrainedSource(twin, None, {}), tmp_path / "m.gguf", "f32")
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
def test_a_scale_beside_the_tensor(exact: bool, seed: int, tmp_path: Path) -> None:
    """Newer converters write d = 1 and an F32 tensor `.scale`: the scale keeps all of its bits."""
    source = TrainedSource(drawn(BASE, seed), None, {})
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


# ---- llama.cpp ---------------------------------------------------------------------------------------------

# In a process of its own: llama.cpp ends the process it is in on some errors.
ORACLE = """
import json, sys
import numpy as np
import cyllama.llama.llama_cpp as llama

def main(path, vocabulary, request):
    class Model(llama.LlamaModel):
        n_vocab = vocabulary  # the wheel's get_logits_ith asks the model for it
    llama.disable_logging()
    model = Model(path)
    request = json.load(open(request))
    vocab = model.get_vocab()
    if request["ids"]:
        settings = llama.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = 1
        context = llama.LlamaContext(model, settings)
        batch = llama.LlamaBatch(n_tokens=512, embd=0, n_seq_max=1)
        batch.set_batch(request["ids"], 0, True)
        context.decode(batch)
        rows = [context.get_logits_ith(i) for i in range(len(request["ids"]))]
        np.save(path + ".npy", np.array(rows, np.float32))
    print(json.dumps([vocab.tokenize(line, False, False) for line in request["lines"]]))

main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
"""


def llama_cpp(path: Path, vocab_size: int, ids: list[int], lines: list[str]) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits [T, V] of `ids`, and the tokens of `lines`, by llama.cpp (cyllama's build)."""
    request = path.with_suffix(".json")
    request.write_text(json.dumps({"ids": ids, "lines": lines}))
    command = [sys.executable, "-c", ORACLE, str(path), str(vocab_size), str(request)]
    done = child_process.run(command)
    tokens = json.loads(done.stdout.splitlines()[-1])
    return torch.from_numpy(np.load(f"{path}.npy")) if ids else torch.empty(0), tokens


def as_float(model: Transformer) -> Transformer:
    """The same ternary weights without int8 activations: what llama.cpp computes from F32 and F16 files."""
    twin = Transformer(model.config.replace(linear="float"))
    state = model.state_dict()
    for name in projections(model.config):
        codes, scale = TrainedSource(model, None, {}).codes(name)
        state[f"{name}.weight"] = codes * scale
    twin.load_state_dict(state)
    return twin


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def kl(expected: torch.Tensor, got: torch.Tensor) -> float:
    p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["f32", "f16", "tq2_0", "tq1_0"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_runs_the_export(
    variant: str, kind: str, tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path
) -> None:
    """F32: 2e-3 of the same weights in float; llama.cpp keeps keys and values in fp16, which alone is 1e-3.

    Ternary types: int8 activations on both sides, but llama.cpp takes a scale for every 256 of them: two roundings
    that have nothing to do with each other, 2.5 % of a random model's logits, and little of its distribution.
    """
    pytest.importorskip("cyllama", reason="cyllama comes with the extra `interop`")
    model = drawn(BASE.replace(vocab_size=tokenizer.vocab_size, **VARIANTS[variant]), seed)
    path = export_gguf(TrainedSource(model, tokenizer, {}), tmp_path / "m.gguf", kind)
    ids = torch.randint(3, tokenizer.vocab_size, (100,))
    got, _ = llama_cpp(path, tokenizer.vocab_size, ids.tolist(), [])
    with torch.no_grad():
        expected = (as_float(model) if kind in ("f32", "f16") else model)(ids[None])[0]
    assert relative(got, expected) <= {"f32": 2e-3, "f16": 4e-3}.get(kind, 6e-2)
    assert kl(expected, got) <= 2e-3


def test_llama_cpp_has_the_same_tokens(tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path) -> None:
    """A thousand lines in two scripts, with characters that only bytes can spell, and runs of spaces."""
    pytest.importorskip("cyllama", reason="cyllama comes with the extra `interop`")
    model = drawn(BASE.replace(vocab_size=tokenizer.vocab_size), seed)
    path = export_gguf(TrainedSource(model, tokenizer, {}), tmp_path / "m.gguf", "tq2_0")
    alphabet = "abcdefghij  .1é\t" + "한국어말은😀힣"
    lines = ["".join(random.choices(alphabet, k=random.randint(1, 60))) for _ in range(1000)]
    _, tokens = llama_cpp(path, tokenizer.vocab_size, [], lines)
    assert tokens == tokenizer.encode_batch(lines)


def test_a_tokenizer_that_puts_a_space_first(tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path) -> None:
    """LLaMA-2's habit, which our own tokenizers do not have: read through tokenizers, the same ids as llama.cpp."""
    pytest.importorskip("cyllama", reason="cyllama comes with the extra `interop`")
    pytest.importorskip("tokenizers", reason="tokenizers comes with the extra of that name")
    model = drawn(BASE.replace(vocab_size=tokenizer.vocab_size), seed)
    path = export_gguf(TrainedSource(model, tokenizer, {}), tmp_path / "m.gguf", "tq2_0")
    raw = path.read_bytes()
    name = b"tokenizer.ggml.add_space_prefix" + (7).to_bytes(4, "little")
    assert raw.count(name + b"\0") == 1
    path.write_bytes(raw.replace(name + b"\0", name + b"\1"))
    lines = ["".join(random.choices("abcdefghij  .1é 한국어말은힣", k=random.randint(1, 40))) for _ in range(300)]
    _, tokens = llama_cpp(path, tokenizer.vocab_size, [], lines)
    source = GgufSource(path)
    assert source.tokenizer.kind == "tokenizer.json"
    assert source.tokenizer.encode_batch(lines) == tokens
    import_model(source, tmp_path / "m.safetensors", source.tokenizer)
    assert load(tmp_path / "m.safetensors").tokenizer.bos_id == tokenizer.bos_id


def test_a_new_llama_cpp_runs_q2_0(tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path) -> None:
    """xllamacpp, the newer build, gives the same next-token probabilities from Q2_0 and TQ2_0 as we do."""
    pytest.importorskip("xllamacpp", reason="xllamacpp comes with the extra `interop`")
    model = drawn(BASE.replace(vocab_size=tokenizer.vocab_size), seed)
    ids = torch.randint(259, tokenizer.vocab_size, (20,)).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    for kind in ("q2_0", "tq2_0"):
        path = export_gguf(TrainedSource(model, tokenizer, {}), tmp_path / f"{kind}.gguf", kind)
        command = [sys.executable, "-c", SERVER, str(path), json.dumps(ids)]
        done = child_process.run(command)
        top = json.loads(done.stdout.splitlines()[-1])
        expected = logits.log_softmax(-1)
        assert len(top) == 100
        gaps = [abs(float(expected[id]) - logprob) for id, logprob in top]
        assert sum(gaps) / len(gaps) <= 0.05, (kind, gaps)  # the noise of int8 activations; swapped codes give 1


SERVER = """
import json, sys
import xllamacpp as x
params = x.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = x.Server(params)
ids = json.loads(sys.argv[2])
# It tells no probabilities where the drawn token is half a letter or ends the text: a bias, which they leave out, makes
# it one of the prompt's.
request = {"prompt": ids, "max_tokens": 1, "logprobs": 100, "temperature": 0, "cache_prompt": False}
request["logit_bias"] = [[ids[0], 1000.0]]
result = server.handle_completions(request)
top = result["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print(json.dumps([[entry["id"], entry["logprob"]] for entry in top]), flush=True)
import os
os._exit(0)  # threads of the server hold the interpreter
"""


# ---- what is refused ---------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "ReLU^2": ({"hidden_act": "relu2"}, "tq2_0", r"ReLU\^2.*hidden_act=silu.*--to hf-packed,"),
    "plain ReLU^2": ({"hidden_act": "relu2", "linear": "float"}, "f16", r"ReLU\^2.*--to hf,"),
    "QK norm": ({"qk_norm": True}, "tq2_0", r"QK norm.*nano-portable"),
    "untied": ({"tie_word_embeddings": False}, "f32", r"head of its own.*--to hf-packed"),
    "width": ({"hidden_size": 320, "num_attention_heads": 2}, "tq2_0", r"hidden_size 320.*q2_0"),
    "ffn": ({"intermediate_size": 500}, "tq1_0", r"intermediate_size 500, expected a multiple of 256.*f16"),
    "float": ({"linear": "float"}, "tq2_0", "not ternary"),
    "type": ({}, "q4_k", "expected one of tq2_0"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED.values(), ids=list(REFUSED))
def test_export_refuses(changes: dict[str, Any], kind: str, message: str, seed: int, tmp_path: Path) -> None:
    source = TrainedSource(drawn(BASE.replace(**changes), seed), None, {})
    with pytest.raises(BitNetError, match=message):
        export_gguf(source, tmp_path / "m.gguf", kind)
    assert not list(tmp_path.iterdir())


def test_export_leaves_nothing_of_a_failure(seed: int, tmp_path: Path) -> None:
    model = drawn(BASE.replace(vocab_size=3), seed)
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
    with pytest.raises(BitNetError, match="is no GGUF file"):
        export_gguf(TrainedSource(model, None, {}), tmp_path / "mine.txt", "f32")


def test_f16_holds_what_it_is_given(seed: int, tmp_path: Path) -> None:
    """Small numbers keep a bit or two in fp16: refused, where f32 writes them as they are."""
    config = BASE.replace(num_hidden_layers=1)
    for linear, name, factor, part in (
        ("ternary", "model.layers.0.mlp.up_proj.weight", 1e-4, r"up_proj: F16: got a weight scale.*export as f32"),
        ("float", "model.layers.0.mlp.up_proj.weight", 1e-5, r"up_proj: rounding to F16.*export as f32"),
        ("float", "model.embed_tokens.weight", 1e-5, r"embed_tokens.weight: rounding to F16.*export as f32"),
    ):
        model = drawn(config.replace(linear=linear), seed)
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


def test_a_file_of_many_tensors_is_read_at_once(tmp_path: Path) -> None:
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


def test_a_packed_file_of_any_kind_goes_out(seed: int, tmp_path: Path) -> None:
    """int8 embeddings and binary weights: a packed layout holds both unchanged."""
    model = drawn(BASE.replace(linear="binary"), seed)
    packed = read_packed(write_packed(tmp_path / "m.safetensors", model, None, embedding="int8"))
    back = GgufSource(export_gguf(PackedSource(packed), tmp_path / "m.gguf", "tq2_0"))
    codes = back.codes("model.layers.1.self_attn.q_proj").codes
    assert torch.equal(codes, PackedSource(packed).codes("model.layers.1.self_attn.q_proj").codes)
    assert set(codes.unique().tolist()) == {-1, 1}


# ---- damaged and hostile files -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: SentencePieceTokenizer
) -> tuple[dict[str, Any], list, list]:
    """Keys, plan and bytes of a good file, to spoil."""
    config = BASE.replace(num_hidden_layers=1, vocab_size=tokenizer.vocab_size)
    source = TrainedSource(drawn(config, 1), tokenizer, {})
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


SPOILED: dict[str, tuple[Callable[..., tuple[dict[str, Any], list, list]], str]] = {
    "architecture": (key("general.architecture", "mamba"), "mamba"),
    "no architecture": (lambda k, p, d: ({}, p, d), "general.architecture"),
    "architecture of another kind": (key("general.architecture", 7), "expected a text"),
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


@pytest.mark.parametrize(("spoil", "part"), SPOILED.values(), ids=list(SPOILED))
def test_a_spoiled_file(
    spoil: Callable[..., Any], part: str, made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, plan, data = spoil(*made)
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
    "a name past the end": (header(keys=1, rest=number(2**20, 8)), "goes on past"),
    "a length that wraps": (header(keys=1, rest=number(2**64 - 1, 8)), "string of"),
    "a value of no type": (header(keys=1, rest=text("a") + number(99)), "type 99"),
    "an array of arrays": (header(keys=1, rest=text("a") + number(9) + number(9) + number(1, 8)), "type 9"),
    "a huge array": (header(keys=1, rest=text("a") + number(9) + number(12) + number(2**61, 8)), "goes on past"),
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
def test_a_hostile_header(raw: bytes, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    refused(tmp_path, "texts of more than", capsys)


@pytest.mark.slow
def test_pieces_that_would_take_memory() -> None:
    with pytest.raises(BitNetError, match="more than 524,288 pieces"):
        read_pieces(b"\x0a\x03\x0a\x01a" * ((1 << 19) + 1))
    with pytest.raises(BitNetError, match="a piece of more than"):
        read_pieces(b"\x0a\x84\x20\x0a\x81\x20" + b"a" * 4097)


def test_a_file_that_was_cut(made: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        write_gguf(file, made[0], made[1], iter(made[2]))
    whole = path.read_bytes()
    for _ in range(50):
        path.write_bytes(whole[: random.randrange(len(whole) - 31)])
        with pytest.raises(BitNetError, match=r"cut short|goes on past|expected"):
            GgufSource(path)
