"""`bitnet train --init`: a run that starts from another model, and a float model that turns ternary."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from bitnet.cli import main
from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.checkpoint import read_save
from bitnet.files.gguf.export import export_gguf
from bitnet.files.hf.export import export_hf
from bitnet.files.packed import write_packed
from bitnet.files.source import TrainedSource
from bitnet.kernels import reference
from bitnet.layers import BitLinear, project
from bitnet.model import Transformer
from bitnet.quant import Precision, training_precision
from bitnet.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from bitnet.train.command import resolve, run_training
from bitnet.train.config import default_config
from bitnet.train.pretrain import pretrain
from bitnet.train.report.display import Display
from bitnet.train.runs.run import Run
from bitnet.train.runs.saves import Progress, Saves

TEXT = "fade a cabbage\nbag the hedge and feed the bead to a badge\n" * 60


pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(autouse=True)
def default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITNET_BACKEND", raising=False)


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train_sentencepiece([TEXT], 280)


def made(tokenizer: SentencePieceTokenizer, seed: int, **changes: object) -> Transformer:
    shape = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=16, qk_norm=False, **shape)
    model = Transformer(config.replace(**{"num_key_value_heads": 1, **changes}))
    model.init_weights(seed)
    return model


def train(folder: Path, *args: object) -> int:
    (folder / "toy.txt").write_text(TEXT)
    base = [
        "train",
        "-q",
        "--data",
        folder / "toy.txt",
        "--set",
        "data.val_fraction=0.2",
        "--set",
        "train.batch_size=2",
    ]
    return main([str(arg) for arg in [*base, *args]])


def first_weights(run: Path) -> dict[str, torch.Tensor]:
    return read_save(run / "saves" / "step-00000001").tensors("model")


@pytest.mark.parametrize("kind", ["hf", "gguf", "run"])
def test_training_starts_from_a_model(kind: str, tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path) -> None:
    """With a learning rate next to nothing, the first save holds the weights it started from, and the shape."""
    linear = "float" if kind == "gguf" else "ternary"
    model = made(tokenizer, seed, linear=linear, **({"hidden_act": "silu"} if kind == "gguf" else {}))
    source = TrainedSource(model, tokenizer, {})
    if kind == "run":
        export_hf(source, tmp_path / "hf", packed=False)
        assert train(tmp_path, "--init", tmp_path / "hf", "--out", tmp_path / "start", "--steps", 2) == 0
        start = tmp_path / "start"
        model, _ = Run(start).load()
    elif kind == "hf":
        start = export_hf(source, tmp_path / "start", packed=False)
    else:
        start = export_gguf(source, tmp_path / "start.gguf", "f32")
    still = [
        "--lr",
        "1e-12",
        "--set",
        "train.embedding_lr=1e-12",
        "--set",
        "train.save_every=1",
        "--set",
        "train.keep=9",
    ]
    out = tmp_path / "out"
    assert train(tmp_path, "--init", start, "--out", out, "--steps", 2, *still) == 0
    found = first_weights(out)
    for name, parameter in model.named_parameters():
        # Tables come at the bf16 values they are used at; a master on an edge between codes may move by 1e-5 of 0.02.
        expected = parameter.bfloat16().float() if "embed" in name else parameter
        torch.testing.assert_close(found[name], expected.detach(), rtol=0.0, atol=1e-6)
    run = Run(out)
    assert run.config().model.linear == linear
    assert run.tokenizer().encode(TEXT) == tokenizer.encode(TEXT)
    # The same command resumes, and so does a bare one where the model it began with is gone.
    assert train(tmp_path, "--init", start, "--out", out, "--steps", 3, *still) == 0
    shutil.rmtree(start) if start.is_dir() else start.unlink()
    assert main(["train", "-q", "--out", str(out), "--steps", "4"]) == 0
    assert [row["step"] for row in run.metrics() if "loss" in row] == [1, 2, 3, 4]


class Stop(Exception):  # noqa: N818 - it is no error, it ends a run
    pass


@pytest.mark.parametrize("route", ["flag", "--set", "TOML"])
def test_the_model_is_the_same_by_every_route(
    route: str, tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--init, --set train.init and a TOML file: the shape, rotary base and activation of the model it starts from."""
    model = made(tokenizer, seed, hidden_act="silu", rope_theta=500_000.0, rms_norm_eps=1e-6, sub_norms=False)
    start = export_hf(TrainedSource(model, tokenizer, {}), tmp_path / "start", packed=False)
    (tmp_path / "init.toml").write_text(f"[train]\ninit = {json.dumps(str(start))}\n")
    (tmp_path / "char.toml").write_text(f'[tokenizer]\nkind = "char"\n[train]\ninit = {json.dumps(str(start))}\n')
    (tmp_path / "mini.toml").write_text(f'preset = "mini"\n[train]\ninit = {json.dumps(str(start))}\n')
    args = {
        "flag": ["--init", start],
        "--set": ["--set", f"train.init={start}"],
        "TOML": ["--config", tmp_path / "init.toml"],
    }[route]
    out = tmp_path / "out"
    for more, part in (
        (["--set", "model.rope_theta=10000"], "model.rope_theta: got 10000.0, expected 500000.0"),
        (["--set", "model.hidden_act=relu2"], "model.hidden_act"),
        (["--set", "model.vocab_size=999"], "model.vocab_size"),
        (["--tokenizer", "char"], "--tokenizer char and --init"),
        (["--set", "tokenizer.kind=sentencepiece"], "--tokenizer sentencepiece and --init"),
        (["--config", tmp_path / "char.toml"], "--tokenizer char and --init"),
        (["--config", tmp_path / "mini.toml"], "--preset mini and --init"),
        (["--preset", "nano"], "--preset nano and --init"),
    ):
        if route == "TOML" and "--config" in more:
            continue
        capsys.readouterr()
        assert train(tmp_path, *args, "--out", out, "--steps", 1, *more) == 2
        assert part in capsys.readouterr().err
        assert not (out / "config.toml").exists()
    still = ["--lr", "1e-12", "--set", "train.embedding_lr=1e-12", "--linear", "binary", "--context", 8]
    assert train(tmp_path, *args, "--out", out, "--steps", 1, *still) == 0
    got, _ = Run(out).load()
    assert got.config == model.config.replace(linear="binary", max_position_embeddings=8)
    expected = dict(model.named_parameters())
    for name, parameter in got.named_parameters():
        if "_proj" in name:
            torch.testing.assert_close(parameter, expected[name], rtol=0.0, atol=1e-6)


