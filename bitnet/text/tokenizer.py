"""Text to token ids and back, without loss: what every tokenizer answers, and what follows from its spellings.

Every tokenizer reduces to one list of spellings, id -> UTF-8 bytes. Decoding joins the bytes: decode(encode(text)) is
text for every valid Unicode string, streaming is an incremental UTF-8 decoder, and the lengths of the spellings give
bits per byte.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import BitNetError


class StreamDecoder:
    """Turns ids into text one at a time; a character made of several tokens appears once complete.

    The texts of all push() calls and the final flush() add up to decode() of the same ids.
    """

    def __init__(self, spellings: Sequence[bytes]) -> None:
        self._spellings = spellings
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that `id` completes, possibly empty. Raises BitNetError for an id that no token has."""
        return self._utf8.decode(_spelling(self._spellings, id))

    def flush(self) -> str:
        """What is left: U+FFFD for an unfinished character, otherwise nothing. The decoder is then as new."""
        return self._utf8.decode(b"", final=True)


class Tokenizer(Protocol):
    """What the rest of the project needs of a tokenizer; ids are 0 .. vocab_size - 1."""

    @property
    def kind(self) -> str:
        """The name of its file form, for `load_tokenizer`."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def bos_id(self) -> int | None:
        """The id that marks the beginning of a text, None where there is none."""

    @property
    def eos_id(self) -> int | None:
        """The id that marks the end of a text, None where there is none."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """All ids that end a text, the end of a turn included; `eos_id` is the first."""

    @property
    def add_bos(self) -> bool:
        """Whether the model expects a text to start with `bos_id`."""

    @property
    def chat_template(self) -> str | None:
        """The model's chat template (Jinja), None for a model that was not trained to chat."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with no control token added and none recognised in it."""
        ...

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """encode() of each text; the number of threads does not change the result."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation, ready for the model's turn. messages: {"role", "content"} each.

        Raises BitNetError where `chat_template` is None or fails.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control ids are dropped, an invalid byte sequence becomes U+FFFD."""
        ...

    def stream(self) -> StreamDecoder:
        """A fresh decoder for one id at a time."""
        ...

    def spelling(self, id: int) -> bytes:
        """The UTF-8 bytes that one id stands for; none for a control id."""
        ...

    def byte_lengths(self) -> NDArray[np.int64]:
        """UTF-8 bytes that each id stands for, int64 [vocab_size]; 0 for control ids. For bits per byte."""
        ...

    def to_bytes(self) -> bytes:
        """The file form, which load_tokenizer(kind, data) reads."""
        ...


class BaseTokenizer:
    """What all tokenizers share: everything that follows from their spellings, and no chat."""

    kind: str
    bos_id: int | None
    eos_id: int | None

    def __init__(self, spellings: list[bytes]) -> None:
        self._spellings = spellings

    @property
    def vocab_size(self) -> int:
        return len(self._spellings)

    @property
    def end_ids(self) -> tuple[int, ...]:
        return () if self.eos_id is None else (self.eos_id,)

    @property
    def add_bos(self) -> bool:
        return self.bos_id is not None

    @property
    def chat_template(self) -> str | None:
        return None

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        raise BitNetError(
            f"chat: got a model without a chat template (tokenizer '{self.kind}'), expected an imported chat model, "
            "which has one; omit --chat"
        )

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join([_spelling(self._spellings, id) for id in ids]).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self._spellings)

    def spelling(self, id: int) -> bytes:
        return _spelling(self._spellings, id)

    def byte_lengths(self) -> NDArray[np.int64]:
        return np.array([len(spelling) for spelling in self._spellings], dtype=np.int64)


def _spelling(spellings: Sequence[bytes], id: int) -> bytes:
    if not 0 <= id < len(spellings):  # a negative index would silently read from the end
        raise BitNetError(
            f"got the token id {id}, expected 0 .. {len(spellings) - 1}; use the tokenizer of the same model"
        )
    return spellings[id]


def check_unicode(text: str) -> None:
    """Raise BitNetError for a text with a lone surrogate, which has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BitNetError(
            f"got the lone surrogate {text[error.start]!a} at position {error.start}, "
            "expected valid Unicode; decode the text with its right encoding"
        ) from None
