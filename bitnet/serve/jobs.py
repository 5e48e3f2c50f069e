"""What the event loop and the scheduler exchange: jobs in one direction, their events in the other."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bitnet.engine.sampling import Sampling


@dataclass(frozen=True)
class Token:
    """One token of a reply.

    logprob: natural logarithm of its probability, None for the first token of a prompt. top: the likeliest ids with
    theirs.
    """

    id: int
    start: int  # characters before it in the text of the reply, an echoed prompt included
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Delta:
    """New text, and the tokens it consists of."""

    text: str
    tokens: Sequence[Token]


@dataclass(frozen=True)
class Finished:
    """A job's last event. reason: "stop" (a stop id or a stop string) or "length"."""

    reason: str
    tokens: int  # generated
    cached: int  # prompt tokens that the KV cache held already


@dataclass(frozen=True)
class Failure:
    """A job's last event where there is no result: an HTTP status and one sentence."""

    status: int
    message: str


Event = Delta | Finished | Failure


@dataclass(eq=False)
class Job:
    """One text to generate. Any thread may set `cancelled`; no event is sent after that."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: Sequence[str] = ()
    stop_ids: frozenset[int] = frozenset()
    top: int | None = None  # alternatives to report for each token; None: no log-probabilities
    echo: str | None = None  # the prompt's text, sent first
    owner: Any = None  # the submitter's: where the events belong
    cancelled: bool = False
    submitted: float = field(default_factory=time.perf_counter)

    @property
    def scored(self) -> bool:
        """Whether log-probabilities of the prompt are asked for, which takes the logits of every position."""
        return self.echo is not None and self.top is not None


class QueueFullError(Exception):
    """The queue has no room; `retry`: seconds after which it may have."""

    def __init__(self, retry: int) -> None:
        super().__init__(f"the queue is full; try again in {retry} s")
        self.retry = retry


class ClosedError(Exception):
    """The server is shutting down."""
