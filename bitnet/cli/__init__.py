"""The command line: the list of verbs, how its words are read, and how an error becomes one line.

A verb is a function with options only; what it does lives in its own module, imported when the verb runs, so that
`--help` is quick. Products go to stdout, everything else to stderr. Exit codes: 0, 2 for bad input (one line that says
got, expected and what to do; `--debug` shows the traceback), 130 and 143 for Ctrl-C and SIGTERM.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from bitnet.cli import bench, compare, doctor, eval, export, generate, import_, inspect, pack, serve, sweep, train
from bitnet.cli.options import Debug, state
from bitnet.errors import BitNetError, is_thread_shortage

_LISTS = ("--data", "--val-data")  # take one or more values: --data a.txt b.txt


class _Verb(TyperCommand):
    """A command whose list options may be written once with several values, as a shell expands a glob."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread_lists(args))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer would leave without a word
            raise _InterruptedError from None


class _InterruptedError(Exception):
    """Ctrl-C, on its way through typer."""


class _App(TyperGroup):
    """Verbs in the order of `VERBS`, not in the alphabet's."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


def spread_lists(args: Sequence[str]) -> list[str]:
    """`--data a b` as `--data a --data b`; `-` (standard input) is a value."""
    result: list[str] = []
    option: str | None = None
    for arg in args:
        is_value = arg == "-" or not arg.startswith("-")
        if option and is_value and result[-1] != option:
            result.append(option)
        result.append(arg)
        if not is_value:
            option = arg.partition("=")[0]
            option = option if option in _LISTS else None
    return result


app = typer.Typer(
    cls=_App,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="BitNet b1.58: train small ternary language models, pack them to two bits a weight, run them.",
    epilog="A first run:  bitnet train --out runs/first  ;  bitnet pack runs/first -o model.safetensors  ;  "
    "bitnet generate -m model.safetensors -p 'def '",
)


def _show_version(value: bool) -> None:
    if value:
        from bitnet import __version__

        typer.echo(f"bitnet {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Debug = False,
) -> None:
    pass


VERBS: dict[str, Callable[..., None]] = {  # in the order a newcomer meets them
    "train": train.train,
    "sweep": sweep.sweep,
    "pack": pack.pack,
    "generate": generate.generate,
    "serve": serve.serve,
    "eval": eval.evaluate,
    "bench": bench.bench,
    "compare": compare.compare,
    "inspect": inspect.inspect,
    "export": export.export,
    "import": import_.import_,
    "doctor": doctor.doctor,
}
for _name, _function in VERBS.items():
    app.command(_name, cls=_Verb)(_function)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    state["debug"] = False
    return guarded(lambda: app(args=argv, prog_name="bitnet", standalone_mode=False))


def guarded(action: Callable[[], int | None]) -> int:
    """Run a program of ours: log to stderr, and turn every error a user can cause into one line and an exit code."""
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
    except (typer.Abort, KeyboardInterrupt, _InterruptedError):
        print("bitnet: interrupted", file=sys.stderr)
        return 130
    except (BrokenPipeError, SystemExit) as error:
        # typer leaves with code 1 when the reader of our output went away (`| head`). To us that is no error, but
        # nothing may be flushed to it any more.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        # BitNetError is a ValueError, as are the kernels' refusals. Of torch's RuntimeErrors only a lack of memory or
        # threads is the user's; another one is a mistake of ours and wants its traceback.
        of_user = not isinstance(error, RuntimeError) or is_out_of_memory(error) or is_thread_shortage(error)
        if state["debug"] or not of_user:
            raise
        print(f"bitnet: error: {describe(error)}", file=sys.stderr)
        return 2
    finally:
        logging.getLogger("bitnet").removeHandler(handler)


def usage_error(error: typer.TyperException) -> str:
    """A mistake in the command line in one line. Empty where typer has shown the help instead."""
    read = getattr(error, "format_message", None)
    message = " ".join((read() if read else str(error)).split())
    context = getattr(error, "ctx", None)
    return f"{message.rstrip('.')}; see: {context.command_path} -h" if message and context else message


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is Python's or torch's way to say that memory ran out."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words


def describe(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and not isinstance(error, BitNetError):
        where = f"'{error.filename}': " if error.filename else ""
        return f"{where}{error.strerror or error}; nothing saved before is lost"
    if is_out_of_memory(error):
        return "out of memory; use a smaller model, batch or context"
    if is_thread_shortage(error):
        return "the system starts no more threads; use fewer (-t), or raise its limit (ulimit -u, or the container's)"
    return " ".join(str(error).split())
