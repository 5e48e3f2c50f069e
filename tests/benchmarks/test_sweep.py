"""`bitnet sweep`: its runs are those of `bitnet train`, and it resumes where it stopped."""

import json
import random
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from sweep_specs import GRID, write_spec

from bitnet.benchmarks.sweep import run as sweep
from bitnet.benchmarks.sweep.spec import read_spec
from bitnet.cli import main
from bitnet.errors import BitNetError
from bitnet.train import pretrain as loop
from bitnet.train.runs.run import Run


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.train.pretrain.plot_run", lambda *args: [])


def test_a_sweep_resumes_and_reports(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut off in its fourth run, started again: eight runs, each trained once, equal to what `bitnet train` gives."""
    file, out, calls = write_spec(text, GRID), text.parent / "out", 0
    original = loop.Trainer.training_step

    def counted(trainer: loop.Trainer) -> None:
        nonlocal calls
        calls += 1
        if calls == 4 * 3 + 2:
            raise KeyboardInterrupt
        original(trainer)

    monkeypatch.setattr(loop.Trainer, "training_step", counted)
    args = ["sweep", str(file), "--out", str(out), "--json", "-q"]
    assert main(args) == 130
    assert main(args) == 0
    report = json.loads(capsys.readouterr().out)
    assert calls == 8 * 4 + 2  # the run that was cut off had no save yet: one step again, and the one that was cut
    assert json.loads((out / "sweep.json").read_text()) == report
    assert all((out / f"{name}.png").exists() for name in ("sweep", "curves"))
    assert len(report["runs"]) == 8
    for run in report["runs"]:  # of the model that was trained: its characters, not the vocabulary asked for
        assert len(report["curves"][run["run"]]) == 4  # as many as steps
        model, _ = Run(out / run["run"]).load()
        assert run["parameters"] == sum(weight.numel() for weight in model.parameters())
    by_key = {(r["point"], r["linear"], r["seed"]): r["loss"] for r in report["runs"]}
    for point in report["points"]:
        losses = [by_key[point["point"], point["linear"], seed] for seed in (1, 2)]
        assert point["loss"]["mean"] == pytest.approx(sum(losses) / 2)
        gaps = [by_key[point["point"], "ternary", s] - by_key[point["point"], "float", s] for s in (1, 2)]
        assert (point["gap"] is None) == (point["linear"] == "float")
        assert point["gap"] is None or point["gap"]["mean"] == pytest.approx(sum(gaps) / 2)
    means = {(p["point"], p["linear"]): p["loss"]["mean"] for p in report["points"]}
    (size,) = report["sizes"]
    assert size["tried"] == {"ternary": 2, "float": 2}
    for linear, best in size["best"].items():
        assert means[best, linear] == min(mean for (_, kind), mean in means.items() if kind == linear)
    ours, theirs = (size["best"][linear] for linear in ("ternary", "float"))
    gaps = [by_key[ours, "ternary", s] - by_key[theirs, "float", s] for s in (1, 2)]
    assert size["tuned_gaps"].keys() == {"ternary"}
    assert size["tuned_gaps"]["ternary"]["pairs"] == 2
    assert size["tuned_gaps"]["ternary"]["gap"]["mean"] == pytest.approx(statistics.fmean(gaps))
    assert size["tuned_gaps"]["ternary"]["gap"]["error"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2)

    plan = random.choice(read_spec(file))
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
    assert main(["sweep", str(write_spec(text, "seeds = [1]")), "--out", str(out), "-q"]) == 0
    changed = write_spec(text, "seeds = [1]", "train.clip = 0.5\n")
    assert main(["sweep", str(changed), "--out", str(out), "-q"]) == 2
    assert "train.clip" in capsys.readouterr().err
    longer = write_spec(text, "seeds = [2, 1]")
    longer.write_text(longer.read_text().replace("train.steps = 4", "train.steps = 6"))
    assert main(["sweep", str(longer), "--out", str(out), "-q"]) == 2
    assert "train.steps = 4, got 6" in capsys.readouterr().err
    assert len(list(out.glob("*s2"))) == 0  # refused before anything is trained
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", str(write_spec(text, "seeds = [1]")), "--out", str(out), "-q"]) == 2
    assert "expected one" in capsys.readouterr().err


def test_a_run_that_diverges_is_listed_and_the_rest_is_trained(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sweep.run_training

    def diverging(preset: Any, file: Any, values: Any, *rest: Any, **options: Any) -> Any:
        done = original(preset, file, values, *rest, **options)
        if values["train"]["lr"] == 0.01:
            raise BitNetError("training diverged: got 5 steps in a row without a finite gradient")
        return done

    monkeypatch.setattr(sweep, "run_training", diverging)
    file, out = write_spec(text, GRID.replace("[1, 2]", "[1]")), text.parent / "out"
    assert main(["sweep", str(file), "--out", str(out), "-q"]) == 0
    report = json.loads((out / "sweep.json").read_text())
    assert [r["loss"] is None for r in report["runs"]] == ["lr=0.01" in r["point"] for r in report["runs"]]
    assert {p["diverged"] for p in report["points"] if "lr=0.01" in p["point"]} == {1}
    (size,) = report["sizes"]
    assert size["best"] == {"ternary": "lr=0.001", "float": "lr=0.001"}
    assert size["tried"] == {"ternary": 2, "float": 2}

    monkeypatch.setattr(sweep, "run_training", original)
    again = next(r for r in report["runs"] if r["loss"] is None)
    assert main(["sweep", str(file), "--out", str(out), "-q"]) == 0
    assert json.loads((out / "sweep.json").read_text())["runs"] == report["runs"]
    shutil.rmtree(out / again["run"])  # the way to try it again
    assert main(["sweep", str(file), "--out", str(out), "-q"]) == 0
    runs = json.loads((out / "sweep.json").read_text())["runs"]
    assert sum(r["loss"] is None for r in runs) == 1
    assert next(r for r in runs if r["run"] == again["run"])["loss"] is not None


def test_finished_runs_score_the_test_text(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ternary run as its packed file scores the same windows; a changed text is scored anew, nothing else is."""
    unseen, out = tmp_path / "unseen.txt", tmp_path / "out"
    unseen.write_text("".join(random.choice(["fade ", "bag ", "cabbage\n", "hedge "]) for _ in range(200)))
    content = "seeds = [3]\nlinears = ['ternary', 'float']\ntest = ['{}']\n[[runs]]\n[[runs]]\nmodel.hidden_size = 64"
    file = write_spec(text, content.format(unseen))
    args = ["sweep", str(file), "--out", str(out), "--json", "-q"]
    assert main(args) == 0
    report = json.loads(capsys.readouterr().out)
    assert (out / "scaling.png").exists()  # two sizes
    assert len({run["parameters"] for run in report["runs"]}) == 2
    for run in report["runs"]:
        if run["linear"] == "ternary":
            assert main(["pack", str(out / run["run"]), "-o", str(tmp_path / "m.safetensors")]) == 0
            capsys.readouterr()
            count = len(Run(out / run["run"]).tokenizer().encode(unseen.read_text()))
            whole = str((count - 1) // 16 * 16)  # nothing comes before the first token to predict it from
            words = ["eval", "-m", str(tmp_path / "m.safetensors"), "--data", str(unseen), "--tokens", whole, "--json"]
            assert main(words) == 0
            found = json.loads(capsys.readouterr().out)
            assert run["test_loss"] == pytest.approx(found["loss"], rel=1e-5)
            assert run["test_bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-5)
    for point in report["points"]:
        if point["linear"] == "ternary":
            ours, baseline = (
                next(r for r in report["runs"] if (r["point"], r["linear"]) == (point["point"], linear))
                for linear in ("ternary", "float")
            )
            assert point["test_gap"]["mean"] == pytest.approx(ours["test_loss"] - baseline["test_loss"])
    folder = out / report["runs"][0]["run"]
    before = (folder / "test.json").stat().st_mtime_ns
    unseen.touch()  # the same text
    assert main(args) == 0
    assert (folder / "test.json").stat().st_mtime_ns == before
    was = unseen.read_text()
    unseen.write_text(was[len(was) // 2 :] + was[: len(was) // 2])  # as long, and another
    capsys.readouterr()
    assert main(args) == 0
    for run, old in zip(json.loads(capsys.readouterr().out)["runs"], report["runs"], strict=True):
        assert run["test_loss"] != old["test_loss"]
        assert run["loss"] == old["loss"]
    file.write_text(file.read_text().replace("test = ", "test_tokens = 64\ntest = "))
    assert main(args) == 0
    assert json.loads((folder / "test.json").read_text())["tokens"] == 64
    file.write_text(file.read_text().replace(str(unseen), str(tmp_path / "nowhere.txt")))
    assert main(["sweep", str(file), "--out", str(tmp_path / "new"), "-q"]) == 2
    assert "nowhere.txt" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()  # named before anything is trained
