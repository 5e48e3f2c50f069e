"""Byte-pair encoding with byte fallback by SentencePiece, made lossless: the tokenizer, and its training.

What SentencePiece does to text, and what is done about it here:
- it writes a space as U+2581, so a literal U+2581 would come back as a space: encode() spells that character with its
  three byte tokens instead;
- a model trained on text without any space has no piece for it and returns U+2581: training adds one space;
- a newline never enters a learnt piece (training splits lines there), so it is always a token by itself, and text that
  is cut after newlines gives the same ids as uncut text. Encoding in blocks depends on that. Blocks are also three
  times as fast, because the merge queue of SentencePiece outgrows the cache on long strings (2.0 MB/s at 1 MiB a call,
  5.8 MB/s at 4 KiB).
"""

import heapq
import io
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import sentencepiece

from bitnet.errors import BitNetError
from bitnet.text.tokenizer import BaseTokenizer, check_unicode

SPACE_MARK = "\u2581"  # how SentencePiece writes a space
# Characters that SentencePiece's trainer reserves (its space mark, its unknown mark, NUL) and the newline, which
# separates its input lines: none may be learnt, all are encoded as byte tokens.
RESERVED = "\n\0" + SPACE_MARK + "\u2585"
SPECIAL_IDS = 3 + 256  # unk, bos, eos and one token for each byte value
BLOCK_CHARS = 2048  # encode in blocks of at least this many characters, cut after a newline
SAMPLE_CHARS = 16384  # the unit in which training text is sampled
LINE_CHARS = 4096  # cut training lines here: SentencePiece drops long ones, aborts on words over 65,535
ALPHABET_COVERAGE = 0.9995  # share of the text whose characters get a piece each; the rest is encoded as bytes
_TRAINER_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "hard_vocab_limit": False,
    "character_coverage": 1.0,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "max_sentence_length": 4 * LINE_CHARS,  # counted in bytes
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "num_threads": 1,  # two gain 7 % of two seconds, and their number is stored in the model: bytes would differ
    "minloglevel": 2,  # errors only
}
# Every way in which a foreign model is known to lose text.
PROBE = " a\n\n\t  <s></s><unk><0x0A>1\r\n" + SPACE_MARK + "\0\u00e9\U0001f600 "


class SentencePieceTokenizer(BaseTokenizer):
    """Byte-pair encoding with byte fallback, from a serialised SentencePiece model."""

    kind = "sentencepiece"

    def __init__(self, data: bytes) -> None:
        self._data = bytes(data)
        self._model, spellings = _load_model(self._data)
        super().__init__(spellings)
        bos, eos = int(self._model.bos_id()), int(self._model.eos_id())
        self.bos_id = bos if bos >= 0 else None
        self.eos_id = eos if eos >= 0 else None
        self._space_mark_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._check_lossless()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        blocks: list[str] = []
        ends = [0]
        for text in texts:
            check_unicode(text)
            blocks.extend(_blocks(text, BLOCK_CHARS))
            ends.append(len(blocks))
        ids = self._encode_blocks(blocks, threads)
        return [list(chain.from_iterable(ids[start:end])) for start, end in pairwise(ends)]

    def to_bytes(self) -> bytes:
        return self._data

    def _encode_blocks(self, blocks: list[str], threads: int) -> list[list[int]]:
        heads = [block.partition(SPACE_MARK)[0] for block in blocks]
        ids: list[list[int]] = self._model.encode(heads, out_type=int, num_threads=threads)
        for i, block in enumerate(blocks):
            for part in block.split(SPACE_MARK)[1:]:  # almost always none
                ids[i] += [*self._space_mark_ids, *self._model.encode(part, out_type=int)]
        return ids

    def _check_lossless(self) -> None:
        if self.decode(self.encode(PROBE)) != PROBE:
            raise BitNetError(
                "got a SentencePiece model that does not give text back unchanged, expected byte fallback, "
                "identity normalisation and no dummy prefix; train one with this project"
            )
        if any(b"\n" in piece and piece != b"\n" for piece in self._spellings):
            raise BitNetError(
                "got a SentencePiece model with a newline inside a longer piece, expected the newline to be "
                "a separate token; train one with this project"
            )


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, *, sample_bytes: int = 20_000_000, seed: int = 0
) -> SentencePieceTokenizer:
    """Learn byte-pair merges from `texts`, of which at most `sample_bytes`, spread over all of them, are held.

    vocab_size: requested number of ids, at least 260; a text too small for it gives the largest vocabulary it supports.
    The same texts, sizes and seed give the same bytes. Raises BitNetError for a smaller vocabulary and for no text.
    """
    if vocab_size <= SPECIAL_IDS:
        raise BitNetError(
            f"got vocab_size {vocab_size}, expected at least {SPECIAL_IDS + 1} (3 control tokens, 256 bytes, "
            "1 piece); choose a larger one, such as 8192"
        )
    sample = _sample_blocks(texts, sample_bytes, seed)
    counts: Counter[str] = Counter()
    for block in sample:
        counts.update(block)
    alphabet = _alphabet(counts, vocab_size)
    if not alphabet:
        raise BitNetError("got no text to train a tokenizer on, expected some characters; give a longer text")
    # A character outside the alphabet cannot be part of a piece, so it may as well end the line. This is done here and
    # not with character_coverage, because SentencePiece fails when the characters to cover do not fit vocab_size.
    to_newline = {ord(character): "\n" for character in {*counts, *RESERVED} - alphabet}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_training_lines(sample, to_newline),
        model_writer=model,
        vocab_size=vocab_size,
        **_TRAINER_OPTIONS,
    )
    return SentencePieceTokenizer(model.getvalue())