def test_a_program_that_opens_no_models_refuses_one(tmp_path: Path) -> None:
    (tmp_path / "toy.txt").write_text(TEXT)
    flags = {"data": {"sources": (str(tmp_path / "toy.txt"),)}}
    with pytest.raises(BitNetError, match="starts from random weights"):
        run_training(None, None, flags, ["train.init=x"], tmp_path / "out", torch.device("cpu"), quiet=True)
    config = default_config().override({"train": {"init": "x"}})
    with pytest.raises(BitNetError, match="that model opened"):
        pretrain(config, tmp_path / "out", torch.device("cpu"), Display(1, quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("linear", ["float", "ternary", "binary"])
def test_training_that_starts_from_a_model_has_no_warmup_by_default(linear: str, tmp_path: Path) -> None:
    run, initial = Run(tmp_path / "new"), default_config().model.replace(linear=linear)
    assert resolve(None, None, {}, [], run).train.quant_warmup == 0.8
    assert resolve(None, None, {}, [], run, initial).train.quant_warmup == 0.0
    assert resolve(None, None, {}, ["train.quant_warmup=0.5"], run, initial).train.quant_warmup == 0.5


def test_a_float_model_turns_ternary(
    tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe: a float LlamaForCausalLM, --linear ternary, quantisation warm-up over half of the steps."""
    model = made(tokenizer, seed, linear="float", sub_norms=False, hidden_act="silu")
    start = export_hf(TrainedSource(model, tokenizer, {}), tmp_path / "float", packed=False)
    args = ["--init", start, "--linear", "ternary", "--set", "train.quant_warmup=0.5", "--set", "train.save_every=2"]
    assert train(tmp_path, *args, "--out", tmp_path / "whole", "--steps", 8) == 0
    ternary, _ = Run(tmp_path / "whole").load()
    assert ternary.config == model.config.replace(linear="ternary", initializer_range=ternary.config.initializer_range)
    # Stopped after step 2 and resumed during warm-up, which takes four steps: weights with the same bits.
    shares: list[float] = []
    save = Saves.save

    def save_and_stop(saves: Saves, progress: Progress) -> None:
        save(saves, progress)
        raise Stop

    def note_share(share: float, *options: object) -> Precision:
        shares.append(share)
        return training_precision(share, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saves, "save", save_and_stop)
        with pytest.raises(Stop):
            train(tmp_path, *args, "--out", tmp_path / "parts", "--steps", 8)
    assert [path.name for path in (tmp_path / "parts" / "saves").iterdir()] == ["step-00000002"]
    packing = ["pack", str(tmp_path / "parts"), "-o", str(tmp_path / "m.safetensors")]
    capsys.readouterr()
    assert main(packing) == 0
    assert "at step 2 the quantisation warm-up is at 50%" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitnet.train.pretrain.training_precision", note_share)
        assert train(tmp_path, *args, "--out", tmp_path / "parts", "--steps", 8) == 0
    assert shares[1:5] == [0.75, 0.75, 1.0, 1.0]  # the estimate, steps 3, 4, 5
    capsys.readouterr()
    assert main(packing) == 0
    assert capsys.readouterr().err == ""
    a, b = Run(tmp_path / "whole").load()[0].state_dict(), Run(tmp_path / "parts").load()[0].state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
def test_operands_in_warmup_are_part_quantised(amp: bool) -> None:
    """Against products in float64 of operands that move from the float ones to the quantised ones.

    In fp32 an operand is rounded a few times, relative to the larger of its ends, and each addition rounds. In bf16 it
    is rounded once more; the sum of all these errors is a random walk, and six standard deviations are no coincidence.
    """
    layers = nn.ModuleList([BitLinear(24, 40, bias=False), BitLinear(24, 8, bias=False, linear="binary")])
    x, dy = torch.randn(15, 24, requires_grad=True), torch.randn(15, 48)
    dy = dy.bfloat16().float()
    q, inv_scale = reference.quantize_activations(x.detach())
    ends_x = torch.stack([x.detach().double(), q.double() / inv_scale])
    masters = torch.cat([layer.weight.detach().double() for layer in layers])
    codes = [layer.quantized_weight() for layer in layers]
    ends_w = torch.stack([masters, torch.cat([c.codes.double() * c.scale for c in codes])])
    size_x, size_w, size_dy = ends_x.abs().amax(0), ends_w.abs().amax(0), dy.double().abs()
    for share in (0.0, 0.25, 0.9, 1.0 - 2**-20, 1.0):
        precision = Precision(torch.tensor(share))
        mixed_x, mixed_w = ends_x[0].lerp(ends_x[1], share), ends_w[0].lerp(ends_w[1], share)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = torch.cat(project(x, *layers, precision=precision), -1)
            assert torch.equal(layers[0](x, precision), y[:, :40])
        assert y.dtype == (torch.bfloat16 if amp else torch.float32)
        x.grad = None
        layers.zero_grad()
        y.backward(dy.to(y.dtype))
        dw = torch.cat([layer.weight.grad for layer in layers])
        for got, left, right, size, sums in (
            (y, mixed_x, mixed_w.T, size_x @ size_w.T, 24),
            (x.grad, dy.double(), mixed_w, size_dy @ size_w, 48),
            (dw, dy.double().T, mixed_x, size_dy.T @ size_x, 15),
        ):
            wanted = left @ right
            bound = (sums + 12) * 2**-24 * size
            if amp:  # both operands and the result are rounded, each by at most half a unit of eight bits
                bound += 2**-8 * (6 * (left.square() @ right.square()).sqrt() + wanted.abs())
            assert ((got.double() - wanted).abs() <= bound).all(), share


def test_what_cannot_be_trained_on(
    tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made(tokenizer, seed)
    packed = write_packed(tmp_path / "m.safetensors", model, tokenizer)
    bare = export_hf(TrainedSource(model, None, {}), tmp_path / "bare", packed=False)
    codes = export_hf(TrainedSource(model, tokenizer, {}), tmp_path / "codes", packed=True)
    whole = export_hf(TrainedSource(model, tokenizer, {}), tmp_path / "whole", packed=False)
    for start, more, part in (
        (packed, [], "ternary codes only"),
        (codes, [], "ternary codes only"),
        (bare, [], "no tokenizer"),
        (tmp_path / "nothing", [], "nothing at"),
        (whole, ["--preset", "nano"], "--preset nano and --init"),
        (whole, ["--set", "model.hidden_size=64"], "shape"),
    ):
        capsys.readouterr()
        assert train(tmp_path, "--init", start, "--out", tmp_path / "out", "--steps", 1, *more) == 2, start
        assert part in capsys.readouterr().err
        assert not (tmp_path / "out" / "config.toml").exists()


@pytest.mark.parametrize("kind", ["packed file", "hf-packed", "gguf"])
def test_codes_are_refused_before_the_text_is_read(
    kind: str, tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is tokenised, nothing is written, and that the text is missing as well is not noticed."""
    model = made(tokenizer, seed, hidden_size=256, intermediate_size=256, hidden_act="silu", sub_norms=False)
    source = TrainedSource(model, tokenizer, {})
    if kind == "packed file":
        start = write_packed(tmp_path / "m.safetensors", model, tokenizer)
    elif kind == "hf-packed":
        start = export_hf(source, tmp_path / "codes", packed=True)
    else:
        start = export_gguf(source, tmp_path / "codes.gguf", "tq2_0")
    args = ["--init", str(start), "--data", str(tmp_path / "missing.txt"), "--out", str(tmp_path / "out")]
    assert main(["train", "-q", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ternary codes only" in line
    assert not (tmp_path / "out").exists()


def test_an_imported_export_is_the_same_model(
    tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line: train, export, import, write the same text; the reports as JSON."""
    start = export_hf(TrainedSource(made(tokenizer, seed), tokenizer, {}), tmp_path / "hf", packed=False)
    run, direct, back = tmp_path / "run", tmp_path / "direct.safetensors", tmp_path / "back.safetensors"
    assert train(tmp_path, "--init", start, "--out", run, "--steps", 2) == 0
    assert main(["pack", str(run), "-o", str(direct)]) == 0
    for target, source in (("hf", "master"), ("hf-packed", "multiply")):
        folder = str(tmp_path / f"new-{target}")
        capsys.readouterr()
        assert main(["export", str(run), "-o", folder, "--to", target, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["readers"][0][:2] == ["transformers 5", True]
        assert main(["import", folder, "-o", str(back), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["source"] == f"Hugging Face, bitnet, {source}"
        texts = []
        for path in (direct, back):
            assert main(["generate", "-m", str(path), "-p", "a", "-n", "5", "--temp", "0", "--json"]) == 0
            texts.append(json.loads(capsys.readouterr().out)["ids"])
        assert texts[0] == texts[1]
        assert main(["export", str(run), "-o", folder, "--to", target]) == 2  # it is not empty any more
    assert main(["export", str(run), "-o", str(tmp_path / "x"), "--to", "onnx"]) == 2
    assert main(["export", str(run), "-o", str(tmp_path / "x"), "--to", "hf", "--type", "f16"]) == 2
    assert main(["import", "nowhere", "-o", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()
