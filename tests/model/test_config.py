"""ModelConfig: what it refuses and how it says so, there and back through plain values, the presets."""

import dataclasses
import json
import math

import pytest

from bitnet.config import ACTIVATIONS, LINEARS, PRESETS, ModelConfig, preset
from bitnet.errors import BitNetError

COUNTS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 2**31, True, 1.0, "4", None, math.nan], ids=str)
def test_counts(name: str, value: object) -> None:
    with pytest.raises(BitNetError, match=rf"model\.{name}: got .*, expected "):
        ModelConfig(**{name: value})


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps", "initializer_range"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e13, 10**400, True, "1", None], ids=str)
def test_numbers(name: str, value: object) -> None:
    with pytest.raises(BitNetError, match=rf"model\.{name}: got .*, expected "):
        ModelConfig(**{name: value})


@pytest.mark.parametrize("name", ["sub_norms", "qk_norm", "tie_word_embeddings"])
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_switches(name: str, value: object) -> None:
    with pytest.raises(BitNetError, match=rf"model\.{name}: got .*, expected bool"):
        ModelConfig(**{name: value})


@pytest.mark.parametrize(("name", "allowed"), [("linear", LINEARS), ("hidden_act", ACTIVATIONS)])
def test_choices(name: str, allowed: tuple[str, ...]) -> None:
    for value in allowed:
        assert getattr(ModelConfig(**{name: value}), name) == value
    for value in ("gelu", "", allowed[0].upper()):
        with pytest.raises(BitNetError, match=rf"model\.{name}: got '{value}', expected one of {', '.join(allowed)}"):
            ModelConfig(**{name: value})
    with pytest.raises(BitNetError, match=rf"model\.{name}: got 3 \(int\), expected str"):
        ModelConfig(**{name: 3})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 250, "num_attention_heads": 4}, "hidden_size 250 is not a multiple of num_attention_heads 4"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "12 / 4 gives heads of 3; rotary embeddings need an even size"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of"),
        ({"num_attention_heads": 2, "num_key_value_heads": 4}, "num_attention_heads 2 is not a multiple of"),
    ],
)
def test_combinations(values: dict[str, int], message: str) -> None:
    with pytest.raises(BitNetError, match=message):
        ModelConfig(**values)


def test_unknown_keys_and_shapes() -> None:
    with pytest.raises(BitNetError, match=r"model: got unknown key 'hiden_size'.* 'hidden_size'"):
        ModelConfig.from_dict({"hiden_size": 3})
    with pytest.raises(BitNetError, match=r"model: got unknown key 'wings'.*expected one of .*hidden_size.*vocab_size"):
        ModelConfig.from_dict({"wings": 3})
    for wrong in ([], "x", None, 3):
        with pytest.raises(BitNetError, match="expected a table"):
            ModelConfig.from_dict(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PRESETS)
def test_there_and_back(name: str) -> None:
    config = PRESETS[name]
    values = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(values) == config
    assert set(values) == {field.name for field in dataclasses.fields(ModelConfig)}
    assert ModelConfig.from_dict({"rope_theta": 5}).rope_theta == 5.0  # TOML and JSON write whole floats so


def test_replace_checks_again() -> None:
    config = ModelConfig()
    assert config.replace(vocab_size=7).vocab_size == 7
    assert config.vocab_size == 4096
    with pytest.raises(BitNetError):
        config.replace(vocab_size=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_gguf_and_kernels(name: str) -> None:
    config = preset(name)
    assert config.hidden_size % 256 == config.intermediate_size % 256 == 0
    assert config.head_dim in (64, 128)
    assert config.linear == "ternary"


def test_preset_2b4t_is_the_published_model() -> None:
    config = preset("2b4t")
    published = {
        "vocab_size": 128_256,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 30,
        "num_attention_heads": 20,
        "num_key_value_heads": 5,
        "max_position_embeddings": 4096,
        "hidden_act": "relu2",
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "sub_norms": True,
        "qk_norm": False,
    }
    assert {name: getattr(config, name) for name in published} == published
    assert config.head_dim == 128


def test_unknown_preset() -> None:
    with pytest.raises(BitNetError, match=r"preset: got 'huge', expected one of nano, .*2b4t"):
        preset("huge")
