"""Many texts at once on one engine: continuous batching in a thread of its own.

The thread owns the engine. Each turn is one forward pass: the newest token of every text being written and, beside
them, tokens of prompts being read, CHUNK in all, so that a long prompt slows the running texts a little and never stops
them. A text that ends leaves its slot at once and the next in the queue takes it: of the free slots one whose tokens
begin as the prompt does, which is then not read again, else the one left longest ago.

Every text draws with a random state of its own, and the C++ engine's rows do not depend on each other: there, with a
seed, the same request gives the same text whatever runs beside it. The other engines read a prompt in pieces whose
sizes depend on what runs beside it, and round a little differently for each size.

    waiting  --admit-->  reading its prompt  -->  writing  -->  ended; its tokens stay in the slot until it is taken
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitnet.engine.base import BatchEntry, SequenceBatch, common_length
from bitnet.engine.sampling import Sampler, Sampling
from bitnet.serve.metrics import Metrics
from bitnet.serve.text import StopWriter
from bitnet.text.tokenizer import Tokenizer

_log = logging.getLogger("bitnet")

CHUNK = 256  # tokens a turn: the C++ engine's one pass, about the time of a few decode steps
_SCORE_BYTES = 64 << 20  # of logits made at once where a prompt is scored
_MEMORY = 0.9  # of the running mean of a job's seconds in its slot, from which Retry-After is guessed


@dataclass(frozen=True)
class Token:
    """One token of a reply. logprob: natural logarithm, None where nothing came before it; top: the likeliest."""

    id: int
    start: int  # characters before it in the job's whole text, the echo included
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Piece:
    """New text, and the tokens it is made of."""

    text: str
    tokens: Sequence[Token]


@dataclass(frozen=True)
class End:
    """A job's last event. reason: "stop" (end of text or a stop string) or "length"."""

    reason: str
    tokens: int  # written
    reused: int  # prompt tokens that were in the slot already


@dataclass(frozen=True)
class Failure:
    """A job's last event where there is no result."""

    status: int
    message: str


Event = Piece | End | Failure


@dataclass(eq=False)
class Job:
    """One text to write. `cancelled` may be set from any thread; nothing is sent for the job after that."""

    ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: Sequence[str] = ()
    ends: frozenset[int] = frozenset()
    top: int | None = None  # alternatives for each token; None: no log-probabilities
    echo: str | None = None  # the prompt's text, to be sent first; its tokens are scored where `top` is set
    key: Any = None  # the caller's: where its events belong
    cancelled: bool = False
    submitted: float = field(default_factory=time.perf_counter)


class QueueFullError(Exception):
    """No room to wait; `retry`: seconds after which there may be."""

    def __init__(self, retry: int) -> None:
        super().__init__(f"the queue is full; try again in {retry} s")
        self.retry = retry


class ClosedError(Exception):
    """The server is going down."""


class _Running:
    """A job in a slot."""

    def __init__(self, job: Job, slot: int, reused: int, tokenizer: Tokenizer) -> None:
        self.job, self.slot, self.reused = job, slot, reused
        self.read = reused  # prompt tokens in the slot
        self.new: list[int] = []
        self.started = time.perf_counter()
        self.sampler = Sampler(job.sampling)
        self.decoder = tokenizer.stream()
        self.writer = StopWriter(job.stop)
        self.length = 0  # characters made, the held back ones among them
        self.pending: list[tuple[Token, int, int]] = []  # tokens not sent; where their text starts and ends
        self.scores: list[Token] = []  # of the prompt

    @property
    def scored(self) -> bool:
        return self.job.echo is not None and self.job.top is not None


