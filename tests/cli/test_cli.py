"""The command line from end to end on one tiny run: text to a run, a packed file, figures and text again."""

import inspect
import io
import json
import math
import os
import random
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process
import pytest
import safetensors
import torch
import typer.main
from compiler import without_build_warning
from text_models import TINY, set_options

import bitnet
from bitnet import cli
from bitnet.benchmarks.compare.command import Options
from bitnet.benchmarks.compare.method import Settings
from bitnet.cli import app, main, spread_lists
from bitnet.cli.options import EngineOptions
from bitnet.config import ModelConfig
from bitnet.engine.cpu import CACHES, HEADS, CpuEngine
from bitnet.engine.load import ENGINES
from bitnet.engine.sampling import GREEDY, Sampling
from bitnet.kernels import native
from bitnet.train.config import TokenizerConfig, TrainConfig, default_config
from bitnet.train.data.shards import open_dataset

VERBS = (
    "train",
    "sweep",
    "pack",
    "generate",
    "serve",
    "eval",
    "bench",
    "compare",
    "inspect",
    "export",
    "import",
    "doctor",
)
Captured = pytest.CaptureFixture[str]
SHAPE = {**TINY, "vocab_size": 300, "num_hidden_layers": 2, "max_position_embeddings": 24}
SETTINGS = set_options(SHAPE)


def toy_text(seed: int) -> str:
    rng = random.Random(seed)
    words = ["def", "return", "né", "한국", "cabbage", "  if", "x = 1", "🙂", "the", "of"]
    return "".join(rng.choice(words) + rng.choice([" ", " ", "\n"]) for _ in range(900))


class Made:
    """A finished run and its packed file."""

    def __init__(self, folder: Path, summary: dict[str, Any]) -> None:
        self.folder, self.summary = folder, summary
        self.corpus, self.run, self.model = folder / "toy.txt", folder / "run", folder / "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "toy.txt").write_text(toy_text(1))
    args = ["train", "--data", folder / "toy.txt", "--out", folder / "run", "--steps", "25", "--json", "--seed", "3"]
    args += [*SETTINGS, "--set", "data.val_fraction=0.2", "--batch-size", "8", "--dtype", "fp32"]
    with pytest.MonkeyPatch.context() as patch:
        out, err = io.StringIO(), io.StringIO()
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = main([str(arg) for arg in args])
    assert code == 0, err.getvalue()
    assert all(part in err.getvalue() for part in ("parameters", "validation (all)", "tokens/s", "packed"))
    summary = json.loads(out.getvalue())
    assert main(["pack", str(folder / "run"), "-o", str(folder / "model.safetensors")]) == 0
    return Made(folder, summary)


def report(capsys: Captured, *args: object) -> dict[str, Any]:
    """Run with --json: one JSON document on stdout and nothing else."""
    capsys.readouterr()
    assert main([str(arg) for arg in (*args, "--json")]) == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert isinstance(values, dict)
    assert "{" not in captured.err
    return values


# ---- train -------------------------------------------------------------------------------------------------


