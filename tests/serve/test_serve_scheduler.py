"""Continuous batching on a toy engine whose next token depends on every token before it.

Jobs that run together give the texts they give alone; nothing is read twice, left over or sent after a stop string.
"""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitnet.engine.base import BatchEntry
from bitnet.engine.sampling import Sampler, Sampling
from bitnet.serve import scheduler as scheduling
from bitnet.serve.jobs import ClosedError, Delta, Event, Failure, Finished, Job, QueueFullError, Token
from bitnet.serve.metrics import Metrics
from bitnet.serve.scheduler import Scheduler
from bitnet.serve.text import Speller, StopFilter
from bitnet.text.characters import CharTokenizer
from bitnet.text.sentencepiece import train_sentencepiece

TOKENIZER = CharTokenizer("abcdefgh \né😀")
V = TOKENIZER.vocab_size
LIMIT = 64


def toy_logits(held: Sequence[int]) -> Tensor:
    """[V], from all tokens so far."""
    return torch.randn(V, generator=torch.Generator().manual_seed(hash(tuple(held)) % 2**63)) * 3


class ToyBatch:
    """A SequenceBatch that records its passes; `gate` holds a pass back until it is open."""

    def __init__(self, count: int) -> None:
        self.count, self.limit = count, LIMIT
        self.held: list[list[int]] = [[] for _ in range(count)]
        self.passes: list[list[BatchEntry]] = []
        self.gate = threading.Semaphore(10**5)
        self.broken = False

    def length(self, slot: int) -> int:
        return len(self.held[slot])

    def truncate(self, slot: int, length: int) -> None:
        assert 0 <= length <= len(self.held[slot])
        del self.held[slot][length:]

    def forward(self, parts: Sequence[BatchEntry]) -> list[Tensor]:
        self.gate.acquire()
        if self.broken:
            self.broken = False
            raise RuntimeError("the toy is broken")
        assert parts
        assert len({part.sequence for part in parts}) == len(parts)
        self.passes.append(list(parts))
        results = []
        for part in parts:
            assert part.ids
            held = self.held[part.sequence]
            rows = [toy_logits([*held, *part.ids[: i + 1]]) for i in range(len(part.ids))]
            held.extend(part.ids)
            assert len(held) <= LIMIT
            results.append(torch.stack(rows) if part.every else rows[-1])
        return results


