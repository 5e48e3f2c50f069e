"""Continuous batching: many jobs at once on one engine, in one thread.

The thread owns the engine. Each step is one forward pass over the newest token of every decoding sequence and tokens of
prompts, CHUNK tokens in all, so that a long prompt delays the other sequences a little and never stops them. When a
sequence finishes, the first waiting job takes its place in the same step. Its keys and values stay in the cache until
then: a job goes to the free sequence whose tokens its prompt begins with, which are then not read again, or else to
the one that has been free longest.

Each sequence draws with its own random state, and rows of the C++ engine do not depend on each other: there, a request
with a seed gives the same text whatever else runs. The other engines read a prompt in pieces whose size depends on
the load, and round a little differently for each size.

    waiting  --admit-->  prefilling  -->  decoding  -->  finished
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from bitnet.engine.base import BatchEntry, SequenceBatch, common_length
from bitnet.serve.jobs import ClosedError, Event, Failure, Job, QueueFullError
from bitnet.serve.metrics import Metrics
from bitnet.serve.sequence import RunningSequence
from bitnet.text.tokenizer import Tokenizer

_log = logging.getLogger("bitnet")

CHUNK = 256  # tokens of a pass: one block of the C++ engine, which takes about as long as a few decode steps
_DECAY = 0.9  # of the running mean of a job's duration, from which Retry-After is estimated


class Scheduler:
    """Runs jobs on the sequences of an engine.

    queue: jobs that may wait. post: called from the scheduler's thread with the events of a step.
    """

    def __init__(
        self,
        batch: SequenceBatch,
        tokenizer: Tokenizer,
        metrics: Metrics,
        post: Callable[[Sequence[tuple[Job, Event]]], None],
        *,
        queue: int,
    ) -> None:
        self._batch, self._tokenizer, self._metrics, self._post = batch, tokenizer, metrics, post
        self._queue = queue
        self._changed = threading.Condition()  # guards what other threads use: _waiting and _closing
        self._waiting: deque[Job] = deque()
        self._running: dict[int, RunningSequence] = {}  # by index, in the order of admission
        self._cached: list[list[int]] = [[] for _ in range(batch.count)]  # ids in the KV cache of each sequence
        self._freed = [0.0] * batch.count  # when a sequence became free, in seconds of perf_counter
        self._events: list[tuple[Job, Event]] = []
        self._closing = False
        self._deadline = math.inf
        self._mean_seconds = 1.0  # running mean of a job's duration

    # ---- called from any thread ----------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of `jobs`, or none. Raises QueueFullError and ClosedError."""
        with self._changed:
            if self._closing:
                raise ClosedError
            self._drop_cancelled_waiting()
            free = self._batch.count - len(self._running)
            if len(self._waiting) + len(jobs) > self._queue + free:
                ahead = len(self._waiting) + len(self._running)
                raise QueueFullError(min(60, max(1, math.ceil(self._mean_seconds * ahead / self._batch.count))))
            self._waiting.extend(jobs)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def _drop_cancelled_waiting(self) -> None:
        """Drop cancelled jobs from the queue. Called with the lock held."""
        remaining = deque(job for job in self._waiting if not job.cancelled)
        self._metrics.cancelled.inc(len(self._waiting) - len(remaining))
        self._waiting = remaining

    @property
    def most_jobs(self) -> int:
        """The most jobs that one request may consist of: more would never fit."""
        return self._queue + self._batch.count

    @property
    def busy(self) -> bool:
        """Whether sequences are running."""
        return bool(self._running)

    def close(self, seconds: float) -> None:
        """Refuse new and waiting jobs; running ones have `seconds` to finish."""
        with self._changed:
            self._closing = True
            self._deadline = time.perf_counter() + seconds
            self._changed.notify()

    # ---- the scheduler's thread ----------------------------------------------------------------------------

    def run(self) -> None:
        """Work until `close`. Every job gets its last event, whatever happens."""
        try:
            while self._wait_for_work():
                try:
                    self._step()
                except (RuntimeError, ValueError, MemoryError) as error:
                    _log.exception("the engine failed; its running requests get an error and the server continues")
                    self._fail_running(500, f"the engine failed: {type(error).__name__}")
                self._deliver()
        finally:
            with self._changed:
                self._closing = True
            self._refuse_waiting("the server has stopped")
            self._fail_running(503, "the server has stopped")
            self._deliver()

    def _wait_for_work(self) -> bool:
        """Sleep until there is work. False: the server is closing and nothing runs."""
        with self._changed:
            while not (self._waiting or self._running or self._closing):
                self._changed.wait()
            closing = self._closing
        if not closing:
            return True
        self._refuse_waiting("the server is shutting down")
        if self._running and time.perf_counter() > self._deadline:
            self._fail_running(503, "the server is shutting down")
        self._deliver()
        return bool(self._running)

    @torch.inference_mode()
    def _step(self) -> None:
        self._drop_cancelled_running()
        self._admit()
        work = self._plan()
        if not work:
            return
        results = self._batch.forward([entry for _, entry in work])
        self._metrics.passes.inc()
        for (sequence, entry), logits in zip(work, results, strict=True):
            self._cached[sequence.index].extend(entry.ids)
            if sequence.prefilling:
                self._metrics.prompt_tokens.inc(len(entry.ids))
            generated = len(sequence.tokens)
            self._send(sequence, sequence.advance(len(entry.ids), logits))
            if len(sequence.tokens) > generated:
                self._metrics.generated_tokens.inc()
                if not generated:
                    self._metrics.first_token_seconds.observe(time.perf_counter() - sequence.job.submitted)

    def _drop_cancelled_running(self) -> None:
        for sequence in list(self._running.values()):
            if sequence.job.cancelled:
                self._free(sequence)
                self._metrics.cancelled.inc()

    def _admit(self) -> None:
        """Start waiting jobs while sequences are free."""
        while len(self._running) < self._batch.count:
            with self._changed:
                job = self._waiting.popleft() if self._waiting else None
                self._metrics.waiting.set(len(self._waiting))
            if job is None:
                break
            if job.cancelled:
                self._metrics.cancelled.inc()
                continue
            self._start(job)

    def _start(self, job: Job) -> None:
        index, common = self._choose_sequence(job.prompt)
        cached = 0 if job.scored else min(common, len(job.prompt) - 1)  # the last token is read for its logits
        sequence = self._running[index] = RunningSequence(job, index, cached, self._tokenizer)
        self._batch.truncate(index, cached)
        del self._cached[index][cached:]
        self._metrics.running.set(len(self._running))
        self._metrics.cached_tokens.inc(cached)
        if job.max_tokens == 0 and not job.scored:
            self._send(sequence, sequence.skip_prompt())

    def _choose_sequence(self, ids: Sequence[int]) -> tuple[int, int]:
        """The free sequence with the longest common prefix, else the one free longest; and the length of the prefix.

        A prefix counts if it is at least half of the shorter text. Less is often only BOS and a system prompt, for
        which no cache should be taken that another conversation may come back to.
        """
        free = [index for index in range(self._batch.count) if index not in self._running]
        common = {index: common_length(self._cached[index], ids) for index in free}

        def priority(index: int) -> tuple[int, float]:
            shorter = min(len(self._cached[index]), len(ids))
            return common[index] if 2 * common[index] >= shorter else 0, -self._freed[index]

        index = max(free, key=priority)
        return index, common[index]

    def _plan(self) -> list[tuple[RunningSequence, BatchEntry]]:
        """The entries of one pass: a token of each decoding sequence, then prompts up to CHUNK tokens in all."""
        decoding = [sequence for sequence in self._running.values() if not sequence.prefilling]
        work = [(sequence, BatchEntry(sequence.index, sequence.next_ids(1))) for sequence in decoding]
        room = max(1, CHUNK - len(work))  # many decoding sequences never stop a prompt either
        for sequence in self._running.values():
            if sequence.prefilling and room:
                ids = sequence.next_ids(room)
                work.append((sequence, BatchEntry(sequence.index, ids, every=sequence.job.scored)))
                room -= len(ids)
        return work

    def _send(self, sequence: RunningSequence, events: Sequence[Event]) -> None:
        """Queue the events of a sequence for delivery, and free it when it has finished."""
        self._queue_events(sequence.job, *events)
        if sequence.finished:
            now = time.perf_counter()
            self._mean_seconds = _DECAY * self._mean_seconds + (1 - _DECAY) * (now - sequence.started)
            self._metrics.job_seconds.observe(now - sequence.job.submitted)
            self._free(sequence)

    def _free(self, sequence: RunningSequence) -> None:
        del self._running[sequence.index]
        self._freed[sequence.index] = time.perf_counter()
        self._metrics.running.set(len(self._running))

    def _fail_running(self, status: int, message: str) -> None:
        """Fail every running job and clear its cache, whose contents are unknown after a failed pass."""
        for sequence in list(self._running.values()):
            self._queue_events(sequence.job, Failure(status, message))
            self._free(sequence)
            self._batch.truncate(sequence.index, 0)
            self._cached[sequence.index].clear()

    def _refuse_waiting(self, message: str) -> None:
        with self._changed:
            jobs = list(self._waiting)
            self._waiting.clear()
            self._metrics.waiting.set(0)
        for job in jobs:
            self._queue_events(job, Failure(503, message))

    def _queue_events(self, job: Job, *events: Event) -> None:
        if not job.cancelled:
            self._events += [(job, event) for event in events]

    def _deliver(self) -> None:
        """Post the events of a step together: waking the event loop costs more than an event."""
        if self._events:
            self._post(self._events)
            self._events = []
