"""The packed file: what is written is what runs, any safetensors reader can read it, and nothing damaged gets in."""

import json
import os
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from packed_models import CHARACTERS, CONFIG, VARIANTS, content, trained
from torch import Tensor, nn

from bitnet.engine.load import load
from bitnet.engine.torch import TorchEngine
from bitnet.errors import BitNetError
from bitnet.files import safetensors_file
from bitnet.files.packed import build, read_packed, write_packed
from bitnet.files.packed_layout import packed_bytes
from bitnet.files.tensors import float16_bytes, linear_parameters, parameters
from bitnet.inspection import inspect_packed, projection_reports
from bitnet.kernels import ops, reference
from bitnet.layers import BitLinear, PackedLinear
from bitnet.model import Transformer
from bitnet.text.characters import CharTokenizer

# ---- the same model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant: str, seed: int, tmp_path: Path) -> None:
    model = trained(seed, **VARIANTS[variant])
    path = write_packed(tmp_path / "m.safetensors", model, CharTokenizer(CHARACTERS), info={"steps": 3, "loss": 1.5})
    packed = read_packed(str(path))
    assert packed.config == model.config
    assert packed.info == {"steps": 3, "loss": 1.5}
    assert packed.tokenizer is not None
    assert packed.tokenizer.decode([0, 3, 60]) == CHARACTERS[0] + CHARACTERS[3] + CHARACTERS[60]
    assert set(packed.tensors) == set(content(path)[1]) - {"tokenizer"}
    again = write_packed(tmp_path / "again.safetensors", model, packed.tokenizer, info=packed.info)
    metadata, tensors = content(path)
    metadata_again, tensors_again = content(again)
    assert metadata == metadata_again
    assert all(torch.equal(tensors[name], tensors_again[name]) for name in tensors | tensors_again)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "float"])
def test_engine_of_the_file_is_the_trained_model(variant: str, seed: int, tmp_path: Path) -> None:
    """Bit for bit: the same integers, the same scales, an embedding that training already uses at bf16 values."""
    model = trained(seed, **VARIANTS[variant])
    engine = load(write_packed(tmp_path / "m.safetensors", model, None), engine="torch")
    assert engine.tokenizer is None
    ids = torch.randint(61, (3, 20))
    with torch.no_grad():
        expected = model(ids)
    logits = engine.logits(ids)
    assert torch.equal(logits, expected)
    target = expected.log_softmax(-1)
    assert float((target.exp() * (target - logits.log_softmax(-1))).sum(-1).mean()) <= 1e-5


def test_float_model_is_stored_in_bf16(seed: int, tmp_path: Path) -> None:
    model = trained(seed, linear="float")
    engine = load(write_packed(tmp_path / "m.safetensors", model, None))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj." in name:
                parameter.copy_(parameter.bfloat16())
    ids = torch.randint(61, (2, 11))
    with torch.no_grad():
        assert torch.equal(engine.logits(ids), model(ids))


def test_every_layer_gives_the_same_integers(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = build(read_packed(write_packed(tmp_path / "m.safetensors", model, None)))
    sums: list[Tensor] = []
    for name in ("codes_matmul", "packed_matmul"):
        product = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda q, w, f=product: (sums.append(f(q, w)), sums[-1])[1])
    outputs: list[Tensor] = []
    for module in (*model.modules(), *packed.modules()):
        if type(module).__name__ in ("Attention", "FeedForward", "Block", "RMSNorm"):
            module.register_forward_hook(lambda module, args, y: outputs.append(y))
    ids = torch.randint(61, (2, 9))
    with torch.no_grad():
        model(ids)
        trained_sums, trained_outputs = list(sums), list(outputs)
        sums.clear()
        outputs.clear()
        packed(ids)
    # Training multiplies q|k|v and gate|up in one product, the packed model one by one.
    parts = iter(sums)
    merged = [
        torch.cat([next(parts) for _ in range(n)], dim=1) for _ in range(CONFIG.num_hidden_layers) for n in (3, 1, 2, 1)
    ]
    assert next(parts, None) is None
    assert len(merged) == len(trained_sums)
    for ours, theirs in zip(merged, trained_sums, strict=True):
        assert ours.dtype == torch.int32
        assert torch.equal(ours, theirs)
    assert len(outputs) == len(trained_outputs) > 10
    for ours, theirs in zip(outputs, trained_outputs, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max())


