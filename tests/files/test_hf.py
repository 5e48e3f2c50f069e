"""Hugging Face folders against transformers itself: what we write loads there, what it writes loads here."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from file_models import kl, random_model
from hf_models import (
    BASE,
    QUANTIZATION,
    SHAPES,
    VARIANTS,
    assert_same_layers,
    change_quantization,
    load_in_transformers,
    load_tensors,
    save_published,
    save_tensors,
    transformers,
    transformers_bitnet,
    transformers_model,
)
from torch import nn

from bitnet.config import ModelConfig
from bitnet.engine.load import load
from bitnet.errors import BitNetError
from bitnet.files import ternary
from bitnet.files.hf.export import export_hf, move_from_edges
from bitnet.files.hf.read import HfSource
from bitnet.files.importing import import_model
from bitnet.files.packed import PackedSource, read_packed, write_packed
from bitnet.files.source import TrainedSource
from bitnet.kernels import native, ops
from bitnet.text.characters import train_char
from bitnet.text.sentencepiece import SentencePieceTokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations are not ours to fix


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers compiles its quantisers, which takes a C++ compiler and most of a minute on a CPU."""
    import torch._dynamo

    monkeypatch.delenv("BITNET_BACKEND", raising=False)
    with torch._dynamo.config.patch(disable=True):
        yield


# ---- out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["hf", "hf-packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_runs_the_export(
    variant: str, target: str, tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path
) -> None:
    model = random_model(BASE.replace(vocab_size=tokenizer.vocab_size, **VARIANTS[variant]), seed)
    folder = export_hf(TrainedSource(model, tokenizer, {}), tmp_path / "out", packed=target == "hf-packed")
    theirs = load_in_transformers(folder)
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
def test_a_float_model_stays_a_float_model(variant: str, seed: int, tmp_path: Path) -> None:
    model = random_model(BASE.replace(linear="float", **VARIANTS[variant]), seed)
    folder = export_hf(TrainedSource(model, None, {}), tmp_path / "out", packed=False)
    theirs = load_in_transformers(folder)
    assert type(theirs.model.layers[0].mlp.up_proj) is nn.Linear
    ids = torch.randint(300, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)  # fp32 sums in another order
    source = HfSource(folder)
    assert source.config.linear == "float"
    with pytest.raises(BitNetError, match="expected ternary ones"):
        export_hf(TrainedSource(model, None, {}), tmp_path / "packed", packed=True)


def test_masters_on_the_edge_keep_their_codes(seed: int, tmp_path: Path) -> None:
    """Weights within a few ulp of half the scale: fp32 and fp64 means put them on either side, the export does not."""
    model = random_model(BASE, seed)
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
    assert_same_layers(load_in_transformers(folder), model, torch.randint(300, (2, 30)))


def test_masters_can_be_trained_on_there(seed: int, tmp_path: Path) -> None:
    folder = export_hf(TrainedSource(random_model(BASE, seed), None, {}), tmp_path / "out", packed=False)
    theirs = load_in_transformers(folder)
    ids = torch.randint(300, (2, 16))
    theirs(ids, labels=ids).loss.backward()
    assert float(theirs.model.layers[0].mlp.up_proj.weight.grad.abs().sum()) > 0


def test_binary_goes_out_packed_only(seed: int, tmp_path: Path) -> None:
    model = random_model(BASE.replace(linear="binary"), seed)
    source = TrainedSource(model, None, {})
    with pytest.raises(BitNetError, match=r"binary.*--to hf-packed"):
        export_hf(source, tmp_path / "no", packed=False)
    assert not list(tmp_path.iterdir())
    theirs = load_in_transformers(export_hf(source, tmp_path / "out", packed=True))
    assert_same_layers(theirs, model, torch.randint(300, (1, 20)))


