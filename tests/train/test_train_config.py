"""The configuration of a run: TOML there and back, what is refused, and which source wins."""

import dataclasses
import math
import random
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet.config import PRESETS, ModelConfig
from bitnet.errors import BitNetError
from bitnet.train import command
from bitnet.train.command import parse_assignments, resolve
from bitnet.train.config import (
    DTYPES,
    OPTIMIZERS,
    SCHEDULES,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
    default_config,
    read_config,
)
from bitnet.train.data.corpus import DataConfig
from bitnet.train.runs.run import Run

# ---- TOML there and back -----------------------------------------------------------------------------------

# Everything a file name may hold: quotes, backslashes, control characters, any script; no lone surrogates.
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    ['a"b', "C:\\new\\table", "\x7f", "\u0085\u2028", "'''", "#[x]", "a\nb\t", "한국어"]
)
shares = st.floats(0, 1)
rates = st.floats(1e-9, 1e5)
counts = st.integers(1, 2**40)


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    heads = draw(st.sampled_from([1, 2, 6]))
    model = ModelConfig(
        vocab_size=draw(st.integers(1, 2**31 - 1)),
        hidden_size=heads * 2 * draw(st.integers(1, 99)),
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([k for k in (1, 2, 3, 6) if heads % k == 0])),
        linear=draw(st.sampled_from(["ternary", "binary", "float"])),
        qk_norm=draw(st.booleans()),
        rope_theta=draw(st.floats(1, 1e12)),
        rms_norm_eps=draw(st.floats(1e-12, 1)),
    )
    data = DataConfig(
        paths=tuple(draw(st.lists(texts.filter(lambda t: t != "-"), max_size=3))),
        val_paths=tuple(draw(st.lists(texts, max_size=1))),
        val_fraction=draw(st.floats(0, 1, exclude_min=True, exclude_max=True)),
    )
    train = TrainConfig(
        steps=draw(counts),
        context=draw(st.integers(0, model.context)),
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        lr=draw(rates),
        schedule=draw(st.sampled_from(SCHEDULES)),
        warmup=draw(shares),
        dtype=draw(st.sampled_from(DTYPES)),
        compile=draw(st.booleans()),
        seed=draw(st.integers(0, 2**62)),
        sample_prompt=draw(texts),
    )
    return RunConfig(model, TokenizerConfig(draw(st.sampled_from(["char", "sentencepiece"]))), data, train)


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "config.toml"


@settings(max_examples=150)
@given(config=configs())
def test_toml_gives_the_config_back(config: RunConfig, toml: Path) -> None:
    toml.write_text(config.to_toml(), encoding="utf-8", newline="")
    assert read_config(toml) == config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_toml(name: str, toml: Path) -> None:
    toml.write_text(default_config(name).to_toml())
    assert read_config(toml) == default_config(name)
    assert default_config(name).model == PRESETS[name]


def test_toml_names_every_field(toml: Path) -> None:
    """What is written is complete: a later version with other defaults reads the same run."""
    lines = RunConfig().to_toml().splitlines()
    for part in (ModelConfig, TokenizerConfig, DataConfig, TrainConfig):
        for field in dataclasses.fields(part):
            assert any(line.startswith(f"{field.name} = ") for line in lines), field.name


def test_an_int_may_stand_for_a_float(toml: Path) -> None:
    toml.write_text("[train]\nlr = 1\n[model]\nrope_theta = 10\n")
    config = read_config(toml)
    assert (config.train.lr, type(config.train.lr)) == (1.0, float)
    assert (config.model.rope_theta, type(config.model.rope_theta)) == (10.0, float)


def test_preset_key(toml: Path) -> None:
    toml.write_text('preset = "micro"\n[train]\nsteps = 7\n')
    config = read_config(toml)
    assert config.model == PRESETS["micro"]
    assert config.train.steps == 7


# ---- what is refused ---------------------------------------------------------------------------------------

