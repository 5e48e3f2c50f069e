"""`bitnet generate -i` in a pseudo-terminal (prompts, history, Ctrl-C, Ctrl-D), and what a ChatSession remembers."""

import contextlib
import os
import pty
import random
import re
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, Self

import child_process
import pytest
from compiler import without_build_warning
from text_models import chat_tokenizer, model_for, packed_model, text_tokenizer

from bitnet.cli import main
from bitnet.cli.chat import ChatSession
from bitnet.engine.load import load
from bitnet.engine.sampling import GREEDY, Sampler
from bitnet.engine.torch import TorchEngine
from bitnet.errors import BitNetError
from bitnet.generation import prompt_ids
from bitnet.text.tokenizer import Tokenizer

CONTEXT = 512


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return text_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_model(tmp_path_factory.mktemp("chat") / "toy.safetensors", tokenizer, 3, CONTEXT)


def small_engine(tokenizer: Tokenizer, seed: int) -> TorchEngine:
    return TorchEngine(model_for(tokenizer, seed, CONTEXT, width=32, layers=1))


# The test run may ignore SIGINT, as background jobs of a shell do; a program on a terminal does not.
_MAIN = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from bitnet.cli import main; sys.exit(main(sys.argv[1:]))"
)


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, *args: object) -> None:
        own, other = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "INPUTRC": os.devnull}
        command = [sys.executable, "-c", _MAIN, "generate", "-i", "-t", "1", *map(str, args)]
        self.process = child_process.start(
            command, stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
        )
        os.close(other)
        self.own, self.seen = own, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        child_process.end(self.process)
        os.close(self.own)

    def until(self, pattern: str, seconds: float = child_process.LIMIT) -> str:
        """The output up to the first match that comes after the last one."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.seen):
                text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
                return text.replace("\r\n", "\n")
            if select.select([self.own], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.own, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    break
        raise AssertionError(f"no {pattern!r} in {self.seen!r}")

    def interrupt_until(self, pattern: str) -> None:
        """Press Ctrl-C until it has an effect: while readline handles a key, Python notices it only with the next."""
        for _ in range(60):
            os.killpg(self.process.pid, signal.SIGINT)
            with contextlib.suppress(AssertionError):
                self.until(pattern, 1.0)
                return
        raise AssertionError(f"no {pattern!r} in {self.seen!r}")

    def type(self, text: str) -> None:
        os.write(self.own, text.encode())

    def exit_code(self) -> int:
        return self.process.wait(child_process.LIMIT)


def test_a_terminal_session(model: Path) -> None:
    engine: Any = load(model)
    with Terminal("-m", model, "-n", 30, "--temp", 0, "--ignore-eos") as terminal:
        terminal.until("> $")
        terminal.type("the fox\n")
        expected = engine.tokenizer.decode(engine.generate(prompt_ids(engine.tokenizer, "the fox"), 60, GREEDY))
        first = terminal.until(r"30 tokens, [\d,]+/s\r\n> $")
        begun = engine.tokenizer.decode(engine.generate(prompt_ids(engine.tokenizer, "the fox"), 30, GREEDY))
        assert begun.replace("\r\n", "\n") in first
        terminal.type("\n")  # continues the text
        assert expected[len(begun) :].replace("\r\n", "\n") in terminal.until(r"30 tokens, [\d,]+/s\r\n> $")
        terminal.type("\x1b[A\n")  # the up arrow: the last prompt again
        assert begun.replace("\r\n", "\n") in terminal.until(r"30 tokens, [\d,]+/s\r\n> $")
        terminal.type("/help\n")
        terminal.until("/reset clears[^>]*> $")
        terminal.type("half a line")
        terminal.until("half a line")
        terminal.interrupt_until(r"Ctrl-D exits\r\n> $")  # readline would miss the key before its prompt
        terminal.type("\x04")
        assert terminal.exit_code() == 0


def test_ctrl_c_stops_the_reply_and_not_the_program(model: Path) -> None:
    with Terminal("-m", model, "-n", 10**6, "--ignore-eos", "-s", 1, "-p", "the") as terminal:
        terminal.until(r"Ctrl-D exits\r\n.")
        os.killpg(terminal.process.pid, signal.SIGINT)
        terminal.until(r"(stopped|tokens, [\d,]+/s)\r\n> $")  # the context may have been full already
        terminal.type("a \\\nb\n")
        terminal.until(r"(tokens, [\d,]+/s)\r\n> $")
        terminal.type("/quit\n")
        assert terminal.exit_code() == 0


def test_prompts_from_a_pipe(model: Path) -> None:
    command = child_process.bitnet("generate", "-i", "-m", model, "-n", 5, "--temp", 0, "--ignore-eos")
    done = child_process.run(command, stdin="the\nfox\n")
    engine: Any = load(model)
    for prompt in ("the", "fox"):
        reply = engine.tokenizer.decode(engine.generate(prompt_ids(engine.tokenizer, prompt), 5, GREEDY))
        assert reply + "\n" in done.stdout
    assert ">" not in done.stderr


# ---- what a ChatSession remembers --------------------------------------------------------------------------


def new_session(engine: Any, tokenizer: Tokenizer, n: int, chat: bool = False, limit: int = CONTEXT) -> ChatSession:
    return ChatSession(engine, tokenizer, limit, Sampler(GREEDY), n, frozenset(), chat)


def test_after_an_interrupted_reply_the_next_is_right(tokenizer: Tokenizer, seed: int) -> None:
    """Wherever a reply was stopped, the next prompt gives what a fresh session gives."""
    engine = small_engine(tokenizer, seed)
    session = new_session(engine, tokenizer, 12)
    for _ in range(6):
        prompt = " ".join(random.choices(["the", "fox", "dog"], k=random.randint(1, 6)))
        pieces = session.answer(prompt)
        stop = random.randrange(12)
        got = [next(pieces) for _ in range(stop)]
        pieces.close()  # type: ignore[attr-defined]
        expected = engine.generate(prompt_ids(tokenizer, prompt), 12, GREEDY)
        decoder = tokenizer.stream()
        assert got == [decoder.push(id) for id in expected[:stop]]


def test_a_full_context_ends_the_reply(tokenizer: Tokenizer, seed: int) -> None:
    engine = small_engine(tokenizer, seed)
    session = new_session(engine, tokenizer, 100, limit=10)
    assert len(list(session.answer("the"))) - 1 == 10 - len(prompt_ids(tokenizer, "the")) + 1
    assert session.full
    with pytest.raises(BitNetError, match="at most the context's 10"):
        list(session.answer("the lazy dog jumps over the quick brown fox and on and on"))
    session.reset()
    assert session.ids == []


def test_a_conversation_is_remembered_and_continued(seed: int) -> None:
    tokenizer = chat_tokenizer()
    engine = small_engine(tokenizer, seed)
    session = new_session(engine, tokenizer, 4, chat=True)
    first = "".join(session.answer("hello"))
    more = "".join(session.answer(""))
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": session.messages[1]["content"]}]
    assert session.messages == messages
    start = tokenizer.encode_chat(messages[:1])
    whole = engine.generate(start, 8, GREEDY)
    assert first == tokenizer.decode(whole[:4])
    assert more == tokenizer.decode(whole[4:])
    list(session.answer("world"))
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2
    assert session.ids[:-4] == tokenizer.encode_chat([*messages, {"role": "user", "content": "world"}])
    session.reset()
    session.stop = frozenset(range(tokenizer.vocab_size))  # the model ends at once: there is nothing to continue
    list(session.answer("hello"))
    list(session.answer(""))
    assert [message["content"] for message in session.messages] == ["hello", "", "", ""]
    assert not session.full


def test_options_that_exclude_interactive_use(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in (["--json"], ["-p", "-"], ["--chat"]):
        assert main(["generate", "-i", "-m", str(model), *extra]) == 2
        assert len(without_build_warning(capsys.readouterr().err).splitlines()) == 1
