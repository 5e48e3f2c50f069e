"""A method, one way to shrink a model: why it cannot run here, or how it makes its file."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bitnet.benchmarks.compare.artifact import Artifact
from bitnet.benchmarks.compare.pair import Pair


@dataclass(frozen=True)
class Settings:
    """Settings of all methods."""

    threads: int
    qat_steps: int = 100
    calibration: int = 64  # windows of training text
    llama: str = ""  # a Python with llama-cpp-python; "": the wheel that is installed here


@dataclass(frozen=True)
class Method:
    """One row of the comparison. why_not: why it cannot run here on these models, None where it can."""

    name: str
    family: str
    title: str
    why_not: Callable[[Pair, Settings], str | None]
    make: Callable[[Pair, Path, Settings], Artifact] = field(repr=False)  # into a folder that no other method uses


def always(pair: Pair, settings: Settings) -> str | None:
    """`why_not` of a method that can always run."""
    return None


def needs(module: str, install: str) -> Callable[[Pair, Settings], str | None]:
    """`why_not` of a method that needs one package. install: the command that installs it."""

    def why_not(pair: Pair, settings: Settings) -> str | None:
        if importlib.util.find_spec(module) is not None:
            return None
        return f"{module} is not installed; {install}"

    return why_not


def version(distribution: str) -> str:
    """A library with its version, for the table."""
    return f"{distribution} {importlib.metadata.version(distribution)}"
