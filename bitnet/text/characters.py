"""One token for each character of the training text."""

import json
from collections.abc import Iterable, Sequence

import numpy as np

from bitnet.errors import BitNetError
from bitnet.text.tokenizer import BaseTokenizer, check_unicode

CHAR_FORMAT = "bitnet-char"


class CharTokenizer(BaseTokenizer):
    """One id for each character of the training text, in code point order; no control tokens."""

    kind = "char"
    bos_id = None
    eos_id = None

    def __init__(self, characters: Iterable[str]) -> None:
        """Raises BitNetError where `characters`, repeated or not, are empty or hold a lone surrogate."""
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise BitNetError("got no characters, expected at least one; give some text to train on")
        check_unicode(self.characters)
        super().__init__([character.encode() for character in self.characters])
        # Code point -> id, or -1 when unknown. The last entry stands for all code points above.
        self._ids = np.full(ord(self.characters[-1]) + 2, -1, dtype=np.int32)
        self._ids[[ord(character) for character in self.characters]] = np.arange(len(self.characters))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Raises BitNetError for a character that was not in the training text."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if (ids < 0).any():
            position = int(np.argmax(ids < 0))
            after = f" after {text[max(0, position - 20) : position]!a}" if position else ""
            raise BitNetError(
                f"got the character {text[position]!a} at position {position}{after}, expected one of the "
                f"{self.vocab_size} characters of the training text; use the sentencepiece tokenizer, which "
                "encodes any text"
            )
        result: list[int] = ids.tolist()
        return result

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def to_bytes(self) -> bytes:
        content = {"format": CHAR_FORMAT, "version": 1, "characters": self.characters}
        return json.dumps(content).encode("ascii")


def train_char(texts: Iterable[str]) -> CharTokenizer:
    """A tokenizer of all characters in `texts`, which are read once and not kept. Raises BitNetError for no text."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    return CharTokenizer(characters)


def load_char(data: bytes) -> CharTokenizer:
    """The tokenizer that `to_bytes` wrote. Raises BitNetError for damaged bytes."""
    wrong = "expected the JSON that the char tokenizer writes; copy the file again or train a new tokenizer"
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BitNetError(f"got a char tokenizer that cannot be read ({error}), {wrong}") from error
    if not isinstance(content, dict) or content.get("format") != CHAR_FORMAT or content.get("version") != 1:
        raise BitNetError(f"got a char tokenizer without format {CHAR_FORMAT!r} and version 1, {wrong}")
    characters = content.get("characters")
    if not isinstance(characters, str) or not characters or sorted(set(characters)) != list(characters):
        raise BitNetError(f"got characters that are not sorted and distinct, {wrong}")
    return CharTokenizer(characters)