def test_train_json_is_the_end_of_the_run(made: Made) -> None:
    summary = made.summary
    assert (summary["run"], summary["steps"]) == (str(made.run), 25)
    rows = [json.loads(line) for line in (made.run / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in rows if row.get("val_whole"))
    assert summary["validation"]["bits_per_byte"] == last["val_bits_per_byte"]
    assert summary["sample"] in (made.run / "samples.txt").read_bytes().decode()  # a model may generate \r
    assert [Path(path).is_file() for path in summary["pictures"]] == [True, True]
    assert sum("loss" in row for row in rows) == 25


def test_flags_land_in_the_saved_config(made: Made) -> None:
    config = tomllib.loads((made.run / "config.toml").read_text())
    assert {key: config["model"][key] for key in SHAPE} == SHAPE
    assert config["train"]["steps"] == 25
    assert config["train"]["seed"] == 3
    assert config["data"]["paths"] == [str(made.corpus)]


def test_train_prints_the_run_and_logs_to_stderr(made: Made, capsys: Captured) -> None:
    assert main(["train", "--out", str(made.run)]) == 0  # already complete
    captured = capsys.readouterr()
    assert captured.out == f"{made.run}\n"
    assert "done already" in captured.err
    assert main(["train", "--out", str(made.run), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def small(out: Path, *args: object) -> list[str]:
    fixed = [*SETTINGS, "--out", out, "--steps", "1", "-q", "--set", "data.val_fraction=0.3", "--set", "train.seed=1"]
    return ["train", *(str(arg) for arg in (*args, *fixed))]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.txt", "b.txt", "c.md", "deep/d.txt")):
        (folder / name).write_text(toy_text(i))
    return folder


@pytest.mark.parametrize(
    ("data", "files"),
    [
        (["{}/a.txt", "{}/b.txt"], {"a.txt", "b.txt"}),
        (["{}"], {"parts/a.txt", "parts/b.txt", "parts/c.md", "parts/deep/d.txt"}),
        (["{}/*.txt"], {"a.txt", "b.txt"}),
        (["{}/**/*.txt"], {"a.txt", "b.txt", "d.txt"}),
        (["{}/deep", "{}/*.md", "{}/a.txt"], {"deep/d.txt", "c.md", "a.txt"}),
    ],
    ids=["files", "folder", "glob", "deep-glob", "mixed"],
)
def test_data_may_be_anything(
    data: list[str], files: set[str], parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitnet.train.pretrain.plot_run", lambda *args: [])
    assert main(small(tmp_path / "run", "--data", *(name.format(parts) for name in data))) == 0
    sources = open_dataset(tmp_path / "run" / "data").manifest.sources
    assert {source.name for source in sources} == files


def test_val_data_is_validated_on(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.train.pretrain.plot_run", lambda *args: [])
    args = ["--data", parts / "a.txt", parts / "b.txt", "--val-data", parts / "deep", parts / "c.md"]
    assert main(small(tmp_path / "run", *args)) == 0
    data = open_dataset(tmp_path / "run" / "data")
    assert data.val.text_bytes == sum((parts / name).stat().st_size for name in ("deep/d.txt", "c.md"))
    assert data.train.text_bytes == sum((parts / name).stat().st_size for name in ("a.txt", "b.txt"))


class Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def test_data_from_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.train.pretrain.plot_run", lambda *args: [])
    text = toy_text(9)
    monkeypatch.setattr(sys, "stdin", Stdin(text.encode()))
    assert main(small(tmp_path / "run", "--data", "-")) == 0
    data = open_dataset(tmp_path / "run" / "data")
    assert data.train.text_bytes + data.val.text_bytes == len(text.encode())


@pytest.mark.parametrize(
    ("args", "spread"),
    [
        ("--data a b -n 3", "--data a --data b -n 3"),
        ("--data a", "--data a"),
        ("--data - b --val-data c d", "--data - --data b --val-data c --val-data d"),
        ("--data a --data b c", "--data a --data b --data c"),
        ("--steps 3 --data a", "--steps 3 --data a"),
        ("--data=a b", "--data=a --data b"),
        ("x --json y", "x --json y"),
        ("", ""),
    ],
)
def test_lists_may_be_written_once(args: str, spread: str) -> None:
    assert spread_lists(args.split()) == spread.split()


# ---- pack and inspect --------------------------------------------------------------------------------------


def test_pack_reports_what_it_wrote(made: Made, capsys: Captured, tmp_path: Path) -> None:
    values = report(capsys, "pack", made.run, "-o", tmp_path / "m.safetensors")
    assert values["file_bytes"] == (tmp_path / "m.safetensors").stat().st_size
    digests = []
    for path in (made.model, tmp_path / "m.safetensors"):
        with safetensors.safe_open(path, framework="pt") as file:
            digests.append(file.metadata()["sha256"])
    assert digests[0] == digests[1]  # the same run packs to the same content
    assert main(["pack", str(made.run), "-o", str(tmp_path / "m.safetensors")]) == 0  # again, over its own file
    out = capsys.readouterr().out
    assert str(tmp_path / "m.safetensors") in out
    assert "times smaller than fp16" in out


def test_pack_with_an_int8_embedding_is_smaller(made: Made, capsys: Captured, tmp_path: Path) -> None:
    values = report(capsys, "pack", made.run, "-o", tmp_path / "m.safetensors", "--embedding", "int8")
    assert values["file_bytes"] < made.model.stat().st_size
    vocab = values["config"]["vocab_size"]
    assert values["table_bytes"] == vocab * (32 + 4)  # int8 rows and one fp32 scale each


def test_inspect_counts_what_is_in_the_file(made: Made, capsys: Captured) -> None:
    values = report(capsys, "inspect", made.model)
    assert values == report(capsys, "inspect", "-m", made.model)
    vocab = values["config"]["vocab_size"]
    d, f, kv = 32, 44, 16
    block = 2 * d * d + 2 * d * kv + 3 * d * f
    norms = 2 * (2 * d + 2 * 16) + d  # before attention and feed-forward, of queries and keys; the last
    assert values["ternary_parameters"] == 2 * block
    assert values["parameters"] == 2 * block + vocab * d + norms
    assert values["float16_bytes"] == 2 * values["parameters"]
    assert values["table_bytes"] == 2 * vocab * d
    assert values["projection_bytes"] == 2 * block // 4 + 2 * 7 * 4  # two bits each and a scale a projection
    assert values["bits_per_weight"] == 8 * values["projection_bytes"] / (2 * block)
    assert len(values["layers"]) == 14
    model, _ = run_model(made)
    zeros = 0
    for layer in values["layers"]:
        weight = model.state_dict()[f"{layer['name']}.weight"].double()
        scale = float(weight.abs().mean())
        codes = (weight / scale).round().clamp(-1, 1)
        assert layer["shape"] == list(weight.shape)
        assert layer["scale"] == pytest.approx(scale, rel=1e-6)
        # A weight within 2^-22 of a threshold may round either way: one per layer is allowed.
        assert layer["zero_fraction"] == pytest.approx(float((codes == 0).double().mean()), abs=1.01 / weight.numel())
        zeros += layer["zero_fraction"] * weight.numel()
    assert values["zero_fraction"] == pytest.approx(zeros / (2 * block), rel=1e-6)
    assert values["training"]["steps"] == 25
    assert values["training"]["val_bits_per_byte"] == made.summary["validation"]["bits_per_byte"]


def run_model(made: Made) -> tuple[Any, Any]:
    from bitnet.train.runs.run import Run

    return Run(made.run).load()


def test_inspect_as_a_table(made: Made, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["inspect", str(made.model)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for part in (
        "ternary",
        "SiLU",
        "no sub-norms",
        "bits per weight",
        "zeros by layer",
        "sentencepiece",
        "2 layers, width 32",
    ):
        assert part in captured.out, part


# ---- eval --------------------------------------------------------------------------------------------------


def test_eval_is_what_the_logits_say(made: Made, capsys: Captured, tmp_path: Path) -> None:
    """Every token but the first of a document, in windows of the context, in float64."""
    text = toy_text(77)[:1500]
    (tmp_path / "new.txt").write_text(text)
    context = random.choice([5, 16, 24])
    values = report(capsys, "eval", "-m", made.model, "--data", tmp_path / "new.txt", "-c", context)
    engine = bitnet.load(made.model)
    ids = torch.tensor([engine.tokenizer.bos_id, *engine.tokenizer.encode(text)])
    windows, tokens = [], 0
    for start in range(0, len(ids) - 1, context):
        inputs, targets = ids[start : start + context], ids[start + 1 : start + context + 1]
        logits = engine.logits(inputs[: len(targets)]).double()
        scores = logits.log_softmax(-1)[range(len(targets)), targets]
        windows.append((-float(scores.sum()), len(targets), targets))
        tokens += len(targets)
    nats, size = math.fsum(n for n, _, _ in windows), len(text.encode())
    assert (values["tokens"], values["bytes"], values["context"]) == (tokens, size, context)
    # fp32 losses of a few nats: 2^-24 * 16 each.
    assert values["loss"] == pytest.approx(nats / tokens, abs=2e-6)
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=2e-6)
    assert values["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=4e-6)
    # The ratio estimate's error (Cochran 1977, equation 6.13) over windows, for tokens.
    residuals = [n - nats / tokens * t for n, t, _ in windows]
    n = len(windows)
    error = math.sqrt(n / (n - 1) * math.fsum(r * r for r in residuals)) / tokens
    assert values["perplexity_error"] == pytest.approx(math.exp(nats / tokens) * error, rel=1e-4)


@pytest.mark.parametrize(("engine", "noise"), [("torch", 1e-6), ("auto", 2e-5)])
def test_packing_costs_nothing(engine: str, noise: float, made: Made, capsys: Captured, tmp_path: Path) -> None:
    """The packed file on the text of the validation split: what training measured last, to fp32 noise.

    The C++ engine adds floats in another order, so a few activations in a thousand round to the neighbouring int8
    value, 1/127 of the row's largest. That changes two bits per byte in the sixth digit.
    """
    data = open_dataset(made.run / "data")
    text = made.corpus.read_text()
    held_back = text[int(len(text) * (1 - 0.2)) :]
    assert len(held_back.encode()) == data.val.text_bytes
    (tmp_path / "val.txt").write_text(held_back)
    values = report(capsys, "eval", "-m", made.model, "--data", tmp_path / "val.txt", "--engine", engine)
    expected = made.summary["validation"]
    assert values["engine"] == ("torch" if engine == "torch" or native.why_not() else "cpu")
    assert values["tokens"] == expected["tokens"]
    assert values["bytes"] == expected["bytes"]
    assert values["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], abs=noise)
    assert values["bits_per_byte_error"] == pytest.approx(expected["bits_per_byte_error"], abs=noise)


def test_eval_takes_files_stdin_and_a_limit(
    made: Made, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [toy_text(5)[:400], toy_text(6)[:300]]
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / name).write_text(text)
    both = report(capsys, "eval", "-m", made.model, "--data", tmp_path / "a", tmp_path / "b")
    assert both["bytes"] == sum(len(text.encode()) for text in texts)
    one = report(capsys, "eval", "-m", made.model, "--data", tmp_path / "a")
    monkeypatch.setattr(sys, "stdin", Stdin(texts[0].encode()))
    piped = report(capsys, "eval", "-m", made.model, "--data", "-")
    assert [piped[key] for key in ("loss", "tokens", "bytes")] == [one[key] for key in ("loss", "tokens", "bytes")]
    few = report(capsys, "eval", "-m", made.model, "--data", tmp_path / "a", "--tokens", "31")
    assert few["tokens"] == 31


def test_eval_as_a_table(made: Made, capsys: Captured) -> None:
    values = report(capsys, "eval", "-m", made.model, "--data", made.corpus)
    assert main(["eval", "-m", str(made.model), "--data", str(made.corpus)]) == 0
    captured = capsys.readouterr()
    for part in (f"{values['bits_per_byte']:.4f}", "±", "perplexity", f"{values['bytes']:,} bytes"):
        assert part in captured.out, part
    assert without_build_warning(captured.err) == ""


# ---- generate ----------------------------------------------------------------------------------------------


def test_greedy_text_is_the_argmax_of_the_logits(made: Made, capsys: Captured) -> None:
    values = report(capsys, "generate", "-m", made.model, "-p", "def ", "-n", "12", "--temp", "0", "--ignore-eos")
    engine = bitnet.load(made.model)
    ids = [engine.tokenizer.bos_id, *engine.tokenizer.encode("def ")]
    assert values["prompt_tokens"] == len(ids)
    for token in values["ids"]:  # prompt and text fit into the context of 24
        logits = engine.logits(torch.tensor(ids))[-1]
        # With the KV cache the same sums are computed in another order: a tie within fp32 noise may go either way.
        assert float(logits[token]) >= float(logits.max()) - 1e-4
        ids.append(token)
    assert values["tokens"] == len(values["ids"]) == 12
    assert values["text"] == engine.tokenizer.decode(values["ids"])
    again = report(capsys, "generate", "-m", made.model, "-p", "def ", "-n", "12", "--temp", "0", "--ignore-eos")
    assert again["ids"] == values["ids"]


def test_a_seed_repeats_a_text(made: Made, capsys: Captured) -> None:
    args = ["generate", "-m", made.model, "-p", "the", "-n", "40", "--temp", "1.5", "--ignore-eos"]
    args += ["--top-k", "0", "--top-p", "1", "--min-p", "0"]
    first, again, other = (report(capsys, *args, "-s", seed)["ids"] for seed in (11, 11, 12))
    assert first == again
    assert first != other
    free = [report(capsys, *args) for _ in range(2)]
    assert free[0]["seed"] != free[1]["seed"]
    assert report(capsys, *args, "-s", free[0]["seed"])["ids"] == free[0]["ids"]  # reported, so that it can be repeated


def test_text_streams_to_stdout_and_figures_to_stderr(made: Made, capsys: Captured) -> None:
    args = ["generate", "-m", str(made.model), "-p", "né 한", "-n", "30", "-s", "4", "--ignore-eos"]
    values = report(capsys, *args)
    assert main(args) == 0
    captured = capsys.readouterr()
    assert captured.out == "né 한" + values["text"] + "\n"
    assert "30 generated" in captured.err
    assert "seed 4" in captured.err


def test_no_new_tokens(made: Made, capsys: Captured) -> None:
    values = report(capsys, "generate", "-m", made.model, "-p", "def", "-n", "0")
    assert (values["ids"], values["text"], values["tokens"]) == ([], "", 0)
    assert main(["generate", "-m", str(made.model), "-p", "def", "-n", "0"]) == 0
    assert capsys.readouterr().out == "def\n"


def test_a_small_context_limits_what_is_seen(made: Made, capsys: Captured) -> None:
    """With -c 6 only the last three tokens of a prompt are read: half of the context is left for new text."""
    engine = bitnet.load(made.model)
    args = ["-n", "3", "--temp", "0", "-c", "6", "--ignore-eos"]
    long = report(capsys, "generate", "-m", made.model, "-p", "def return cabbage the of the of if", *args)
    ids = [engine.tokenizer.bos_id, *engine.tokenizer.encode("def return cabbage the of the of if")][-3:]
    assert long["ids"] == engine.generate(ids, 3, GREEDY)
    values = report(capsys, "generate", "-m", made.model, "-p", "the", "-n", "60", "--temp", "0", "-c", "6")
    assert len(values["ids"]) <= 60


def test_a_prompt_from_standard_input(made: Made, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["-n", "5", "--temp", "0"]
    expected = report(capsys, "generate", "-m", made.model, "-p", "né\nthe", *args)
    monkeypatch.setattr(sys, "stdin", Stdin("né\nthe".encode()))
    got = report(capsys, "generate", "-m", made.model, "-p", "-", *args)
    assert (got["prompt"], got["ids"]) == ("né\nthe", expected["ids"])


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
@pytest.mark.parametrize("verb", [["generate", "-p", "def ", "-n", "9", "--temp", "0"], ["eval", "--data", "{}"]])
def test_engine_head_and_cache_are_options(
    verb: list[str], made: Made, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them reaches the engine, and an unknown value is refused in one line."""
    seen: list[tuple[str, str]] = []

    def spy(*args: Any, **options: Any) -> CpuEngine:
        seen.append((options["head"], options["cache"]))
        return CpuEngine(*args, **options)

    monkeypatch.setattr("bitnet.engine.load.CpuEngine", spy)
    args = [verb[0], "-m", made.model, *(part.format(made.corpus) for part in verb[1:])]
    for options in ([], ["--engine", "cpu"], ["--head", "int8"], ["--cache", "bf16"], ["--cache", "int8"]):
        assert report(capsys, *args, *options)["engine"] == "cpu"
    exact = ("file", "fp32")
    assert seen == [exact, exact, ("int8", "fp32"), ("file", "bf16"), ("file", "int8")]
    assert report(capsys, *args, "--engine", "torch")["engine"] == "torch"
    assert len(seen) == 5
    for option, known in (("engine", "auto, cpu, torch"), ("head", ", ".join(HEADS)), ("cache", ", ".join(CACHES))):
        assert main([str(arg) for arg in (*args, f"--{option}", "gold")]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"bitnet: error: {option}: got 'gold', expected one of {known}")
        assert err.count("\n") == 1


def test_threads_are_what_was_asked_for(made: Made, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.threads.usable_cores", lambda: 2)
    report(capsys, "generate", "-m", made.model, "-n", "1", "-t", "2")
    assert torch.get_num_threads() == 2
    report(capsys, "eval", "-m", made.model, "--data", made.corpus, "--tokens", "9", "-t", "1")
    assert torch.get_num_threads() == 1


# ---- the tool itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_every_verb(verb: str, flag: str, capsys: Captured) -> None:
    assert main([verb, flag]) == 0
    captured = capsys.readouterr()
    assert f"bitnet {verb}" in captured.out
    assert captured.err == ""


def test_help_lists_the_verbs_in_order(capsys: Captured) -> None:
    assert main(["--help"]) == 0
    table = capsys.readouterr().out.partition("Commands")[2]
    assert sorted(VERBS, key=lambda verb: table.index(f"│ {verb} ")) == list(VERBS)


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_prints_what_is_declared(verb: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word of it: rich reads [word] as markup and drops it, unless a backslash precedes it.

    In a terminal wide enough for the longest help text to fit on one line, so that columns do not mix.
    """
    monkeypatch.setenv("COLUMNS", "500")
    command = typer.main.get_command(app)
    if verb:
        command = command.commands[verb]
        command.fill_help()
    declared = [command.help or "", *(getattr(param, "help", None) or "" for param in command.params)]
    assert main([*verb.split(), "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert not re.search(r"\{[a-z]", printed.partition("Options")[2])  # every {name} has been replaced by its value
    for text in filter(None, declared):
        for paragraph in text.replace("\\[", "[").split("\n\n"):
            assert " ".join(paragraph.split()) in printed


def test_brackets_survive_in_help(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["sweep", "--help"]) == 0
    assert "Sweep spec in TOML: seeds, linears, [base], [grid], [[runs]]." in capsys.readouterr().out


def test_version_of_the_module() -> None:
    done = child_process.run(child_process.bitnet("--version"))
    assert done.stdout == f"bitnet {bitnet.__version__}\n"
    assert done.stderr == ""


def test_the_command_line_starts_without_torch() -> None:
    code = "import bitnet.cli, sys; sys.exit('torch' in sys.modules)"
    child_process.run([sys.executable, "-c", code])


def test_ctrl_c_is_130(made: Made, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def interrupted(path: Path) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitnet.inspection.inspect_packed", interrupted)
    assert main(["inspect", str(made.model)]) == 130
    assert capsys.readouterr().err == "bitnet: interrupted\n"
    assert cli.guarded(lambda: interrupted(made.model)) == 130  # type: ignore[arg-type,return-value]


@pytest.mark.slow
@pytest.mark.parametrize("args", [["inspect", "{}", "--json"], ["generate", "-m", "{}", "-n", "9"]])
def test_a_closed_pipe_is_no_error(args: list[str], made: Made) -> None:
    """As in `bitnet ... | head -0`, with a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    done = child_process.run(child_process.bitnet(*(arg.format(made.model) for arg in args)), check=False, stdout=write)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr


def test_memory_and_disk_errors_are_one_line(capsys: Captured) -> None:
    def fail(error: BaseException) -> Callable[[], int]:
        def action() -> int:
            raise error

        return action

    memory = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    for error in (MemoryError(), memory, OSError(5, "Input/output error", "somewhere"), PermissionError(13, "Denied")):
        assert cli.guarded(fail(error)) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith("bitnet: error: ")
    for bug in (ZeroDivisionError(), RuntimeError("mat1 and mat2 shapes cannot be multiplied")):
        with pytest.raises(type(bug)):  # a bug is not reported as a user error
            cli.guarded(fail(bug))
    with pytest.raises(SystemExit):
        cli.guarded(fail(SystemExit(3)))


OWNERS: dict[str, Callable[[], dict[str, object]]] = {  # by verb: the dataclass that defines a default, by option
    "train": lambda: {
        **dict.fromkeys(("steps", "seed", "batch_size", "lr", "optimizer", "dtype"), TrainConfig()),
        "linear": ModelConfig(),
    },
    "generate": lambda: dict.fromkeys(("temperature", "top_k", "top_p", "min_p"), Sampling()),
    "compare": lambda: {
        **dict.fromkeys(("max_tokens", "kl_tokens", "rounds", "budget"), Options(())),
        "qat_steps": Settings(1),
    },
}


def shown_defaults(verb: str) -> dict[str, str]:
    """By option: the word after "Default:" in its help."""
    command = typer.main.get_command(app).commands[verb]
    command.fill_help()
    found = {
        param.name: re.search(r"Default: (\S+)\.$", getattr(param, "help", None) or "") for param in command.params
    }
    return {name: match[1] for name, match in found.items() if match}


@pytest.mark.parametrize("verb", OWNERS)
def test_help_names_the_real_defaults(verb: str) -> None:
    shown = shown_defaults(verb)
    for name, owner in OWNERS[verb]().items():
        value = getattr(owner, name)
        assert shown[name] == (f"{value:g}" if name == "budget" else str(value)), name
    if verb == "train":
        assert shown["tokenizer"] == TokenizerConfig().kind
        assert default_config(shown["preset"]) == default_config()


def test_engine_options_are_those_of_load() -> None:
    """The same defaults, and every value that the engines know is in the help."""
    parameters = inspect.signature(bitnet.load).parameters
    defaults = EngineOptions().load_options()
    assert defaults == {name: parameters[name].default for name in defaults}
    command = typer.main.get_command(app).commands["generate"]
    texts = {param.name: getattr(param, "help", None) or "" for param in command.params}
    for option, values in (("engine", ENGINES), ("head", HEADS), ("cache", CACHES)):
        assert all(value in texts[option] for value in values)


# ---- old spellings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--twin", "{}"], ["--twin={}"], ["--baseline", "{}"]], ids=" ".join)
def test_compare_takes_a_baseline_under_both_names(
    args: list[str], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path | None] = []

    def spy(run: Path, baseline: Path | None, *rest: Any, **options: Any) -> dict[str, Any]:
        seen.append(baseline)
        return {"results": []}

    monkeypatch.setattr("bitnet.benchmarks.compare.command.compare_runs", spy)
    monkeypatch.setattr("bitnet.benchmarks.compare.command.write_report", lambda *args: None)
    command = ["compare", "run", "--data", "text", *(arg.format(tmp_path) for arg in args), "--json"]
    assert main(command) == 0
    assert seen == [tmp_path]


@pytest.mark.parametrize("option", ["--slots", "--sequences"])
def test_serve_takes_a_number_of_sequences_under_both_names(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvicorn")
    seen: list[int] = []

    def spy(model: Path, device: Any, options: Any, *rest: Any, **engine: Any) -> int:
        seen.append(options.sequences)
        return 0

    monkeypatch.setattr("bitnet.serve.server.serve", spy)
    assert main(["serve", option, "7"]) == 0
    assert seen == [7]


def test_train_takes_linear_plain_for_float(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.train.pretrain.plot_run", lambda *args: [])
    assert main(small(tmp_path / "run", "--data", parts, "--linear", "plain")) == 0
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["model"]["linear"] == "float"


@pytest.mark.parametrize(("verb", "old"), [("compare", "--twin"), ("serve", "--slots"), ("train", "plain")])
def test_help_shows_no_old_spelling(verb: str, old: str, capsys: Captured) -> None:
    assert main([verb, "--help"]) == 0
    assert old not in capsys.readouterr().out
