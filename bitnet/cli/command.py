"""How a verb reads its command line: lists, old spellings, and help that takes defaults from where they are defined."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from bitnet.cli.errors import InterruptedVerb

_LISTS = ("--data", "--val-data")  # take one or more values: --data a.txt b.txt

# Options that have been renamed, by verb. The old spelling is accepted and not shown.
_OLD_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "compare": {"--twin": "--baseline"},
    "serve": {"--slots": "--sequences"},
}


class Verb(TyperCommand):
    """A command of `bitnet`."""

    @staticmethod
    def help_values() -> Mapping[str, object]:
        """The values of the {names} in the verb's help texts. Called for --help only, since it may import torch."""
        return {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread_lists(rename_options(args, _OLD_OPTIONS.get(self.name or "", {}))))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise InterruptedVerb from None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.fill_help()
        super().format_help(ctx, formatter)

    def fill_help(self) -> None:
        """Replace {names} in the help texts: `{train.lr}` becomes the value that the config dataclass defines."""
        values = self.help_values()
        for param in self.params:
            if text := getattr(param, "help", None):
                param.help = text.format_map(values)  # type: ignore[attr-defined]


def verb_class(values: Callable[[], Mapping[str, object]]) -> type[Verb]:
    """A Verb whose help texts contain the names of `values`."""

    class VerbWithValues(Verb):
        help_values = staticmethod(values)

    return VerbWithValues


class VerbGroup(TyperGroup):
    """Lists the verbs in the order they are declared in, not alphabetically."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


def rename_options(args: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """The arguments with old option names, as `--old value` or `--old=value`, replaced by the current ones."""
    renamed = []
    for arg in args:
        option, equals, value = arg.partition("=")
        renamed.append(f"{names[option]}{equals}{value}" if option in names else arg)
    return renamed


def spread_lists(args: Sequence[str]) -> list[str]:
    """`--data a b` as `--data a --data b`, so that a shell may expand a glob; `-` (standard input) is a value."""
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
