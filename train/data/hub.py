"""Training text from data sets of Hugging Face's `datasets` library (extra `datasets`).

    --data 'datasets:roneneldan/TinyStories?rows=100000' --documents row
    --data 'hf://datasets/HuggingFaceFW/fineweb-edu?config=sample-10BT&rows=2000000' --documents row
    --data 'datasets:json?data_files=stories.jsonl' --documents row          # a builder and its files, offline too

Keys: split (train), column (text), config, data_files, rows (0: all). The rows are streamed once, in the order of the
data set, into a spool file beside the token shards. After that the run needs no network, and resumes like a run on any
other text. Streaming rows into the training loop would save the disk space, but the state of the stream would belong
to the library, and a new version of it or a change on the hub would change the run.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import parse_qs

from bitnet.errors import BitNetError

PREFIXES = ("datasets:", "hf://datasets/")
_KEYS = {"split": "train", "column": "text", "config": "", "data_files": "", "rows": "0"}


def is_dataset(name: str) -> bool:
    """Whether a --data value names a data set rather than a file."""
    return name.startswith(PREFIXES)


def spool_rows(name: str, path: Path) -> tuple[int, str]:
    """Write the texts of a data set to a file, one JSON string per line. Returns its size in bytes and its sha256.

    Raises BitNetError for an unknown key, a data set or column that does not exist, and if the library is missing.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for text in _texts(name):
            line = json.dumps(text).encode() + b"\n"
            file.write(line)
            digest.update(line)
            size += len(line)
    return size, digest.hexdigest()


def _texts(name: str) -> Iterator[str]:
    where, settings = _parse(name)
    try:
        import datasets
    except ImportError:
        raise BitNetError(
            "data: got no package 'datasets', expected it to read a data set; from a clone: pip install '.[datasets]'"
        ) from None
    try:
        rows = datasets.load_dataset(
            where,
            settings["config"] or None,
            data_files=settings["data_files"] or None,
            split=settings["split"],
            streaming=True,
        )
        for number, row in enumerate(islice(rows, int(settings["rows"]) or None)):
            text = row.get(settings["column"])
            if not isinstance(text, str):
                raise BitNetError(
                    f"data: {name}: got {type(text).__name__} in column '{settings['column']}' of row {number}, "
                    f"expected text; the columns are {', '.join(row)} (?column=...)"
                )
            if text:
                yield text
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a data set that is a script
        if isinstance(error, BitNetError):
            raise
        raise BitNetError(f"data: {name}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def _parse(name: str) -> tuple[str, dict[str, str]]:
    prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
    where, _, query = name.removeprefix(prefix).partition("?")
    given = {key: values[-1] for key, values in parse_qs(query, keep_blank_values=True).items()}
    if unknown := given.keys() - _KEYS.keys():
        raise BitNetError(f"data: {name}: got the key '{min(unknown)}', expected {', '.join(_KEYS)}")
    settings = {**_KEYS, **given}
    if not where or not settings["rows"].isdecimal():
        raise BitNetError(f"data: got {name!r}, expected datasets:NAME or datasets:NAME?rows=NUMBER")
    return where, settings
