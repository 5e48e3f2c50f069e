"""Stopping a run politely: SIGINT and SIGTERM ask, the loop answers after its step."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class StopSignal:
    """The number of the first signal that asked the run to stop, or None."""

    received: int | None = None


@contextmanager
def stop_signals(tell: Callable[[str], None]) -> Iterator[StopSignal]:
    """Note SIGINT and SIGTERM instead of dying of them; a second one ends the process at once."""
    stop = StopSignal()
    previous: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        stop.received = number
        for each, handler in previous.items():
            signal.signal(each, handler)
        tell("stopping after this step and a save; again to stop at once")

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        previous[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
