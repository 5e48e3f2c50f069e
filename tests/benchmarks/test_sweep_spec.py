"""Sweep specs: which runs they ask for, and how mistakes are named."""

from pathlib import Path

import pytest
from sweep_specs import GRID, write_spec

from bitnet.benchmarks.sweep.spec import read_held_out, read_spec
from bitnet.cli import main
from bitnet.config import preset
from bitnet.errors import BitNetError
from bitnet.train.command import resolve
from bitnet.train.runs.run import Run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_grid_of_listed_runs(text: Path) -> None:
    content = """seeds = [3, 5]
linears = ["ternary", "float"]
[grid]
train.lr = [0.001, 0.002]
train.momentum = [0.8, 0.9]
[[runs]]
[[runs]]
name = "zero init"
train.zero_init = true"""
    plans = read_spec(write_spec(text, content))
    assert len(plans) == 2 * 2 * 2 * 2 * 2
    assert len({plan.folder for plan in plans}) == len(plans)
    combinations = {
        (p.linear, p.seed, *(p.values["train"].get(key) for key in ("lr", "momentum", "zero_init"))) for p in plans
    }
    assert len(combinations) == len(plans)
    for plan in plans:
        assert plan.values["model"]["linear"] == plan.linear
        assert plan.values["train"]["steps"] == 4
        assert f"lr={plan.values['train']['lr']:g}" in plan.point


def test_a_listed_run_with_linears_of_its_own(text: Path) -> None:
    content = """seeds = [3, 5]
linears = ["ternary", "float"]
[[runs]]
[[runs]]
name = "float first"
linears = ["ternary"]
train.float_share = 0.2"""
    plans = read_spec(write_spec(text, content))
    assert [(plan.point, plan.linear, plan.seed) for plan in plans] == [
        ("base", "ternary", 3),
        ("base", "float", 3),
        ("base", "ternary", 5),
        ("base", "float", 5),
        ("float first", "ternary", 3),
        ("float first", "ternary", 5),
    ]
    assert "linears" not in plans[-1].values


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("seeds = []", "seeds"),
        ("seeds = [1.5]", "seeds"),
        ("linears = ['cubic']", "linears"),
        ("[[runs]]\nlinears = []", "linears"),
        ("[[runs]]\nlinears = 'float'", "linears"),
        ("sedes = [1]", "sedes"),
        ("[grid]\ntrain.lr = 0.1", "expected a list"),
        ("[[runs]]\nname='x'\n[[runs]]\nname='x'", "one name"),
        ("seeds = [", "TOML"),
        ("linears = ['cubic']\n[[runs]]\nlinears = ['float']", "linears"),  # though every run has its own
        ("preset = 'nanoo'", "preset 'nanoo', expected one of nano"),
        ("preset = ['nano']", "preset .'nano'., expected one of nano"),
        ("[[runs]]\n[[runs]]\npreset = 'nanoo'", r"\[\[runs\]\] 2: got preset 'nanoo'"),
        ("[[runs]]\nlinear = ['float']", "got linear = .'float'., expected .* or name, linears, preset"),
        ("[[runs]]\nname = 3", "name 3, expected text"),
        ("[[runs]]\nname = ''", "name '', expected text"),
        ("[[runs]]\n[runs.train]\nlr = 1\n[grid]\ntrain.lr = [1]", r"train.lr in \[grid\] and in \[\[runs\]\]"),
        ("[runs]\ntrain.lr = 0.1", "one or more tables"),
        ("runs = []", "one or more tables"),
        ("runs = [3]", "one or more tables"),
        ("grid = 3", r"\[grid\]: got 3, expected a table"),
        ("[grid]\nlr = [0.1]", r"\[grid\]: got lr = .0.1., expected settings with their section"),
        ("base = 3", r"\[base\]: got 3, expected a table"),
        ("[base]\nsteps = 3", r"\[base\]: got steps = 3, expected settings with their section"),
        ("[grid]\nmodel.linear = ['float']", "got model.linear, expected none; linears ="),
        ("[grid]\ntrain.seed = [1, 2]", "got train.seed, expected none; seeds ="),
        ("[base]\nmodel.linear = 'float'", "got model.linear, expected none; linears ="),
        ("[base]\ntrain.seed = 1", "got train.seed, expected none; seeds ="),
        ("[[runs]]\nmodel.linear = 'float'", "got model.linear, expected none; linears ="),
        ("[[runs]]\ntrain.seed = 1", "got train.seed, expected none; seeds ="),
        ("test = ['-']", "every run reads the text again"),
        ("test = 'x.txt'", "a list of paths"),
        ("test_tokens = 5", "a list of paths"),
        ("test = ['x.txt']\ntest_tokens = -1", "a list of paths"),
    ],
)
def test_mistakes_are_named(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(content)

    def read(path: Path) -> None:
        read_spec(path)
        read_held_out(path)

    with pytest.raises(BitNetError, match=says) as raised:
        read(tmp_path / "x.toml")
    assert "x.toml" in str(raised.value)


def test_listed_runs_with_presets_of_their_own(text: Path) -> None:
    content = """preset = "nano"
[base]
train.steps = 4
[[runs]]
[[runs]]
preset = "mini"
[[runs]]
preset = "small"
name = "the large one"
train.lr = 0.001"""
    file = text.parent / "spec.toml"
    file.write_text(content)
    plans = read_spec(file)
    assert [(plan.point, plan.preset) for plan in plans] == [
        ("base", "nano"),
        ("preset=mini", "mini"),
        ("the large one", "small"),
    ]
    for plan in plans:
        assert plan.values.keys() == {"train", "model"}
        found = resolve(plan.preset, None, plan.values, [], Run(text.parent / "none")).model
        assert plan.preset is not None
        assert found == preset(plan.preset)


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "specs").glob("*.toml")), ids=lambda file: file.stem)
def test_the_specs_of_this_project(file: Path) -> None:
    read_held_out(file)
    for plan in read_spec(file):
        resolve(plan.preset, None, plan.values, [], Run(file.parent / "none"))


def test_the_plan_is_listed(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_spec(text, GRID)
    assert main(["sweep", str(file), "--out", str(text.parent / "out"), "--plan"]) == 0
    assert capsys.readouterr().out.split() == [plan.folder for plan in read_spec(file)]
    assert not (text.parent / "out").exists()
