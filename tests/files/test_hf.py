"""Hugging Face folders against transformers itself: what we write loads there, what it writes loads here."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet.config import ModelConfig
from bitnet.engine.load import load
from bitnet.errors import BitNetError
from bitnet.files import ternary
from bitnet.files.hf.export import export_hf, move_from_edges
from bitnet.files.hf.read import HfSource
from bitnet.files.importing import import_model
from bitnet.files.packed import PackedSource, read_packed, write_packed
from bitnet.files.source import TrainedSource
from bitnet.files.tensors import projections
from bitnet.kernels import native, ops
from bitnet.model import Transformer
from bitnet.text.characters import train_char
from bitnet.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece

transformers = pytest.importorskip("transformers", reason="transformers comes with the extra `interop`")
pytest.importorskip("accelerate", reason="accelerate comes with the extra `interop`")
bitnet_there = pytest.importorskip("transformers.integrations.bitnet")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations are not ours to mend

SHAPES = {
    "wide": {"hidden_size": 64, "intermediate_size": 100, "num_attention_heads": 4, "num_key_value_heads": 2},
    "deep": {"hidden_size": 24, "intermediate_size": 68, "num_attention_heads": 2, "num_key_value_heads": 1},
    "one head each": {"hidden_size": 40, "intermediate_size": 44, "num_attention_heads": 5, "num_key_value_heads": 5},
}
BASE = ModelConfig(
    vocab_size=300,
    num_hidden_layers=2,
    max_position_embeddings=64,
    qk_norm=False,
    initializer_range=0.1,
    **SHAPES["wide"],
)
VARIANTS: dict[str, dict[str, Any]] = {
    "bitnet": {},
    "bitnet-silu": {"hidden_act": "silu"},
    "bitnet-untied": {"tie_word_embeddings": False, "rope_theta": 500_000.0},
    "llama": {"sub_norms": False, "hidden_act": "silu"},
    "llama-untied": {"sub_norms": False, "hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
}


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers compiles its quantisers, which takes a C++ compiler and most of a minute on a CPU."""
    import torch._dynamo

    monkeypatch.delenv("BITNET_BACKEND", raising=False)
    with torch._dynamo.config.patch(disable=True):
        yield


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    words = ["".join(random.choices("abcdefgh", k=random.randint(1, 8))) for _ in range(400)]
    words += ["".join(chr(random.randrange(0xAC00, 0xAC40)) for _ in range(random.randint(1, 4))) for _ in range(300)]
    lines = [" ".join(random.choices(words, k=12)) for _ in range(400)]
    return train_sentencepiece(["\n".join(lines)], 360)


