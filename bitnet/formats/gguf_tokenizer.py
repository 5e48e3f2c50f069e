"""Tokenizers in the keys of a GGUF file: SentencePiece ("llama") and byte-level BPE ("gpt2").

SentencePiece goes both ways without loss: pieces, scores and types are what the file form holds too. Byte-level BPE is
read for the pre-tokenizers below, by the names llama.cpp gives them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.errors import BitNetError
from bitnet.formats.gguf_file import StringArray
from bitnet.formats.sentencepiece_model import BYTE, CONTROL, UNKNOWN, USER, Piece, Pieces, read_pieces, write_pieces
from bitnet.formats.tokenizer_json import byte_level_json, sentencepiece_json
from bitnet.json_tokenizer import JsonTokenizer, Settings
from bitnet.tokenizer import SentencePieceTokenizer, Tokenizer

_PREFIX = "tokenizer.ggml."
_WAY_OUT = "give another one (--tokenizer FOLDER), or none (--tokenizer none)"


def tokenizer_keys(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The keys of a tokenizer. Raises BitNetError for a kind that GGUF has no place for."""
    if tokenizer is None:
        return {f"{_PREFIX}model": "none"}
    if not isinstance(tokenizer, SentencePieceTokenizer):
        if not isinstance(tokenizer, JsonTokenizer):
            raise BitNetError(
                f"export: got a tokenizer of kind '{tokenizer.kind}', which other tools cannot read; train with "
                "--tokenizer sentencepiece"
            )
        raise BitNetError(
            f"export: got a tokenizer of kind '{tokenizer.kind}', which is not written into GGUF files; train with "
            "--tokenizer sentencepiece, or export --to hf-packed (a plain model: --to hf)"
        )
    model = read_pieces(tokenizer.to_bytes())
    keys: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.text for piece in model.pieces],
        "scores": [float(piece.score) for piece in model.pieces],
        "token_type": [piece.type for piece in model.pieces],
        "unknown_token_id": next(id for id, piece in enumerate(model.pieces) if piece.type == UNKNOWN),
        "add_bos_token": tokenizer.bos_id is not None,
        "add_eos_token": False,
        "add_space_prefix": model.dummy_prefix,
        "remove_extra_whitespaces": False,
    }
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    keys.update({name: id for name, id in ids.items() if id is not None})
    return {_PREFIX + name: value for name, value in keys.items()}


def read_tokenizer(path: Path, keys: Mapping[str, Any], vocab_size: int) -> Tokenizer | None:
    """The tokenizer in a file's keys, None where it has none. Raises BitNetError for one that cannot be used."""
    kind = keys.get(f"{_PREFIX}model", "none")
    if not isinstance(kind, str):
        raise BitNetError(f"{path}: {_PREFIX}model: got {kind!r:.40}, expected a text; {_WAY_OUT}")
    if kind in ("none", "no_vocab"):
        return None
    tokens = keys.get(f"{_PREFIX}tokens")
    types = keys.get(f"{_PREFIX}token_type")
    if not isinstance(tokens, StringArray) or len(tokens) != vocab_size:
        got = len(tokens) if isinstance(tokens, StringArray) else "no"
        raise BitNetError(f"{path}: got {got} tokens, expected {vocab_size} as in the model; {_WAY_OUT}")
    if not isinstance(types, np.ndarray) or len(types) != vocab_size:
        raise BitNetError(f"{path}: {_PREFIX}token_type: expected one for each of {vocab_size} tokens; {_WAY_OUT}")
    if kind == "llama":
        return _read_sentencepiece(path, keys, tokens, types)
    if kind == "gpt2":
        return _read_byte_level(path, keys, tokens, types)
    raise BitNetError(f"{path}: got a tokenizer of kind {kind!r:.40}, expected 'llama' or 'gpt2'; {_WAY_OUT}")


def _read_sentencepiece(
    path: Path, keys: Mapping[str, Any], tokens: StringArray, types: "np.ndarray[Any, Any]"
) -> Tokenizer:
    scores = keys.get(f"{_PREFIX}scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise BitNetError(f"{path}: {_PREFIX}scores: expected a number for each of {len(tokens)} tokens; {_WAY_OUT}")
    if not set(types.tolist()) <= set(range(1, 7)):
        raise BitNetError(f"{path}: {_PREFIX}token_type: expected 1 to 6; {_WAY_OUT}")
    pieces = [Piece(tokens[i], float(scores[i]), int(types[i])) for i in range(len(tokens))]
    prefix = keys.get(f"{_PREFIX}add_space_prefix", True) is not False  # llama.cpp's default
    model = Pieces(pieces, prefix)
    bos, eos = _id(path, keys, "bos_token_id", len(tokens)), _id(path, keys, "eos_token_id", len(tokens))
    ours = {i: pieces[i].text for i in (bos, eos) if i is not None}
    add_bos = _add_bos(path, keys)
    if not prefix and add_bos and list(ours.values()) == ["<s>", "</s>"][: len(ours)]:
        return SentencePieceTokenizer(write_pieces(model))
    # A model that puts a space before every text, or other control tokens: tokenizers holds it as it is.
    settings = Settings(len(tokens), bos, () if eos is None else (eos,), _template(keys), add_bos)
    return JsonTokenizer(sentencepiece_json(model, bos if add_bos else None), settings)


def _read_byte_level(
    path: Path, keys: Mapping[str, Any], tokens: StringArray, types: "np.ndarray[Any, Any]"
) -> Tokenizer:
    merges = keys.get(f"{_PREFIX}merges")
    if not isinstance(merges, StringArray):
        raise BitNetError(f"{path}: {_PREFIX}merges: got none, expected the merges of a BPE tokenizer; {_WAY_OUT}")
    pre = keys.get(f"{_PREFIX}pre", "default")
    names = [tokens[i] for i in range(len(tokens))]
    special = [i for i, kind in enumerate(types.tolist()) if kind in (CONTROL, USER, UNKNOWN, BYTE)]
    control = {i for i, kind in enumerate(types.tolist()) if kind in (CONTROL, UNKNOWN)}
    bos, eos = _id(path, keys, "bos_token_id", len(names)), _id(path, keys, "eos_token_id", len(names))
    turn = _id(path, keys, "eot_token_id", len(names))
    ends = tuple(dict.fromkeys(i for i in (eos, turn) if i is not None))
    add_bos = _add_bos(path, keys)
    first = bos if add_bos else None
    try:
        text = byte_level_json(names, [merges[i] for i in range(len(merges))], special, control, pre, first)
    except BitNetError as error:
        raise BitNetError(f"{path}: {error}; {_WAY_OUT}") from None
    return JsonTokenizer(text, Settings(len(names), bos, ends, _template(keys), add_bos))


def _add_bos(path: Path, keys: Mapping[str, Any]) -> bool:
    """Whether texts start with BOS; true where nothing is said, as llama.cpp has it for the kinds read here."""
    value = keys.get(f"{_PREFIX}add_bos_token", True)
    if not isinstance(value, bool):
        raise BitNetError(f"{path}: {_PREFIX}add_bos_token: got {value!r:.40}, expected true or false; {_WAY_OUT}")
    return value


def _template(keys: Mapping[str, Any]) -> str | None:
    value = keys.get("tokenizer.chat_template")
    return value if isinstance(value, str) else None


def _id(path: Path, keys: Mapping[str, Any], name: str, size: int) -> int | None:
    value = keys.get(_PREFIX + name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
        raise BitNetError(f"{path}: {_PREFIX}{name}: got {value!r:.40}, expected an id below {size}; {_WAY_OUT}")
    return value
