"""Checks shared by every config dataclass: types, allowed values, unknown keys; all errors are BitNetError."""

import difflib
import logging
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar, get_args, get_origin

from bitnet.errors import BitNetError

T = TypeVar("T")
_log = logging.getLogger("bitnet")
_FLOAT_LIMIT = 2**1023  # integers below it convert to float; float() of a larger one overflows


def check_types(config: Any, section: str) -> None:
    """Raise BitNetError for a value that is not of its field's type (an int is a float, a bool is not an int)."""
    for field in fields(config):
        value = getattr(config, field.name)
        if not _is_a(value, field.type):
            raise BitNetError(
                f"{section}.{field.name}: got {value!r} ({type(value).__name__}), expected {_describe(field.type)}"
            )


def check_range(config: Any, section: str, names: Iterable[str], low: float, high: float | None = None) -> None:
    """Raise BitNetError for a number outside low..high; None: no upper limit."""
    expected = f"{low} or more" if high is None else f"{low} to {high}"
    for name in names:
        value = getattr(config, name)
        # Written so that NaN, for which every comparison is false, is refused as well.
        if not (value >= low and (high is None or value <= high)):
            raise BitNetError(f"{section}.{name}: got {value}, expected {expected}")


def check_choice(config: Any, section: str, name: str, allowed: Iterable[str]) -> None:
    """Raise BitNetError for a string that is not one of `allowed`."""
    value = getattr(config, name)
    if value not in allowed:
        raise BitNetError(f"{section}.{name}: got '{value}', expected one of {', '.join(allowed)}")


# Names that earlier versions wrote into files, and today's.
_OLD_KEYS = {("train", "ease"): "quant_warmup", ("train", "table_lr"): "embedding_lr"}
_OLD_VALUES = {("model", "linear", "plain"): "float"}


def current(values: dict[str, Any], section: str) -> dict[str, Any]:
    """Settings under today's names; for an old name, a log line gives the new one.

    Raises BitNetError for a setting given under both of its names.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = _OLD_KEYS.get((section, name), name)
        if key in found or (key != name and key in values):
            raise BitNetError(f"{section}.{key}: got it under its old name '{name}' as well; give it once")
        if key != name:
            _log.info("%s.%s is called %s.%s now", section, name, section, key)
        found[key] = _OLD_VALUES.get((section, key, value), value) if isinstance(value, str) else value
    return found


def from_values(cls: type[T], values: dict[str, Any], section: str) -> T:
    """Build a config dataclass from parsed TOML or JSON. Raises BitNetError for unknown keys and wrong types."""
    if not isinstance(values, dict):
        raise BitNetError(f"{section}: got {type(values).__name__}, expected a table of settings")
    values = current(values, section)
    known = {field.name: field.type for field in fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(sorted(known))}"
            raise BitNetError(f"{section}: got unknown key '{name}'; {hint}")
    return cls(**{name: _convert(value, known[name]) for name, value in values.items()})


def _convert(value: Any, expected: Any) -> Any:
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < _FLOAT_LIMIT else value  # too large: left for the type check to refuse
    if get_origin(expected) is tuple and isinstance(value, list):
        return tuple(_convert(element, get_args(expected)[0]) for element in value)
    return value


def _is_a(value: Any, expected: Any) -> bool:
    if get_origin(expected) is tuple:
        return isinstance(value, tuple) and all(_is_a(element, get_args(expected)[0]) for element in value)
    if expected is float:
        is_integer = isinstance(value, int) and not isinstance(value, bool) and abs(value) < _FLOAT_LIMIT
        return is_integer or isinstance(value, float)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _describe(expected: Any) -> str:
    if get_origin(expected) is tuple:
        return f"a list of {get_args(expected)[0].__name__}"
    return str(expected.__name__)


def parse(text: str, expected: type, name: str) -> Any:
    """The value of a command-line flag as the type of its field; a list is written a,b. Raises BitNetError."""
    if expected is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise BitNetError(f"{name}: got '{text}', expected true or false")
    if expected in (int, float):
        try:
            return expected(text)
        except ValueError:
            raise BitNetError(f"{name}: got '{text}', expected {expected.__name__}") from None
    if expected is tuple:
        return tuple(part for part in text.split(",") if part)
    return text  # a string; building the config refuses an unknown name
