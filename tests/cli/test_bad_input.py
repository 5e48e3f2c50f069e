"""Bad input gives exit code 2 and one line that says what was wrong; no traceback, and no file changes."""

import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from compiler import without_build_warning
from text_models import TINY, set_options

from bitnet.cli import main
from bitnet.files.packed import write_packed
from bitnet.text.characters import train_char
from bitnet.train.runs.run import Run

Captured = pytest.CaptureFixture[str]
SETTINGS = set_options(TINY)
TOY = "fade a cabbage\nbag the hedge\n"


@pytest.fixture(autouse=True)
def any_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITNET_BACKEND", raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with toy.txt, a finished run and its packed file."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "toy.txt").write_text(TOY * 40)
    args = ["train", "--data", folder / "toy.txt", "--out", folder / "run", "--steps", "2", "--tokenizer", "char", "-q"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitnet.train.pretrain.plot_run", lambda *args: [])
        assert main([str(arg) for arg in [*args, *SETTINGS, "--set", "data.val_fraction=0.2"]]) == 0
    assert main(["pack", str(folder / "run"), "-o", str(folder / "model.safetensors")]) == 0
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of that folder to damage."""
    shutil.copytree(made, tmp_path / "place")
    return tmp_path / "place"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def refused(capsys: Captured, *args: object) -> str:
    """Run a command that must fail; returns its one line of error."""
    capsys.readouterr()
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    err = without_build_warning(captured.err)
    assert code == 2, err
    assert err.startswith("bitnet: error: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert captured.out == ""
    return err


def check_mentions(line: str, *parts: str) -> None:
    assert [part for part in parts if part not in line] == [], line


def train_args(place: Path, *args: object, data: object = None) -> list[object]:
    found = place / "toy.txt" if data is None else data
    return ["train", "-q", *SETTINGS, "--data", found, "--out", place / "new", "--steps", "1", *args]


# ---- models ------------------------------------------------------------------------------------------------

READERS: dict[str, Callable[[Path, Path], list[object]]] = {
    "generate": lambda model, place: ["generate", "-m", model, "-p", "a", "-n", "2"],
    "eval": lambda model, place: ["eval", "-m", model, "--data", place / "toy.txt"],
    "inspect": lambda model, place: ["inspect", model],
}


def resave(path: Path, change: Callable[[dict[str, str], dict[str, torch.Tensor]], None]) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    safetensors.torch.save_file(tensors, path, metadata)


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: random.randrange(len(data))])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data) // 2, len(data))] ^= 1 << random.randrange(8)  # among the tensors
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not a model at all " * 100)


def another_version(path: Path) -> None:
    resave(path, lambda metadata, tensors: metadata.update(version="2"))


def another_layout(path: Path) -> None:
    resave(path, lambda metadata, tensors: metadata.update(layout="k8-msb"))


def another_format(path: Path) -> None:
    resave(path, lambda metadata, tensors: metadata.update(format="pt"))


def another_scale(path: Path) -> None:
    """A valid value, but not the one that was written."""

    def change(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight_scale"] *= 2

    resave(path, change)


def gone(path: Path) -> None:
    path.unlink()


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    gone: "nothing at",
    folder_instead: "a folder at",
    truncate: "",
    empty: "cannot be read",
    text: "cannot be read",
    flip: "",
    another_version: "version 2",
    another_layout: "k8-msb",
    another_format: "'pt'",
    another_scale: "checksum",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("verb", READERS)
def test_a_damaged_model_is_refused(verb: str, damage: Callable[[Path], None], place: Path, capsys: Captured) -> None:
    model = place / "model.safetensors"
    damage(model)
    before = snapshot(place)
    check_mentions(refused(capsys, *READERS[verb](model, place)), str(model), DAMAGES[damage])
    assert snapshot(place) == before


def test_every_cut_and_many_flips(place: Path, capsys: Captured) -> None:
    """One byte short, one byte long, cut in the header, and random bits flipped anywhere."""
    model = place / "model.safetensors"
    data = model.read_bytes()
    damaged = [data[: len(data) - 1], data + b"\0", data[:7], data[:8], data[:100], data[len(data) // 2 :]]
    for _ in range(60):
        changed = bytearray(data)
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
        damaged.append(bytes(changed))
    for changed in damaged:
        model.write_bytes(changed)
        refused(capsys, "inspect", model)


def test_tokenizer_and_model_that_do_not_match(place: Path, capsys: Captured) -> None:
    run = Run(place / "run")
    model, _ = run.load()
    before = snapshot(place)
    with pytest.raises(ValueError, match="do not match"):
        write_packed(place / "other.safetensors", model, train_char(["only abc"]))
    assert snapshot(place) == before
    # A run whose tokenizer was replaced.
    data = train_char(["only abc"]).to_bytes()
    (place / "run" / "data" / "tokenizer.model").write_bytes(data)
    refused(capsys, "pack", place / "run", "-o", place / "other.safetensors")
    assert not (place / "other.safetensors").exists()

    # A packed file whose tokenizer was replaced.
    def change(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        tensors["tokenizer"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    resave(place / "model.safetensors", change)
    for verb in READERS.values():
        refused(capsys, *verb(place / "model.safetensors", place))


def test_text_the_tokenizer_cannot_encode(place: Path, capsys: Captured) -> None:
    (place / "other.txt").write_text("ZEBRA")
    check_mentions(refused(capsys, "eval", "-m", place / "model.safetensors", "--data", place / "other.txt"), "'Z'")
    check_mentions(refused(capsys, "generate", "-m", place / "model.safetensors", "-p", "Zebra"), "'Z'")


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["-c", "17"], "17"),
        (["--top-p", "1.5"], "top_p"),
        (["--top-p", "0"], "top_p"),
        (["--top-p", "nan"], "top_p"),
        (["--min-p", "-0.1"], "min_p"),
        (["--top-k", "-1"], "top_k"),
        (["--temp", "-1"], "temperature"),
        (["-n", "-1"], "'-n'"),
        (["-n", "many"], "'-n'"),
        (["-s", "-1"], "'-s'"),
        (["--device", "tpu"], "tpu"),
        (["--device", "mps"], "mps"),
        (["--device", "cuda:x"], "cuda:x"),
        (["-t", "-2"], "'-t'"),
        (["--unknown", "1"], "--unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_out_of_range(args: list[str], part: str, made: Path, capsys: Captured) -> None:
    check_mentions(refused(capsys, "generate", "-m", made / "model.safetensors", "-p", "a", *args), part)


def test_eval_beyond_the_context(made: Path, capsys: Captured) -> None:
    model, data = made / "model.safetensors", made / "toy.txt"
    check_mentions(refused(capsys, "eval", "-m", model, "--data", data, "-c", "17"), "17", "16")


def test_an_empty_prompt_without_a_first_token(made: Path, capsys: Captured) -> None:
    """The character tokenizer has no BOS to start with."""
    check_mentions(refused(capsys, "generate", "-m", made / "model.safetensors"), "empty prompt")


class Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def test_a_prompt_that_is_not_utf8(made: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"caf\xe9"))
    check_mentions(refused(capsys, "generate", "-m", made / "model.safetensors", "-p", "-"), "UTF-8", "3")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there(device: str, place: Path, capsys: Captured) -> None:
    before = snapshot(place)
    for args in (
        ["generate", "-m", place / "model.safetensors", "-p", "a"],
        ["eval", "-m", place / "model.safetensors", "--data", place / "toy.txt"],
        train_args(place),
    ):
        check_mentions(refused(capsys, *args, "--device", device), device, "cpu")
    assert snapshot(place) == before


# ---- threads -----------------------------------------------------------------------------------------------

THREADED: dict[str, Callable[[Path], list[object]]] = {
    "train": train_args,
    "sweep": lambda place: ["sweep", place / "spec.toml", "--out", place / "new"],
    "generate": lambda place: ["generate", "-m", place / "model.safetensors", "-p", "a"],
    "serve": lambda place: ["serve", "-m", place / "model.safetensors"],
    "eval": lambda place: ["eval", "-m", place / "model.safetensors", "--data", place / "toy.txt"],
    "bench": lambda place: ["bench", "-m", place / "model.safetensors"],
    "compare": lambda place: ["compare", place / "run", "--data", place / "toy.txt"],
}
NO_THREADS = {
    "zero": ("0", "got 0"),
    "negative": ("-1", "got -1"),
    "one too many": ("5", "got 5"),
    "a million": ("1000000", "got 1000000"),
    "beyond any integer": ("9" * 5000, "5000 characters"),
    "a word": ("many", "got 'many'"),
    "half of one": ("0.5", "got '0.5'"),
    "nothing": (" ", "got '"),
}


@pytest.mark.parametrize("flag", ["-t", "--threads"])
@pytest.mark.parametrize("verb", THREADED)
def test_threads_that_this_machine_has_not(
    verb: str, flag: str, place: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine, or in a container, of four cores."""
    monkeypatch.setattr("bitnet.threads.usable_cores", lambda: 4)
    before, torchs = snapshot(place), torch.get_num_threads()
    for text, got in NO_THREADS.values():
        line = refused(capsys, *THREADED[verb](place), flag, text)
        check_mentions(line, got, "-t", "expected 1 to the 4 cores that this process may use", "leave it out")
        assert len(line) < 300
    assert snapshot(place) == before
    assert torch.get_num_threads() == torchs


def test_every_verb_with_threads_is_among_these() -> None:
    import typer

    from bitnet.cli import app

    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {name for name, verb in verbs.items() if any("-t" in param.opts for param in verb.params)} == set(THREADED)


@pytest.mark.parametrize("cores", [1, 2])
def test_as_many_threads_as_there_are_cores(
    cores: int, place: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitnet.threads.usable_cores", lambda: cores)
    args = ["generate", "-m", place / "model.safetensors", "-p", "a", "-n", "1", "-t", cores]
    assert main([str(arg) for arg in args]) == 0
    check_mentions(refused(capsys, *args[:-1], cores + 1), f"got {cores + 1}, expected 1")


def test_an_unknown_backend(made: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_BACKEND", "unknown")
    check_mentions(refused(capsys, "generate", "-m", made / "model.safetensors", "-p", "a"), "unknown", "reference")


# ---- text --------------------------------------------------------------------------------------------------


@pytest.fixture
def corpora(place: Path) -> Path:
    (place / "empty.txt").write_bytes(b"")
    (place / "latin.txt").write_bytes(b"fade " * 1000 + b"caf\xe9" + b" bag" * 1000)
    (place / "cut.txt").write_bytes(("fade " * 500 + "é").encode()[:-1])
    (place / "none").mkdir()
    return place


BAD_DATA = {
    "missing.txt": ["missing.txt"],
    "*.nothing": ["*.nothing"],
    "empty.txt": ["no text"],
    "none": ["no text"],
    "latin.txt": ["latin.txt", "0xe9", "5003", "UTF-8"],
    "cut.txt": ["cut.txt", "UTF-8"],
}


@pytest.mark.parametrize(("name", "parts"), BAD_DATA.items(), ids=list(BAD_DATA))
def test_bad_text_to_train_on(name: str, parts: list[str], corpora: Path, capsys: Captured) -> None:
    before = snapshot(corpora)
    check_mentions(refused(capsys, *train_args(corpora, data=corpora / name)), *parts)
    left = {key for key in snapshot(corpora) if not key.startswith("new")}
    assert left == set(before)
    # The failed attempt leaves nothing that stops the next one in the same folder.
    assert main([str(arg) for arg in train_args(corpora, "--set", "data.val_fraction=0.2")]) == 0


@pytest.mark.parametrize(("name", "parts"), BAD_DATA.items(), ids=list(BAD_DATA))
def test_bad_text_to_score(name: str, parts: list[str], corpora: Path, capsys: Captured) -> None:
    before = snapshot(corpora)
    check_mentions(refused(capsys, "eval", "-m", corpora / "model.safetensors", "--data", corpora / name), *parts)
    assert snapshot(corpora) == before


def test_one_character_cannot_be_scored(place: Path, capsys: Captured) -> None:
    (place / "one.txt").write_text("a")
    check_mentions(
        refused(capsys, "eval", "-m", place / "model.safetensors", "--data", place / "one.txt"), "at least 2 tokens"
    )


def test_a_corpus_shorter_than_the_context(place: Path, capsys: Captured) -> None:
    (place / "short.txt").write_text("fade fade fade fade")
    args = train_args(place, "--tokenizer", "char", "--set", "data.val_fraction=0.3", data=place / "short.txt")
    check_mentions(refused(capsys, *args), "17", "context")
    (place / "short.txt").write_text("fade fade fade fade " * 9)  # with more text the same command works
    assert main([str(arg) for arg in args]) == 0


def test_standard_input_that_is_empty(place: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b""))
    check_mentions(refused(capsys, *train_args(place, data="-")), "no text")


# ---- settings ----------------------------------------------------------------------------------------------

BAD_SETTINGS = {
    "unknown key": (["--set", "train.rate=1"], ["rate"]),
    "unknown section": (["--set", "trainer.lr=1"], ["trainer"]),
    "no value": (["--set", "train.lr"], ["train.lr", "section.key=value"]),
    "not a number": (["--set", "train.lr=fast"], ["train.lr", "fast"]),
    "heads": (["--set", "model.num_attention_heads=5"], ["32", "5"]),
    "key/value heads": (["--set", "model.num_key_value_heads=3"], ["3"]),
    "odd heads": (["--set", "model.num_attention_heads=32"], ["even"]),
    "vocabulary": (["--set", "model.vocab_size=100"], ["100"]),
    "preset": (["--preset", "pico"], ["pico", "nano", "2b4t"]),
    "linear": (["--linear", "quaternary"], ["quaternary", "ternary"]),
    "tokenizer": (["--tokenizer", "words"], ["words", "sentencepiece"]),
    "dtype": (["--dtype", "fp16"], ["fp16", "bf16"]),
    "optimizer": (["--optimizer", "sgd"], ["sgd", "muon"]),
    "documents": (["--documents", "page"], ["page", "paragraph"]),
    "steps": (["--steps", "0"], ["steps", "0"]),
    "steps as text": (["--steps", "ten"], ["--steps", "integer"]),
    "context": (["-c", "17"], ["17", "16"]),
    "config that is not there": (["--config", "no-such.toml"], ["no-such.toml"]),
    "device": (["--device", "abacus"], ["abacus"]),
}  # fmt: skip


@pytest.mark.parametrize(("args", "parts"), BAD_SETTINGS.values(), ids=list(BAD_SETTINGS))
def test_bad_settings(args: list[str], parts: list[str], place: Path, capsys: Captured) -> None:
    before = snapshot(place)
    check_mentions(refused(capsys, *train_args(place, *args)), *parts)
    after = {key: value for key, value in snapshot(place).items() if key not in ("new", "new/lock")}
    assert after == before


def test_an_unknown_key_in_a_config_file(place: Path, capsys: Captured) -> None:
    (place / "mine.toml").write_text("[train]\nlearning_rate = 0.1\n")
    check_mentions(refused(capsys, *train_args(place, "--config", place / "mine.toml")), "learning_rate", "lr")


# ---- folders -----------------------------------------------------------------------------------------------


def test_out_is_a_folder_of_other_files(place: Path, capsys: Captured) -> None:
    """Even a file called lock in it must not be written."""
    (place / "new").mkdir()
    (place / "new" / "lock").write_text("my combination: 1234")
    (place / "new" / "thesis.txt").write_text("four years")
    before = snapshot(place)
    check_mentions(refused(capsys, *train_args(place)), "not empty", "--out")
    assert snapshot(place) == before


def test_out_is_a_file(place: Path, capsys: Captured) -> None:
    (place / "new").write_text("a file")
    before = snapshot(place)
    check_mentions(refused(capsys, *train_args(place)), "file", "--out")
    assert snapshot(place) == before


def test_out_is_a_run_with_other_settings(place: Path, capsys: Captured) -> None:
    before = snapshot(place)
    check_mentions(refused(capsys, "train", "-q", "--out", place / "run", "--lr", "0.5"), "train.lr", "0.5", "--out")
    check_mentions(refused(capsys, "train", "-q", "--out", place / "run", "--preset", "micro"), "model.", "--out")
    assert snapshot(place) == before


PACKS: dict[str, tuple[list[str], str]] = {
    "nothing": (["nowhere", "-o", "new.safetensors"], "nothing at"),
    "a folder that is no run": (["run/saves", "-o", "new.safetensors"], "without config.toml"),
    "a file": (["toy.txt", "-o", "new.safetensors"], "a file at"),
    "onto text": (["run", "-o", "toy.txt"], "not a packed model"),
    "onto its own config": (["run", "-o", "run/config.toml"], "not a packed model"),
    "onto its own save": (["run", "-o", "run/saves/step-00000002/model.safetensors"], "not a packed model"),
    "onto a folder": (["run", "-o", "run"], "a folder"),
    "into no folder": (["run", "-o", "none/new.safetensors"], "no folder"),
    "embedding": (["run", "-o", "new.safetensors", "--embedding", "int4"], "int4"),
}


@pytest.mark.parametrize(("args", "part"), PACKS.values(), ids=list(PACKS))
def test_bad_packs(args: list[str], part: str, place: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before = snapshot(place)
    check_mentions(refused(capsys, "pack", *args), part)
    assert snapshot(place) == before


def test_a_run_without_a_save(place: Path, capsys: Captured) -> None:
    shutil.rmtree(place / "run" / "saves")
    check_mentions(refused(capsys, "pack", place / "run", "-o", place / "new.safetensors"), "no save")


def test_a_run_with_damaged_saves_only(place: Path, capsys: Captured) -> None:
    for path in (place / "run" / "saves").glob("*/model.safetensors"):
        flip(path)
    before = snapshot(place)
    assert main(["pack", str(place / "run"), "-o", str(place / "new.safetensors")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("bitnet: error:")] == lines[-1:]
    assert "Traceback" not in "".join(lines)
    assert snapshot(place) == before


def test_a_run_whose_config_was_broken(place: Path, capsys: Captured) -> None:
    (place / "run" / "config.toml").write_text("[model\n")
    check_mentions(refused(capsys, "pack", place / "run", "-o", place / "new.safetensors"), "config.toml", "TOML")
    check_mentions(refused(capsys, "train", "-q", "--out", place / "run"), "config.toml", "TOML")


def test_a_run_whose_shape_was_changed(place: Path, capsys: Captured) -> None:
    config = place / "run" / "config.toml"
    config.write_text(config.read_text().replace("intermediate_size = 44", "intermediate_size = 48"))
    check_mentions(refused(capsys, "train", "-q", "--out", place / "run", "--steps", "3"), "do not fit")


# ---- usage -------------------------------------------------------------------------------------------------

USAGE = {
    "no such verb": (["paint"], "paint"),
    "no data": (["eval", "-m", "x"], "--data"),
    "no run": (["pack", "-o", "x"], "'RUN'"),
    "no output": (["pack", "x"], "--output"),
    "a model twice": (["inspect", "x", "-m", "y"], "one of them"),
    "unknown flag": (["doctor", "--fast"], "--fast"),
}


@pytest.mark.parametrize(("args", "part"), USAGE.values(), ids=list(USAGE))
def test_usage(args: list[str], part: str, capsys: Captured) -> None:
    check_mentions(refused(capsys, *args), part)


@pytest.mark.parametrize("args", [["inspect", "nowhere", "--debug"], ["--debug", "inspect", "nowhere"]])
def test_debug_shows_the_traceback(args: list[str], capsys: Captured) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        main(args)
    refused(capsys, "inspect", "nowhere")  # for that command only


def test_json_does_not_change_an_error(capsys: Captured) -> None:
    line = refused(capsys, "inspect", "nowhere")
    assert refused(capsys, "inspect", "nowhere", "--json") == line
    with pytest.raises(json.JSONDecodeError):
        json.loads(line)


def test_a_bug_is_not_reported_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> dict[str, Any]:
        raise AssertionError("a bug")

    monkeypatch.setattr("bitnet.inspection.inspect_packed", broken)
    with pytest.raises(AssertionError):
        main(["inspect", "x"])
