"""The command line: the list of verbs.

A verb is a function whose parameters are its options, which makes some of them long. The module that does the work is
imported when the verb runs, so that `--help` is quick. Results go to stdout, everything else to stderr.
"""

from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from bitnet.cli import bench, compare, doctor, eval, export, generate, import_, inspect, pack, serve, sweep, train
from bitnet.cli.command import Verb, VerbGroup, spread_lists, verb_class
from bitnet.cli.errors import guarded
from bitnet.cli.options import Debug, Settings

__all__ = ["VERBS", "app", "guarded", "main", "spread_lists"]

app = typer.Typer(
    cls=VerbGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="BitNet b1.58: train small ternary language models, pack them to two bits per weight, run them.",
    epilog="First steps:\n\n"
    "bitnet generate -p 'It was'\n\n"
    "bitnet train --out runs/first\n\n"
    "bitnet pack runs/first -o model.safetensors\n\n"
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


VERBS: dict[str, Callable[..., None]] = {  # in the order in which a newcomer needs them
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
# Verbs whose help texts show defaults that a config dataclass defines.
_HELP_VALUES = {
    "train": train.help_values,
    "generate": generate.help_values,
    "bench": bench.help_values,
    "compare": compare.help_values,
}
for _name, _function in VERBS.items():
    app.command(_name, cls=verb_class(_HELP_VALUES[_name]) if _name in _HELP_VALUES else Verb)(_function)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    settings = Settings()
    run = lambda: app(args=argv, prog_name="bitnet", standalone_mode=False, obj=settings)  # noqa: E731
    return guarded(run, lambda: settings.debug)
