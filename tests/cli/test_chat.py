"""`bitnet generate -i` in a pseudo-terminal: prompts, history, Ctrl-C and Ctrl-D; and what a chat_session remembers."""

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

from bitnet.cli import main
from bitnet.cli.chat import ChatSession
from bitnet.config import ModelConfig
from bitnet.engine.load import load
from bitnet.engine.sampling import GREEDY, Sampler
from bitnet.engine.torch import TorchEngine
from bitnet.errors import BitNetError
from bitnet.files.packed import write_packed
from bitnet.generation import prompt_ids
from bitnet.model import Transformer
from bitnet.text.json_tokenizer import JsonTokenizer, Settings
from bitnet.text.sentencepiece import train_sentencepiece
from bitnet.text.tokenizer import Tokenizer

CONTEXT = 512
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}bot: "


def made(tokenizer: Tokenizer, seed: int) -> Transformer:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        **shape,
    )
    model = Transformer(config)
    model.init_weights(seed)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_sentencepiece(["the quick brown fox jumps over the lazy dog, né 한국 " * 30], 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("chat") / "toy.safetensors", made(tokenizer, 3), tokenizer)


# What runs the tests may ignore SIGINT, as shells make background jobs do; a program on a terminal does not.
_MAIN = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from bitnet.cli import main; sys.exit(main(sys.argv[1:]))"
)


class Terminal:
    """A process behind a pseudo-terminal."""

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
        """What came up to a match that is new since the last one."""
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
        """Ctrl-C until it is heard: Python hears one that comes while readline handles a key with the next key only."""
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
        terminal.type("\n")  # goes on with the text
        assert expected[len(begun) :].replace("\r\n", "\n") in terminal.until(r"30 tokens, [\d,]+/s\r\n> $")
        terminal.type("\x1b[A\n")  # the arrow key: the last prompt again
        assert begun.replace("\r\n", "\n") in terminal.until(r"30 tokens, [\d,]+/s\r\n> $")
        terminal.type("/help\n")
        terminal.until("/reset forgets[^>]*> $")
        terminal.type("half a line")
        terminal.until("half a line")
        terminal.interrupt_until(r"Ctrl-D leaves\r\n> $")  # before its prompt, readline would not see the key
        terminal.type("\x04")
        assert terminal.exit_code() == 0


def test_ctrl_c_stops_the_text_and_not_the_program(model: Path) -> None:
    with Terminal("-m", model, "-n", 10**6, "--ignore-eos", "-s", 1, "-p", "the") as terminal:
        terminal.until(r"Ctrl-D leaves\r\n.")
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
        said = engine.tokenizer.decode(engine.generate(prompt_ids(engine.tokenizer, prompt), 5, GREEDY))
        assert said + "\n" in done.stdout
    assert ">" not in done.stderr


# ---- what a chat_session remembers ---------------------------------------------------------------------------------


def talk_of(engine: Any, tokenizer: Tokenizer, n: int, chat: bool = False, limit: int = CONTEXT) -> ChatSession:
    return ChatSession(engine, tokenizer, limit, Sampler(GREEDY), n, frozenset(), chat)


def test_an_interrupted_text_is_read_on_rightly(tokenizer: Tokenizer, seed: int) -> None:
    """Stopped anywhere, each next prompt gives what a fresh model gives."""
    engine = TorchEngine(made(tokenizer, seed))
    chat_session = talk_of(engine, tokenizer, 12)
    for _ in range(6):
        prompt = " ".join(random.choices(["the", "fox", "dog"], k=random.randint(1, 6)))
        pieces = chat_session.answer(prompt)
        stop = random.randrange(12)
        got = [next(pieces) for _ in range(stop)]
        pieces.close()  # type: ignore[attr-defined]
        expected = engine.generate(prompt_ids(tokenizer, prompt), 12, GREEDY)
        decoder = tokenizer.stream()
        assert got == [decoder.push(id) for id in expected[:stop]]


def test_a_context_that_is_full_ends_the_text(tokenizer: Tokenizer, seed: int) -> None:
    engine = TorchEngine(made(tokenizer, seed))
    chat_session = talk_of(engine, tokenizer, 100, limit=10)
    assert len(list(chat_session.answer("the"))) - 1 == 10 - len(prompt_ids(tokenizer, "the")) + 1
    assert chat_session.full
    with pytest.raises(BitNetError, match="at most the context's 10"):
        list(chat_session.answer("the lazy dog jumps over the quick brown fox and on and on"))
    chat_session.reset()
    assert chat_session.text == []


def test_a_conversation_is_kept(seed: int) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers comes with the extra of that name")
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        ["hello world " * 9], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    )
    built.add_special_tokens(["<|start|>", "<|end|>"])
    ids = [built.token_to_id(name) for name in ("<|start|>", "<|end|>")]
    tokenizer = JsonTokenizer(built.to_str(), Settings(built.get_vocab_size(), ids[0], (ids[1],), TEMPLATE))
    engine = TorchEngine(made(tokenizer, seed))
    chat_session = talk_of(engine, tokenizer, 4, chat=True)
    first = "".join(chat_session.answer("hello"))
    on = "".join(chat_session.answer(""))
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": chat_session.messages[1]["content"]}]
    assert chat_session.messages == said
    start = tokenizer.encode_chat(said[:1])
    whole = engine.generate(start, 8, GREEDY)
    assert first == tokenizer.decode(whole[:4])
    assert on == tokenizer.decode(whole[4:])
    list(chat_session.answer("world"))
    assert [message["role"] for message in chat_session.messages] == ["user", "assistant"] * 2
    assert chat_session.text[:-4] == tokenizer.encode_chat([*said, {"role": "user", "content": "world"}])
    chat_session.reset()
    chat_session.ends = frozenset(range(tokenizer.vocab_size))  # ends at once: an empty line has nothing to go on with
    list(chat_session.answer("hello"))
    list(chat_session.answer(""))
    assert [message["content"] for message in chat_session.messages] == ["hello", "", "", ""]
    assert not chat_session.full


def test_what_does_not_go_together(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in (["--json"], ["-p", "-"], ["--chat"]):
        assert main(["generate", "-i", "-m", str(model), *extra]) == 2
        assert len(without_build_warning(capsys.readouterr().err).splitlines()) == 1
