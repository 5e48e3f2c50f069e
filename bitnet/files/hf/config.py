"""config.json of a Hugging Face folder: our configuration in it, and what its quantization_config means.

    form        quant_method  linear_class   mode      weight                weight_scale
    master      bitnet        autobitlinear  online    float [N, K]          none: quantised in every forward pass
    multiply    bitnet        autobitlinear  offline   uint8 [N / 4, K]      mean |W|, the output is multiplied
    divide      bitnet        bitlinear, or  -         uint8 [N / 4, K]      1 / mean |W|, the output is divided
                              none
    float       none                                   float [N, K]          none: not quantised

Beware of the last column: one name has two opposite meanings, and only linear_class decides which.
"""

from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError


class WeightForm(StrEnum):
    """How a folder holds its projections: the table above."""

    MASTER = "master"
    MULTIPLY = "multiply"
    DIVIDE = "divide"
    FLOAT = "float"


# The sub-norms in 1bitLLM's first models.
OLD_NAMES = {"self_attn.attn_sub_norm": "self_attn.inner_attn_ln", "mlp.ffn_sub_norm": "mlp.ffn_layernorm"}
_THETA = {"bitnet": 500_000.0, "llama": 10_000.0}  # transformers' defaults
_EPSILON = {"bitnet": 1e-5, "llama": 1e-6}
_MAY_BE_SKIPPED = ("lm_head", "embed_tokens", "model.embed_tokens")  # modules that are float in our models as well


