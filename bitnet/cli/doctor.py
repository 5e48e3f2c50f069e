"""`bitnet doctor`: examine this machine."""

import typer

from bitnet.cli.options import Debug, Json
from bitnet.cli.terminal import print_json, print_tables


def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Show versions, devices, kernels and what limits this machine; test the kernels against the reference."""
    from bitnet.doctor import describe_machine, examine
    from bitnet.threads import use_threads

    use_threads()
    report = {"machine": describe_machine(), **examine()}  # first: the self-tests would count as load
    if as_json:
        print_json(report)
    else:
        from bitnet.cli.tables import doctor_tables

        print_tables(*doctor_tables(report))
    raise typer.Exit(0 if report["healthy"] else 1)
