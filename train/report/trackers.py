"""Metrics for TensorBoard and Weights & Biases, for those who use them (extras `tensorboard`, `wandb`)."""

from pathlib import Path
from typing import Any, Protocol

from bitnet.errors import BitNetError
from bitnet.train.config import TrainConfig


class Tracker(Protocol):
    """Takes rows of metrics.jsonl as they are written."""

    def log(self, row: dict[str, Any]) -> None:
        """Pass on the numbers of one row."""

    def close(self) -> None:
        """Write what is still in memory."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BitNetError(
                "train: got no tensorboard, expected it for --tensorboard; pip install tensorboard"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, row: dict[str, Any]) -> None:
        """Write each number as a scalar."""
        for key, value in _numbers(row).items():
            self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project "bitnet", named like the folder."""

    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise BitNetError("train: got no wandb, expected it for --wandb; pip install wandb") from None
        self._run = wandb.init(project="bitnet", name=folder.name, id=folder.name, resume="allow", dir=folder)

    def log(self, row: dict[str, Any]) -> None:
        """Send each number."""
        self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        """Send what is still in memory."""
        self._run.finish()


def make_trackers(config: TrainConfig, folder: Path) -> list[Tracker]:
    """The trackers a configuration asks for. Raises BitNetError when one is not installed."""
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(folder))
    if config.wandb:
        trackers.append(WeightsAndBiases(folder))
    return trackers


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The scalars of a row, telemetry spread out as zeros/LAYER, flips/LAYER, scale/LAYER."""
    numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float) and key != "step"}
    for layer in row.get("telemetry", ()):
        for key in ("zeros", "flips", "scale"):
            if layer[key] is not None:
                numbers[f"{key}/{layer['layer']}"] = layer[key]
    return numbers