def drawn(config: ModelConfig, seed: int) -> Transformer:
    """A model with random weights, gains away from 1, and zeros, small and large weights in every projection."""
    model = Transformer(config)
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def kl(expected: Tensor, got: Tensor) -> float:
    p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def load_there(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def inputs_of(model: nn.Module, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every projection of transformers' model while it reads `ids`."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, y, name=name: seen.update({name: (args[0], y)}))
        for name, module in model.named_modules()
        if name.endswith("_proj")
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def assert_same_layers(theirs: nn.Module, ours: Transformer, ids: Tensor) -> None:
    """Every projection gives the same output for the same input, to 1e-6 of its largest value.

    Both sum integers exactly, or the same numbers scaled: what is left is a rounding of fp32 before and after.
    """
    seen = inputs_of(theirs, ids)
    assert sorted(seen) == sorted(projections(ours.config))
    for name, (x, expected) in seen.items():
        with torch.no_grad():
            got = ours.get_submodule(name)(x)
        worst = float((got - expected).abs().max() / expected.abs().max())
        assert worst <= 1e-6, f"{name}: {worst}"


# ---- out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["hf", "hf-packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_runs_the_export(
    variant: str, target: str, tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path
) -> None:
    model = drawn(BASE.replace(vocab_size=tokenizer.vocab_size, **VARIANTS[variant]), seed)
    folder = export_hf(TrainedSource(model, tokenizer, {}), tmp_path / "out", packed=target == "hf-packed")
    theirs = load_there(folder)
    llama = not model.config.sub_norms
    assert type(theirs).__name__ == ("LlamaForCausalLM" if llama else "BitNetForCausalLM")
    layer = theirs.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == ("BitLinear" if llama and target == "hf-packed" else "AutoBitLinear")
    ids = torch.randint(tokenizer.vocab_size, (2, 33))
    assert_same_layers(theirs, model, ids)
    with torch.no_grad():
        expected, got = model(ids), theirs(ids).logits
    assert kl(expected, got) <= 1e-3
    assert float((expected.argmax(-1) == got.argmax(-1)).float().mean()) > 0.9


@pytest.mark.parametrize("variant", ["bitnet", "llama"])
def test_a_plain_model_stays_a_float_model(variant: str, seed: int, tmp_path: Path) -> None:
    model = drawn(BASE.replace(linear="float", **VARIANTS[variant]), seed)
    folder = export_hf(TrainedSource(model, None, {}), tmp_path / "out", packed=False)
    theirs = load_there(folder)
    assert type(theirs.model.layers[0].mlp.up_proj) is nn.Linear
    ids = torch.randint(300, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)  # fp32 sums in another order
    source = HfSource(folder)
    assert source.config.linear == "float"
    with pytest.raises(BitNetError, match="not ternary"):
        export_hf(TrainedSource(model, None, {}), tmp_path / "packed", packed=True)


def test_masters_on_the_edge_keep_their_codes(seed: int, tmp_path: Path) -> None:
    """Weights within a few ulp of half the scale: fp32 and fp64 means put them on either side, the export does not."""
    model = drawn(BASE, seed)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        # The mean of all with 800 of them at half of it.
        scale = float(layer.weight[:, 8:].double().abs().sum() / (layer.weight.numel() - 400))
        layer.weight[:, :8] = 0.5 * scale * (1 + torch.randint(-16, 17, (100, 8)).double() * 2.0**-24)
    codes = layer.quantized_weight().codes
    assert 0 < int(codes[:, :8].sum()) < 800
    exported = move_from_edges(layer.weight.detach(), codes, layer.quantized_weight().scale)
    assert float((exported - layer.weight).abs().max()) < 1e-5 * scale
    for total in (exported.abs().mean(), exported.double().abs().mean().float(), exported.T.abs().mean() * (1 + 1e-6)):
        assert torch.equal((exported / total).round().clamp(-1, 1).to(torch.int8), codes)
    folder = export_hf(TrainedSource(model, None, {}), tmp_path / "out", packed=False)
    assert_same_layers(load_there(folder), model, torch.randint(300, (2, 30)))


def test_masters_can_be_trained_on_there(seed: int, tmp_path: Path) -> None:
    folder = export_hf(TrainedSource(drawn(BASE, seed), None, {}), tmp_path / "out", packed=False)
    theirs = load_there(folder)
    ids = torch.randint(300, (2, 16))
    theirs(ids, labels=ids).loss.backward()
    assert float(theirs.model.layers[0].mlp.up_proj.weight.grad.abs().sum()) > 0


def test_binary_goes_out_packed_only(seed: int, tmp_path: Path) -> None:
    model = drawn(BASE.replace(linear="binary"), seed)
    source = TrainedSource(model, None, {})
    with pytest.raises(BitNetError, match=r"binary.*--to hf-packed"):
        export_hf(source, tmp_path / "no", packed=False)
    assert not list(tmp_path.iterdir())
    theirs = load_there(export_hf(source, tmp_path / "out", packed=True))
    assert_same_layers(theirs, model, torch.randint(300, (1, 20)))


def test_export_refuses_what_transformers_has_not(seed: int, tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    for packed in (True, False):
        with pytest.raises(BitNetError, match=r"QK norm.*nano-portable"):
            export_hf(TrainedSource(drawn(BASE.replace(qk_norm=True), seed), None, {}), tmp_path / "a", packed=packed)
    file = write_packed(tmp_path / "m.safetensors", drawn(BASE, seed), None)
    with pytest.raises(BitNetError, match=r"ternary codes only.*folder of the run"):
        export_hf(PackedSource(read_packed(file)), tmp_path / "a", packed=False)
    with pytest.raises(BitNetError, match=r"kind 'char'.*--tokenizer sentencepiece"):
        export_hf(
            TrainedSource(drawn(BASE.replace(vocab_size=3), seed), train_char(["abc"]), {}), tmp_path / "a", packed=True
        )
    odd = drawn(BASE.replace(intermediate_size=102), seed)
    with pytest.raises(BitNetError, match="102 rows, expected a multiple of 4"):
        export_hf(TrainedSource(odd, None, {}), tmp_path / "a", packed=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(BitNetError, match="not empty"):
        export_hf(TrainedSource(drawn(BASE, seed), None, {}), tmp_path / "full", packed=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "m.safetensors"]


# ---- tokenizers ----------------------------------------------------------------------------------------------


def test_the_exported_tokenizer_gives_the_same_ids(
    tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path
) -> None:
    model = drawn(BASE.replace(vocab_size=tokenizer.vocab_size), seed)
    folder = export_hf(TrainedSource(model, tokenizer, {}), tmp_path / "out", packed=True)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    alphabet = "abcdefgh  \t12.,!éß中\U0001f600" + "".join(map(chr, range(0xAC00, 0xAC42)))
    for _ in range(1000):
        line = "".join(random.choices(alphabet, k=random.randint(0, 60)))
        ids = tokenizer.encode(line)
        assert theirs.encode(line, add_special_tokens=False) == ids, line
        assert theirs.encode(line) == [tokenizer.bos_id, *ids]
        assert theirs.decode(ids) == line
    assert (folder / "tokenizer.model").read_bytes() == tokenizer.to_bytes()
    assert HfSource(folder).tokenizer.to_bytes() == tokenizer.to_bytes()
    (folder / "tokenizer.model").unlink()
    again = HfSource(folder).tokenizer
    assert again.kind == "tokenizer.json"
    text = "abc \uac00\uac01\n  d\u20ac"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text


# ---- in ------------------------------------------------------------------------------------------------------


def there(config: ModelConfig) -> Any:
    """A random model of transformers' own class, float, with bf16 tables as published ones have."""
    known = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.context,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    kind = "BitNet" if config.sub_norms else "Llama"
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**known)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            if "embed" in name or "head" in name:
                parameter.copy_(parameter.bfloat16())
    return model


QUANTIZATION = {
    "master": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "multiply": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "divide": {},
}


def save_as(model: Any, folder: Path, kind: str, shard: str = "5GB") -> Path:
    """A folder as its authors would publish it: transformers' own files, its packing, its scales."""
    model.save_pretrained(folder, max_shard_size=shard)
    settings = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"], **QUANTIZATION[kind]}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    if kind == "master":
        return folder
    for file in folder.glob("*.safetensors"):
        tensors = load_tensors(file)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = tensors[name].float()
            scale = 1 / weight.abs().mean().clamp(min=1e-5)
            codes = (weight * scale).round().clamp(-1, 1)
            tensors[name] = bitnet_there.pack_weights(codes)
            stored = scale if kind == "divide" else 1 / scale
            tensors[name.replace(".weight", ".weight_scale")] = stored.reshape(1)
        save_tensors(tensors, file)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = {name: file.name for file in folder.glob("*.safetensors") for name in load_tensors(file)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def load_tensors(path: Path) -> dict[str, Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(path)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", QUANTIZATION)
@pytest.mark.parametrize("variant", VARIANTS)
def test_models_of_transformers_run_here(variant: str, kind: str, shape: str, tmp_path: Path) -> None:
    config = BASE.replace(**SHAPES[shape], **VARIANTS[variant])
    shard = "30KB" if shape == "deep" else "5GB"
    folder = save_as(there(config), tmp_path / "in", kind, shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shape == "deep")
    theirs = load_there(folder)
    source = HfSource(folder)
    assert source.config == config.replace(initializer_range=0.1)
    (note,) = import_model(source, tmp_path / "m.safetensors", None)
    assert "no tokenizer" in note
    ids = torch.randint(300, (2, 33))
    with torch.no_grad():
        expected = theirs(ids).logits
    for backend in [b for b in ops.BACKENDS if b.why_not(torch.device("cpu")) is None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(ops.ENVIRONMENT, backend.name)
            engine = load(tmp_path / "m.safetensors", engine="torch")
            assert_same_layers(theirs, engine.model, ids)
            got = engine.logits(ids)
        assert kl(expected, got) <= 1e-3, backend.name
    if native.why_not() is None:
        got = torch.stack([load(tmp_path / "m.safetensors", engine="cpu").logits(row[None])[0] for row in ids])
        assert kl(expected, got) <= 1e-3, "the C++ engine"


@pytest.mark.parametrize("shape", [(4, 1), (8, 7), (64, 100), (100, 24)], ids=lambda s: f"N{s[0]}-K{s[1]}")
def test_bytes_are_those_of_transformers(shape: tuple[int, int]) -> None:
    for _ in range(20):
        codes = torch.randint(-1, 2, shape, dtype=torch.int8)
        assert torch.equal(ternary.pack_hf(codes), bitnet_there.pack_weights(codes.float()))


def test_an_imported_model_is_an_ordinary_packed_file(seed: int, tmp_path: Path) -> None:
    """Byte for byte the tensors that `pack` writes of the same masters, and a checksum that holds."""
    model = drawn(BASE, seed)
    direct = read_packed(write_packed(tmp_path / "direct.safetensors", model, None))
    for packed in (False, True):
        folder = export_hf(TrainedSource(model, None, {}), tmp_path / f"out-{packed}", packed=packed)
        import_model(HfSource(folder), tmp_path / "m.safetensors", None)
        there_and_back = read_packed(tmp_path / "m.safetensors")
        assert set(there_and_back.tensors) == set(direct.tensors)
        for name, tensor in direct.tensors.items():
            assert torch.equal(there_and_back.tensors[name], tensor), name
        assert there_and_back.info["imported_from"].startswith("Hugging Face")


def test_the_older_names_of_1bitllm(tmp_path: Path) -> None:
    """inner_attn_ln and ffn_layernorm, masters, no quantization_config, a rotary table among the tensors."""
    config = BASE.replace(hidden_act="silu", rope_theta=10_000.0)
    folder = save_as(there(config), tmp_path / "in", "master")
    theirs = load_there(folder)
    tensors = load_tensors(folder / "model.safetensors")
    renamed = {
        name.replace("self_attn.attn_sub_norm", "self_attn.inner_attn_ln").replace("ffn_sub_norm", "ffn_layernorm"): t
        for name, t in tensors.items()
    }
    renamed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_tensors(renamed, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"], values["rope_parameters"]
    values |= {"architectures": ["BitnetForCausalLM"], "model_type": "llama", "weight_bits": 1, "rope_theta": 10_000.0}
    (folder / "config.json").write_text(json.dumps(values))
    source = HfSource(folder)
    assert source.config.sub_norms
    import_model(source, tmp_path / "m.safetensors", None)
    ids = torch.randint(300, (1, 40))
    assert_same_layers(theirs, load(tmp_path / "m.safetensors", engine="torch").model, ids)


def test_a_model_that_transformers_unpacked_and_saved(tmp_path: Path) -> None:
    """Loaded offline, its weights are floats of -1, 0 and 1 beside their scale; so its state dict reads."""
    folder = save_as(there(BASE), tmp_path / "in", "multiply")
    theirs = load_there(folder)
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    assert state[UP].shape == (100, 64)
    save_tensors(state, folder / "model.safetensors")
    import_model(HfSource(folder), tmp_path / "m.safetensors", None)
    assert_same_layers(theirs, load(tmp_path / "m.safetensors", engine="torch").model, torch.randint(300, (1, 20)))


def test_a_name_on_the_hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched where it can be, with nothing but data files; one line where it cannot."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    from bitnet.files.hf.hub import download
    from bitnet.files.opening import open_source

    asked: dict[str, Any] = {}

    def fetch(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns, never=ignore_patterns)
        if name.startswith("owner/gguf"):
            return str(tmp_path)
        if name == "owner/absent":
            raise LocalEntryNotFoundError("no network\nat all")
        return str(published)

    listed = {"owner/gguf": ["README.md", "m.gguf", "f16/m.gguf"], "owner/gguf-2": ["a.gguf", "b.gguf"]}
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.list_repo_files", listed.__getitem__)
    assert open_source("owner/model").config == BASE.replace(initializer_range=0.1)
    assert asked["name"] == "owner/model"
    assert not [pattern for pattern in asked["patterns"] if pattern.endswith((".py", ".bin", ".pt", "*"))]
    assert asked["never"] == ["*/*"]  # other models in sub-folders
    assert download("owner/gguf") == tmp_path / "m.gguf"
    assert asked["patterns"] == ["m.gguf"]
    with pytest.raises(BitNetError, match=r"\[a\.gguf, b\.gguf\], expected one such file"):
        download("owner/gguf-2")
    with pytest.raises(BitNetError, match=r"'owner/absent'.*\(no network at all\)"):
        open_source("owner/absent")
    for name in ("owner", "a/b/c", "../x/y", "owner/mo del", ""):
        with pytest.raises(BitNetError, match=r"nothing at|without config\.json"):
            open_source(name)
    asked.clear()
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("runs/model", "owner/m.gguf", "owner/m.safetensors", "./model", "/nowhere", "~/model", "owner/"):
        with pytest.raises(BitNetError, match=f"got nothing at '{name}', expected a packed file"):
            open_source(name)
    assert not asked


def test_what_is_no_model_is_told_what_to_give(published: Path, tmp_path: Path) -> None:
    from bitnet.files.opening import open_source

    for name in ("model.safetensors", "config.json"):
        with pytest.raises(BitNetError, match=f"a file of a Hugging Face folder.*give '{published}'"):
            open_source(str(published / name))
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(BitNetError, match=r"a training run.*bitnet pack"):
        open_source(str(tmp_path))
    (tmp_path / "README.md").write_text("# What this is\n")
    with pytest.raises(BitNetError, match=r"README\.md.*expected a packed file, a GGUF file, a Hugging Face folder"):
        open_source(str(tmp_path / "README.md"))


def test_info_that_is_no_object(published: Path, tmp_path: Path) -> None:
    """A packed file's `info` is somebody else's JSON as well."""
    import_model(HfSource(published), tmp_path / "m.safetensors", None)
    packed = replace(read_packed(tmp_path / "m.safetensors"), info=[])
    with pytest.raises(BitNetError, match="expected a JSON object"):
        PackedSource(packed)


@pytest.mark.parametrize("plain", [False, True])
def test_who_reads_what(plain: bool) -> None:
    from bitnet.files.exporting import readers

    llama = BASE.replace(linear="float" if plain else "ternary", **VARIANTS["llama"])
    bitnet = BASE.replace(hidden_act="silu")

    def runs(config: ModelConfig, target: str) -> dict[str, bool]:
        return {name: yes for names, yes, _ in readers(config, target) for name in names.split(", ")}

    assert runs(llama, "hf")["vLLM"] == plain
    assert not runs(bitnet, "hf-packed")["vLLM"]
    assert runs(llama, "f16")["Ollama"]
    assert not runs(bitnet, "tq2_0")["Ollama"]
    assert not runs(bitnet, "tq2_0")["vLLM"]
    assert not runs(llama, "q2_0")["LM Studio"]
    assert ("float" in readers(llama, "f16")[0][2]) == (not plain)
    assert "float" not in readers(llama, "tq2_0")[0][2]


def test_rounding_is_told(tmp_path: Path) -> None:
    model = there(BASE)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1 / 3000)
    source = HfSource(save_as(model, tmp_path / "in", "master"))
    assert "rounded to bf16" in import_model(source, tmp_path / "m.safetensors", None)[0]


# ---- what is refused ----------------------------------------------------------------------------------------


def changed(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def quantization(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    changed(folder, quantization_config={**config, **values})


def tensor(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_tensors(folder / "model.safetensors")
    change(tensors)
    save_tensors(tensors, folder / "model.safetensors")


def with_tokenizer(folder: Path, **values: Any) -> None:
    """A tokenizer.json that cannot be read, beside settings that are read before it."""
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


UP = "model.layers.1.mlp.up_proj.weight"
SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "model type": (lambda f: changed(f, model_type="mistral"), "mistral"),
    "activation": (lambda f: changed(f, hidden_act="gelu"), "gelu"),
    "rope scaling": (lambda f: changed(f, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "llama3"),
    "bias": (lambda f: changed(f, attention_bias=True), "attention_bias"),
    "head size": (lambda f: changed(f, head_dim=8), "head_dim"),
    "layers": (lambda f: changed(f, num_hidden_layers=2**30), "layers"),
    "more layers": (lambda f: changed(f, num_hidden_layers=3), "model.layers.2"),
    "fewer layers": (lambda f: changed(f, num_hidden_layers=1), "which no such model"),
    "width": (lambda f: changed(f, hidden_size=2**40), "hidden_size"),
    "width of another model": (lambda f: changed(f, hidden_size=128), r"expected.*128"),
    "a text for a number": (lambda f: changed(f, vocab_size="300"), "vocab_size"),
    "untied without a head": (lambda f: changed(f, tie_word_embeddings=False), "lm_head"),
    "another quantisation": (lambda f: changed(f, quantization_config={"quant_method": "gptq"}), "gptq"),
    "quantisation without sense": (lambda f: quantization(f, linear_class="x"), "linear_class"),
    "norms in the linears": (lambda f: quantization(f, use_rms_norm=True), "use_rms_norm"),
    "projections left out": (lambda f: quantization(f, modules_to_not_convert=["o_proj"]), "o_proj"),
    "the other sense of the scale": (lambda f: quantization(f, linear_class="bitlinear"), "--weight-scale multiply"),
    "a list of classes": (lambda f: quantization(f, linear_class=[]), "linear_class"),
    "a list of modes": (lambda f: quantization(f, quantization_mode=[]), "quantization_mode"),
    "a number of modules": (lambda f: quantization(f, modules_to_not_convert=5), "modules_to_not_convert"),
    "lists of modules": (lambda f: quantization(f, modules_to_not_convert=[[]]), "modules_to_not_convert"),
    "a list of model types": (lambda f: changed(f, model_type=[]), "model_type"),
    "a number of layer types": (lambda f: changed(f, layer_types=5), "layer_types"),
    "lists of layer types": (lambda f: changed(f, layer_types=[[]]), "layer_types"),
    "rope parameters as a text": (lambda f: changed(f, rope_parameters="default"), "rope_parameters"),
    "a list for the rope": (lambda f: changed(f, rope_parameters=[1]), "rope_parameters"),
    "add_bos": (lambda f: with_tokenizer(f, add_bos_token=3), "add_bos_token"),
    "a list for a template's name": (lambda f: with_tokenizer(f, chat_template=[{"name": []}]), "tokenizer.json"),
    "code 3": (lambda f: tensor(f, lambda t: t[UP][0, 0].fill_(0b11)), "code 3"),
    "scale of zero": (lambda f: tensor(f, lambda t: t[UP + "_scale"].fill_(0)), "above 0"),
    "scale that is none": (lambda f: tensor(f, lambda t: t[UP + "_scale"].fill_(torch.nan)), "above 0"),
    "norm that is none": (lambda f: tensor(f, lambda t: t["model.norm.weight"].fill_(torch.inf)), "not finite"),
    "no tensor": (lambda f: tensor(f, lambda t: t.pop(UP)), "up_proj"),
    "no scale": (lambda f: tensor(f, lambda t: t.pop(UP + "_scale")), "weight_scale"),
    "one tensor more": (lambda f: tensor(f, lambda t: t.update(other=torch.ones(2))), "'other'"),
    "another shape": (lambda f: tensor(f, lambda t: t.update({UP: t[UP][:, :-1]})), "up_proj"),
    "another dtype": (lambda f: tensor(f, lambda t: t.update({UP: t[UP].to(torch.int8)})), "int8"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "JSON"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 100_000), "JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "expected an object"),
    "a key twice": (lambda f: (f / "config.json").write_text('{"model_type": 1, "model_type": 2}'), "twice"),
    "bad ids": (lambda f: ((f / "tokenizer.json").write_text("{}"), changed(f, eos_token_id=999)), "ids"),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_as(there(BASE), tmp_path_factory.mktemp("published") / "in", "multiply")


@pytest.mark.parametrize(("spoil", "part"), SPOILED.values(), ids=list(SPOILED))
def test_a_spoiled_folder(
    spoil: Callable[[Path], object], part: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re
    import shutil

    from bitnet.cli import main

    folder = tmp_path / "in"
    shutil.copytree(published, folder)
    spoil(folder)
    assert main(["import", str(folder), "-o", str(tmp_path / "m.safetensors")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bitnet: error: ")
    assert captured.err.count("\n") == 1
    assert re.search(part, captured.err), captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_right_sense_can_be_given(published: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "in"
    shutil.copytree(published, folder)
    theirs = load_there(published)
    quantization(folder, linear_class="bitlinear")
    import_model(HfSource(folder, "multiply"), tmp_path / "m.safetensors", None)
    assert_same_layers(theirs, load(tmp_path / "m.safetensors", engine="torch").model, torch.randint(300, (1, 20)))


@pytest.mark.parametrize("mode", ["multiply", "divide"])
def test_the_wrong_sense_cannot_be_given(mode: str, seed: int, tmp_path: Path) -> None:
    """A folder of ours says what its scales are; another's is told by scales that no model has."""
    shape = BASE.replace(**VARIANTS["llama" if mode == "divide" else "bitnet"])
    folder = export_hf(TrainedSource(drawn(shape, seed), None, {}), tmp_path / "in", packed=True)
    other = "divide" if mode == "multiply" else "multiply"
    assert HfSource(folder, mode).form == HfSource(folder).form == mode
    with pytest.raises(BitNetError, match=f"leave it away, or give --weight-scale {mode}"):
        HfSource(folder, other)


def test_shards(tmp_path: Path) -> None:
    folder = save_as(there(BASE), tmp_path / "in", "master", "40KB")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    first = sorted(set(listed["weight_map"].values()))[0]
    for name in ("../model.safetensors", "a/b.safetensors", "", "..", 7, "none.safetensors", "é" * 200, "a\0b"):
        index.write_text(json.dumps({**listed, "weight_map": {**listed["weight_map"], UP: name}}))
        with pytest.raises(BitNetError, match=r"shard name|is not there"):
            HfSource(folder)
    index.write_text(json.dumps({**listed, "weight_map": {**listed["weight_map"], "ghost": first}}))
    with pytest.raises(BitNetError, match="'ghost', which no shard holds"):
        HfSource(folder)
    index.write_text(json.dumps(listed))
    whole = (folder / first).read_bytes()
    (folder / first).write_bytes(whole[: len(whole) - random.randrange(1, len(whole))])
    with pytest.raises(BitNetError, match=r"cut|expected a safetensors file|header"):
        HfSource(folder)