BAD = {
    "unknown key": ("[train]\nlearning_rate = 1.0", ["learning_rate", "embedding_lr"]),
    "unknown section": ("[trainer]\nlr = 1.0", ["trainer", "train"]),
    "key outside a section": ("lr = 1.0", ["lr"]),
    "section that is none": ("train = 3", ["train"]),
    "array of sections": ("[[train]]\nlr = 1.0", ["train"]),
    "int for a string": ("[train]\nschedule = 3", ["schedule", "3", "str"]),
    "string for a float": ('[train]\nlr = "fast"', ["lr", "fast", "float"]),
    "float for an int": ("[train]\nsteps = 1.5", ["steps", "1.5", "int"]),
    "bool for an int": ("[train]\nsteps = true", ["steps", "True", "int"]),
    "int for a bool": ("[train]\ncompile = 1", ["compile", "1", "bool"]),
    "bool for a float": ("[train]\nlr = true", ["lr", "True", "float"]),
    "string for a list": ('[data]\npaths = "a.txt"', ["paths", "a.txt", "list"]),
    "list of ints": ("[data]\npaths = [1]", ["paths", "list"]),
    "zero steps": ("[train]\nsteps = 0", ["steps", "0", "1 or more"]),
    "negative seed": ("[train]\nseed = -1", ["seed", "-1"]),
    "not a number": ("[train]\nlr = nan", ["lr", "nan"]),
    "infinite": ("[train]\nclip = inf", ["clip", "inf"]),
    "warm-up above one": ("[train]\nwarmup = 1.01", ["warmup", "1.01"]),
    "beta of one": ("[train]\nbeta2 = 1.0", ["beta2", "1.0"]),
    "one save only": ("[train]\nkeep = 1", ["keep", "1", "2 or more"]),
    "schedule": ('[train]\nschedule = "step"', ["step", *SCHEDULES]),
    "optimizer": ('[train]\noptimizer = "sgd"', ["sgd", *OPTIMIZERS]),
    "dtype": ('[train]\ndtype = "fp16"', ["fp16", *DTYPES]),
    "linear": ('[model]\nlinear = "quaternary"', ["quaternary", "ternary", "binary", "float"]),
    "tokenizer": ('[tokenizer]\nkind = "words"', ["words", "sentencepiece", "char"]),
    "heads": ("[model]\nnum_attention_heads = 3", ["256", "3", "num_attention_heads"]),
    "key/value heads": ("[model]\nnum_key_value_heads = 3", ["num_key_value_heads", "3"]),
    "odd heads": ("[model]\nhidden_size = 12\nnum_attention_heads = 4", ["12", "4", "even"]),
    "context beyond the model's": ("[train]\ncontext = 257", ["257", "256", "max_position_embeddings"]),
    "val fraction": ("[data]\nval_fraction = 1.0", ["val_fraction", "1.0"]),
    "unknown preset": ('preset = "pico"', ["pico", *PRESETS]),
    "preset of another type": ('preset = ["nano"]', ["nano", *PRESETS]),
    "no TOML": ("[train\n", ["TOML"]),
    "nested too deep": ("x = " + "[" * 20_000, ["TOML"]),
}


@pytest.mark.parametrize(("text", "parts"), BAD.values(), ids=list(BAD))
def test_bad_toml_is_refused_by_name(text: str, parts: list[str], toml: Path) -> None:
    toml.write_text(text)
    with pytest.raises(BitNetError) as error:
        read_config(toml)
    assert [part for part in parts if part not in str(error.value)] == [], str(error.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'[train]\nsample_prompt = "caf\xe9"\n')
    for name in ("latin.toml", "missing.toml", "."):
        with pytest.raises(BitNetError, match="config"):
            read_config(tmp_path / name)


# ---- flags and assignments ---------------------------------------------------------------------------------