class Bench:
    """A scheduler in its thread, and what it sent."""

    def __init__(self, count: int, queue: int = 100) -> None:
        self.batch = ToyBatch(count)
        self.events: list[tuple[Job, Event]] = []
        self.news = threading.Condition()
        self.metrics = Metrics()
        self.scheduler = Scheduler(self.batch, TOKENIZER, self.metrics, self.post, queue=queue)
        self.thread = threading.Thread(target=self.scheduler.run)
        self.thread.start()

    def post(self, events: Sequence[tuple[Job, Event]]) -> None:
        with self.news:
            self.events += events
            self.news.notify_all()

    def of(self, job: Job) -> list[Event]:
        return [event for owner, event in self.events if owner is job]

    def ended(self, job: Job) -> bool:
        return any(not isinstance(event, Delta) for event in self.of(job))

    def until(self, done: Callable[[], bool]) -> None:
        with self.news:
            assert self.news.wait_for(done, timeout=60)

    def run(self, *jobs: Job) -> list[tuple[str, Finished, list[Token]]]:
        self.scheduler.submit(jobs)
        self.until(lambda: all(self.ended(job) for job in jobs))
        return [self.result(job) for job in jobs]

    def result(self, job: Job) -> tuple[str, Finished, list[Token]]:
        *deltas, end = self.of(job)
        assert isinstance(end, Finished), end
        assert all(isinstance(piece, Delta) for piece in deltas)
        return "".join(p.text for p in deltas), end, [token for p in deltas for token in p.tokens]


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*args: int, **kwargs: int) -> Bench:
        made.append(Bench(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.batch.gate.release(10**5)
        one.scheduler.close(0.0)
        one.thread.join(timeout=60)
        assert not one.thread.is_alive()


def some_ids(low: int = 1, high: int = 30) -> list[int]:
    return [random.randrange(V) for _ in range(random.randint(low, high))]


def alone(job: Job) -> list[int]:
    """The ids of a job by the plain loop, without stop strings."""
    held, sampler, new = list(job.prompt), Sampler(job.sampling), []
    while len(new) < job.max_tokens:
        id = int(sampler.draw(toy_logits(held)[None]))
        if id in job.stop_ids:
            break
        new.append(id)
        held.append(id)
    return new


def some_job(**changes: object) -> Job:
    sampling = Sampling(temperature=random.choice([0.0, 0.7, 1.5]), seed=random.getrandbits(40))
    values = {"prompt": some_ids(), "max_tokens": random.randint(1, 30), "sampling": sampling}
    return Job(**{**values, **changes})  # type: ignore[arg-type]


# ---- texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_jobs_that_run_together_give_the_texts_they_give_alone(
    count: int, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "CHUNK", random.choice([1, 5, 256]))
    jobs = [some_job(stop_ids=frozenset(some_ids(0, 2))) for _ in range(14)]
    jobs += [some_job(prompt=[*jobs[0].prompt, *some_ids(1, 3)]), some_job(prompt=jobs[1].prompt)]  # something to reuse
    made = bench(count)
    for job, (text, end, tokens) in zip(jobs, made.run(*jobs), strict=True):
        expected = alone(job)
        assert (text, end.tokens) == (TOKENIZER.decode(expected), len(expected))
        assert end.reason == ("length" if len(expected) == job.max_tokens else "stop")
        assert [token.id for token in tokens] == expected
        assert [token.start for token in tokens] == list(range(len(expected)))  # one character each
        assert all(token.logprob is None for token in tokens)


def test_a_pass_holds_every_decoding_sequence_and_a_bounded_part_of_prompts(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "CHUNK", 4)
    made = bench(3)
    made.batch.gate = threading.Semaphore(0)
    jobs = [some_job(prompt=some_ids(20, 30), max_tokens=30) for _ in range(3)]
    made.scheduler.submit(jobs)
    made.batch.gate.release(10**5)
    made.until(lambda: all(made.ended(job) for job in jobs))
    written = dict.fromkeys(range(3), 0)  # tokens read of each sequence
    for entries in made.batch.passes:
        prompts = [entry for entry in entries if written[entry.sequence] < len(jobs[entry.sequence].prompt)]
        assert sum(len(entry.ids) for entry in entries) <= 4
        assert all(len(entry.ids) == 1 for entry in entries if entry not in prompts)
        for entry in entries:
            written[entry.sequence] += len(entry.ids)
    # While the second and third prompt were read, the first sequence was decoded in the same passes.
    assert any(len(entries) > 1 and max(len(entry.ids) for entry in entries) > 1 for entries in made.batch.passes)


def test_a_cached_prefix_is_not_read_again(bench: Callable[..., Bench]) -> None:
    made = bench(2)
    first = some_job(prompt=some_ids(20, 25), max_tokens=5, sampling=Sampling(temperature=0.0))
    other = some_job(prompt=[(first.prompt[0] + 1) % V, *some_ids(5, 9)], max_tokens=3)
    made.run(first)
    made.run(other)
    said = alone(first)
    again = [*first.prompt, *said[:3], (said[3] + 1) % V, *some_ids(2, 2)]
    for ids, kept in ((again, len(first.prompt) + 3), (again, len(again) - 1), (first.prompt, len(first.prompt) - 1)):
        job = some_job(prompt=ids)
        before = len(made.batch.passes)
        text, end, _ = made.run(job)[0]
        assert text == TOKENIZER.decode(alone(job))
        assert end.cached == kept
        assert list(made.batch.passes[before][0].ids) == list(ids[kept:])


def test_the_sequence_that_is_free_longest_is_taken_first(bench: Callable[..., Bench]) -> None:
    made = bench(3)
    for start in range(3):
        made.run(some_job(prompt=[start, *some_ids()]))
    made.run(some_job(prompt=[4, 5]))
    assert made.batch.held[0][:2] == [4, 5]
    assert [held[0] for held in made.batch.held[1:]] == [1, 2]


def test_a_shared_first_token_takes_no_cache_from_another_text(bench: Callable[..., Bench]) -> None:
    made = bench(2)
    first, second = ([0, start, *some_ids(8, 20)] for start in (1, 2))  # 0: as BOS begins every text
    made.run(some_job(prompt=first))
    assert made.run(some_job(prompt=second))[0][1].cached == 0  # in the empty sequence
    assert [held[:2] for held in made.batch.held] == [[0, 1], [0, 2]]
    assert made.run(some_job(prompt=[*first, 3]))[0][1].cached >= len(first)
    third = made.run(some_job(prompt=[0, 3, *some_ids(8, 20)]))[0][1]
    assert third.cached == 1  # what the sequence that is free longest happens to share
    assert [held[:2] for held in made.batch.held] == [[0, 1], [0, 3]]


def test_log_probabilities_are_the_models(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the prompt across chunk borders, and of what is written, before temperature and filters."""
    monkeypatch.setattr(scheduling, "CHUNK", 7)
    made = bench(2)
    noise = some_job(max_tokens=30)
    echo = TOKENIZER.decode(ids := some_ids(10, 30))
    job = some_job(prompt=ids, top=3, echo=echo, max_tokens=random.choice([0, 9]))
    _, (text, end, tokens) = made.run(noise, job)
    written = alone(job)
    assert text == echo + TOKENIZER.decode(written)
    assert end.cached == 0
    whole = [*ids, *written]
    assert [token.id for token in tokens] == whole
    assert [token.start for token in tokens] == list(range(len(whole)))
    assert (tokens[0].logprob, tokens[0].top) == (None, ())
    for i, token in enumerate(tokens[1:], 1):
        scores = toy_logits(whole[:i]).double().log_softmax(-1)
        # fp32 log-softmax of numbers below 16: a few roundings of 2^-24 * 16.
        assert token.logprob == pytest.approx(float(scores[token.id]), abs=1e-5)
        best = scores.topk(3)
        assert [id for id, _ in token.top] == best.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_the_stop_token_of_a_scored_text_is_sent(bench: Callable[..., Bench]) -> None:
    """An evaluation harness writes one token and drops it: the prompt's last one must not be dropped in its place."""
    made = bench(1)
    ids = some_ids()
    scores = toy_logits(ids).double().log_softmax(-1)
    ends = frozenset([int(scores.argmax())])
    fields = {"prompt": ids, "stop_ids": ends, "top": 1, "max_tokens": 1, "sampling": Sampling(temperature=0.0)}
    text, end, tokens = made.run(some_job(echo=TOKENIZER.decode(ids), **fields))[0]
    assert (text, end.reason, end.tokens) == (TOKENIZER.decode(ids), "stop", 0)
    assert [token.id for token in tokens] == [*ids, *ends]
    assert tokens[-1].start == len(ids)
    assert tokens[-1].logprob == pytest.approx(float(scores.max()), abs=1e-5)
    assert made.run(some_job(**fields))[0][2] == []  # not scored: the end has no text and is no token of it


def test_nothing_to_write(bench: Callable[..., Bench]) -> None:
    made = bench(1)
    text, end, tokens = made.run(some_job(max_tokens=0, echo="abc"))[0]
    assert (text, end.reason, end.tokens, tokens, made.batch.passes) == ("abc", "length", 0, [], [])


# ---- stop strings ------------------------------------------------------------------------------------------


def cut(text: str, stops: Sequence[str]) -> str | None:
    """The text before the stop string that is complete first; of those that end together, before the longest."""
    for end in range(len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)]
    return None


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=6),
)
def test_stop_strings_do_not_depend_on_where_deltas_end(text: str, stops: list[str], cuts: list[int]) -> None:
    filter_, shown = StopFilter(stops), ""
    places = [0, *sorted(min(place, len(text)) for place in cuts), len(text)]
    for start, end in pairwise(places):
        shown += filter_.push(text[start:end])
        assert filter_.passed == len(shown)
        expected = cut(text[:end], stops)
        if expected is not None:
            assert (shown, filter_.stopped) == (expected, True)
        else:  # what may become a stop string is held back, and nothing else
            held = text[len(shown) : end]
            assert text.startswith(shown)
            assert not held or any(stop.startswith(held) for stop in stops)
            assert not filter_.stopped
    shown += filter_.flush()
    assert shown == (text if cut(text, stops) is None else cut(text, stops))


