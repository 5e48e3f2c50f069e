"""Data sets of Hugging Face's `datasets` as text to learn from (the extra `datasets`).

    --data 'datasets:roneneldan/TinyStories?rows=100000' --documents row
    --data 'hf://datasets/HuggingFaceFW/fineweb-edu?config=sample-10BT&rows=2000000' --documents row
    --data 'datasets:json?data_files=stories.jsonl' --documents row          # a builder and its files, offline too

Keys: split (train), column (text), config, data_files, rows (0: all). The rows are streamed once, in the data set's
own order, into a spool beside the token shards, and from there on the run needs no network: resuming, the share of
each process and the order of an epoch are those of any other text. A stream into the loop itself would save the disk
and lose that: its state is the library's, and another version or a change on the hub would be another run.
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
    """Whether a --data value names a data set and no file."""
    return name.startswith(PREFIXES)


def spool_rows(name: str, path: Path) -> tuple[int, str]:
    """Write a data set's texts into a file, one JSON string a line. Returns its size in bytes and sha256.

    Raises BitNetError for an unknown key, a data set or column that is not there, and without the library.
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
            "data: got no datasets, expected Hugging Face's library for it; pip install 'bitnet-ternary[datasets]'"
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
