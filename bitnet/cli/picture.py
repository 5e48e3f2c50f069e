"""The picture of a model's quantisation: `bitnet inspect --plot` (needs matplotlib: the extra `plot`).

    top left       master weights of each kind of projection in units of their scale s_w. In a ternary model those with
                   |w / s_w| < 1/2 become 0; a binary model takes the sign of w minus the mean, and has no zeros. A
                   packed file holds no master weights, so this is left out
    bottom left    quantised weights: the shares of -1, 0 and +1
    top right      share of zeros by layer, one line per kind of projection
    bottom right   largest input of each kind of projection by layer: median over the tokens of a text, and maximum.
                   An int8 step is 1/127 of it

Dimensions: L layers, T tokens, K in-features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitnet.engine.torch import TorchEngine
from bitnet.errors import BitNetError
from bitnet.generation import prompt_ids
from bitnet.kernels import packing
from bitnet.layers import BitLinear, PackedLinear
from bitnet.model import Transformer
from bitnet.plotting import pyplot, save
from bitnet.text.tokenizer import Tokenizer

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
# Projections that share an input share a line.
_INPUTS = {"q": "q, k, v", "o": "o", "gate": "gate, up", "down": "down"}
_STYLES = (
    ("#1f5aa6", "o", "-"),
    ("#e07b39", "s", "-"),
    ("#5b8c5a", "^", "-"),
    ("#8c8c8c", "D", "-"),
    ("#b04a5a", "v", "--"),
    ("#6a5acd", "P", "--"),
    ("#222222", "X", "--"),
)
_RANGE, _BINS = 4.0, 128  # histogram of W / s_w; the few weights beyond four scales are not drawn
PROMPT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair."
)  # Dickens, 1859


@dataclass(frozen=True)
class Figures:
    """What the picture shows, by kind of projection; lists are by layer."""

    bins: dict[str, Tensor]  # shares of W / s_w in _BINS bins over -_RANGE.._RANGE; empty without master weights
    codes: dict[str, tuple[float, float, float]]  # shares of -1, 0, +1
    zeros: dict[str, list[float]]
    ranges: dict[str, list[tuple[float, float]]]  # median and maximum over tokens of the absmax
    text: str  # what the activations were measured on
    tokens: int


def draw(model: Transformer, tokenizer: Tokenizer | None, text: str, path: Path, name: str) -> None:
    """Draw a ternary or binary model, trained or packed, into `path`. Raises BitNetError for a float one."""
    config = model.config
    title = f"{name}: {config.num_hidden_layers} layers, width {config.hidden_size}, {config.linear} weights"
    save(figure(measure(model, tokenizer, text), title), path)


@torch.inference_mode()
def measure(model: Transformer, tokenizer: Tokenizer | None, text: str) -> Figures:
    """The figures of a model; activations on `text` (empty: a few lines of Dickens).

    Raises BitNetError for a float model and for a text that the model cannot read.
    """
    if model.config.linear == "float":
        raise BitNetError("inspect --plot: got a float model, whose weights are not quantised, expected a ternary one")
    found = {kind: _projections(model, kind) for kind in KINDS}
    counts = {kind: [_counts(layer) for layer in layers] for kind, layers in found.items()}
    shares = {kind: torch.stack(rows).sum(dim=0) for kind, rows in counts.items()}
    bins = {
        kind: torch.stack([_histogram(layer) for layer in layers if isinstance(layer, BitLinear)]).mean(dim=0)
        for kind, layers in found.items()
        if isinstance(layers[0], BitLinear)
    }
    ids, source = _ids(model, tokenizer, text)
    with _recorded_inputs(model) as seen:
        TorchEngine(model).logits(ids)
    return Figures(
        bins,
        {kind: tuple((row / row.sum()).tolist()) for kind, row in shares.items()},
        {kind: [float(row[1] / row.sum()) for row in rows] for kind, rows in counts.items()},
        {name: [(float(x.median()), float(x.max())) for x in seen[kind]] for kind, name in _INPUTS.items()},
        source,
        len(ids),
    )


def _projections(model: Transformer, kind: str) -> list[nn.Module]:
    return [getattr(block.self_attn if kind in "qkvo" else block.mlp, f"{kind}_proj") for block in model.model.layers]


def _counts(layer: nn.Module) -> Tensor:
    """How many weights are -1, 0 and +1: [3] fp64."""
    if isinstance(layer, PackedLinear):
        assert layer.packed is not None
        codes = packing.unpack(layer.packed, layer.in_features)
    else:
        assert isinstance(layer, BitLinear)
        codes = layer.quantized_weight().codes
    return torch.stack([(codes == value).sum() for value in (-1, 0, 1)]).double()


def _histogram(layer: BitLinear) -> Tensor:
    weight = layer.weight.float() / layer.quantized_weight().scale
    return torch.histc(weight, _BINS, -_RANGE, _RANGE).double() / weight.numel()


def _ids(model: Transformer, tokenizer: Tokenizer | None, text: str) -> tuple[Tensor, str]:
    """Ids [T] of at most a context, and a description of them."""
    most = model.config.context
    if tokenizer is None:
        if text:
            raise BitNetError("inspect: got a text (-p) for a model without a tokenizer, expected none; omit it")
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, model.config.vocab_size, (min(most, 256),), generator=generator), "random tokens"
    ids = prompt_ids(tokenizer, text or PROMPT)
    if not ids:
        raise BitNetError("inspect: got a text without a token, expected at least one")
    return torch.tensor(ids[:most]), "the given text" if text else "a built-in text"


class _Recorder(nn.Module):
    """Wraps a projection and records the absmax of each token's input. Not a BitLinear, so `project` calls it alone."""

    def __init__(self, layer: nn.Module, seen: list[Tensor]) -> None:
        super().__init__()
        self.layer, self.seen = layer, seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.abs().amax(dim=-1).flatten())
        y: Tensor = self.layer(x)
        return y


