"""The whole model: its arithmetic about itself, names, init, causality, all variants forward and backward."""

import pytest
import tiny_model
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitnet.config import PRESETS, ModelConfig
from bitnet.files import tensors as arithmetic
from bitnet.files.packed_layout import expected_tensors, packed_bytes
from bitnet.layers import BitLinear
from bitnet.model import Transformer


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    groups, repeats, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 70)),
        hidden_size=groups * repeats * half * 2,
        intermediate_size=draw(st.integers(1, 70)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=groups * repeats,
        num_key_value_heads=groups,
        linear=draw(st.sampled_from(["ternary", "binary", "float"])),
        sub_norms=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=80, suppress_health_check=list(HealthCheck))
@given(configs())
def test_counts_are_those_of_the_real_tensors(config: ModelConfig) -> None:
    with torch.device("meta"):
        built = Transformer(config)
    sizes = {name: parameter.numel() for name, parameter in built.named_parameters()}
    projections = sum(size for name, size in sizes.items() if "_proj." in name)
    tables = sum(size for name, size in sizes.items() if "embed_tokens" in name or "lm_head" in name)
    assert arithmetic.parameters(config) == sum(sizes.values())
    assert arithmetic.linear_parameters(config) == projections
    assert arithmetic.embedding_parameters(config) == tables
    assert arithmetic.norm_parameters(config) == sum(sizes.values()) - projections - tables
    assert arithmetic.float16_bytes(config) == 2 * sum(sizes.values())
    width = {torch.uint8: 1, torch.bfloat16: 2, torch.float32: 4}
    total = 0
    for shape, dtypes in expected_tensors(config).values():
        (dtype,) = dtypes - {torch.int8}
        total += torch.Size(shape).numel() * width[dtype]
    assert packed_bytes(config) == total


def test_2b4t_is_the_published_size() -> None:
    config = PRESETS["2b4t"]
    d, f, kv = 2560, 6912, 5 * 128
    weights = 30 * (d * d + kv * d + kv * d + d * d + f * d + f * d + d * f)
    assert arithmetic.linear_parameters(config) == weights == 2_084_044_800
    assert round(weights / 4 / 1e6) == 521  # MB at two bits
    assert arithmetic.embedding_parameters(config) == 128_256 * 2560
    assert arithmetic.norm_parameters(config) == 30 * (3 * d + f) + d
    assert arithmetic.kv_cache_bytes(config, 4096, 2) == 2 * 30 * 5 * 128 * 4096 * 2
    # Two operations a weight, the head's included, and q k^T, p v over half of the context.
    forward = 2 * (weights + 128_256 * 2560) + 30 * 2 * 2 * d * 4096 // 2
    assert arithmetic.flops_per_token(config, 4096) == forward
    assert arithmetic.flops_per_token(config, 4096, training=True) == 3 * forward


def test_names_are_those_of_transformers() -> None:
    """BitNetForCausalLM's, one to one; only the norms of QK heads are ours."""
    block = """input_layernorm.weight self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight
        self_attn.o_proj.weight self_attn.attn_sub_norm.weight post_attention_layernorm.weight mlp.gate_proj.weight
        mlp.up_proj.weight mlp.ffn_sub_norm.weight mlp.down_proj.weight""".split()
    theirs = {"model.embed_tokens.weight", "model.norm.weight"}
    theirs |= {f"model.layers.{i}.{name}" for i in range(2) for name in block}
    assert set(Transformer(tiny_model.CONFIG.replace(qk_norm=False)).state_dict()) == theirs
    norms = {f"model.layers.{i}.self_attn.{x}_norm.weight" for i in range(2) for x in "qk"}
    assert set(Transformer(tiny_model.CONFIG).state_dict()) == theirs | norms
    untied = set(Transformer(tiny_model.CONFIG.replace(tie_word_embeddings=False, qk_norm=False)).state_dict())
    assert untied == theirs | {"lm_head.weight"}
    bare = {name for name in theirs if "sub_norm" not in name}
    assert set(Transformer(tiny_model.CONFIG.replace(sub_norms=False, qk_norm=False)).state_dict()) == bare


