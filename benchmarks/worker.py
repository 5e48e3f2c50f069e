"""Contenders in processes of their own, asked one at a time: other Pythons, other environments, no shared state.

A worker is a script that reads one JSON command a line from stdin and answers each with one JSON line on stdout.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Worker:
    """A running contender; `ask` returns what it answers, a dict of JSON values."""

    def __init__(self, script: str, *args: str, python: str = sys.executable, **environment: str) -> None:
        command = [python, str(Path(__file__).with_name(script)), *args]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send one command and wait for its answer. Raises RuntimeError when the worker has died."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"contender died: {self._process.args}") from None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"contender died: {self._process.args}")
        return json.loads(line)

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The other side: answer commands until stdin ends. Whatever else is printed goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        out.write(json.dumps(answer(json.loads(line))) + "\n")
        out.flush()
