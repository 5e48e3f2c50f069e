"""How an error of the command line becomes one line on stderr and an exit code.

0 success, 2 bad input (one line: got, expected, what to do; `--debug` shows the traceback instead), 130 Ctrl-C, 143
SIGTERM.
"""

import logging
import os
import sys
from collections.abc import Callable

import typer

from bitnet.errors import BitNetError, is_thread_shortage


class InterruptedVerb(Exception):  # noqa: N818 - not an error: it carries Ctrl-C past typer, which would exit silently
    """Ctrl-C while a verb was running."""


def guarded(action: Callable[[], int | None], debug: Callable[[], bool] = lambda: False) -> int:
    """Run `action` with logging to stderr and turn user errors into one line. Returns the exit code.

    debug: whether an error is raised with its traceback instead; asked after the error, once options have been parsed.
    Bugs are raised: they need their traceback.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("bitnet: %(message)s"))
    logging.getLogger("bitnet").addHandler(handler)
    logging.getLogger("bitnet").setLevel(logging.INFO)
    try:
        return int(action() or 0)
    except typer.TyperException as error:
        if message := usage_error(error):
            print(f"bitnet: error: {message}", file=sys.stderr)
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt, InterruptedVerb):
        print("bitnet: interrupted", file=sys.stderr)
        return 130
    except (BrokenPipeError, SystemExit) as error:
        # When the reader of our output closes the pipe (`| head`), typer exits with code 1. That is no error, but
        # Python's final flush would fail again, so stdout is pointed at the null device.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if debug() or not _is_user_error(error):
            raise
        print(f"bitnet: error: {describe(error)}", file=sys.stderr)
        return 2
    finally:
        logging.getLogger("bitnet").removeHandler(handler)


def _is_user_error(error: Exception) -> bool:
    """BitNetError and the kernels' refusals are ValueErrors; of torch's RuntimeErrors, those about resources count."""
    return not isinstance(error, RuntimeError) or is_out_of_memory(error) or is_thread_shortage(error)


def usage_error(error: typer.TyperException) -> str:
    """A usage error as one line; empty where typer has already printed the help."""
    format_message = getattr(error, "format_message", None)
    message = " ".join((format_message() if format_message else str(error)).split())
    context = getattr(error, "ctx", None)
    return f"{message.rstrip('.')}; see: {context.command_path} -h" if message and context else message


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch ran out of memory."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in message or "can't allocate memory" in message


def describe(error: BaseException) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and not isinstance(error, BitNetError):
        path = f"'{error.filename}': " if error.filename else ""
        return f"{path}{error.strerror or error}; everything saved earlier is intact"
    if is_out_of_memory(error):
        return "out of memory; use a smaller model, batch or context"
    if is_thread_shortage(error):
        return (
            "the system refused to start another thread; use fewer (-t), or raise its limit (ulimit -u, or the "
            "container's)"
        )
    return " ".join(str(error).split())