def test_build_replaces_every_projection(file: Path) -> None:
    built = build(read_packed(file))
    kinds = {type(module) for name, module in built.named_modules() if name.endswith("_proj")}
    assert kinds == {PackedLinear}
    assert not any(parameter.requires_grad for parameter in built.parameters())
    assert not any(tensor.is_meta for tensor in (*built.parameters(), *built.buffers()))


# ---- the file ----------------------------------------------------------------------------------------------


def test_any_reader_can_decode_it(model: Transformer, file: Path) -> None:
    """By hand, with the json and struct of the standard library: header, one projection, its scale, the tokenizer."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__")
    assert (metadata["format"], metadata["version"], metadata["layout"]) == ("bitnet-packed", "1", "k4-lsb")
    assert json.loads(metadata["config"]) == CONFIG.to_dict()

    def data(name: str, dtype: str) -> bytes:
        assert header[name]["dtype"] == dtype
        start, end = header[name]["data_offsets"]
        return body[start:end]

    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight.detach()
    codes = reference.ternary_weights(weight).codes.tolist()
    n, width = header[f"{name}.weight"]["shape"]
    packed = data(f"{name}.weight", "U8")
    decoded = [[(packed[i * width + k // 4] >> 2 * (k % 4) & 3) - 1 for k in range(42)] for i in range(n)]
    assert decoded == codes
    (scale,) = struct.unpack("<f", data(f"{name}.weight_scale", "F32"))
    assert abs(scale / float(weight.double().abs().mean()) - 1) < 1e-6  # 42 + 2 roundings of 2^-24
    assert metadata["tokenizer"] == "char"
    assert json.loads(data("tokenizer", "U8"))["characters"] == "".join(CHARACTERS)
    embedding = data("model.embed_tokens.weight", "BF16")
    first = struct.unpack("<f", b"\0\0" + embedding[:2])[0]  # bf16 is the upper half of fp32
    assert first == float(model.model.embed_tokens.weight[0, 0].detach().bfloat16())


@pytest.mark.parametrize("variant", VARIANTS)
def test_size_is_two_bits_a_weight(variant: str, tmp_path: Path) -> None:
    config = CONFIG.replace(hidden_size=64, intermediate_size=192, initializer_range=0.02, **VARIANTS[variant])
    model = Transformer(config)
    model.init_weights(1)
    path = write_packed(tmp_path / "m.safetensors", model, None)
    size, header = path.stat().st_size, struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert size == 8 + header + packed_bytes(config)
    assert header < 12_000
    weights, rest = linear_parameters(config), parameters(config) - linear_parameters(config)
    if config.linear == "float":
        return
    # 64 and 192 are multiples of 4: two bits a weight exactly. Norms are kept at 32 bits, seven scales a layer.
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert packed_bytes(config) == weights // 4 + 2 * (rest - norms) + 4 * norms + 28 * config.num_hidden_layers
    assert float16_bytes(config) == 2 * (weights + rest)


def test_inspection(model: Transformer, file: Path) -> None:
    report = inspect_packed(file)
    json.dumps(report)
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["ternary_parameters"] == sum(m.weight.numel() for m in model.modules() if isinstance(m, BitLinear))
    assert report["file_bytes"] == file.stat().st_size
    assert [row["name"] for row in report["layers"]] == [
        n for n, m in model.named_modules() if isinstance(m, BitLinear)
    ]
    zeros = total = 0
    for row in projection_reports(read_packed(file)):
        layer = model.get_submodule(row.name)
        codes, scale = reference.ternary_weights(layer.weight.detach())
        assert row.shape == tuple(codes.shape)
        assert row.scale == float(scale)
        assert row.zeros == pytest.approx(float((codes == 0).double().mean()), rel=1e-6)
        zeros, total = zeros + int((codes == 0).sum()), total + codes.numel()
    assert report["zero_fraction"] == pytest.approx(zeros / total, rel=1e-6)
    assert report["bits_per_weight"] >= 2


@pytest.mark.parametrize("variant", ["ternary", "untied-silu"])
def test_int8_embedding(variant: str, seed: int, tmp_path: Path) -> None:
    model = trained(seed, **VARIANTS[variant])
    path = write_packed(tmp_path / "m.safetensors", model, None, embedding="int8")
    tensors = content(path)[1]
    embeddings = [name for name in tensors if name.endswith((".embed_tokens.weight", "lm_head.weight"))]
    assert len(embeddings) == (1 if variant == "ternary" else 2)
    engine = load(path, engine="torch")
    assert isinstance(engine, TorchEngine)
    state = engine.model.state_dict()
    for name in embeddings:
        assert tensors[name].dtype == torch.int8
        assert tensors[name.removesuffix("weight") + "scale"].shape == (61, 1)
        values = engine.model.get_submodule(name.removesuffix(".weight")).values()
        assert torch.equal(values, state[name])  # not rounded to bf16 on top
        rows = model.state_dict()[name].bfloat16().double()
        step = rows.abs().amax(dim=1, keepdim=True) / 127
        # Half a step, and four fp32 roundings on numbers of up to 127 steps.
        assert bool(((state[name].double() - rows).abs() <= step * (0.5 + 127 * 4 * 2.0**-24)).all())
    assert engine.logits(torch.tensor([1, 2, 3])).shape == (3, 61)
    bf16 = write_packed(tmp_path / "b.safetensors", model, None)
    saved = len(embeddings) * (61 * CONFIG.hidden_size - 61 * 4)
    assert sum(t.numel() * t.element_size() for t in content(bf16)[1].values()) - saved == sum(
        t.numel() * t.element_size() for t in tensors.values()
    )


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002], ids=oct)
def test_file_mode_follows_the_umask(umask: int, model: Transformer, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        path = write_packed(tmp_path / "m.safetensors", model, None)
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
        assert os.umask(umask) == umask  # and it is left as it was
    finally:
        os.umask(before)


# ---- writing safely ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
@pytest.mark.parametrize("exists", [True, False])
def test_failed_write_changes_nothing(
    broken: str, exists: bool, model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    before = write_packed(path, model, None).read_bytes() if exists else None

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    target, name, stand_in = {
        "write": (safetensors_file.TensorWriter, "write", fail),
        "fsync": (os, "fsync", fail),
        "replace": (Path, "replace", fail),
    }[broken]
    other = trained(7)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, stand_in)
        with pytest.raises(OSError, match="No space left"):
            write_packed(path, other, None)
    assert [p.name for p in tmp_path.iterdir()] == (["model.safetensors"] if exists else [])
    if exists:
        assert path.read_bytes() == before
    write_packed(path, model, None)
    read_packed(path)


def test_packed_file_is_replaced(file: Path) -> None:
    other = trained(3)
    write_packed(file, other, None)
    codes = content(file)[1]["model.norm.weight"]
    assert torch.equal(codes, other.model.norm.weight)
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_targets_that_are_refused(model: Transformer, tmp_path: Path) -> None:
    with pytest.raises(BitNetError, match=r"got a folder .*expected a file to write, such as .*model\.safetensors"):
        write_packed(tmp_path, model, None)
    with pytest.raises(BitNetError, match=r"got no folder .*create it first"):
        write_packed(tmp_path / "nowhere" / "m.safetensors", model, None)
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine")
    with pytest.raises(BitNetError, match=r"exists and is not a packed model; remove it or choose another"):
        write_packed(foreign, model, None)
    assert foreign.read_text() == "mine"
    weights = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, weights, {"format": "pt"})
    before = weights.read_bytes()
    with pytest.raises(BitNetError, match="is not a packed model"):
        write_packed(weights, model, None)
    assert weights.read_bytes() == before
    with pytest.raises(BitNetError, match=r"got embedding 'fp4', expected one of bf16, int8"):
        write_packed(tmp_path / "m.safetensors", model, None, embedding="fp4")
    with pytest.raises(BitNetError, match=r"got 60 tokens in the tokenizer, expected 61"):
        write_packed(tmp_path / "m.safetensors", model, CharTokenizer(CHARACTERS[:60]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "other.safetensors"]


def test_engine_drops_the_packed_copy(file: Path) -> None:
    engine = load(file, engine="torch")
    assert isinstance(engine, TorchEngine)
    layers = [module for module in engine.model.modules() if isinstance(module, PackedLinear)]
    assert layers
    assert all(layer.packed is None for layer in layers)
    assert not any(isinstance(module, nn.Linear) for module in engine.model.modules())