def test_init(seed: int) -> None:
    config = tiny_model.CONFIG.replace(
        hidden_size=128, intermediate_size=384, num_hidden_layers=2, initializer_range=0.02
    )

    def made(seed: int) -> dict[str, torch.Tensor]:
        built = Transformer(config)
        built.init_weights(seed)
        return built.state_dict()

    state = torch.random.get_rng_state()
    first, other = made(seed), made(seed + 1)
    torch.manual_seed(seed + 7)  # the global generator is not asked
    torch.set_num_threads(2)
    second = made(seed)
    torch.random.set_rng_state(state)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if value.dim() == 1:
            assert bool((value == 1).all()), name
            continue
        assert not torch.equal(value, other[name]), name
        wanted = 0.02 / 2 if "o_proj" in name or "down_proj" in name else 0.02  # sqrt(2 * 2 layers) = 2
        n = value.numel()
        # Six standard errors: of a mean, 1 / sqrt(n); of a standard deviation, 1 / sqrt(2 n).
        assert abs(float(value.mean())) < 6 * wanted / n**0.5, name
        assert abs(float(value.std()) / wanted - 1) < 6 / (2 * n) ** 0.5, name


@pytest.mark.parametrize("linear", ["ternary", "binary", "float"])
@pytest.mark.parametrize("act", ["relu2", "silu"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_variant_trains(linear: str, act: str, tied: bool, seed: int) -> None:
    built = Transformer(tiny_model.CONFIG.replace(linear=linear, hidden_act=act, tie_word_embeddings=tied))
    built.init_weights(seed)
    kinds = {type(module) for name, module in built.named_modules() if name.endswith("_proj")}
    assert kinds == {torch.nn.Linear if linear == "float" else BitLinear}
    ids = torch.randint(61, (3, 9))
    logits = built(ids)
    assert logits.shape == (3, 9, 61)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("linear", ["ternary", "binary", "float"])
@pytest.mark.parametrize("autocast", [False, True])
def test_later_tokens_never_change_earlier_logits(linear: str, autocast: bool, seed: int) -> None:
    built = Transformer(tiny_model.CONFIG.replace(linear=linear))
    built.init_weights(seed)
    ids = torch.randint(61, (2, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        before = built(ids)
        for place in (1, 5, 11):
            changed = ids.clone()
            changed[:, place] = (changed[:, place] + 1) % 61
            after = built(changed)
            assert torch.equal(after[:, :place], before[:, :place])
            assert not torch.equal(after[:, place:], before[:, place:])


def test_sequences_of_a_batch_do_not_mix(seed: int) -> None:
    built = Transformer(tiny_model.CONFIG)
    built.init_weights(seed)
    ids = torch.randint(61, (3, 8))
    before = built(ids)
    ids[1] = (ids[1] + 1) % 61
    after = built(ids)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


def test_position_matters(seed: int) -> None:
    """The same tokens further along give other logits: rotary tables start where they are told to."""
    built = Transformer(tiny_model.CONFIG)
    built.init_weights(seed)
    cos, sin = built.rotary(3, 5, torch.device("cpu"))
    longer = built.rotary(0, 200, torch.device("cpu"))  # past the context: a larger table, the same values
    assert torch.equal(cos, longer[0][3:8])
    assert torch.equal(sin, longer[1][3:8])


def test_embedding_is_used_in_bf16_values(seed: int) -> None:
    """So that a packed file, which holds bf16, loses nothing."""
    built = Transformer(tiny_model.CONFIG)
    built.init_weights(seed)
    ids = torch.randint(61, (1, 6))
    before = built(ids)
    with torch.no_grad():
        built.model.embed_tokens.weight.copy_(built.model.embed_tokens.weight.bfloat16())
    assert torch.equal(built(ids), before)
