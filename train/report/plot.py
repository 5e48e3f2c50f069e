"""The loss curve of a run as PNG and SVG; needs matplotlib (extra `plot`)."""

from pathlib import Path
from typing import Any

from bitnet.plotting import pyplot, save_both


def plot_run(rows: list[dict[str, Any]], target: Path, title: str) -> list[Path]:
    """Draw training and validation loss and the learning rate over steps into target.png and target.svg.

    rows: metrics as in metrics.jsonl. Raises BitNetError when matplotlib is not installed.
    """
    plt = pyplot()

    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "val_loss" in row]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 5.5), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    steps = [row["step"] for row in training]
    losses = [row["loss"] for row in training]
    top.plot(steps, losses, color="#b8c7dc", linewidth=0.8, label="training, each step")
    top.plot(steps, smooth(losses), color="#1f5aa6", linewidth=1.6, label="training, smoothed")
    if validation:
        points, last = [row["step"] for row in validation], validation[-1]
        label = f"validation: {last['val_loss']:.3f} nats, {last['val_bits_per_byte']:.3f} bits per byte"
        top.plot(points, [row["val_loss"] for row in validation], "o-", color="#d1495b", markersize=4, label=label)
    if losses:
        # Cut off the first steps, whose loss is so high that it would flatten the rest.
        ordered = sorted(losses + [row["val_loss"] for row in validation])
        top.set_ylim(ordered[0] - 0.1, ordered[int(0.97 * (len(ordered) - 1))] + 0.3)
    top.set_ylabel("loss (nats per token)")
    top.set_title(title, loc="left", fontsize=11, parse_math=False)  # a folder's name may contain "$"
    top.legend()
    bottom.plot(steps, [row["lr"] for row in training], color="#555555", linewidth=1.2)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.grid()
    return save_both(figure, target)


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about a thirtieth of the values, with bias correction as in Adam."""
    weight = 1 - 1 / max(1.0, len(values) / 30)
    smoothed, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**i))
    return smoothed