def test_jobs_end_at_their_stop_strings(bench: Callable[..., Bench]) -> None:
    made = bench(3)
    jobs = []
    for _ in range(20):
        job = some_job(max_tokens=30)
        text = TOKENIZER.decode(alone(job))
        at = random.randrange(len(text))
        job.stop = [text[at : at + random.randint(1, 4)], "zz"]
        jobs.append(job)
    for job, (text, end, tokens) in zip(jobs, made.run(*jobs), strict=True):
        whole = TOKENIZER.decode(alone(job))
        assert (text, end.reason) == (cut(whole, job.stop), "stop")
        assert [token.id for token in tokens] == alone(job)[: len(text)]
        assert end.tokens == len(text) + len(next(s for s in job.stop if whole.startswith(s, len(text))))


def test_every_id_has_a_spelling() -> None:
    tokenizer = train_sentencepiece(["some text and more text"], 300)
    speller = Speller(tokenizer)
    names = [speller.name(id) for id in range(tokenizer.vocab_size)]
    assert names[:3] == ["<control 0>", "<bos>", "<eos>"]
    assert names[3 + 0xE9] == "bytes:\\xe9"
    assert all(names)
    text = "text é 😀"
    assert b"".join(map(speller.bytes, tokenizer.encode(text))) == text.encode()