class Scheduler:
    """Runs jobs on the slots of an engine.

    queue: jobs that may wait. post: called from the scheduler's thread with the events of a turn.
    """

    def __init__(
        self,
        slots: SequenceBatch,
        tokenizer: Tokenizer,
        metrics: Metrics,
        post: Callable[[Sequence[tuple[Job, Event]]], None],
        *,
        queue: int = 64,
    ) -> None:
        self._slots, self._tokenizer, self._metrics, self._post = slots, tokenizer, metrics, post
        self.queue = queue
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, _Running] = {}  # by slot, in the order of arrival
        self._held: list[list[int]] = [[] for _ in range(slots.count)]  # tokens in each slot
        self._used = [0.0] * slots.count  # when a slot was last left
        self._events: list[tuple[Job, Event]] = []
        self._closing = False
        self._deadline = math.inf
        self._seconds = 1.0  # running mean of a job in its slot

    # ---- from any thread -----------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of `jobs`, or none. Raises QueueFullError and ClosedError."""
        with self._lock:
            if self._closing:
                raise ClosedError
            self._forget_cancelled()
            free = self._slots.count - len(self._running)
            if len(self._waiting) + len(jobs) > self.queue + free:
                ahead = len(self._waiting) + len(self._running)
                raise QueueFullError(min(60, max(1, math.ceil(self._seconds * ahead / self._slots.count))))
            self._waiting.extend(jobs)
            self._metrics.waiting.set(len(self._waiting))
            self._lock.notify()

    def _forget_cancelled(self) -> None:
        """Those who left while they waited are no queue. With the lock held."""
        left = deque(job for job in self._waiting if not job.cancelled)
        self._metrics.cancelled.inc(len(self._waiting) - len(left))
        self._waiting = left

    @property
    def most(self) -> int:
        """Jobs that one request may bring: more would never find room."""
        return self.queue + self._slots.count

    @property
    def busy(self) -> bool:
        """Whether texts are being written."""
        return bool(self._running)

    def close(self, seconds: float) -> None:
        """Take nothing new, refuse what waits, and end what runs after `seconds` at the latest."""
        with self._lock:
            self._closing = True
            self._deadline = time.perf_counter() + seconds
            self._lock.notify()

    # ---- the thread ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until `close`; every job gets its last event, whatever happens."""
        try:
            while self._wait():
                try:
                    self._turn()
                except (RuntimeError, ValueError, MemoryError) as error:
                    _log.exception("a pass of the engine failed: its requests get an error, the server goes on")
                    self._fail_running(500, f"the engine failed: {type(error).__name__}")
                self._deliver()
        finally:
            with self._lock:
                self._closing = True
            self._refuse_waiting("the server has stopped")
            self._fail_running(503, "the server has stopped")
            self._deliver()

    def _wait(self) -> bool:
        """Sleep until there is work. False: all is done and the server closes."""
        with self._lock:
            while not (self._waiting or self._running or self._closing):
                self._lock.wait()
            closing = self._closing
        if not closing:
            return True
        self._refuse_waiting("the server is shutting down")
        if self._running and time.perf_counter() > self._deadline:
            self._fail_running(503, "the server is shutting down")
        self._deliver()
        return bool(self._running)

    @torch.inference_mode()
    def _turn(self) -> None:
        self._drop_cancelled()
        self._admit()
        work = self._plan()
        if not work:
            return
        logits = self._slots.forward([part for _, part in work])
        self._metrics.passes.inc()
        for (running, part), rows in zip(work, logits, strict=True):
            self._held[running.slot].extend(part.ids)
            self._advance(running, part, rows)

    def _drop_cancelled(self) -> None:
        for running in list(self._running.values()):
            if running.job.cancelled:
                self._leave(running)
                self._metrics.cancelled.inc()

    def _admit(self) -> None:
        while len(self._running) < self._slots.count:
            with self._lock:
                job = self._waiting.popleft() if self._waiting else None
                self._metrics.waiting.set(len(self._waiting))
            if job is None:
                break
            if job.cancelled:
                self._metrics.cancelled.inc()
                continue
            self._start(job)

    def _start(self, job: Job) -> None:
        scored = job.echo is not None and job.top is not None  # needs the logits of every position
        slot, common = self._best_slot(job.ids)
        reused = 0 if scored else min(common, len(job.ids) - 1)  # the last token is read for its logits
        running = self._running[slot] = _Running(job, slot, reused, self._tokenizer)
        self._slots.truncate(slot, reused)
        del self._held[slot][reused:]
        self._metrics.busy.set(len(self._running))
        self._metrics.reused.inc(reused)
        if job.max_tokens == 0 and not scored:  # nothing to compute
            self._read_all(running)

    def _best_slot(self, ids: Sequence[int]) -> tuple[int, int]:
        """The free slot with the longest common beginning, else the one left longest ago; and that length.

        A beginning counts from half of the shorter text on: for less (every text may start with BOS and one system
        prompt) no slot is taken that another conversation may come back to.
        """
        free = [slot for slot in range(self._slots.count) if slot not in self._running]
        common = {slot: common_length(self._held[slot], ids) for slot in free}
        worth = {slot: n if 2 * n >= min(len(self._held[slot]), len(ids)) else 0 for slot, n in common.items()}
        slot = max(free, key=lambda slot: (worth[slot], -self._used[slot]))
        return slot, common[slot]

    def _plan(self) -> list[tuple[_Running, BatchEntry]]:
        """The parts of one pass: a token of each writing text, then prompts until CHUNK tokens are reached in all."""
        work = [(r, BatchEntry(r.slot, r.new[-1:])) for r in self._running.values() if r.new]
        left = max(1, CHUNK - len(work))  # a prompt is never stopped either
        for running in self._running.values():
            if running.new or left == 0:
                continue
            size = min(left, len(running.job.ids) - running.read)
            if running.scored:
                size = min(size, max(1, _SCORE_BYTES // (4 * self._tokenizer.vocab_size)))
            ids = running.job.ids[running.read : running.read + size]
            work.append((running, BatchEntry(running.slot, ids, every=running.scored)))
            left -= size
        return work

    def _advance(self, running: _Running, part: BatchEntry, logits: Tensor) -> None:
        """Take the result of a pass. logits: [V], or [T, V] of a scored prompt."""
        if not running.new:
            if running.scored:
                self._score(running, logits)
                logits = logits[-1]
            running.read += len(part.ids)
            self._metrics.prompt.inc(len(part.ids))
            if running.read < len(running.job.ids):
                return
            if not self._read_all(running):
                return
        self._write(running, logits)

    def _score(self, running: _Running, logits: Tensor) -> None:
        """Log-probabilities of prompt tokens: row j of a chunk [T, V] judges the token after it."""
        ids, top = running.job.ids, running.job.top or 0
        if running.read == 0:
            running.scores.append(Token(ids[0], 0))
        targets = ids[running.read + 1 : running.read + len(logits) + 1]
        rows = log_probabilities(logits[: len(targets)])
        running.scores += [Token(id, 0, *judged(row, id, top)) for id, row in zip(targets, rows, strict=True)]

    def _read_all(self, running: _Running) -> bool:
        """The prompt is in. False where nothing is to be written."""
        job = running.job
        if job.echo is not None:
            self._send(job, Piece(job.echo, self._placed(running.scores)))
        if job.max_tokens:
            return True
        self._end(running, "length")
        return False

    def _placed(self, tokens: Sequence[Token]) -> list[Token]:
        """The tokens of a prompt with the place of each in its text."""
        decoder, start, placed = self._tokenizer.stream(), 0, []
        for token in tokens:
            placed.append(Token(token.id, start, token.logprob, token.top))
            start += len(decoder.push(token.id))
        return placed

    def _write(self, running: _Running, logits: Tensor) -> None:
        """Draw a token from logits [V] and send the text it completes."""
        job = running.job
        id = int(running.sampler.draw(logits[None]))
        scores = (None, ()) if job.top is None else judged(log_probabilities(logits[None])[0], id, job.top)
        place = len(job.echo or "") + running.length
        if id in job.ends:
            if running.scored:  # who scores a prompt counts on a token behind it, text or not
                running.pending.append((Token(id, place, *scores), running.length, running.length))
            self._end(running, "stop")
            return
        if not running.new:
            self._metrics.first_token.observe(time.perf_counter() - job.submitted)
        running.new.append(id)
        self._metrics.written.inc()
        piece = running.decoder.push(id)
        start = running.length
        running.length += len(piece)
        running.pending.append((Token(id, place, *scores), start, running.length))
        self._show(running, running.writer.push(piece))
        if running.writer.stopped:
            self._end(running, "stop")
        elif len(running.new) >= job.max_tokens:
            self._end(running, "length")

    def _show(self, running: _Running, text: str, last: bool = False) -> None:
        """Send text, with the tokens whose text has been sent as far as it ever will be."""
        shown, writer = [], running.writer
        while running.pending:
            token, start, end = running.pending[0]
            if end > writer.shown and not last and not (writer.stopped and start < writer.shown):
                break
            del running.pending[0]
            shown.append(token)
        if text or shown:
            self._send(running.job, Piece(text, shown))

    def _end(self, running: _Running, reason: str) -> None:
        """Send what is left of a job and its end, and free its slot."""
        writer = running.writer
        if not writer.stopped:
            text = writer.push(running.decoder.flush())
            text += writer.flush()
            self._show(running, text, last=not writer.stopped)
        self._send(running.job, End(reason, len(running.new), running.reused))
        now = time.perf_counter()
        self._seconds = _MEMORY * self._seconds + (1 - _MEMORY) * (now - running.started)
        self._metrics.job_seconds.observe(now - running.job.submitted)
        self._leave(running)

    def _leave(self, running: _Running) -> None:
        del self._running[running.slot]
        self._used[running.slot] = time.perf_counter()
        self._metrics.busy.set(len(self._running))

    def _fail_running(self, status: int, message: str) -> None:
        """End every running job without a result, and empty its slot: what it holds is not known."""
        for running in list(self._running.values()):
            self._send(running.job, Failure(status, message))
            self._leave(running)
            self._slots.truncate(running.slot, 0)
            self._held[running.slot].clear()

    def _refuse_waiting(self, message: str) -> None:
        with self._lock:
            jobs = list(self._waiting)
            self._waiting.clear()
            self._metrics.waiting.set(0)
        for job in jobs:
            self._send(job, Failure(503, message))

    def _send(self, job: Job, event: Event) -> None:
        if not job.cancelled:
            self._events.append((job, event))

    def _deliver(self) -> None:
        """Hand over the events of a turn at once: waking the other thread costs more than an event."""
        if self._events:
            self._post(self._events)
            self._events = []


def log_probabilities(logits: Tensor) -> Tensor:
    """Natural logarithms of what the model gives, before any sampling filter: [T, V] fp32 on the CPU."""
    return logits.float().cpu().log_softmax(dim=-1)


def judged(row: Tensor, id: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """The logarithm of one token and the `top` likeliest with theirs. row: [V]."""
    values, index = row.topk(min(top, len(row)))
    return float(row[id]), list(zip(index.tolist(), values.tolist(), strict=True))


def usable(ids: Iterable[int], vocab_size: int) -> bool:
    """Whether all ids are the model's."""
    return all(0 <= id < vocab_size for id in ids)
