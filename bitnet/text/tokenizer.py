"""Text to token ids and back, without loss: what every tokenizer is, and what follows from its table.

A tokenizer reduces to one table, id -> UTF-8 bytes. Decoding joins the bytes, so decode(encode(text)) == text holds for
every valid Unicode string, streaming is an incremental UTF-8 decoder, and the table's lengths give bits per byte.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import BitNetError


class StreamDecoder:
    """Turns ids into text one at a time; a character made of several tokens appears once complete.

    The texts of all push() calls and the final flush() add up to decode() of the same ids.
    """

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that `id` completes, possibly empty."""
        return self._utf8.decode(token_bytes(self._table, id))

    def flush(self) -> str:
        """What is left: U+FFFD for an unfinished character, otherwise nothing. The decoder is then as new."""
        return self._utf8.decode(b"", final=True)


class Tokenizer(Protocol):
    """What the rest of the project needs of a tokenizer; ids are 0 .. vocab_size - 1."""

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with no control token added and none recognised in it."""
        ...

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """encode() of each text; the number of threads does not change the result."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control ids are dropped, an invalid byte sequence becomes U+FFFD."""
        ...

    def stream(self) -> StreamDecoder:
        """A fresh decoder for one id at a time."""
        ...

    def spelling(self, id: int) -> bytes:
        """The bytes of text behind one id; none for a control id."""
        ...

    def byte_lengths(self) -> NDArray[np.int64]:
        """UTF-8 bytes of text behind each id, int64 [vocab_size]; 0 for control ids. For bits per byte."""
        ...

    def to_bytes(self) -> bytes:
        """The file form, which load_tokenizer(kind, data) reads."""
        ...


class TableTokenizer:
    """The half that both kinds share: everything that follows from the table id -> bytes."""

    def __init__(self, table: list[bytes]) -> None:
        self._table = table

    @property
    def vocab_size(self) -> int:
        return len(self._table)

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join([token_bytes(self._table, id) for id in ids]).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self._table)

    def spelling(self, id: int) -> bytes:
        return token_bytes(self._table, id)

    def byte_lengths(self) -> NDArray[np.int64]:
        return np.array([len(piece) for piece in self._table], dtype=np.int64)


def token_bytes(table: Sequence[bytes], id: int) -> bytes:
    """The bytes of one id. Raises BitNetError for an id outside the table."""
    if not 0 <= id < len(table):  # a negative index would silently read from the end
        raise BitNetError(f"got the token id {id}, expected 0 .. {len(table) - 1}; use the tokenizer of the same model")
    return table[id]


def check_unicode(text: str) -> None:
    """Raise BitNetError for a text with a lone surrogate, which has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BitNetError(
            f"got the lone surrogate {text[error.start]!a} at position {error.start}, "
            "expected valid Unicode; decode the text with its right encoding"
        ) from None
