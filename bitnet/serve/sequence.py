"""One job while it runs: how far its prompt has been read, its tokens, and the text they make.

    prefilling (the prompt, in pieces)  -->  decoding (one token per pass)  -->  finished

A sequence turns logits into events. Where it lives in the engine, and when it runs, is the scheduler's business.

Dimensions: T tokens of a pass, V vocabulary.
"""

import time
from collections.abc import Sequence

from torch import Tensor

from bitnet.engine.sampling import Sampler
from bitnet.serve.jobs import Delta, Event, Finished, Job, Token
from bitnet.serve.text import StopFilter
from bitnet.text.tokenizer import Tokenizer

_SCORE_BYTES = 64 << 20  # of logits made at once for a prompt that is scored


class RunningSequence:
    """A job that runs as sequence `index` of the engine's batch. cached: tokens of its prompt that need no reading."""

    def __init__(self, job: Job, index: int, cached: int, tokenizer: Tokenizer) -> None:
        self.job, self.index, self.cached = job, index, cached
        self.tokens: list[int] = []  # generated
        self.started = time.perf_counter()
        self.finished = False
        self._prefilled = cached  # prompt tokens in the KV cache
        self._tokenizer = tokenizer
        self._sampler = Sampler(job.sampling)
        self._decoder = tokenizer.stream()
        self._filter = StopFilter(job.stop)
        self._length = 0  # characters generated, including those that the filter holds back
        self._unsent: list[tuple[Token, int, int]] = []  # with the places where their text starts and ends
        self._prompt_scores: list[Token] = []

    @property
    def prefilling(self) -> bool:
        """Whether prompt tokens remain to be read."""
        return self._prefilled < len(self.job.prompt)

    def next_ids(self, most: int) -> Sequence[int]:
        """The ids of the next pass: up to `most` of the prompt, or the newest token."""
        if not self.prefilling:
            return self.tokens[-1:]
        if self.job.scored:
            most = min(most, max(1, _SCORE_BYTES // (4 * self._tokenizer.vocab_size)))
        return self.job.prompt[self._prefilled : self._prefilled + most]

    def skip_prompt(self) -> list[Event]:
        """The events of a job that asks for no tokens and no scores: no pass is needed."""
        self._prefilled = len(self.job.prompt)
        return self._prompt_done()

    def advance(self, count: int, logits: Tensor) -> list[Event]:
        """Take the result of a pass over `count` ids. logits: [V] fp32, or [T, V] of a scored prompt."""
        events: list[Event] = []
        if self.prefilling:
            if self.job.scored:
                self._score_prompt(logits)
                logits = logits[-1]
            self._prefilled += count
            if self.prefilling:
                return []
            events += self._prompt_done()
        return events if self.finished else events + self._decode(logits)

    def _score_prompt(self, logits: Tensor) -> None:
        """Log-probabilities of prompt tokens: row t of [T, V] predicts the token after position t."""
        ids, top = self.job.prompt, self.job.top or 0
        if self._prefilled == 0:
            self._prompt_scores.append(Token(ids[0], 0))
        targets = ids[self._prefilled + 1 : self._prefilled + len(logits) + 1]
        rows = log_probabilities(logits[: len(targets)])
        self._prompt_scores += [Token(id, 0, *score(row, id, top)) for id, row in zip(targets, rows, strict=True)]

    def _prompt_done(self) -> list[Event]:
        """Echo the prompt if that was asked for; finish if no tokens were."""
        events: list[Event] = []
        if self.job.echo is not None:
            events.append(Delta(self.job.echo, self._placed(self._prompt_scores)))
        return events if self.job.max_tokens else events + self._finish("length")

    def _placed(self, tokens: Sequence[Token]) -> list[Token]:
        """The tokens of a prompt, each with its place in the prompt's text."""
        decoder, start, placed = self._tokenizer.stream(), 0, []
        for token in tokens:
            placed.append(Token(token.id, start, token.logprob, token.top))
            start += len(decoder.push(token.id))
        return placed

    def _decode(self, logits: Tensor) -> list[Event]:
        """Draw a token from logits [V]."""
        job = self.job
        id = int(self._sampler.draw(logits[None]))
        scores = (None, ()) if job.top is None else score(log_probabilities(logits[None])[0], id, job.top)
        token = Token(id, len(job.echo or "") + self._length, *scores)
        if id in job.stop_ids:
            if job.scored:  # who scores a prompt expects one token after it, even one without text
                self._unsent.append((token, self._length, self._length))
            return self._finish("stop")
        self.tokens.append(id)
        text = self._decoder.push(id)
        self._unsent.append((token, self._length, self._length + len(text)))
        self._length += len(text)
        events = self._delta(self._filter.push(text))
        if self._filter.stopped:
            return events + self._finish("stop")
        if len(self.tokens) >= job.max_tokens:
            return events + self._finish("length")
        return events

    def _delta(self, text: str, last: bool = False) -> list[Event]:
        """New text with the tokens whose text is complete; after the `last` delta nothing is unsent."""
        sent, passed = [], self._filter.passed
        while self._unsent:
            token, start, end = self._unsent[0]
            if end > passed and not last and not (self._filter.stopped and start < passed):
                break
            del self._unsent[0]
            sent.append(token)
        return [Delta(text, sent)] if text or sent else []

    def _finish(self, reason: str) -> list[Event]:
        """The text that is left, and the last event."""
        self.finished = True
        events: list[Event] = []
        if not self._filter.stopped:
            text = self._filter.push(self._decoder.flush())
            text += self._filter.flush()
            events += self._delta(text, last=not self._filter.stopped)
        return [*events, Finished(reason, len(self.tokens), self.cached)]


def log_probabilities(logits: Tensor) -> Tensor:
    """The model's log-probabilities before any sampling filter: [T, V] float -> [T, V] fp32 on the CPU."""
    return logits.float().cpu().log_softmax(dim=-1)


def score(row: Tensor, id: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of one id, and the `top` likeliest ids with theirs. row: [V] fp32."""
    values, index = row.topk(min(top, len(row)))
    return float(row[id]), list(zip(index.tolist(), values.tolist(), strict=True))
