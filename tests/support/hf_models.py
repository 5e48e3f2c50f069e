"""transformers' own models, and folders of them as their authors would publish them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet.config import ModelConfig
from bitnet.files.tensors import projections
from bitnet.model import Transformer

transformers = pytest.importorskip("transformers", reason="transformers comes with the extra `interop`")
pytest.importorskip("accelerate", reason="accelerate comes with the extra `interop`")
transformers_bitnet = pytest.importorskip("transformers.integrations.bitnet")

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


def load_in_transformers(folder: Path) -> Any:
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


def transformers_model(config: ModelConfig) -> Any:
    """A random model of transformers' own class, float, with bf16 embeddings as in published ones."""
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


def save_published(model: Any, folder: Path, kind: str, shard: str = "5GB") -> Path:
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
            tensors[name] = transformers_bitnet.pack_weights(codes)
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


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def change_quantization(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(folder, quantization_config={**config, **values})
