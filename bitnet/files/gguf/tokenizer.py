"""Tokenizers in the keys of a GGUF file: SentencePiece ("llama") and byte-level BPE ("gpt2").

SentencePiece is read and written without loss: GGUF holds pieces, scores and types as its own file does. Byte-level BPE
is read and written for the pre-tokenizers in hf/tokenizer_json.py, by the names llama.cpp gives them.
"""

import re
from collections.abc import Mapping, Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.errors import BitNetError
from bitnet.files.gguf.file import StringArray
from bitnet.files.hf.tokenizer_json import byte_level_json, parse_tokenizer_json, sentencepiece_json
from bitnet.files.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER,
    Piece,
    SentencePieceModel,
    read_pieces,
    write_pieces,
)
from bitnet.text.json_tokenizer import JsonTokenizer, Settings
from bitnet.text.sentencepiece import SentencePieceTokenizer
from bitnet.text.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # end of text, of turn, of message
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_OTHER_TOKENIZER = "give another one (--tokenizer FOLDER), or none (--tokenizer none)"


def tokenizer_keys(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The keys of a tokenizer. Raises BitNetError for one that GGUF has no keys for, or llama.cpp no name."""
    if tokenizer is None:
        return {f"{_PREFIX}model": "none"}
    keys = _model_keys(tokenizer) | {"add_bos_token": tokenizer.add_bos, "add_eos_token": False}
    if len(tokenizer.end_ids) > len(_ENDS):
        raise BitNetError(f"export: got {len(tokenizer.end_ids)} ids that end a text, expected at most {len(_ENDS)}")
    ids = {"bos_token_id": tokenizer.bos_id, **dict(zip(_ENDS, tokenizer.end_ids, strict=False))}
    keys.update({name: id for name, id in ids.items() if id is not None})
    named = {_PREFIX + name: value for name, value in keys.items()}
    return named if tokenizer.chat_template is None else {**named, _TEMPLATE: tokenizer.chat_template}


@singledispatch
def _model_keys(tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys of a tokenizer's tokens, without the prefix."""
    raise BitNetError(
        f"export: got a tokenizer of kind '{tokenizer.kind}', which other tools cannot read; train with "
        "--tokenizer sentencepiece"
    )


@_model_keys.register
def _(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    model = read_pieces(tokenizer.to_bytes())
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.text for piece in model.pieces],
        "scores": [float(piece.score) for piece in model.pieces],
        "token_type": [piece.type for piece in model.pieces],
        "unknown_token_id": next(id for id, piece in enumerate(model.pieces) if piece.type == UNKNOWN),
        "add_space_prefix": model.dummy_prefix,
        "remove_extra_whitespaces": False,
    }


@_model_keys.register
def _(tokenizer: JsonTokenizer) -> dict[str, Any]:
    """ "gpt2" for byte-level BPE, "llama" for SentencePiece-like BPE."""
    try:
        parts = parse_tokenizer_json(tokenizer.tokenizer_json)
    except BitNetError as error:
        raise BitNetError(
            f"export: {error}; export --to hf-packed (a float model: --to hf), or import the model with "
            "--tokenizer none and export that"
        ) from error
    tokens, types = _tokens_and_types(tokenizer, fallback=not parts.pre)
    keys: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if parts.pre:
        return keys | {"model": "gpt2", "pre": parts.pre, "merges": [" ".join(pair) for pair in parts.merges]}
    keys |= {"model": "llama", "pre": "default", "scores": _scores(tokens, parts.merges)}
    return keys | {"add_space_prefix": parts.prefix, "remove_extra_whitespaces": False}


def _tokens_and_types(tokenizer: JsonTokenizer, fallback: bool) -> tuple[list[str], list[int]]:
    """Token and type of every id. fallback: whether "<0x41>" stands for a byte."""
    added = tokenizer.added_tokens()
    unknown = tokenizer.unknown_token if fallback else None
    tokens, types = tokenizer.tokens(), []
    for id, token in enumerate(tokens):
        if not token:
            tokens[id] = f"[PAD{id}]"  # as llama.cpp's own converter names an id without a token
            types.append(UNUSED)
        elif token == unknown:
            types.append(UNKNOWN)
        elif id in added:
            types.append(CONTROL if added[id] else USER)
        else:
            types.append(BYTE if fallback and _BYTE.fullmatch(token) else NORMAL)
    if len(set(tokens)) != len(tokens):
        raise BitNetError("export: got a token called [PAD...] beside ids without a token, expected different names")
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Scores that give the order of merge rules: earlier is higher. Raises BitNetError where no scores give it."""
    rank: dict[str, int] = {}
    last = ""
    for left, right in merges:
        piece = left + right
        if piece != last and piece in rank:
            raise BitNetError(
                "export: got merges that no scores of pieces give, expected those of a SentencePiece model"
            )
        rank.setdefault(piece, len(rank))
        last = piece
    lowest = float(-len(rank))
    return [-float(rank[token]) if token in rank else lowest for token in tokens]


def read_tokenizer(path: Path, keys: Mapping[str, Any], vocab_size: int) -> Tokenizer | None:
    """The tokenizer in a file's keys, None where it has none. Raises BitNetError for one that cannot be used."""
    kind = keys.get(f"{_PREFIX}model", "none")
    if not isinstance(kind, str):
        raise BitNetError(f"{path}: {_PREFIX}model: got {kind!r:.40}, expected a text; {_OTHER_TOKENIZER}")
    if kind in ("none", "no_vocab"):
        return None
    tokens = keys.get(f"{_PREFIX}tokens")
    types = keys.get(f"{_PREFIX}token_type")
    if not isinstance(tokens, StringArray) or len(tokens) != vocab_size:
        got = len(tokens) if isinstance(tokens, StringArray) else "no"
        raise BitNetError(f"{path}: got {got} tokens, expected {vocab_size} as in the model; {_OTHER_TOKENIZER}")
    if not isinstance(types, np.ndarray) or len(types) != vocab_size:
        raise BitNetError(
            f"{path}: {_PREFIX}token_type: expected one for each of {vocab_size} tokens; {_OTHER_TOKENIZER}"
        )
    if kind == "llama":
        return _read_sentencepiece(path, keys, tokens, types)
    if kind == "gpt2":
        return _read_byte_level(path, keys, tokens, types)
    raise BitNetError(f"{path}: got a tokenizer of kind {kind!r:.40}, expected 'llama' or 'gpt2'; {_OTHER_TOKENIZER}")


