"""SIGINT and SIGTERM stop a run after the current step and a save."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class StopSignal:
    """`received`: the number of the first signal, or None."""

    received: int | None = None


@contextmanager
def stop_signals(note: Callable[[str], None]) -> Iterator[StopSignal]:
    """Record the first SIGINT or SIGTERM inside the block instead of ending; a second one ends the process at once.

    note: called with a line for the user when the first signal arrives.
    """
    stop = StopSignal()
    previous: dict[int, Any] = {}

    def handle(number: int, _: object) -> None:
        stop.received = number
        for each, handler in previous.items():
            signal.signal(each, handler)
        note("stopping after this step and a save; interrupt again to stop at once")

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        previous[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
