"""Metrics sent to TensorBoard and Weights & Biases (extras `tensorboard` and `wandb`)."""

from pathlib import Path
from typing import Any, Protocol

from bitnet.errors import BitNetError
from bitnet.train.config import TrainConfig
from bitnet.train.runs.run import TENSORBOARD


class Tracker(Protocol):
    """Receives the rows of metrics.jsonl as they are written."""

    def log(self, row: dict[str, Any]) -> None:
        """Log the numbers of one row."""

    def close(self) -> None:
        """Flush and close."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BitNetError(
                "train: got no tensorboard package, expected it for --tensorboard; pip install tensorboard"
            ) from None
        self._writer = SummaryWriter(str(folder / TENSORBOARD))

    def log(self, row: dict[str, Any]) -> None:
        """Write each number as a scalar."""
        for key, value in _numbers(row).items():
            self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """A run in the project "bitnet", named after the folder."""

    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise BitNetError("train: got no wandb package, expected it for --wandb; pip install wandb") from None
        self._run = wandb.init(project="bitnet", name=folder.name, id=folder.name, resume="allow", dir=folder)

    def log(self, row: dict[str, Any]) -> None:
        """Send each number."""
        self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        """Flush and close."""
        self._run.finish()


def make_trackers(config: TrainConfig, folder: Path) -> list[Tracker]:
    """The trackers that a configuration asks for. Raises BitNetError when one is not installed."""
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(folder))
    if config.wandb:
        trackers.append(WeightsAndBiases(folder))
    return trackers


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The scalars of a row; telemetry becomes zeros/LAYER, flips/LAYER and scale/LAYER."""
    numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float) and key != "step"}
    for layer in row.get("telemetry", ()):
        for key in ("zeros", "flips", "scale"):
            if layer[key] is not None:
                numbers[f"{key}/{layer['layer']}"] = layer[key]
    return numbers
