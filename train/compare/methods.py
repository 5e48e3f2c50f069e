"""Every way to shrink a model that is compared, in one registry: a method says why it cannot run, or makes a file."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bitnet.errors import BitNetError
from bitnet.train.compare.artifact import Artifact
from bitnet.train.compare.pair import Pair


@dataclass(frozen=True)
class Settings:
    """What the methods are asked to do."""

    threads: int
    qat_steps: int = 100
    calibration: int = 64  # windows of training text
    llama: str = ""  # a Python with llama-cpp-python; "": the wheel that is installed here


@dataclass(frozen=True)
class Method:
    """One row. why_not: the reason it cannot run here on these models, None where it can."""

    name: str
    family: str
    title: str
    why_not: Callable[[Pair, Settings], str | None]
    make: Callable[[Pair, Path, Settings], Artifact] = field(repr=False)  # into a folder of its own


def registry() -> dict[str, Method]:
    """All methods by name, in the order of the table."""
    from bitnet.train.compare import gptq, llama, own, torchao_methods

    methods = [*own.FLOATS, *torchao_methods.METHODS, *gptq.METHODS, *llama.METHODS, *own.BITNETS]
    return {method.name: method for method in methods}


def choose(names: str | None) -> list[Method]:
    """The methods of a comma-separated list of names and families; all of them for None. Raises BitNetError."""
    known = registry()
    if names is None:
        return list(known.values())
    families = {method.family for method in known.values()}
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in known and name not in families:
            raise BitNetError(
                f"methods: got '{name}', expected some of {', '.join(known)}, or the families "
                f"{', '.join(sorted(families))}"
            )
    if not asked:
        raise BitNetError(f"methods: got none, expected some of {', '.join(known)}")
    return [method for method in known.values() if method.name in asked or method.family in asked]


def always(pair: Pair, settings: Settings) -> str | None:
    """For methods that need nothing that is not here."""
    return None


def needs(module: str, install: str) -> Callable[[Pair, Settings], str | None]:
    """why_not of a method that needs one package."""

    def why_not(pair: Pair, settings: Settings) -> str | None:
        if importlib.util.find_spec(module) is not None:
            return None
        return f"{module} is not installed; {install}"

    return why_not


def version(distribution: str) -> str:
    """A library with its version, for the table."""
    return f"{distribution} {importlib.metadata.version(distribution)}"
