"""Which tests a run takes: llama-bench's vocabulary, comma lists that cross-multiply.

pp512            read a prompt of 512 tokens          tg128           write 128 tokens, one at a time
pp512+tg128      both, as one answer                  @ d1024         after 1024 tokens that are not timed
x4               four sequences at once
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError

PROMPT, PREDICT = 512, 128  # llama-bench's defaults
_MOST = 2**20  # a larger number is more likely a typing error


@dataclass(frozen=True)
class Test:
    """One measurement. Token counts are those of each of `batch` sequences."""

    __test__ = False  # pytest: not a class of tests

    prompt: int
    predict: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        """As llama-bench writes it."""
        words = [f"pp{self.prompt}"] * bool(self.prompt) + [f"tg{self.predict}"] * bool(self.predict)
        return (
            "+".join(words)
            + (f" @ d{self.depth}" if self.depth else "")
            + (f" x{self.batch}" if self.batch > 1 else "")
        )

    @property
    def tokens(self) -> int:
        """Tokens of one sequence that are timed."""
        return self.prompt + self.predict

    @property
    def positions(self) -> int:
        """Positions that a sequence needs."""
        return self.depth + self.tokens


@dataclass(frozen=True)
class TestChoice:
    """The tests that the user asked for; prompts and predicts are None for the defaults."""

    __test__ = False  # pytest: not a class of tests

    prompts: list[int] | None
    predicts: list[int] | None
    pairs: list[tuple[int, int]]
    depths: list[int]
    batches: list[int]


def tests(choice: TestChoice, config: ModelConfig, model: str) -> list[Test]:
    """All tests on one model. Raises BitNetError where there is none, and for one longer than the model's context."""
    half = config.context // 2  # a default prompt leaves half the context to its answer
    prompts = [min(PROMPT, half)] if choice.prompts is None else choice.prompts
    predicts = [min(PREDICT, half)] if choice.predicts is None else choice.predicts
    asked = [(p, 0) for p in prompts if p] + [(0, n) for n in predicts if n] + choice.pairs
    found = [Test(*pair, d, b) for b, d, pair in itertools.product(choice.batches, choice.depths, asked)]
    if not found:
        raise BitNetError("bench: got no test (-p 0 -n 0), expected a prompt, tokens to write or both")
    for test in found:
        if test.positions > config.context:
            raise BitNetError(
                f"bench: {test.name} needs {test.positions} positions, expected at most the context of {model}, "
                f"{config.context}; choose smaller -p, -n or -d"
            )
    return list(dict.fromkeys(found))


def numbers(option: str, text: str, least: int) -> list[int]:
    """The whole numbers of a comma list. Raises BitNetError for anything else, and for one below `least`."""
    found = []
    for part in text.split(","):
        try:
            value = int(part)
        except ValueError:
            raise BitNetError(f"bench: {option}: got '{text}', expected whole numbers such as 1,2") from None
        if not least <= value <= _MOST:
            raise BitNetError(f"bench: {option}: got {value}, expected {least} to {_MOST}")
        found.append(value)
    return list(dict.fromkeys(found))


def pair(text: str) -> tuple[int, int]:
    """A prompt and its answer: "512,128". Raises BitNetError for anything else."""
    values = numbers("--pg", text, 1) if text.count(",") == 1 else []
    if len(values) == 1 and text.count(",") == 1:
        values *= 2  # "64,64"
    if len(values) != 2:
        raise BitNetError(f"bench: --pg: got '{text}', expected a prompt and an answer such as 512,128")
    return values[0], values[1]


def words(option: str, text: str, known: Sequence[str]) -> list[str]:
    """The words of a comma list. Raises BitNetError for a word that is not among `known`."""
    found = [part.strip() for part in text.split(",")]
    for word in found:
        if word not in known:
            raise BitNetError(
                f"bench: {option}: got '{word}', expected {' or '.join(known[-2:])}"
                if len(known) < 3
                else f"bench: {option}: got '{word}', expected one of {', '.join(known)}"
            )
    return list(dict.fromkeys(found))