@contextmanager
def _recorded_inputs(model: Transformer) -> Iterator[dict[str, list[Tensor]]]:
    """Record the absmax [T] of every projection's input, by kind and layer, while the context lasts."""
    seen: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    places = [
        (part, f"{kind}_proj", kind)
        for block in model.model.layers
        for part, kinds in ((block.self_attn, KINDS[:4]), (block.mlp, KINDS[4:]))
        for kind in kinds
    ]
    originals = [getattr(part, name) for part, name, _ in places]
    for (part, name, kind), layer in zip(places, originals, strict=True):
        setattr(part, name, _Recorder(layer, seen[kind]))
    try:
        yield seen
    finally:
        for (part, name, _), layer in zip(places, originals, strict=True):
            setattr(part, name, layer)


def figure(figures: Figures, title: str) -> Any:
    """The figure in matplotlib."""
    plt = pyplot()
    drawn = plt.figure(figsize=(13, 7.4), layout="constrained")
    drawn.suptitle(title, x=0.01, ha="left", fontsize=12)
    left, right = drawn.subfigures(1, 2, width_ratios=(1, 1.1))
    if figures.bins:
        top, bottom = left.subfigures(2, 1, height_ratios=(1.5, 1))
        _masters(top, figures)
    else:
        bottom = left
    _codes(bottom.subplots(), figures)
    zeros, ranges = right.subplots(2, 1, sharex=True)
    _zeros(zeros, figures)
    _ranges(ranges, figures)
    return drawn


def _masters(part: Any, figures: Figures) -> None:
    axes = part.subplots(2, 4, sharex=True, sharey=True)
    centres = [(i + 0.5) / _BINS * 2 * _RANGE - _RANGE for i in range(_BINS)]
    width = 2 * _RANGE / _BINS
    ternary = any(share[1] for share in figures.codes.values())
    for axis, kind in zip(axes.flat, KINDS):
        density = (figures.bins[kind] / width).tolist()
        colours = ["#8fa9cc" if ternary and abs(x) < 0.5 else "#1f4e8c" for x in centres]
        axis.bar(centres, density, width, color=colours)
        axis.set_title(kind, loc="left", fontsize=9, pad=2)
        _add_grid(axis)
        axis.tick_params(labelsize=7)
        axis.set_xticks([-3, -1, 1, 3])
    axes.flat[7].set_axis_off()
    becomes = "light becomes 0, dark -1 or +1" if ternary else "all become -1 or +1, none 0"
    part.suptitle(f"master weights, density of weight / scale: {becomes}", ha="left", x=0.02, fontsize=10)


def _codes(axis: Any, figures: Figures) -> None:
    places = range(len(KINDS))
    for value, (offset, colour, hatch) in enumerate(
        ((-0.27, "#1f4e8c", ""), (0, "#c3d0e3", ""), (0.27, "#1f4e8c", "//"))
    ):
        shares = [100 * figures.codes[kind][value] for kind in KINDS]
        bars = axis.bar(
            [p + offset for p in places],
            shares,
            0.26,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=f"{value - 1:+d}" if value != 1 else "0",
        )
        axis.bar_label(bars, [f"{share:.0f}" for share in shares], fontsize=7, padding=1)
    axis.set_xticks(list(places), KINDS)
    axis.set_ylabel("% of the weights", fontsize=9)
    axis.set_title("quantised weights: -1, 0, +1", loc="left", fontsize=10)
    axis.margins(y=0.25)  # space for the legend
    axis.legend(ncols=3, fontsize=8, loc="upper right")
    _add_grid(axis)


def _zeros(axis: Any, figures: Figures) -> None:
    for kind, (colour, marker, line) in zip(KINDS, _STYLES, strict=True):
        values = [100 * zero for zero in figures.zeros[kind]]
        axis.plot(values, line, marker=marker, color=colour, markersize=4.5, linewidth=1.1, label=kind)
    axis.set_ylabel("% zeros", fontsize=9)
    axis.set_title("zeros by layer", loc="left", fontsize=10)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _add_grid(axis)


def _ranges(axis: Any, figures: Figures) -> None:
    for (name, values), (colour, marker, _) in zip(figures.ranges.items(), _STYLES):
        axis.plot([middle for middle, _ in values], "-", marker=marker, color=colour, markersize=4.5, label=name)
        axis.plot([most for _, most in values], ":", marker=marker, color=colour, markersize=3, linewidth=1)
    layers = len(next(iter(figures.ranges.values())))
    step = max(1, -(-layers // 15))
    axis.set_xticks(range(0, layers, step))
    axis.set_yscale("log")
    axis.set_xlabel("layer", fontsize=9)
    axis.set_ylabel("largest |x| of a token", fontsize=9)
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which(lambda value, _: f"{value:g}")
    axis.tick_params(axis="y", which="minor", labelsize=7)
    axis.set_title(
        f"inputs of the projections, {figures.tokens} tokens of {figures.text}:\n"
        "median token (solid), maximum (dotted)",
        loc="left",
        fontsize=10,
    )
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _add_grid(axis)


def _add_grid(axis: Any) -> None:
    axis.grid()
    axis.set_axisbelow(True)
