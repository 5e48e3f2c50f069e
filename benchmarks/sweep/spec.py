"""A sweep spec: a TOML file that says which runs a sweep makes, read and checked here.

    seeds = [1, 2, 3]
    linears = ["ternary", "float"]        # kinds of linear layers; with "float": gaps to the float baseline
    preset = "nano"
    test = ["unseen/"]                    # text that every finished run scores once; omit it while tuning
    test_tokens = 200_000                 # how much of it, evenly spread; default 0: all

    [base]                                # settings of all runs, as in a run's own file; they override the preset
    data.paths = ["books/"]
    train.steps = 400

    [grid]                                # lists of values: every combination is a run
    train.lr = [0.003, 0.006, 0.012]

    [[runs]]                              # single runs; with a grid, each of them at every point of it
    name = "zero init"
    train.zero_init = true

    [[runs]]
    name = "ternary at once"
    linears = ["ternary"]                 # instead of those above: float layers have no warm-up
    train.quant_warmup = 0.0

    [[runs]]
    preset = "mini"                       # instead of that above; [base] and [grid] still override it, so they should
                                          # not set its sizes

`model.linear` and `train.seed` follow from `linears` and `seeds` and are refused among the settings.
"""

import hashlib
import itertools
import re
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet.config import LINEARS, PRESETS
from bitnet.errors import BitNetError
from bitnet.train.command import Values, merge
from bitnet.train.data.hub import is_dataset
from bitnet.train.data.sources import STANDARD_INPUT, find_sources

_KEYS = {"seeds", "linears", "preset", "test", "test_tokens", "base", "grid", "runs"}
_RUN_KEYS = ("name", "linears", "preset")  # of a listed run, beside its settings
_PLANNED = {"model.linear": "linears", "train.seed": "seeds"}  # settings that the sweep makes -> the key to use instead


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    point: str  # the settings that distinguish it, as text
    linear: str
    seed: int
    preset: str | None
    values: Values

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"{re.sub(r'[^A-Za-z0-9.+=-]+', '-', self.point)}-{self.linear}-s{self.seed}"


@dataclass(frozen=True)
class HeldOut:
    """The test text that finished runs score."""

    paths: tuple[str, ...]
    tokens: int  # 0: all

    def identity(self) -> dict[str, Any]:
        """What identifies the text of a score: paths, tokens, and a digest of local files (not of data sets on a hub).

        Raises BitNetError for a path that does not exist.
        """
        files = [path for path in self.paths if not is_dataset(path)]
        digest = hashlib.sha256()
        for source in find_sources(
            files, Path(tempfile.gettempdir())
        ):  # the folder is for standard input, which is refused
            with source.path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return {"paths": list(self.paths), "tokens_asked": self.tokens, "digest": digest.hexdigest()}


def read_spec(path: Path) -> list[PlannedRun]:
    """The runs of a sweep spec. Raises BitNetError for unknown keys, bad values, and two runs of one name."""
    values = _read(path)
    plans = [
        PlannedRun(
            point,
            linear,
            seed,
            asked.get("preset"),
            merge(settings, {"model": {"linear": linear}, "train": {"seed": seed}}),
        )
        for point, asked, settings in _points(path, values)
        for seed in values.get("seeds", [0])
        for linear in asked.get("linears", ["ternary"])
    ]
    if len({plan.folder for plan in plans}) < len(plans):
        raise BitNetError(
            f"sweep: '{path}': got two runs of one name, expected a `name` of its own for each of [[runs]]"
        )
    return plans


def read_held_out(path: Path) -> HeldOut | None:
    """The test text of a sweep spec, None where it names none. Raises BitNetError for bad values."""
    values = _read(path)
    paths, tokens = values.get("test"), values.get("test_tokens", 0)
    if paths is None and "test_tokens" not in values:
        return None
    if paths is None or not _list_of(str, paths) or type(tokens) is not int or tokens < 0:
        raise BitNetError(
            f"sweep: '{path}': got test {paths!r}, test_tokens {tokens!r}, expected a list of paths and a number"
        )
    if STANDARD_INPUT in paths:
        raise BitNetError(f"sweep: '{path}': got test '-', expected files: every run reads the text again")
    return HeldOut(tuple(paths), tokens)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BitNetError(f"sweep: '{path}' cannot be read as TOML: {error}") from error
    if unknown := values.keys() - _KEYS:
        raise BitNetError(f"sweep: '{path}': got '{min(unknown)}', expected {', '.join(sorted(_KEYS))}")
    _check(path, values)
    return values


