"""`bitnet sweep`: which runs a file asks for, that they are those of `bitnet train`, and going on where it stopped."""

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from bitnet.cli import main
from bitnet.errors import BitNetError
from bitnet.train import pretrain as loop
from bitnet.train import sweep
from bitnet.train.run import Run
from bitnet.train.sweep import mean_and_error, read_held_out, read_sweep

SHAPE = """
model.hidden_size = 32
model.intermediate_size = 44
model.num_hidden_layers = 1
model.num_attention_heads = 2
model.num_key_value_heads = 1
model.max_position_embeddings = 16
train.steps = 4
train.batch_size = 2
train.eval_every = 0
train.dtype = "fp32"
tokenizer.kind = "char"
"""


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.train.pretrain.plot_run", lambda *args: [])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "toy.txt"
    path.write_text("".join(random.choice(["fade ", "bag ", "cabbage\n", "hedge "]) for _ in range(700)))
    return path


def written(text: Path, content: str, base: str = "") -> Path:
    file = text.parent / "ladder.toml"
    top, _, rest = content.partition("\n[")
    file.write_text(f"{top}\n[base]\ndata.paths = ['{text}']\n{base}{SHAPE}" + (f"\n[{rest}" if rest else ""))
    return file


def test_a_grid_of_listed_runs(text: Path) -> None:
    content = """seeds = [3, 5]
linears = ["ternary", "plain"]
[grid]
train.lr = [0.001, 0.002]
train.momentum = [0.8, 0.9]
[[runs]]
[[runs]]
name = "zero init"
train.zero_init = true"""
    plans = read_sweep(written(text, content))
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
linears = ["ternary", "plain"]
[[runs]]
[[runs]]
name = "float first"
linears = ["ternary"]
train.float_share = 0.5"""
    plans = read_sweep(written(text, content))
    assert [(plan.point, plan.linear, plan.seed) for plan in plans] == [
        ("base", "ternary", 3),
        ("base", "plain", 3),
        ("base", "ternary", 5),
        ("base", "plain", 5),
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
        ("[[runs]]\nlinears = 'plain'", "linears"),
        ("sedes = [1]", "sedes"),
        ("[grid]\ntrain.lr = 0.1", "expected a list"),
        ("[[runs]]\nname='x'\n[[runs]]\nname='x'", "one name"),
        ("seeds = [", "TOML"),
        ("test = 'x.txt'", "a list of paths"),
        ("test_tokens = 5", "a list of paths"),
        ("test = ['x.txt']\ntest_tokens = -1", "a list of paths"),
    ],
)
def test_mistakes_are_named(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(content)

    def read(path: Path) -> None:
        read_sweep(path)
        read_held_out(path)

    with pytest.raises(BitNetError, match=says):
        read(tmp_path / "x.toml")


def test_mean_and_error() -> None:
    values = [random.random() for _ in range(5)]
    found = mean_and_error(values)
    assert found is not None
    assert found["mean"] == pytest.approx(sum(values) / 5)
    assert found["error"] == pytest.approx(statistics.stdev(values) / 5**0.5)
    assert mean_and_error([2.0]) == {"mean": 2.0, "error": None}
    assert mean_and_error([]) is None


CONTENT = """seeds = [1, 2]
linears = ["ternary", "plain"]
[grid]
train.lr = [0.001, 0.01]"""


def test_a_sweep_goes_on_and_tells(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut off in its fourth run, started again: eight runs, each trained once, equal to what `bitnet train` gives."""
    file, out, calls = written(text, CONTENT), text.parent / "out", 0
    original = loop.Trainer._training_step

    def counted(trainer: loop.Trainer) -> dict[str, Any] | None:
        nonlocal calls
        calls += 1
        if calls == 4 * 3 + 2:
            raise KeyboardInterrupt
        return original(trainer)

    monkeypatch.setattr(loop.Trainer, "_training_step", counted)
    args = ["sweep", str(file), "--out", str(out), "--json", "-q"]
    assert main(args) == 130
    assert main(args) == 0
    report = json.loads(capsys.readouterr().out)
    assert calls == 8 * 4 + 2  # the run that was cut off had no save yet: one step again, and the one that was cut
    assert json.loads((out / "sweep.json").read_text()) == report
    assert all((out / f"{name}.png").exists() for name in ("sweep", "curves"))
    assert len(report["runs"]) == 8
    by_key = {(r["point"], r["linear"], r["seed"]): r["loss"] for r in report["runs"]}
    for point in report["points"]:
        losses = [by_key[point["point"], point["linear"], seed] for seed in (1, 2)]
        assert point["loss"]["mean"] == pytest.approx(sum(losses) / 2)
        gaps = [by_key[point["point"], "ternary", s] - by_key[point["point"], "plain", s] for s in (1, 2)]
        assert (point["gap"] is None) == (point["linear"] == "plain")
        assert point["gap"] is None or point["gap"]["mean"] == pytest.approx(sum(gaps) / 2)
    means = {(p["point"], p["linear"]): p["loss"]["mean"] for p in report["points"]}
    for linear, best in report["best"].items():
        assert best["loss"]["mean"] == min(mean for (_, kind), mean in means.items() if kind == linear)
    ours, theirs = (report["best"][linear]["point"] for linear in ("ternary", "plain"))
    gaps = [by_key[ours, "ternary", s] - by_key[theirs, "plain", s] for s in (1, 2)]
    assert report["tuned_gaps"].keys() == {"ternary"}
    assert report["tuned_gaps"]["ternary"]["gap"]["mean"] == pytest.approx(statistics.fmean(gaps))
    assert report["tuned_gaps"]["ternary"]["gap"]["error"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2)

    plan = random.choice(read_sweep(file))
    settings = [f"{s}.{k}={v}" for s, c in plan.values.items() for k, v in c.items() if s in ("model", "train")]
    alone = text.parent / "alone"
    sets = [part for s in settings for part in ("--set", s)]
    assert main(["train", "--data", str(text), "--tokenizer", "char", "--out", str(alone), "-q", *sets]) == 0
    assert [r["loss"] for r in Run(alone).metrics() if "loss" in r] == [
        r["loss"] for r in Run(out / plan.folder).metrics() if "loss" in r
    ]
    before = calls
    assert main(args) == 0  # nothing is left to do
    assert calls == before


