"""Statistics of quantised weights during training, per layer: zeros, flips and scale."""

from typing import TypedDict

import torch
from torch import nn

from bitnet.layers import BitLinear


class LayerReport(TypedDict):
    """One projection. zeros: fraction of the codes; flips: fraction that changed since the last report, or None."""

    layer: str
    zeros: float
    flips: float | None
    scale: float


class Telemetry:
    """Compares the codes of every BitLinear with those of the last report; keeps one byte per weight."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._last: dict[str, torch.Tensor] = {}

    def report(self, model: nn.Module | None = None) -> list[LayerReport]:
        """Statistics of all layers now. model: read instead of the model given first, with the same layer names."""
        rows: list[LayerReport] = []
        for full_name, layer in (model or self._model).named_modules():
            if not isinstance(layer, BitLinear):
                continue
            name = full_name.removeprefix("model.layers.")
            codes, scale = layer.quantized_weight()
            last = self._last.get(name)
            flips = None if last is None else float((codes != last).float().mean())
            rows.append(
                {"layer": name, "zeros": float((codes == 0).float().mean()), "flips": flips, "scale": float(scale)}
            )
            self._last[name] = codes
        return rows


def summary(rows: list[LayerReport]) -> str:
    """A report in one line, as ranges over the layers; empty for a model without quantised layers."""
    if not rows:
        return ""
    zeros = [row["zeros"] for row in rows]
    flips = [row["flips"] for row in rows if row["flips"] is not None]
    text = f"zeros {min(zeros):.0%}-{max(zeros):.0%}"
    return f"{text}, flips ≤ {max(flips):.2%}" if flips else text
