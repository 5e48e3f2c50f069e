"""How the verbs print: text as it is generated, one JSON document, tables."""

import json
import os
import sys
from typing import Any

import typer

_WIDTH = 400  # columns where the output is not a terminal: lines of a log are not wrapped


def write_now(text: str) -> None:
    """Print text on stdout without a newline and flush it."""
    sys.stdout.write(text)
    sys.stdout.flush()


def log(line: str) -> None:
    """Print a line on stderr."""
    typer.echo(line, err=True)


def print_json(report: dict[str, Any]) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(report, indent=2))


def print_tables(*tables: Any) -> None:
    """Print rich tables below each other, as wide as the terminal; elsewhere as wide as COLUMNS says, if it is set."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=_WIDTH)
    console.print(*tables, sep="\n")
