"""How the verbs print: text as it is written, one JSON document, tables."""

import json
import sys
from typing import Any

import typer


def write_now(text: str) -> None:
    """Text on stdout, seen at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(report: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(report, indent=2))


def print_tables(*tables: Any) -> None:
    """Tables of rich, one below the other, as wide as the terminal."""
    from rich.console import Console

    Console().print(*tables, sep="\n")