def _check(path: Path, values: dict[str, Any]) -> None:
    """Raise BitNetError where a spec differs from the form at the head of this module."""
    if not _list_of(int, seeds := values.get("seeds", [0])):
        raise BitNetError(f"sweep: '{path}': got seeds {seeds!r}, expected a list of integers, not empty")
    _check_kind(f"sweep: '{path}'", values)
    for name in ("base", "grid"):
        _check_settings(f"sweep: '{path}': [{name}]", values.get(name, {}))
    runs = values.get("runs", [{}])
    if not _list_of(dict, runs):
        raise BitNetError(f"sweep: '{path}': got runs {runs!r}, expected one or more tables, each under [[runs]]")
    for number, listed in enumerate(runs, 1):
        where = f"sweep: '{path}': [[runs]] {number}"
        _check_kind(where, listed)
        if "name" in listed and not (isinstance(listed["name"], str) and listed["name"]):
            raise BitNetError(f"{where}: got name {listed['name']!r}, expected text")
        _check_settings(where, _settings(listed), f", or {', '.join(_RUN_KEYS)}")


def _check_kind(where: str, values: dict[str, Any]) -> None:
    linears = values.get("linears", ["ternary"])
    if not _list_of(str, linears) or not set(linears) <= set(LINEARS):
        raise BitNetError(f"{where}: got linears {linears!r}, expected a list of {', '.join(LINEARS)}")
    if "preset" in values and values["preset"] not in list(PRESETS):  # in a list: the value may not be hashable
        raise BitNetError(f"{where}: got preset {values['preset']!r}, expected one of {', '.join(PRESETS)}")


def _check_settings(where: str, settings: Any, or_else: str = "") -> None:
    if not isinstance(settings, dict):
        raise BitNetError(f"{where}: got {settings!r}, expected a table of settings such as train.lr")
    for section, content in settings.items():
        if not isinstance(content, dict):
            raise BitNetError(
                f"{where}: got {section} = {content!r}, expected settings with their section, such as train.lr{or_else}"
            )
        for key in content:
            if way := _PLANNED.get(f"{section}.{key}"):  # the planned value would silently replace it
                raise BitNetError(f"{where}: got {section}.{key}, expected none; {way} = [...] lists its values")


def _settings(listed: dict[str, Any]) -> dict[str, Any]:
    """The settings of a listed run, without its name, linears and preset."""
    return {section: content for section, content in listed.items() if section not in _RUN_KEYS}


def _list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(element) is kind for element in value)


def _points(path: Path, values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], Values]]:
    """Name, keys (linears, preset) and settings of every point: each listed run at every combination of the grid."""
    axes = [[(f"{section}.{key}", value) for value in _as_list(path, section, key, listed)]
            for section, content in values.get("grid", {}).items() for key, listed in content.items()]  # fmt: skip
    for listed in values.get("runs", [{}]):
        own = _settings(listed)
        _check_overlap(path, own, values.get("grid", {}))
        for chosen in itertools.product(*axes):
            grid: Values = {}
            for name, value in chosen:
                section, _, key = name.partition(".")
                grid.setdefault(section, {})[key] = value
            words = _words(listed) + [f"{name.partition('.')[2]}={_text(value)}" for name, value in chosen]
            yield " ".join(words) or "base", {**values, **listed}, merge(values.get("base", {}), own, grid)


def _check_overlap(path: Path, own: Values, grid: Values) -> None:
    """Raise BitNetError for a setting of a listed run that the grid overrides: the run's name would be wrong."""
    for section, content in own.items():
        if twice := content.keys() & grid.get(section, {}).keys():
            raise BitNetError(
                f"sweep: '{path}': got {section}.{min(twice)} in [grid] and in [[runs]], expected it in one of them"
            )


def _as_list(path: Path, section: str, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BitNetError(f"sweep: '{path}': grid.{section}.{key}: got {value!r}, expected a list of values")
    return value


def _words(listed: dict[str, Any]) -> list[str]:
    """The name of a listed run, or its settings as words."""
    if "name" in listed:
        return [listed["name"]]
    preset = [f"preset={listed['preset']}"] if "preset" in listed else []
    return preset + [f"{key}={_text(v)}" for content in _settings(listed).values() for key, v in content.items()]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
