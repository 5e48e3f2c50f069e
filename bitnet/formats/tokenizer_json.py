"""The `tokenizer.json` of Hugging Face's tokenizers, made from what other formats hold.

SentencePiece BPE   pieces and scores -> merges in the order of the scores; characters without a piece in bytes
byte-level BPE      tokens and merges, plus the pattern that cuts text into words
"""

import json
from collections.abc import Collection, Sequence
from typing import Any

from bitnet.errors import BitNetError
from bitnet.formats.sentencepiece_model import CONTROL, UNKNOWN, USER, Pieces, merges

# How text is cut before byte pairs are merged, by llama.cpp's names. The pattern is LLaMA-3's, as its tokenizer.json
# and llama.cpp spell it.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_PATTERNS = {"llama-bpe": _LLAMA_3, "llama3": _LLAMA_3, "llama-v3": _LLAMA_3}


def sentencepiece_json(model: Pieces, bos_id: int | None) -> str:
    """The tokenizer.json of a SentencePiece BPE model with byte fallback; encoding starts with `bos_id`, if any."""
    unknown = next((piece.text for piece in model.pieces if piece.type == UNKNOWN), None)
    added = [
        _added(id, piece.text, piece.type != USER)
        for id, piece in enumerate(model.pieces)
        if piece.type in (UNKNOWN, CONTROL, USER)
    ]
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": "\u2581"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {piece.text: id for id, piece in enumerate(model.pieces)},
        "merges": [list(pair) for pair in merges(model.pieces)],
    }
    return _document(
        added,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        post_processor=_start_with(bos_id, [piece.text for piece in model.pieces]),
        decoder={"type": "Sequence", "decoders": decoders},
        model=bpe,
    )


def byte_level_json(
    tokens: Sequence[str],
    merge_lines: Sequence[str],
    added: Sequence[int],
    special: Collection[int],
    pre: Any,
    bos_id: int | None,
) -> str:
    """The tokenizer.json of a byte-level BPE model. merge_lines: "left right", best first; added: ids outside the BPE.

    Raises BitNetError for a pre-tokenizer that is not known and for merges that are not two words.
    """
    if not isinstance(pre, str) or pre not in _PATTERNS:
        raise BitNetError(f"got the pre-tokenizer {pre!r:.40}, expected one of {', '.join(_PATTERNS)}")
    pairs = [line.split(" ") for line in merge_lines]
    if any(len(pair) != 2 for pair in pairs):
        raise BitNetError("got a merge that is not two words, expected 'left right'")
    outside = set(added)
    vocab = {token: id for id, token in enumerate(tokens) if id not in outside}
    if len(vocab) + len(outside) != len(tokens):
        raise BitNetError("got a token twice, expected all tokens to differ")
    pattern = {"type": "Split", "pattern": {"Regex": _PATTERNS[pre]}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,  # LLaMA-3: a whole word that is a token needs no merges
        "vocab": vocab,
        "merges": pairs,
    }
    return _document(
        [_added(id, tokens[id], id in special) for id in added],
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [pattern, to_bytes]},
        post_processor=_start_with(bos_id, tokens),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model=bpe,
    )


def _document(added: list[dict[str, Any]], **parts: Any) -> str:
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return json.dumps({**head, **parts}, ensure_ascii=False)


def _added(id: int, text: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": text, **flags, "special": special}


def _start_with(bos_id: int | None, tokens: Sequence[str]) -> dict[str, Any] | None:
    if bos_id is None:
        return None
    name = tokens[bos_id]
    first, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {name: {"id": name, "ids": [bos_id], "tokens": [name]}},
    }
