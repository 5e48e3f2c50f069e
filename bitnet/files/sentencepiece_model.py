"""The file form of a SentencePiece model, read and written without the protobuf package.

    ModelProto     1 pieces (SentencePiece), 2 trainer_spec, 3 normalizer_spec
    SentencePiece  1 piece (text), 2 score (float), 3 type (1 normal, 2 unknown, 3 control, 4 user, 5 unused, 6 byte)

Only what other formats hold as well is written: the pieces, and how text is normalised.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bitnet.errors import BitNetError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
MAX_PIECES = 1 << 19  # the largest vocabularies have half as many
MAX_PIECE = 1 << 12  # bytes
_BPE = 2  # TrainerSpec.model_type


class Piece(NamedTuple):
    """One token: its text (a space is U+2581), its score (higher merges first) and its type."""

    text: str
    score: float
    type: int


class SentencePieceModel(NamedTuple):
    """A SentencePiece BPE model."""

    pieces: list[Piece]
    dummy_prefix: bool  # a space is added before the text


def read_pieces(data: bytes) -> SentencePieceModel:
    """The pieces of a serialised model. Raises BitNetError for damaged bytes and for a model that is not BPE."""
    pieces: list[Piece] = []
    model_type, prefix = 1, True  # the format's defaults
    try:
        for field, value in _fields(data):
            if field == 1:
                if len(pieces) == MAX_PIECES or len(_bytes(value)) > MAX_PIECE:
                    raise BitNetError(
                        f"got a SentencePiece model of more than {MAX_PIECES:,} pieces, or a piece of more than "
                        f"{MAX_PIECE:,} bytes, expected a tokenizer"
                    )
                parts = dict(_fields(_bytes(value)))
                score = struct.unpack("<f", struct.pack("<I", _int(parts.get(2, 0))))[0]
                pieces.append(Piece(_bytes(parts[1]).decode("utf-8"), score, _int(parts.get(3, NORMAL))))
            elif field == 2:
                model_type = _int(dict(_fields(_bytes(value))).get(3, 1))
            elif field == 3:
                prefix = bool(dict(_fields(_bytes(value))).get(3, 1))
    except (IndexError, KeyError, ValueError, struct.error) as error:
        if isinstance(error, BitNetError):
            raise
        raise BitNetError("got a SentencePiece model that cannot be read, expected an undamaged file") from error
    if model_type != _BPE:
        raise BitNetError("got a SentencePiece model that is not BPE (unigram, say), expected BPE; train one here")
    return SentencePieceModel(pieces, prefix)


def write_pieces(model: SentencePieceModel) -> bytes:
    """A serialised BPE model with byte fallback and no normalisation, as sentencepiece reads it."""
    first_of_type = {piece.type: id for id, piece in reversed(list(enumerate(model.pieces)))}
    controls = {piece.text: id for id, piece in enumerate(model.pieces) if piece.type == CONTROL}
    out = bytearray()
    for piece in model.pieces:
        body = _field(1, piece.text.encode()) + b"\x15" + struct.pack("<f", piece.score) + _field(3, piece.type)
        out += _field(1, body)
    trainer = _field(3, _BPE) + _field(4, len(model.pieces)) + _field(35, 1) + _field(40, first_of_type.get(UNKNOWN, 0))
    trainer += _field(41, controls.get("<s>", -1)) + _field(42, controls.get("</s>", -1)) + _field(43, -1)
    normalizer = _field(1, b"identity") + _field(3, int(model.dummy_prefix)) + _field(4, 0) + _field(5, 1)
    return bytes(out + _field(2, trainer) + _field(3, normalizer))


def merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """The merge rules that the scores imply, best first: every cut of a piece into two pieces, by the piece's score."""
    ids = {piece.text: id for id, piece in enumerate(pieces) if piece.type in (NORMAL, USER, UNUSED)}
    rules = [
        (-piece.score, ids[piece.text[:cut]], ids[piece.text[cut:]])
        for piece in pieces
        if piece.type == NORMAL
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in ids and piece.text[cut:] in ids
    ]
    return [(pieces[left].text, pieces[right].text) for _, left, right in sorted(rules)]


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value % 2**64)  # negative numbers in two's complement


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        if tag & 7 == 0:
            value: int | bytes
            value, position = _read_varint(data, position)
        elif tag & 7 == 2:
            length, position = _read_varint(data, position)
            value = _slice(data, position, length)
            position += length
        elif tag & 7 in (1, 5):
            size = 8 if tag & 7 == 1 else 4
            value = int.from_bytes(_slice(data, position, size), "little")
            position += size
        else:
            raise ValueError("unknown wire type")
        yield tag >> 3, value


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a varint of more than 70 bits")


def _slice(data: bytes, start: int, size: int) -> bytes:
    if size > len(data) - start:
        raise ValueError("cut short")
    return data[start : start + size]


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes are expected")
    return value


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number is expected")
    return value