def test_other_settings_under_the_same_name_are_refused(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = text.parent / "out"
    assert main(["sweep", str(written(text, "seeds = [1]")), "--out", str(out), "-q"]) == 0
    changed = written(text, "seeds = [1]", "train.clip = 0.5\n")
    assert main(["sweep", str(changed), "--out", str(out), "-q"]) == 2
    assert "train.clip" in capsys.readouterr().err
    longer = written(text, "seeds = [2, 1]")
    longer.write_text(longer.read_text().replace("train.steps = 4", "train.steps = 6"))
    assert main(["sweep", str(longer), "--out", str(out), "-q"]) == 2
    assert "train.steps = 4, got 6" in capsys.readouterr().err
    assert len(list(out.glob("*s2"))) == 0  # refused before anything is trained
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", str(written(text, "seeds = [1]")), "--out", str(out), "-q"]) == 2
    assert "expected one" in capsys.readouterr().err


def test_a_run_that_diverges_is_listed_and_the_rest_is_trained(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sweep.run_training

    def diverging(preset: Any, file: Any, values: Any, *rest: Any, **options: Any) -> Any:
        done = original(preset, file, values, *rest, **options)
        if values["train"]["lr"] == 0.01:
            raise BitNetError("training diverged: got 5 steps in a row without a finite gradient")
        return done

    monkeypatch.setattr(sweep, "run_training", diverging)
    file, out = written(text, CONTENT.replace("[1, 2]", "[1]")), text.parent / "out"
    assert main(["sweep", str(file), "--out", str(out), "-q"]) == 0
    report = json.loads((out / "sweep.json").read_text())
    assert [r["loss"] is None for r in report["runs"]] == ["lr=0.01" in r["point"] for r in report["runs"]]
    assert {p["diverged"] for p in report["points"] if "lr=0.01" in p["point"]} == {1}
    assert all("lr=0.001" in best["point"] for best in report["best"].values())


def test_the_plan_is_listed(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(text, CONTENT)
    assert main(["sweep", str(file), "--out", str(text.parent / "out"), "--plan"]) == 0
    assert capsys.readouterr().out.split() == [plan.folder for plan in read_sweep(file)]
    assert not (text.parent / "out").exists()


def test_finished_runs_score_the_test_text(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ternary run as its packed file scores the same windows; a changed text is scored anew, nothing else is."""
    unseen, out = tmp_path / "unseen.txt", tmp_path / "out"
    unseen.write_text("".join(random.choice(["fade ", "bag ", "cabbage\n", "hedge "]) for _ in range(200)))
    content = "seeds = [3]\nlinears = ['ternary', 'plain']\ntest = ['{}']\n[[runs]]\n[[runs]]\nmodel.hidden_size = 64"
    file = written(text, content.format(unseen))
    args = ["sweep", str(file), "--out", str(out), "--json", "-q"]
    assert main(args) == 0
    report = json.loads(capsys.readouterr().out)
    assert (out / "scaling.png").exists()  # two sizes
    assert len({run["parameters"] for run in report["runs"]}) == 2
    for run in report["runs"]:
        if run["linear"] == "ternary":
            assert main(["pack", str(out / run["run"]), "-o", str(tmp_path / "m.safetensors")]) == 0
            capsys.readouterr()
            count = len(Run(out / run["run"]).tokenizer().encode(unseen.read_text()))  # with BOS: this many to predict
            whole = str(count // 16 * 16)
            words = ["eval", "-m", str(tmp_path / "m.safetensors"), "--data", str(unseen), "--tokens", whole, "--json"]
            assert main(words) == 0
            found = json.loads(capsys.readouterr().out)
            assert run["test_loss"] == pytest.approx(found["loss"], rel=1e-5)
            assert run["test_bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-5)
    for point in report["points"]:
        if point["linear"] == "ternary":
            ours, twin = (
                next(r for r in report["runs"] if (r["point"], r["linear"]) == (point["point"], linear))
                for linear in ("ternary", "plain")
            )
            assert point["test_gap"]["mean"] == pytest.approx(ours["test_loss"] - twin["test_loss"])
    folder = out / report["runs"][0]["run"]
    before = (folder / "test.json").stat().st_mtime_ns
    assert main(args) == 0
    assert (folder / "test.json").stat().st_mtime_ns == before
    file.write_text(file.read_text().replace("test = ", "test_tokens = 64\ntest = "))
    assert main(args) == 0
    assert json.loads((folder / "test.json").read_text())["tokens"] == 64