# ---- cancelling, closing, failing --------------------------------------------------------------------------


def test_a_cancelled_job_frees_its_sequence_and_sends_nothing_more(bench: Callable[..., Bench]) -> None:
    made = bench(1)
    made.batch.gate = threading.Semaphore(3)
    first, never, second = some_job(max_tokens=30), some_job(), some_job()
    made.scheduler.submit([first, never, second])
    made.until(lambda: len(made.of(first)) >= 1)
    first.cancelled = never.cancelled = True
    said = len(made.of(first))
    made.batch.gate.release(10**5)
    made.until(lambda: made.ended(second))
    assert made.result(second)[0] == TOKENIZER.decode(alone(second))
    assert len(made.of(first)) <= said + 1  # a pass may have been under way
    assert not made.ended(first)
    assert not made.of(never)


def test_the_queue_is_bounded(bench: Callable[..., Bench]) -> None:
    made = bench(2, queue=3)
    made.batch.gate = threading.Semaphore(0)
    jobs = [some_job() for _ in range(6)]
    with pytest.raises(QueueFullError) as refused:
        made.scheduler.submit(jobs)
    assert 1 <= refused.value.retry <= 60
    assert made.scheduler.most_jobs == 5
    made.scheduler.submit(jobs[:5])
    with pytest.raises(QueueFullError):
        made.scheduler.submit(jobs[5:])
    made.batch.gate.release(10**5)
    made.until(lambda: all(made.ended(job) for job in jobs[:5]))
    assert made.run(jobs[5])[0][0] == TOKENIZER.decode(alone(jobs[5]))


def test_a_cancelled_job_makes_room_in_the_queue(bench: Callable[..., Bench]) -> None:
    made = bench(1, queue=2)
    made.batch.gate = threading.Semaphore(1)
    running, *waiting = some_job(prompt=[1], max_tokens=20), some_job(), some_job()
    made.scheduler.submit([running, *waiting])
    made.until(lambda: bool(made.of(running)))  # it stays running: the gate is closed
    with pytest.raises(QueueFullError):
        made.scheduler.submit([some_job()])
    for job in waiting:
        job.cancelled = True
    later = [some_job(), some_job()]
    made.scheduler.submit(later)
    made.batch.gate.release(10**5)
    made.until(lambda: all(made.ended(job) for job in later))
    assert not any(made.of(job) for job in waiting)
    assert b"bitnet_cancelled_total 2.0" in made.metrics.render()


def test_closing_lets_running_jobs_finish_and_refuses_the_rest(bench: Callable[..., Bench]) -> None:
    made = bench(1)
    made.batch.gate = threading.Semaphore(1)
    running, waiting = some_job(max_tokens=20), some_job()
    made.scheduler.submit([running, waiting])
    made.until(lambda: bool(made.of(running)))
    made.scheduler.close(60.0)
    with pytest.raises(ClosedError):
        made.scheduler.submit([some_job()])
    made.batch.gate.release(10**5)
    made.thread.join(timeout=60)
    assert made.result(running)[0] == TOKENIZER.decode(alone(running))
    assert [(type(event), event.status) for event in made.of(waiting)] == [(Failure, 503)]


def test_closing_does_not_wait_beyond_its_time(bench: Callable[..., Bench]) -> None:
    made = bench(1)
    made.batch.gate = threading.Semaphore(1)
    job = some_job(prompt=[1], max_tokens=60)
    made.scheduler.submit([job])
    made.until(lambda: bool(made.of(job)))
    made.scheduler.close(0.0)
    made.batch.gate.release(10**5)
    made.thread.join(timeout=60)
    assert isinstance(made.of(job)[-1], Failure)


def test_a_failed_pass_fails_its_jobs_and_no_others(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    made = bench(1)
    made.batch.broken = True
    broken, job = some_job(), some_job()
    made.scheduler.submit([broken, job])
    made.until(lambda: made.ended(job))
    assert [(type(event), event.status) for event in made.of(broken)] == [(Failure, 500)]
    assert made.result(job)[0] == TOKENIZER.decode(alone(job))
    assert "the toy is broken" in caplog.text