def test_assignments_are_typed_as_their_field() -> None:
    texts = [
        "train.lr=1e-3",
        "train.steps = 12",
        "train.compile=TRUE",
        "data.paths=a b,c=d",
        "train.sample_prompt=x=1, y",
        "model.linear=float",
        "train.clip=2",
    ]
    assert parse_assignments(texts, RunConfig()) == {
        "train": {"lr": 1e-3, "steps": 12, "compile": True, "sample_prompt": "x=1, y", "clip": 2.0},
        "data": {"paths": ("a b", "c=d")},
        "model": {"linear": "float"},
    }


BAD_ASSIGNMENTS = [
    "train.lr", "lr=1", "train.lr=fast", "train.steps=1.5", "train.compile=yes", "train.steps=", "=",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_ASSIGNMENTS)
def test_bad_assignments(text: str) -> None:
    with pytest.raises(BitNetError, match="got"):
        parse_assignments([text], RunConfig())


@pytest.mark.parametrize("text", ["train.rate=1", "trian.lr=1", "train.lr=nan", "train.__class__=x", ".lr=1", "x.=1"])
def test_assignments_to_nothing(text: str, tmp_path: Path) -> None:
    with pytest.raises(BitNetError):
        resolved(tmp_path, assignments=[text])


def resolved(
    folder: Path,
    preset: str | None = None,
    toml: str | None = None,
    flags: dict[str, Any] | None = None,
    assignments: list[str] | None = None,
) -> RunConfig:
    """As `bitnet train --out folder/run` would; flags are of [train]."""
    file = None
    if toml is not None:
        file = folder / "given.toml"
        file.write_text(toml)
    given = {"model": {"linear": None}, "train": flags or {}}
    return resolve(preset, file, given, assignments or [], Run(folder / "run"))


def start(folder: Path, config: RunConfig) -> None:
    run = Run(folder / "run")
    run.path.mkdir()
    run.write_config(config)


def test_each_source_beats_the_weaker_ones(tmp_path: Path) -> None:
    """Assignments beat flags beat the file beats the preset beats the run that is there; what is not given stays."""
    a, b, c, d = (random.sample(range(1, 10_000), 5) for _ in range(4))
    run = RunConfig(train=TrainConfig(steps=a[0], seed=a[1], save_every=a[2], eval_every=a[3], sample_every=a[4]))
    run = run.override({"model": {"num_hidden_layers": 3, "linear": "float"}})
    start(tmp_path, run)
    toml = f"[train]\nseed = {b[1]}\nsave_every = {b[2]}\neval_every = {b[3]}\n"
    flags = {"save_every": c[2], "eval_every": c[3], "lr": None}
    got = resolved(tmp_path, "micro", toml, flags, [f"train.eval_every={d[3]}"])
    t = got.train
    assert (t.steps, t.seed, t.save_every, t.eval_every, t.sample_every) == (a[0], b[1], c[2], d[3], a[4])
    assert t.lr == TrainConfig().lr
    assert got.model == PRESETS["micro"].replace(linear="float")  # no preset sets it


def test_preset_flag_beats_the_preset_of_the_file(tmp_path: Path) -> None:
    assert resolved(tmp_path, "mini", 'preset = "micro"').model == PRESETS["mini"]
    assert resolved(tmp_path, None, 'preset = "micro"').model == PRESETS["micro"]


def test_settings_may_fit_only_together(tmp_path: Path) -> None:
    """Neither the flag nor the assignment is possible without the other."""
    got = resolved(tmp_path, None, None, {"context": 300}, ["model.max_position_embeddings=300"])
    assert got.context == 300
    got = resolved(tmp_path, None, "[model]\nnum_attention_heads = 6\n", {}, ["model.hidden_size=96"])
    assert got.model.head_dim == 16


@pytest.mark.parametrize("way", ["flag", "file"])
def test_a_preset_given_again_keeps_what_the_run_was_started_with(way: str, tmp_path: Path) -> None:
    first = resolved(tmp_path, "micro", None, {"lr": 0.123, "steps": 9})
    start(tmp_path, first)
    again = resolved(tmp_path, "micro") if way == "flag" else resolved(tmp_path, None, 'preset = "micro"')
    assert again == first
    Run(tmp_path / "run").check(again)


