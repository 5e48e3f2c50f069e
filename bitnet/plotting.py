"""What all plots share; matplotlib, which draws them, is optional (extra `plot`)."""

from pathlib import Path
from typing import Any

from bitnet.errors import BitNetError

SUFFIXES = (".png", ".svg")
_DPI = 130
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "bitnet",  # the same plot gives the same file
    "svg.fonttype": "none",  # text as text, not as outlines: a fifth of the size
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def pyplot() -> Any:
    """matplotlib.pyplot, set up to draw into files. Raises BitNetError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise BitNetError(
            "plot: got no matplotlib, expected it to be installed; from a clone: pip install '.[plot]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(_STYLE)
    return plt


def check_target(path: Path) -> None:
    """Raise BitNetError where a plot cannot be written to `path`; called before its data is computed."""
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
    """Write a figure to each path, in the format of its suffix, and close it. Returns the paths."""
    for path in paths:
        figure.savefig(path, dpi=_DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot().close(figure)
    return list(paths)


def save_both(figure: Any, target: Path) -> list[Path]:
    """Write a figure as target.png and target.svg, and close it. Returns the paths."""
    return save(figure, *(target.with_suffix(suffix) for suffix in SUFFIXES))
