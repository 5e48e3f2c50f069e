"""The verb that looks at this machine: doctor."""

import typer

from bitnet.cli.options import Debug, Json
from bitnet.cli.terminal import print_json, print_tables


def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Print versions, devices and kernels, and test the kernels against the reference."""
    from bitnet.doctor import examine
    from bitnet.threads import use_threads

    use_threads()
    report = examine()
    if as_json:
        print_json(report)
    else:
        from bitnet.cli.tables import doctor_tables

        print_tables(*doctor_tables(report))
    raise typer.Exit(0 if report["healthy"] else 1)