# ---- requested and resolved --------------------------------------------------------------------------------


def test_a_resolved_config_is_that_of_the_model_and_keeps_the_request() -> None:
    asked = RunConfig(train=TrainConfig(context=100))
    found = asked.resolved(vocab_size=345)
    assert found.model == asked.model.replace(vocab_size=345, max_position_embeddings=100)
    assert found.requested_vocab_size == asked.model.vocab_size == 4096
    assert found.resolved(vocab_size=345) == found
    assert not found.differences(asked)
    assert not asked.differences(found)
    assert found.requested().model.vocab_size == 4096


@pytest.mark.parametrize("context", [0, 100])
def test_a_resolved_run_takes_the_request_again(context: int, tmp_path: Path) -> None:
    """The tokenizer found 345 tokens where 4096 were asked for: neither figure is another setting."""
    asked = default_config().override({"train": {"context": context}})
    start(tmp_path, asked.resolved(vocab_size=345))
    run = Run(tmp_path / "run")
    for again in (asked, run.config(), resolved(tmp_path), resolved(tmp_path, "nano")):
        assert again.requested_vocab_size == 4096
        run.check(again)
    for vocab_size in (345, 8192):
        with pytest.raises(BitNetError, match=f"model.vocab_size = 4096, got {vocab_size}"):
            run.check(resolved(tmp_path, None, None, {}, [f"model.vocab_size={vocab_size}"]))


def test_without_settings_the_run_keeps_its_own(tmp_path: Path) -> None:
    first = RunConfig(train=TrainConfig(steps=3), data=DataConfig(paths=("x",))).override(
        {"model": {"hidden_size": 64}}
    )
    start(tmp_path, first)
    assert resolved(tmp_path) == first


MAY_CHANGE = {
    "steps": 5, "eval_every": 3, "eval_tokens": 77, "sample_every": 2, "sample_prompt": "x", "save_every": 9,
    "keep": 3, "report_every": 4, "skip_limit": 2, "tensorboard": True, "wandb": True, "compile": True,
    "parallel": "fsdp", "recompute": True, "loss_chunk": 100, "async_save": True, "global_batch": 16,
}  # fmt: skip
MUST_STAY = {
    "train": {
        "batch_size": 3, "accumulate": 2, "context": 8, "optimizer": "adamw", "lr": 0.5, "embedding_lr": 0.5,
        "schedule": "cosine", "warmup": 0.5, "decay": 0.5, "second_stage_lr": 0.5, "min_lr": 0.5, "weight_decay": 0.5,
        "momentum": 0.5, "beta1": 0.5, "beta2": 0.5, "clip": 0.5, "dtype": "bf16", "seed": 5,
        "int8_gradients": "all",
        "init": "runs/other", "quant_warmup": 0.5, "float_share": 0.2, "zero_init": True, "z_loss": 0.5,
        "teacher": "runs/other", "distill": 0.25, "temperature": 2.0,
    },
    "model": {"hidden_size": 64, "linear": "float", "num_hidden_layers": 1, "vocab_size": 300, "sub_norms": False},
    "tokenizer": {"kind": "char"},
    "data": {"paths": ("a",), "val_fraction": 0.5, "documents": "line"},
}  # fmt: skip


def test_every_training_setting_is_sorted_into_one_list() -> None:
    assert set(MAY_CHANGE) | set(MUST_STAY["train"]) == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_settings_that_may_change_on_resume(key: str, tmp_path: Path) -> None:
    start(tmp_path, RunConfig())
    changed = RunConfig().override({"train": {key: MAY_CHANGE[key]}})
    assert changed != RunConfig()
    Run(tmp_path / "run").check(changed)