def _blocks(text: str, size: int, limit: int | None = None) -> Iterator[str]:
    """Parts of at least `size` characters (the last may be shorter), cut after a newline or else at `limit`."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size - 1) + 1 or len(text)
        if limit is not None:
            end = min(end, start + limit)
        yield text[start:end]
        start = end


def _sample_blocks(texts: Iterable[str], sample_bytes: int, seed: int) -> list[str]:
    """A uniform sample of the stream's blocks, in order: each draws a priority and the lowest ones stay."""
    draw = random.Random(seed).random  # a stream that Python promises not to change
    heap: list[tuple[float, int, int, str]] = []  # (-priority, index, bytes, block): highest priority first out
    held = index = 0
    for text in texts:
        check_unicode(text)
        for block in _blocks(text, SAMPLE_CHARS, limit=4 * SAMPLE_CHARS):
            size = len(block.encode())
            heapq.heappush(heap, (-draw(), index, size, block))
            held += size
            index += 1
            while held > sample_bytes and len(heap) > 1:
                held -= heapq.heappop(heap)[2]
    return [block for _, _, _, block in sorted(heap, key=lambda entry: entry[1])]


def _alphabet(counts: Counter[str], vocab_size: int) -> set[str]:
    """The most frequent characters, up to the coverage and half of the free ids: merges need the rest."""
    ranked = sorted((-count, character) for character, count in counts.items() if character not in RESERVED)
    total = -sum(count for count, _ in ranked)
    room = max(1, (vocab_size - SPECIAL_IDS) // 2) - 1  # one id is the space's, present or not
    alphabet: set[str] = {" "} if ranked else set()
    covered = 0
    for count, character in ranked:
        if covered >= ALPHABET_COVERAGE * total or len(alphabet) > room:
            break
        alphabet.add(character)
        covered -= count
    return alphabet


def _training_lines(blocks: Iterable[str], to_newline: dict[int, str]) -> Iterator[str]:
    yield " "  # so that a piece for the space exists whatever the text
    for block in blocks:
        for line in block.translate(to_newline).split("\n"):
            for start in range(0, len(line), LINE_CHARS):
                yield line[start : start + LINE_CHARS]


def _load_model(data: bytes) -> tuple[sentencepiece.SentencePieceProcessor, list[bytes]]:
    """The SentencePiece model and its spellings, id -> bytes."""
    wrong = "expected an undamaged model file; copy the file again or train a new tokenizer"
    if not data:  # SentencePiece takes empty bytes for "load nothing"
        raise BitNetError(f"got an empty SentencePiece model, {wrong}")
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        spellings = [_piece_bytes(model, id) for id in range(model.get_piece_size())]
        for byte in range(256):
            if spellings[model.piece_to_id(f"<0x{byte:02X}>")] != bytes([byte]):
                raise ValueError(f"no token for byte {byte}")
    except (RuntimeError, ValueError, TypeError, OSError, IndexError) as error:  # differs by version
        reason = " ".join(str(error).split())
        raise BitNetError(f"got a SentencePiece model that cannot be read ({reason}), {wrong}") from error
    return model, spellings


def _piece_bytes(model: sentencepiece.SentencePieceProcessor, id: int) -> bytes:
    piece = str(model.id_to_piece(id))
    if model.is_control(id) or model.is_unknown(id) or model.is_unused(id):
        return b""
    if model.is_byte(id):
        return bytes.fromhex(piece[3:5])
    return piece.replace(SPACE_MARK, " ").encode()
