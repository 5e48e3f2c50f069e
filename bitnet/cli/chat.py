"""`bitnet generate -i`: prompts from a terminal, one after the other, on a model that stays loaded.

Ctrl-C stops the text that is being written, Ctrl-D leaves. Keys and values of what was read stay in a slot, so that a
conversation goes on where it was.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bitnet.engine.base import BatchEntry, Engine, common_length
from bitnet.engine.sampling import Sampler, Sampling
from bitnet.errors import BitNetError
from bitnet.generation import load_for_text, prompt_ids, stop_ids
from bitnet.text.json_tokenizer import JsonTokenizer
from bitnet.text.tokenizer import Tokenizer

HELP = """an empty line goes on with the text; \\ at the end of a line: the next one belongs to it
/reset forgets what was said, /help shows this, /quit (or Ctrl-D) leaves; Ctrl-C stops the model"""


def converse(
    model: Path,
    max_new_tokens: int,
    sampling: Sampling,
    device: torch.device,
    *,
    first: str = "",
    context: int = 0,
    ignore_eos: bool = False,
    chat: bool = False,
    write: Callable[[str], None],
    tell: Callable[[str], None],
    **options: str,
) -> None:
    """Answer prompts from standard input until its end. write: gets text; tell: gets remarks for the terminal alone.

    first: a prompt to begin with. chat: prompts are messages of one conversation. options: engine, head and cache of
    `bitnet.load`. Raises BitNetError as `load_for_text` does, and for chat without a template.
    """
    engine, tokenizer, limit = load_for_text(model, device, context, **options)
    if chat and not (isinstance(tokenizer, JsonTokenizer) and tokenizer.settings.chat_template):
        raise BitNetError(f"chat: got {model}, a model without a chat template, expected one; leave --chat away")
    ends = frozenset() if ignore_eos else frozenset(stop_ids(tokenizer))
    chat_session = ChatSession(engine, tokenizer, limit, Sampler(sampling), max_new_tokens, ends, chat)
    tell(f"{model.name}, context {limit} tokens; /help, Ctrl-D leaves")
    prompts = _prompts(tell)
    if first:
        _answer(chat_session, first, write, tell)
    for prompt in prompts:
        if prompt == "/quit":
            return
        if prompt == "/help":
            tell(HELP)
        elif prompt == "/reset":
            chat_session.reset()
            tell("forgotten")
        else:
            _answer(chat_session, prompt, write, tell)


@dataclass
class ChatSession:
    """One model and what has been said so far."""

    engine: Engine
    tokenizer: Tokenizer
    limit: int
    sampler: Sampler
    max_new_tokens: int
    ends: frozenset[int]
    chat: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    text: list[int] = field(default_factory=list)  # ids of the last text, its prompt included
    ended: bool = False  # the model ended it by itself
    full: bool = False  # the context ended it

    def __post_init__(self) -> None:
        self._slots = self.engine.sequence_batch(1, self.limit)
        self._held: list[int] = []  # what the slot is known to hold

    def reset(self) -> None:
        """Forget everything said."""
        self.messages, self.text, self.ended, self.full = [], [], False, False

    def answer(self, prompt: str) -> Iterator[str]:
        """The pieces of what the model says; an empty prompt goes on with the last text.

        Raises BitNetError for a prompt that does not fit and for one that cannot be encoded.
        """
        going_on = not prompt and bool(self.text) and not self.ended
        ids = self.text if going_on else self._ids(prompt)
        if len(ids) > self.limit:
            raise BitNetError(f"got {len(ids)} tokens, expected at most the context's {self.limit}; /reset forgets")
        said: list[int] = []
        self.text, self.ended, self.full = list(ids), False, False
        decoder = self.tokenizer.stream()
        try:
            for id in self._tokens(ids):
                said.append(id)
                self.text.append(id)
                yield decoder.push(id)
            yield decoder.flush()
        finally:  # also where Ctrl-C ends it: what was said counts
            if self.chat:
                self._remember(prompt, self.tokenizer.decode(said), going_on)

    def _ids(self, prompt: str) -> list[int]:
        if not self.chat:
            return prompt_ids(self.tokenizer, prompt)
        assert isinstance(self.tokenizer, JsonTokenizer), self.tokenizer
        return self.tokenizer.encode_chat([*self.messages, {"role": "user", "content": prompt}])

    def _remember(self, prompt: str, answer: str, going_on: bool) -> None:
        if going_on:
            self.messages[-1]["content"] += answer
            return
        self.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    def _tokens(self, ids: list[int]) -> Iterator[int]:
        new = self._settle(ids)
        for _ in range(self.max_new_tokens):
            if len(self._held) + len(new) > self.limit:
                self.full = True
                return
            logits = self._slots.forward([BatchEntry(0, new)])[0]
            self._held += new
            id = int(self.sampler.draw(logits[None]))
            if id in self.ends:
                self.ended = True
                return
            yield id
            new = [id]

    def _settle(self, ids: list[int]) -> list[int]:
        """Keep of the slot what begins `ids`; returns the rest. An interrupt may have left the two lists apart."""
        known = min(len(self._held), self._slots.length(0), len(ids) - 1)
        common = common_length(self._held[: max(known, 0)], ids)
        self._slots.truncate(0, common)
        self._held = ids[:common]
        return ids[common:]


def _prompts(tell: Callable[[str], None]) -> Iterator[str]:
    """Lines of standard input, with history and editing on a terminal."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # input() edits lines and keeps a history once it is imported
    lines: list[str] = []
    while True:
        try:
            line = input(("... " if lines else "> ") if terminal else "")
        except KeyboardInterrupt:
            tell("\nCtrl-D leaves")
            lines = []
            continue
        except EOFError:
            if terminal:
                tell("")
            return
        if line.endswith("\\"):
            lines.append(line[:-1])
            continue
        yield "\n".join([*lines, line])
        lines = []


def _answer(chat_session: ChatSession, prompt: str, write: Callable[[str], None], tell: Callable[[str], None]) -> None:
    started, count = time.perf_counter(), 0
    try:
        for piece in chat_session.answer(prompt):
            write(piece)
            count += 1
        write("\n")
        if chat_session.full:
            tell(f"the context of {chat_session.limit} tokens is full; /reset forgets")
    except KeyboardInterrupt:
        write("\n")
        tell("stopped")
        return
    except BitNetError as error:
        tell(f"{error}")
        return
    seconds = time.perf_counter() - started
    if count > 1:
        tell(f"{count - 1} tokens, {(count - 1) / seconds:,.0f}/s")
