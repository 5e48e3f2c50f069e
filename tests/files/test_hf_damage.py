"""Damaged and hostile Hugging Face folders: each is refused with one line, and nothing is written."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import (
    BASE,
    change_config,
    change_quantization,
    load_tensors,
    save_published,
    save_tensors,
    transformers_model,
)
from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.files.hf.read import HfSource

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations are not ours to fix


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_tensors(folder / "model.safetensors")
    change(tensors)
    save_tensors(tensors, folder / "model.safetensors")


def with_tokenizer(folder: Path, **values: Any) -> None:
    """A tokenizer.json that cannot be read, and settings that are read before it."""
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "model type": (lambda f: change_config(f, model_type="mistral"), "mistral"),
    "activation": (lambda f: change_config(f, hidden_act="gelu"), "gelu"),
    "rope scaling": (lambda f: change_config(f, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "llama3"),
    "bias": (lambda f: change_config(f, attention_bias=True), "attention_bias"),
    "head size": (lambda f: change_config(f, head_dim=8), "head_dim"),
    "layers": (lambda f: change_config(f, num_hidden_layers=2**30), "layers"),
    "more layers": (lambda f: change_config(f, num_hidden_layers=3), "model.layers.2"),
    "fewer layers": (lambda f: change_config(f, num_hidden_layers=1), "not part of such a model"),
    "width": (lambda f: change_config(f, hidden_size=2**40), "hidden_size"),
    "width of another model": (lambda f: change_config(f, hidden_size=128), r"expected.*128"),
    "a text for a number": (lambda f: change_config(f, vocab_size="300"), "vocab_size"),
    "untied without a head": (lambda f: change_config(f, tie_word_embeddings=False), "lm_head"),
    "another quantisation": (lambda f: change_config(f, quantization_config={"quant_method": "gptq"}), "gptq"),
    "an unknown linear class": (lambda f: change_quantization(f, linear_class="x"), "linear_class"),
    "norms in the linears": (lambda f: change_quantization(f, use_rms_norm=True), "use_rms_norm"),
    "projections left out": (lambda f: change_quantization(f, modules_to_not_convert=["o_proj"]), "o_proj"),
    "the other convention": (lambda f: change_quantization(f, linear_class="bitlinear"), "--weight-scale multiply"),
    "a list of classes": (lambda f: change_quantization(f, linear_class=[]), "linear_class"),
    "a list of modes": (lambda f: change_quantization(f, quantization_mode=[]), "quantization_mode"),
    "a number of modules": (lambda f: change_quantization(f, modules_to_not_convert=5), "modules_to_not_convert"),
    "lists of modules": (lambda f: change_quantization(f, modules_to_not_convert=[[]]), "modules_to_not_convert"),
    "a list of model types": (lambda f: change_config(f, model_type=[]), "model_type"),
    "a number of layer types": (lambda f: change_config(f, layer_types=5), "layer_types"),
    "lists of layer types": (lambda f: change_config(f, layer_types=[[]]), "layer_types"),
    "rope parameters as a text": (lambda f: change_config(f, rope_parameters="default"), "rope_parameters"),
    "a list for the rope": (lambda f: change_config(f, rope_parameters=[1]), "rope_parameters"),
    "add_bos": (lambda f: with_tokenizer(f, add_bos_token=3), "add_bos_token"),
    "a list for a template's name": (lambda f: with_tokenizer(f, chat_template=[{"name": []}]), "tokenizer.json"),
    "code 3": (lambda f: change_tensors(f, lambda t: t[UP][0, 0].fill_(0b11)), "code 3"),
    "scale of zero": (lambda f: change_tensors(f, lambda t: t[UP + "_scale"].fill_(0)), "above 0"),
    "scale that is none": (lambda f: change_tensors(f, lambda t: t[UP + "_scale"].fill_(torch.nan)), "above 0"),
    "norm that is none": (lambda f: change_tensors(f, lambda t: t["model.norm.weight"].fill_(torch.inf)), "not finite"),
    "no tensor": (lambda f: change_tensors(f, lambda t: t.pop(UP)), "up_proj"),
    "no scale": (lambda f: change_tensors(f, lambda t: t.pop(UP + "_scale")), "weight_scale"),
    "one tensor more": (lambda f: change_tensors(f, lambda t: t.update(other=torch.ones(2))), "'other'"),
    "another shape": (lambda f: change_tensors(f, lambda t: t.update({UP: t[UP][:, :-1]})), "up_proj"),
    "another dtype": (lambda f: change_tensors(f, lambda t: t.update({UP: t[UP].to(torch.int8)})), "int8"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "JSON"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 100_000), "JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "expected an object"),
    "a key twice": (lambda f: (f / "config.json").write_text('{"model_type": 1, "model_type": 2}'), "twice"),
    "bad ids": (lambda f: ((f / "tokenizer.json").write_text("{}"), change_config(f, eos_token_id=999)), "ids"),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "part"), DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_folder_is_refused(
    damage: Callable[[Path], object], part: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re
    import shutil

    from bitnet.cli import main

    folder = tmp_path / "in"
    shutil.copytree(published, folder)
    damage(folder)
    assert main(["import", str(folder), "-o", str(tmp_path / "m.safetensors")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bitnet: error: ")
    assert captured.err.count("\n") == 1
    assert re.search(part, captured.err), captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_shards(tmp_path: Path) -> None:
    folder = save_published(transformers_model(BASE), tmp_path / "in", "master", "40KB")
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
