"""What quantised weights do while they are trained: share of zeros, flips, scale, per layer."""

from typing import TypedDict

import torch
from torch import nn

from bitnet.layers import BitLinear


class LayerReport(TypedDict):
    """One projection. `flips` is the share of codes that changed since the last report (None at the first)."""

    layer: str
    zeros: float
    flips: float | None
    scale: float


class Telemetry:
    """Remembers the codes of every BitLinear between reports, at one byte a weight."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._last: dict[str, torch.Tensor] = {}

    def report(self, model: nn.Module | None = None) -> list[LayerReport]:
        """Quantise all layers now and compare with the last report. model: a copy to look at instead."""
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
    """One line of a report: ranges over the layers. Empty for a model without quantised layers."""
    if not rows:
        return ""
    zeros = [row["zeros"] for row in rows]
    flips = [row["flips"] for row in rows if row["flips"] is not None]
    text = f"zeros {min(zeros):.0%}-{max(zeros):.0%}"
    return f"{text}, flips ≤ {max(flips):.2%}" if flips else text