def _read_sentencepiece(
    path: Path, keys: Mapping[str, Any], tokens: StringArray, types: "np.ndarray[Any, Any]"
) -> Tokenizer:
    scores = keys.get(f"{_PREFIX}scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise BitNetError(
            f"{path}: {_PREFIX}scores: expected a number for each of {len(tokens)} tokens; {_OTHER_TOKENIZER}"
        )
    if not set(types.tolist()) <= set(range(1, 7)):
        raise BitNetError(f"{path}: {_PREFIX}token_type: expected 1 to 6; {_OTHER_TOKENIZER}")
    pieces = [Piece(tokens[i], float(scores[i]), int(types[i])) for i in range(len(tokens))]
    prefix = keys.get(f"{_PREFIX}add_space_prefix", True) is not False  # llama.cpp's default
    model = SentencePieceModel(pieces, prefix)
    bos, ends = _id(path, keys, "bos_token_id", len(tokens)), _ends(path, keys, len(tokens))
    controls = [pieces[i].text for i in (bos, *ends) if i is not None]
    add_bos = _add_bos(path, keys)
    if not prefix and add_bos and controls == ["<s>", "</s>"][: len(controls)] and _template(keys) is None:
        return SentencePieceTokenizer(write_pieces(model))
    # A model that adds a space before every text, or has other control tokens, is held by a tokenizer.json.
    settings = Settings(len(tokens), bos, ends, _template(keys), add_bos)
    return JsonTokenizer(sentencepiece_json(model, bos if add_bos else None), settings)


def _read_byte_level(
    path: Path, keys: Mapping[str, Any], tokens: StringArray, types: "np.ndarray[Any, Any]"
) -> Tokenizer:
    merges = keys.get(f"{_PREFIX}merges")
    if not isinstance(merges, StringArray):
        raise BitNetError(
            f"{path}: {_PREFIX}merges: got none, expected the merges of a BPE tokenizer; {_OTHER_TOKENIZER}"
        )
    pre = keys.get(f"{_PREFIX}pre", "default")
    names = [token if kind != UNUSED else "" for token, kind in zip(tokens, types.tolist(), strict=True)]
    special = [i for i, kind in enumerate(types.tolist()) if kind in (CONTROL, USER, UNKNOWN, BYTE)]
    control = {i for i, kind in enumerate(types.tolist()) if kind in (CONTROL, UNKNOWN)}
    bos, ends = _id(path, keys, "bos_token_id", len(names)), _ends(path, keys, len(names))
    add_bos = _add_bos(path, keys)
    first = bos if add_bos else None
    try:
        text = byte_level_json(names, [merges[i] for i in range(len(merges))], special, control, pre, first)
    except BitNetError as error:
        raise BitNetError(f"{path}: {error}; {_OTHER_TOKENIZER}") from None
    return JsonTokenizer(text, Settings(len(names), bos, ends, _template(keys), add_bos))


def _add_bos(path: Path, keys: Mapping[str, Any]) -> bool:
    """Whether texts start with BOS; true by default, as in llama.cpp for the kinds that are read here."""
    value = keys.get(f"{_PREFIX}add_bos_token", True)
    if not isinstance(value, bool):
        raise BitNetError(
            f"{path}: {_PREFIX}add_bos_token: got {value!r:.40}, expected true or false; {_OTHER_TOKENIZER}"
        )
    return value


def _template(keys: Mapping[str, Any]) -> str | None:
    value = keys.get(_TEMPLATE)
    return value if isinstance(value, str) else None


def _ends(path: Path, keys: Mapping[str, Any], size: int) -> tuple[int, ...]:
    """The ids that end a text, each once."""
    found = [_id(path, keys, name, size) for name in _ENDS]
    return tuple(dict.fromkeys(id for id in found if id is not None))


def _id(path: Path, keys: Mapping[str, Any], name: str, size: int) -> int | None:
    value = keys.get(_PREFIX + name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
        raise BitNetError(
            f"{path}: {_PREFIX}{name}: got {value!r:.40}, expected an id below {size}; {_OTHER_TOKENIZER}"
        )
    return value