def test_export_refuses_what_transformers_has_not(seed: int, tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    for packed in (True, False):
        with pytest.raises(BitNetError, match=r"QK norm.*nano-portable"):
            export_hf(
                TrainedSource(random_model(BASE.replace(qk_norm=True), seed), None, {}), tmp_path / "a", packed=packed
            )
    file = write_packed(tmp_path / "m.safetensors", random_model(BASE, seed), None)
    with pytest.raises(BitNetError, match=r"ternary codes only.*folder of the run"):
        export_hf(PackedSource(read_packed(file)), tmp_path / "a", packed=False)
    with pytest.raises(BitNetError, match=r"kind 'char'.*--tokenizer sentencepiece"):
        export_hf(
            TrainedSource(random_model(BASE.replace(vocab_size=3), seed), train_char(["abc"]), {}),
            tmp_path / "a",
            packed=True,
        )
    odd = random_model(BASE.replace(intermediate_size=102), seed)
    with pytest.raises(BitNetError, match="102 rows, expected a multiple of 4"):
        export_hf(TrainedSource(odd, None, {}), tmp_path / "a", packed=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(BitNetError, match="not empty"):
        export_hf(TrainedSource(random_model(BASE, seed), None, {}), tmp_path / "full", packed=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "m.safetensors"]


# ---- tokenizers ----------------------------------------------------------------------------------------------


def test_the_exported_tokenizer_gives_the_same_ids(
    tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path
) -> None:
    model = random_model(BASE.replace(vocab_size=tokenizer.vocab_size), seed)
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


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", QUANTIZATION)
@pytest.mark.parametrize("variant", VARIANTS)
def test_models_of_transformers_run_here(variant: str, kind: str, shape: str, tmp_path: Path) -> None:
    config = BASE.replace(**SHAPES[shape], **VARIANTS[variant])
    shard = "30KB" if shape == "deep" else "5GB"
    folder = save_published(transformers_model(config), tmp_path / "in", kind, shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shape == "deep")
    theirs = load_in_transformers(folder)
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
        assert torch.equal(ternary.pack_hf(codes), transformers_bitnet.pack_weights(codes.float()))


def test_an_imported_model_is_an_ordinary_packed_file(seed: int, tmp_path: Path) -> None:
    """Byte for byte the tensors that `pack` writes of the same masters, and a checksum that holds."""
    model = random_model(BASE, seed)
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
    """inner_attn_ln and ffn_layernorm, masters, no quantization_config, rotary frequencies among the tensors."""
    config = BASE.replace(hidden_act="silu", rope_theta=10_000.0)
    folder = save_published(transformers_model(config), tmp_path / "in", "master")
    theirs = load_in_transformers(folder)
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
    """Loaded offline, its weights are floats of -1, 0 and 1, with their scale: that is its state dict."""
    folder = save_published(transformers_model(BASE), tmp_path / "in", "multiply")
    theirs = load_in_transformers(folder)
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    assert state["model.layers.1.mlp.up_proj.weight"].shape == (100, 64)
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


def test_errors_for_other_files_say_what_to_give(published: Path, tmp_path: Path) -> None:
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


def test_info_must_be_an_object(published: Path, tmp_path: Path) -> None:
    """A packed file's `info` is somebody else's JSON as well."""
    import_model(HfSource(published), tmp_path / "m.safetensors", None)
    packed = replace(read_packed(tmp_path / "m.safetensors"), info=[])
    with pytest.raises(BitNetError, match="expected a JSON object"):
        PackedSource(packed)


@pytest.mark.parametrize("is_float", [False, True])
def test_readers_of_an_export(is_float: bool) -> None:
    from bitnet.files.exporting import readers

    llama = BASE.replace(linear="float" if is_float else "ternary", **VARIANTS["llama"])
    bitnet = BASE.replace(hidden_act="silu")

    def runs(config: ModelConfig, target: str) -> dict[str, bool]:
        return {name: yes for names, yes, _ in readers(config, target) for name in names.split(", ")}

    assert runs(llama, "hf")["vLLM"] == is_float
    assert not runs(bitnet, "hf-packed")["vLLM"]
    assert runs(llama, "f16")["Ollama"]
    assert not runs(bitnet, "tq2_0")["Ollama"]
    assert not runs(bitnet, "tq2_0")["vLLM"]
    assert not runs(llama, "q2_0")["LM Studio"]
    assert ("float" in readers(llama, "f16")[0][2]) == (not is_float)
    assert "float" not in readers(llama, "tq2_0")[0][2]


def test_rounding_is_reported(tmp_path: Path) -> None:
    model = transformers_model(BASE)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1 / 3000)
    source = HfSource(save_published(model, tmp_path / "in", "master"))
    assert "rounded to bf16" in import_model(source, tmp_path / "m.safetensors", None)[0]


def test_a_convention_can_be_given(published: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "in"
    shutil.copytree(published, folder)
    theirs = load_in_transformers(published)
    change_quantization(folder, linear_class="bitlinear")
    import_model(HfSource(folder, "multiply"), tmp_path / "m.safetensors", None)
    assert_same_layers(theirs, load(tmp_path / "m.safetensors", engine="torch").model, torch.randint(300, (1, 20)))


@pytest.mark.parametrize("mode", ["multiply", "divide"])
def test_the_wrong_convention_is_refused(mode: str, seed: int, tmp_path: Path) -> None:
    """A folder of ours records its convention; others are refused for scales that no model has."""
    shape = BASE.replace(**VARIANTS["llama" if mode == "divide" else "bitnet"])
    folder = export_hf(TrainedSource(random_model(shape, seed), None, {}), tmp_path / "in", packed=True)
    other = "divide" if mode == "multiply" else "multiply"
    assert HfSource(folder, mode).form == HfSource(folder).form == mode
    with pytest.raises(BitNetError, match=f"omit it, or give --weight-scale {mode}"):
        HfSource(folder, other)