@pytest.mark.parametrize(("section", "key"), [(section, key) for section in MUST_STAY for key in MUST_STAY[section]])
def test_settings_that_must_stay_on_resume(section: str, key: str, tmp_path: Path) -> None:
    taught = {"train": {"teacher": "runs/one"}} if key in ("distill", "temperature") else {}
    started = RunConfig().override(taught)
    start(tmp_path, started)
    before = (tmp_path / "run" / "config.toml").read_bytes()
    changed = started.override({section: {key: MUST_STAY[section][key]}})
    with pytest.raises(BitNetError) as error:
        Run(tmp_path / "run").check(changed)
    assert f"{section}.{key}" in str(error.value)
    assert (tmp_path / "run" / "config.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("values", "key"),
    [({"distill": 0.3}, "distill"), ({"temperature": 2.0}, "temperature"), ({"zero_init": True}, "zero_init")],
)
def test_what_would_do_nothing_is_refused(values: dict[str, Any], key: str) -> None:
    other = {"init": "runs/other"} if key == "zero_init" else {}
    with pytest.raises(BitNetError, match=rf"train\.{key}"):
        TrainConfig(**values, **other)
    TrainConfig(**values, **({} if other else {"teacher": "runs/other"}))


def test_a_global_batch_may_be_cut_anew_on_resume(tmp_path: Path) -> None:
    """Which sequences a step takes does not depend on it; that it is the save's is checked with the save."""
    start(tmp_path, RunConfig(train=TrainConfig(batch_size=2, accumulate=2)))
    Run(tmp_path / "run").check(RunConfig(train=TrainConfig(batch_size=1, global_batch=4)))
    with pytest.raises(BitNetError, match=r"train\.batch_size"):
        Run(tmp_path / "run").check(RunConfig(train=TrainConfig(batch_size=1, accumulate=2)))


def test_differences_name_both_values() -> None:
    other = RunConfig().override({"train": {"lr": 0.5}, "model": {"linear": "float"}})
    rows = set(RunConfig().differences(other))
    assert rows == {("train.lr", RunConfig().train.lr, 0.5), ("model.linear", "ternary", "float")}
    assert not RunConfig().differences(RunConfig())


def test_context_is_the_models_unless_given() -> None:
    assert RunConfig().context == 256
    assert RunConfig(train=TrainConfig(context=100)).context == 100
    with pytest.raises(BitNetError, match="257"):
        RunConfig(train=TrainConfig(context=257))


def test_random_keys_are_unknown(toml: Path) -> None:
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    for _ in range(50):
        key = "".join(random.choices(string.ascii_lowercase + "_", k=random.randint(1, 10)))
        if key not in known:
            toml.write_text(f"[train]\n{key} = 1\n")
            with pytest.raises(BitNetError, match=f"unknown key '{key}'"):
                read_config(toml)


def test_numbers_survive_exactly(toml: Path) -> None:
    for _ in range(200):
        lr = math.ldexp(random.random() + 0.5, random.randint(-30, 10))
        config = RunConfig(train=TrainConfig(lr=lr))
        toml.write_text(config.to_toml())
        assert read_config(toml).train.lr == lr


def test_the_default_folder_says_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset and the kind of linear layer, wherever they are set; not those of a run in another folder."""
    monkeypatch.chdir(tmp_path)
    other = Path("runs/nano")
    other.mkdir(parents=True)
    (other / "config.toml").write_text(default_config("nano").override({"model": {"linear": "float"}}).to_toml())
    file = tmp_path / "settings.toml"
    file.write_text('preset = "micro"\n[model]\nlinear = "plain"\n')
    assert command._default_folder(None, None, {}, []) == Path("runs/nano-ternary")
    assert command._default_folder(None, None, {"model": {"linear": "float"}}, []) == Path("runs/nano-float")
    assert command._default_folder("mini", None, {}, ["model.linear=binary"]) == Path("runs/mini-binary")
    assert command._default_folder(None, file, {}, []) == Path("runs/micro-float")


def test_an_assignment_may_use_an_old_key() -> None:
    assert parse_assignments(["train.ease=0.5"], RunConfig()) == {"train": {"quant_warmup": 0.5}}
    assert parse_assignments(["train.table_lr=1e-3"], RunConfig()) == {"train": {"embedding_lr": 0.001}}
