"""From stored bytes to the tokenizer that wrote them."""

from bitnet.errors import BitNetError
from bitnet.text.characters import load_char
from bitnet.text.sentencepiece import SentencePieceTokenizer
from bitnet.text.tokenizer import Tokenizer


def load_tokenizer(kind: str, data: bytes) -> Tokenizer:
    """The tokenizer whose `to_bytes` gave `data`.

    Raises BitNetError for damaged bytes, an unknown kind, and a SentencePiece model that loses text.
    """
    if kind == "sentencepiece":
        return SentencePieceTokenizer(data)
    if kind == "char":
        return load_char(data)
    if kind == "tokenizer.json":
        from bitnet.text.json_tokenizer import load_json_tokenizer

        return load_json_tokenizer(data)
    raise BitNetError(f"got tokenizer kind {kind!r}, expected 'sentencepiece', 'char' or 'tokenizer.json'")
