"""Processes that tests start: each has a limit, and none outlives its test, whatever that test's outcome.

A limit here catches what hangs. It says nothing about speed: it is a hundred times what such a process takes on a quiet
machine, so that a slow and busy one never meets it, and it is below the limit of a test (`timeout` in pyproject.toml),
so that the failure shows what the process printed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Timer
from typing import Any

import pytest

LIMIT = 480.0  # seconds; starting Python with torch takes 3 on a quiet machine
_LAST_WORDS = 30.0  # seconds for pipes to close once their process group has been killed
_SHOWN = 4000  # characters of each stream in a failure


def run(
    command: Sequence[object], *, limit: float = LIMIT, check: bool = True, stdin: str | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it printed; stdin: the text it reads (none by default).

    Fails the test when it takes longer than `limit` seconds, after killing it and what it started, or, with `check`,
    when its exit code is not 0. options: those of `subprocess.Popen`.
    """
    pipes = {"stdin": subprocess.PIPE if stdin is not None else subprocess.DEVNULL} | dict.fromkeys(
        ("stdout", "stderr"), subprocess.PIPE
    )
    with started(command, **(pipes | options)) as process:
        try:
            out, err = process.communicate(stdin, timeout=limit)
        except subprocess.TimeoutExpired:
            _kill(process)
            out, err = _rest(process)
            pytest.fail(f"did not end in {limit:.0f} s: {_told(process, out, err)}")
    if check and process.returncode:
        pytest.fail(_told(process, out, err))
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextlib.contextmanager
def started(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, killed with its group at the end of the block if it still runs."""
    process = start(command, **options)
    try:
        yield process
    finally:
        end(process)


def start(command: Sequence[object], **options: Any) -> subprocess.Popen[str]:
    """A process in a session of its own; whoever starts it calls `end`, in teardown."""
    return subprocess.Popen(list(map(str, command)), **({"text": True, "start_new_session": True} | options))


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and its group if it still runs, collect it, close its pipes."""
    _kill(process)
    process.wait(_LAST_WORDS)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # what it did not read any more
                pipe.close()


def finish(process: subprocess.Popen[str], number: int | None = None, limit: float = LIMIT) -> tuple[int, str, str]:
    """Send a signal (none: just wait) and return exit code, the rest of stdout, stderr. Fails the test at the limit."""
    if number is not None and process.poll() is None:
        process.send_signal(number)
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        _kill(process)
        out, err = _rest(process)
        why = "did not end" if number is None else f"did not end of signal {signal.Signals(number).name}"
        pytest.fail(f"{why} in {limit:.0f} s: {_told(process, out, err)}")
    return process.returncode, out or "", err or ""


def line_from(process: subprocess.Popen[str], limit: float = LIMIT) -> str:
    """The next line of its stdout, without its end. Fails the test when none comes, showing what the process said."""
    assert process.stdout is not None
    watchdog = Timer(limit, _kill, [process])  # ends the pipe, and with it the wait
    watchdog.daemon = True
    watchdog.start()
    line = process.stdout.readline()
    watchdog.cancel()
    if not line:
        _kill(process)
        pytest.fail(f"no line on stdout (limit {limit:.0f} s): {_told(process, *_rest(process))}")
    return line.rstrip("\n")


def wait_until(true: Callable[[], object], what: object = "what was waited for", limit: float = LIMIT) -> None:
    """Ask again and again until it is true. Fails the test at the limit; what: for the message, called if it can be."""
    until = time.monotonic() + limit
    while not true():
        if time.monotonic() > until:
            pytest.fail(f"not within {limit:.0f} s: {what() if callable(what) else what}")
        time.sleep(0.02)


def bitnet(*args: object) -> list[str]:
    """The command line `bitnet ARGS`, as this Python runs it."""
    return [sys.executable, "-m", "bitnet.cli", *map(str, args)]


def environment(**variables: object) -> Mapping[str, str]:
    """Ours, with these variables on top."""
    return {**os.environ, **{name: str(value) for name, value in variables.items()}}


def _kill(process: subprocess.Popen[str]) -> None:
    if process.returncode is not None:  # collected: its number may be another process's by now
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):  # no group of its own, or none left
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _rest(process: subprocess.Popen[str]) -> tuple[str | None, str | None]:
    """What a killed process had printed; less than all where a process of another group still holds the pipe."""
    try:
        return process.communicate(timeout=_LAST_WORDS)
    except subprocess.TimeoutExpired:
        return None, None


def _told(process: subprocess.Popen[str], out: str | None, err: str | None) -> str:
    command = " ".join(part if len(part) < 80 else f"{part[:77]}..." for part in map(str, process.args))
    return (
        f"{command}\nexit code {process.returncode}\nstdout: {(out or '')[-_SHOWN:]}\nstderr: {(err or '')[-_SHOWN:]}"
    )
