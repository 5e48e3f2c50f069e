"""What every picture needs of matplotlib, which only pictures need (extra `plot`)."""

from pathlib import Path
from typing import Any

from bitnet.errors import BitNetError

SUFFIXES = (".png", ".svg")
_DPI = 130
_LOOK: dict[str, Any] = {
    "svg.hashsalt": "bitnet",  # the same picture is the same file
    "svg.fonttype": "none",  # text stays text: a fifth of the size
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files. Raises BitNetError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise BitNetError(
            "plot: got no matplotlib, expected it for pictures; pip install 'bitnet-ternary[plot]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(_LOOK)
    return plt


def check_target(path: Path) -> None:
    """Raise BitNetError where a picture cannot be written to `path`, before anybody waits for what it shows."""
    if path.suffix not in SUFFIXES:
        raise BitNetError(f"plot: got '{path}', expected a name that ends in {' or '.join(SUFFIXES)}")
    pyplot()
    if not path.parent.is_dir():
        raise BitNetError(f"plot: got no folder '{path.parent}', expected an existing one; create it first")
    try:
        probe = path.with_name(f".{path.name}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BitNetError(f"plot: cannot write in '{path.parent}': {error.strerror}; choose another folder") from None


def save(figure: Any, *paths: Path) -> list[Path]:
    """Write a figure, in the format of each name, and let go of it. Returns the paths."""
    for path in paths:
        figure.savefig(path, dpi=_DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot().close(figure)
    return list(paths)


def save_both(figure: Any, target: Path) -> list[Path]:
    """Write a figure as target.png and target.svg and let go of it. Returns the paths."""
    return save(figure, *(target.with_suffix(suffix) for suffix in SUFFIXES))
