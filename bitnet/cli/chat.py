"""`bitnet generate -i`: prompts from a terminal, one after the other, for a model that stays loaded.

Ctrl-C stops a reply, Ctrl-D exits. The KV cache is kept between prompts: only the tokens that a conversation adds are
read.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bitnet.cli.terminal import log, write_now
from bitnet.engine.base import BatchEntry, Engine, common_length
from bitnet.engine.sampling import Sampler, Sampling
from bitnet.errors import BitNetError
from bitnet.generation import load_for_text, prompt_ids, stop_ids
from bitnet.text.tokenizer import Tokenizer

HELP = """an empty line continues the last text; a line that ends with \\ is continued on the next one
/reset clears the conversation, /help shows this, /quit (or Ctrl-D) exits; Ctrl-C stops a reply"""


def run_chat(
    model: Path,
    max_new_tokens: int,
    sampling: Sampling,
    device: torch.device,
    *,
    first: str = "",
    context: int = 0,
    ignore_eos: bool = False,
    chat: bool = False,
    **options: str,
) -> None:
    """Answer prompts from standard input until it ends.

    first: a prompt to start with. chat: prompts are messages of one conversation. options: engine, head and cache of
    `bitnet.load`. Raises BitNetError as `load_for_text` does, and for chat with a model that has no chat template.
    """
    engine, tokenizer, limit = load_for_text(model, device, context, **options)
    if chat and tokenizer.chat_template is None:
        raise BitNetError(f"chat: got {model}, which has no chat template, expected a chat model; omit --chat")
    stop = frozenset() if ignore_eos else frozenset(stop_ids(tokenizer))
    session = ChatSession(engine, tokenizer, limit, Sampler(sampling), max_new_tokens, stop, chat)
    log(f"{model.name}, context {limit} tokens; /help for help, Ctrl-D exits")
    prompts = _prompts()
    if first:
        _print_answer(session, first)
    for prompt in prompts:
        if prompt == "/quit":
            return
        if prompt == "/help":
            log(HELP)
        elif prompt == "/reset":
            session.reset()
            log("conversation cleared")
        else:
            _print_answer(session, prompt)


@dataclass
class ChatSession:
    """A model and the conversation so far. `full` and `ended` say how the last reply ended."""

    engine: Engine
    tokenizer: Tokenizer
    limit: int  # tokens of the context
    sampler: Sampler
    max_new_tokens: int
    stop: frozenset[int]  # ids that end a reply
    chat: bool  # prompts are messages, and the chat template makes a conversation of them
    messages: list[dict[str, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # the last prompt and its reply
    ended: bool = False  # by a stop id
    full: bool = False  # the context is full

    def __post_init__(self) -> None:
        self._sequences = self.engine.sequence_batch(1, self.limit)
        self._cached: list[int] = []  # ids known to be in the KV cache

    def reset(self) -> None:
        """Clear the conversation."""
        self.messages, self.ids, self.ended, self.full = [], [], False, False

    def answer(self, prompt: str) -> Iterator[str]:
        """Yield the pieces of a reply; an empty prompt continues the last one unless the model had ended it.

        Raises BitNetError for a prompt that is longer than the context or that the tokenizer cannot encode.
        """
        continues = not prompt and bool(self.ids) and not self.ended
        ids = self.ids if continues else self._encode(prompt)
        if len(ids) > self.limit:
            raise BitNetError(f"got {len(ids)} tokens, expected at most the context's {self.limit}; /reset clears it")
        reply: list[int] = []
        self.ids, self.ended, self.full = list(ids), False, False
        decoder = self.tokenizer.stream()
        try:
            for id in self._generate(ids):
                reply.append(id)
                self.ids.append(id)
                yield decoder.push(id)
            yield decoder.flush()
        finally:  # a reply that Ctrl-C stopped is part of the conversation too
            if self.chat:
                self._add_messages(prompt, self.tokenizer.decode(reply), continues)

    def _encode(self, prompt: str) -> list[int]:
        if not self.chat:
            return prompt_ids(self.tokenizer, prompt)
        return self.tokenizer.encode_chat([*self.messages, {"role": "user", "content": prompt}])

    def _add_messages(self, prompt: str, reply: str, continues: bool) -> None:
        if continues:
            self.messages[-1]["content"] += reply
            return
        self.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]

    def _generate(self, ids: list[int]) -> Iterator[int]:
        new = self._reuse_cache(ids)
        for _ in range(self.max_new_tokens):
            if len(self._cached) + len(new) > self.limit:
                self.full = True
                return
            logits = self._sequences.forward([BatchEntry(0, new)])[0]
            self._cached += new
            id = int(self.sampler.draw(logits[None]))
            if id in self.stop:
                self.ended = True
                return
            yield id
            new = [id]

    def _reuse_cache(self, ids: list[int]) -> list[int]:
        """Truncate the KV cache to what it shares with `ids`; returns the ids that remain to be read, at least one.

        Ctrl-C may have come between a forward pass and its bookkeeping, so the shorter of the two lengths counts.
        """
        known = min(len(self._cached), self._sequences.length(0), len(ids) - 1)
        common = common_length(self._cached[: max(known, 0)], ids)
        self._sequences.truncate(0, common)
        self._cached = ids[:common]
        return ids[common:]


def _prompts() -> Iterator[str]:
    """Prompts from standard input, with line editing and history on a terminal."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # input() edits lines and keeps a history once it is imported
    lines: list[str] = []
    while True:
        try:
            line = input(("... " if lines else "> ") if terminal else "")
        except KeyboardInterrupt:
            log("\nCtrl-D exits")
            lines = []
            continue
        except EOFError:
            if terminal:
                log("")
            return
        if line.endswith("\\"):
            lines.append(line[:-1])
            continue
        yield "\n".join([*lines, line])
        lines = []


def _print_answer(session: ChatSession, prompt: str) -> None:
    """Print a reply as it is generated, then its speed."""
    started, pieces = time.perf_counter(), 0
    try:
        for piece in session.answer(prompt):
            write_now(piece)
            pieces += 1
        write_now("\n")
        if session.full:
            log(f"the context of {session.limit} tokens is full; /reset clears it")
    except KeyboardInterrupt:
        write_now("\n")
        log("stopped")
        return
    except BitNetError as error:
        log(str(error))
        return
    seconds, tokens = time.perf_counter() - started, pieces - 1  # the last piece comes from flushing the decoder
    if tokens > 0:
        log(f"{tokens} tokens, {tokens / seconds:,.0f}/s")
