"""How the verbs print: text as it is written, one JSON document, tables."""

import json
import os
import sys
from typing import Any

import typer

_WIDTH = 400  # characters, where the output is no terminal: nothing is folded away in a log


def write_now(text: str) -> None:
    """Text on stdout, seen at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(report: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(report, indent=2))


def print_tables(*tables: Any) -> None:
    """Tables of rich, one below the other, as wide as the terminal, or as COLUMNS says where there is none."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=_WIDTH)
    console.print(*tables, sep="\n")
