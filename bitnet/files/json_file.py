"""JSON that strangers wrote, read within bounds.

What json.loads lacks: a limit on memory (eight megabytes of `{}` become 200 in Python's objects; the count of brackets
and commas is checked before anything is parsed), and the refusal of a name that an object holds twice.
"""

import json
from pathlib import Path
from typing import Any

from bitnet.errors import BitNetError

MAX_JSON = 1 << 23  # bytes
_BYTES = 12  # of JSON for a value, at least, in files that hold what they should
MAX_VALUES = MAX_JSON // _BYTES


def parse_json(text: bytes, most: int = MAX_VALUES) -> dict[str, Any]:
    """A JSON object. Raises BitNetError for anything else, for a name twice, and for more than `most` values."""
    values = text.count(b",") + text.count(b"{") + text.count(b"[")
    if values > most:
        raise BitNetError(f"got JSON of {values:,} values, expected at most {most:,}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise BitNetError(f"got '{name:.80}' twice in one JSON object")
            found[name] = value
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BitNetError):
            raise
        raise BitNetError(f"got JSON that cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise BitNetError(f"got JSON of a {type(value).__name__}, expected an object")
    return value


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object from a file. Raises BitNetError for one that is not there, too large, or not JSON."""
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1)
        if len(text) > limit:
            raise BitNetError(f"got more than {limit:,} bytes of JSON")
        return parse_json(text, limit // _BYTES)
    except OSError as error:
        raise BitNetError(f"{path}: {error.strerror}; check the path") from error
    except BitNetError as error:
        raise BitNetError(f"{path}: {error}") from error
