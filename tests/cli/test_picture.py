"""`bitnet inspect --plot`: its figures agree with the model, and a picture is drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bitnet.benchmarks.bench.random_model import ZEROS, write_random
from bitnet.cli import main, picture
from bitnet.config import ModelConfig
from bitnet.engine.torch import TorchEngine
from bitnet.errors import BitNetError
from bitnet.files.packed import build, read_packed, write_packed
from bitnet.model import Transformer

SHAPE = ModelConfig(200, 32, 44, 3, 4, 2, 48)


def trained(seed: int, **changes: object) -> Transformer:
    model = Transformer(SHAPE.replace(**changes))
    model.init_weights(seed)
    return model


def test_figures_of_masters(seed: int) -> None:
    model = trained(seed)
    figures = picture.measure(model, None, "")
    for kind in picture.KINDS:
        part = "self_attn" if kind in "qkvo" else "mlp"
        weights = [w.detach().numpy() for name, w in model.named_parameters() if f"{part}.{kind}_proj" in name]
        scaled = [w.astype(np.float64) / np.abs(w).astype(np.float64).mean() for w in weights]
        rounded = [np.clip(np.rint(w), -1, 1) for w in scaled]
        # A weight within an fp32 rounding of a border may fall on either side.
        slack = 2 / rounded[0].size
        assert figures.zeros[kind] == pytest.approx([float((w == 0).mean()) for w in rounded], abs=slack)
        expected = [float(np.mean([w == value for w in rounded])) for value in (-1, 0, 1)]
        assert figures.codes[kind] == pytest.approx(expected, abs=slack)
        inside = float(np.mean([np.abs(w) <= picture._RANGE for w in scaled]))
        assert float(figures.bins[kind].sum()) == pytest.approx(inside, abs=slack)
        # The bins -0.5..0.5 are the weights that become zero.
        middle = figures.bins[kind].reshape(2, -1, 8).sum(dim=-1)  # in steps of a half
        assert float(middle[0, -1] + middle[1, 0]) == pytest.approx(expected[1], abs=2 * slack)


@pytest.mark.parametrize("sub_norms", [True, False])
def test_activations_are_those_of_the_model(sub_norms: bool, seed: int) -> None:
    """The inputs of q, k, v and of gate, up are the outputs of the norms."""
    model = trained(seed, sub_norms=sub_norms)
    seen: dict[str, list[torch.Tensor]] = {"q, k, v": [], "gate, up": []}
    for block in model.model.layers:
        for name, norm in (("q, k, v", block.input_layernorm), ("gate, up", block.post_attention_layernorm)):
            norm.register_forward_hook(
                lambda _m, _i, y, name=name: seen[name].append(y.compute().abs().amax(-1).flatten())
            )
    figures = picture.measure(model, None, "")
    assert figures.tokens == SHAPE.context
    for name, rows in seen.items():
        expected = [(float(row.median()), float(row.max())) for row in rows]
        assert figures.ranges[name] == expected
    assert set(figures.ranges) == {"q, k, v", "o", "gate, up", "down"}
    assert all(len(values) == SHAPE.num_hidden_layers for values in figures.ranges.values())


def test_the_model_is_unchanged(seed: int) -> None:
    model = trained(seed)
    before = {name: type(module) for name, module in model.named_modules()}
    ids = torch.randint(0, SHAPE.vocab_size, (9,))
    expected = TorchEngine(model).logits(ids)
    picture.measure(model, None, "")
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(TorchEngine(model).logits(ids), expected)


def test_a_packed_file_gives_the_same(seed: int, tmp_path: Path) -> None:
    model = trained(seed)
    write_packed(tmp_path / "m.safetensors", model, None)
    from_masters = picture.measure(model, None, "")
    packed = picture.measure(build(read_packed(tmp_path / "m.safetensors")), None, "")
    assert packed.bins == {}
    assert (packed.zeros, packed.codes) == (from_masters.zeros, from_masters.codes)
    for name, values in packed.ranges.items():
        assert np.allclose(values, from_masters.ranges[name], rtol=1e-4)  # fp32 sums in another order


@pytest.mark.slow
@pytest.mark.parametrize(("linear", "words"), [("ternary", "light becomes 0"), ("binary", "none 0")])
def test_the_title_says_how_weights_are_quantised(linear: str, words: str, seed: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture.draw(trained(seed, linear=linear), None, "", tmp_path / "p.svg", "toy")
    assert words in (tmp_path / "p.svg").read_text()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_inspect_draws_a_packed_file(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    write_random(SHAPE, tmp_path / "m.safetensors")
    target = tmp_path / f"p{suffix}"
    assert main(["inspect", str(tmp_path / "m.safetensors"), "--plot", str(target)]) == 0
    captured = capsys.readouterr()
    assert f"wrote {target}" in captured.err
    assert "zeros by layer" in captured.out
    content = target.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == ".png" else b"random tokens" in content
    figures = picture.measure(build(read_packed(tmp_path / "m.safetensors")), None, "")
    assert all(abs(share - ZEROS) < 0.15 for shares in figures.zeros.values() for share in shares)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "m.safetensors"
    write_random(SHAPE, model)
    for args, message in (
        ([model, "--plot", tmp_path / "p.pdf"], "ends in .png or .svg"),
        ([model, "--plot", tmp_path / "nowhere" / "p.png"], "got no folder"),
        ([model, "--plot", tmp_path / "p.png", "-p", "text"], "without a tokenizer"),
        ([model, "-p", "text"], "without --plot"),
        ([tmp_path, "--plot", tmp_path / "p.png"], "got a folder"),
        ([tmp_path, "--plot", tmp_path / "p.png", "--json"], "got --json for the folder"),
    ):
        capsys.readouterr()
        assert main(["inspect", *map(str, args)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(BitNetError, match="float"):
        picture.measure(Transformer(SHAPE.replace(linear="float")), None, "")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["inspect", str(model), "--plot", str(tmp_path / "p.png")]) == 2
    assert "got no matplotlib" in capsys.readouterr().err
