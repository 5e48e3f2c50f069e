"""The helpers that start processes for other tests: limits hold, nothing is left, failures show what was printed."""

import os
import signal
from pathlib import Path
from subprocess import PIPE

import child_process
import pytest

# Prints its child's number once both are there.
FAMILY = ["sh", "-c", "echo trouble >&2; sleep 600 & echo $!; wait"]
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_what_was_printed_is_returned() -> None:
    done = child_process.run(["sh", "-c", "read word; echo $word; echo two >&2; exit 3"], stdin="one\n", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "one\n", "two\n")


def test_a_failure_shows_what_was_printed() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"(?s)exit 3.*exit code 3.*stdout: one.*stderr: two"):
        child_process.run(["sh", "-c", "echo one; echo two >&2; exit 3"])


def test_what_does_not_end_meets_its_limit() -> None:
    with pytest.raises(pytest.fail.Exception, match="did not end in 0 s: sleep 600"):
        child_process.run(["sleep", "600"], limit=0.1)


@needs_proc
def test_the_limit_ends_the_whole_group_and_shows_its_words() -> None:
    with child_process.started(FAMILY, stdout=PIPE, stderr=PIPE) as process:
        child = int(child_process.line_from(process))
        with pytest.raises(pytest.fail.Exception, match=r"(?s)did not end in 0 s.*exit code -9.*stderr: trouble"):
            child_process.finish(process, limit=0.1)
    child_process.wait_until(lambda: gone(child))


@needs_proc
def test_a_test_that_fails_leaves_nothing() -> None:
    started = []

    def failing() -> None:
        with child_process.started(FAMILY, stdout=PIPE, stderr=PIPE) as process:
            started.extend([process.pid, int(child_process.line_from(process))])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    child_process.wait_until(lambda: all(map(gone, started)))


def test_a_signal_and_its_exit_code() -> None:
    with child_process.started(
        ["sh", "-c", "trap 'echo bye; exit 7' TERM; echo; while :; do sleep 0.1; done"], stdout=PIPE
    ) as process:
        assert child_process.line_from(process) == ""
        assert child_process.finish(process, signal.SIGTERM) == (7, "bye\n", "")


def test_no_line_shows_why() -> None:
    command = ["sh", "-c", "echo trouble >&2; exit 5"]
    shown = pytest.raises(pytest.fail.Exception, match=r"(?s)no line on stdout.*exit code 5.*stderr: trouble")
    with child_process.started(command, stdout=PIPE, stderr=PIPE) as process, shown:
        child_process.line_from(process)


def test_a_line_that_never_comes_meets_its_limit() -> None:
    shown = pytest.raises(pytest.fail.Exception, match="no line on stdout")
    with child_process.started(["sleep", "600"], stdout=PIPE) as process, shown:
        child_process.line_from(process, limit=0.1)


def test_waiting_ends() -> None:
    answers = iter([False, False, True])
    child_process.wait_until(lambda: next(answers))
    with pytest.raises(pytest.fail.Exception, match="not within 0 s: 5 of 9"):
        child_process.wait_until(lambda: False, lambda: "5 of 9", limit=0.1)


def test_variables_come_on_top() -> None:
    assert child_process.environment(BITNET_X=5) == {**os.environ, "BITNET_X": "5"}
