"""The verb that looks at this machine: doctor."""

import typer

from bitnet.cli.options import Debug, Json
from bitnet.cli.terminal import print_json, print_tables


def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Print versions, devices, kernels and what limits this machine; test the kernels against the reference."""
    from bitnet.doctor import examine, surroundings
    from bitnet.threads import use_threads

    use_threads()
    report = {"machine": surroundings(), **examine()}  # first: the tests would count as a busy machine
    if as_json:
        print_json(report)
    else:
        from bitnet.cli.tables import doctor_tables

        print_tables(*doctor_tables(report))
    raise typer.Exit(0 if report["healthy"] else 1)