def to_config(config: ModelConfig, form: WeightForm, ids: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model. ids: bos_token_id, eos_token_id. Raises BitNetError for a model it cannot hold."""
    if config.qk_norm:
        raise BitNetError(
            "export: got a model with QK norm, which neither BitNetForCausalLM nor LlamaForCausalLM has; train one "
            "without it: --preset nano-portable, or --set model.qk_norm=false"
        )
    if config.linear == "binary" and form is WeightForm.MASTER:
        raise BitNetError(
            "export: got a binary model, whose masters transformers makes ternary; export its codes: --to hf-packed"
        )
    model_type = "bitnet" if config.sub_norms else "llama"
    values = {
        "architectures": ["BitNetForCausalLM" if config.sub_norms else "LlamaForCausalLM"],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        # Readers' defaults differ (true or false), and some support only one spelling of the rotary base.
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": True,
        **ids,
        "dtype": "float32",  # norms and scales keep all of their bits
        "torch_dtype": "float32",
    }
    return values if form is WeightForm.FLOAT else {**values, "quantization_config": _quantization_config(form)}


def _quantization_config(form: WeightForm) -> dict[str, Any]:
    values = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    if form is WeightForm.DIVIDE:
        return values  # no linear_class, as in Falcon-E
    mode = "online" if form is WeightForm.MASTER else "offline"
    return {**values, "linear_class": "autobitlinear", "quantization_mode": mode}


def read_form(path: Path, values: Mapping[str, Any]) -> WeightForm:
    """How a folder holds its projections. Raises BitNetError for another quantisation than BitNet's."""
    quantization = values.get("quantization_config")
    if quantization is None:
        # 1bitLLM's class quantises in every forward pass without a quantization_config.
        old = "BitnetForCausalLM" in _architectures(values)
        return WeightForm.MASTER if old else WeightForm.FLOAT
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "bitnet":
        got = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise BitNetError(f"{path}: got quantization '{got!s:.40}', expected 'bitnet'; import the unquantised model")
    if quantization.get("use_rms_norm"):
        raise BitNetError(
            f"{path}: got use_rms_norm, a norm inside every linear layer, expected none: our blocks do not have it"
        )
    skipped = quantization.get("modules_to_not_convert")
    skipped = [] if skipped is None else skipped
    if not isinstance(skipped, list) or any(name not in _MAY_BE_SKIPPED for name in skipped):
        raise BitNetError(
            f"{path}: got modules_to_not_convert {skipped!r:.80}, expected nothing but embedding and head"
        )
    linear_class = _text(path, quantization, "linear_class", "bitlinear")
    mode = _text(path, quantization, "quantization_mode", "offline")
    found = {("bitlinear", "offline"): WeightForm.DIVIDE, ("autobitlinear", "offline"): WeightForm.MULTIPLY}
    found |= {("autobitlinear", "online"): WeightForm.MASTER}
    if (linear_class, mode) not in found:
        raise BitNetError(
            f"{path}: got linear_class {linear_class!r:.40} and quantization_mode {mode!r:.40}, expected bitlinear, or "
            "autobitlinear with online or offline"
        )
    return found[linear_class, mode]


def from_config(path: Path, values: Mapping[str, Any], form: WeightForm, tensors: Collection[str]) -> ModelConfig:
    """Our configuration of a config.json; tensors: the names in the files. Raises BitNetError for other models."""
    model_type = _text(path, values, "model_type", "")
    old = "model.layers.0.self_attn.inner_attn_ln.weight" in tensors
    if model_type not in _THETA:
        raise BitNetError(
            f"{path}: got model_type {model_type!r:.40} ({', '.join(_architectures(values)) or 'no architecture'}), "
            f"expected one of {', '.join(_THETA)}; other architectures have other blocks"
        )
    for key in ("attention_bias", "mlp_bias", "sliding_window", "layer_types"):
        full = key == "layer_types" and isinstance(values.get(key), list)
        if values.get(key) and not (full and all(kind == "full_attention" for kind in values[key])):
            raise BitNetError(f"{path}: got {key} {values[key]!r:.40}, expected none: our layers do not support it")
    heads = _count(path, values, "num_attention_heads")
    config = ModelConfig(
        vocab_size=_count(path, values, "vocab_size"),
        hidden_size=_count(path, values, "hidden_size"),
        intermediate_size=_count(path, values, "intermediate_size"),
        num_hidden_layers=_count(path, values, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_count(path, values, "num_key_value_heads", heads),
        max_position_embeddings=_count(path, values, "max_position_embeddings", 2048),
        linear="float" if form is WeightForm.FLOAT else "ternary",
        hidden_act=_activation(path, values, model_type),
        sub_norms=model_type == "bitnet" or old,
        qk_norm=False,
        tie_word_embeddings=_tied(path, values, tensors),
        rope_theta=_theta(path, values, model_type),
        rms_norm_eps=_number(path, values, "rms_norm_eps", _EPSILON[model_type]),
        initializer_range=_number(path, values, "initializer_range", 0.02),
    )
    if _count(path, values, "head_dim", config.head_dim) != config.head_dim:
        raise BitNetError(
            f"{path}: got head_dim {values['head_dim']}, expected {config.head_dim}, hidden_size by "
            "num_attention_heads; other head sizes are not supported"
        )
    return config


def _architectures(values: Mapping[str, Any]) -> list[str]:
    found = values.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _activation(path: Path, values: Mapping[str, Any], model_type: str) -> str:
    value = values.get("hidden_act", "relu2" if model_type == "bitnet" else "silu")
    if value not in ("relu2", "silu"):
        raise BitNetError(f"{path}: got hidden_act {value!r:.40}, expected relu2 or silu")
    return str(value)


def _tied(path: Path, values: Mapping[str, Any], tensors: Collection[str]) -> bool:
    has_head = "lm_head.weight" in tensors
    tied = values.get("tie_word_embeddings", not has_head)
    if not isinstance(tied, bool) or (not tied and not has_head):
        raise BitNetError(
            f"{path}: got tie_word_embeddings {tied!r:.40} and {'a' if has_head else 'no'} tensor 'lm_head.weight', "
            "expected a head where the embedding is not tied"
        )
    return tied


def _theta(path: Path, values: Mapping[str, Any], model_type: str) -> float:
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise BitNetError(f"{path}: got rope_parameters {scaling!r:.40}, expected an object; download it again")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise BitNetError(
            f"{path}: got rotary positions of type {kind!r:.40}, expected default: scaling is not supported"
        )
    default = _number(path, values, "rope_theta", _THETA[model_type])
    return _number(path, scaling, "rope_theta", default)


def _text(path: Path, values: Mapping[str, Any], key: str, default: str) -> str:
    value = values.get(key, default)
    if not isinstance(value, str):
        raise BitNetError(f"{path}: {key}: got {value!r:.40}, expected a string; download it again")
    return value


def _count(path: Path, values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise BitNetError(f"{path}: {key}: got {value!r:.40}, expected a whole number above 0")
    return value


def _number(path: Path, values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e15:
        raise BitNetError(f"{path}: {key}: got {value!r:.40}, expected a number above 0")
    return float(value)
