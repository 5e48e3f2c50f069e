"""Rounds in which contenders take turns, and their medians: a change of the machine's load then affects all of them."""

import statistics
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turn(contenders: Sequence[T], turn: int) -> Sequence[T]:
    """The contenders in the order of a round: reversed in every second one, so that none always comes first."""
    return contenders if turn % 2 else contenders[::-1]


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The "median", and "low" and "high", the first and third quartiles; all three the same for a single value."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return {"median": median, "low": low, "high": high}
