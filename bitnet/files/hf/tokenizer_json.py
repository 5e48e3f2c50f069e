"""The `tokenizer.json` of Hugging Face's tokenizers, built from what other formats hold, and parsed for them.

    SentencePiece BPE   pieces and scores <-> merges in the order of the scores; byte tokens for other characters
    byte-level BPE      tokens and merges, and the pattern that splits text into words

Other tokenizers are refused.
"""

import json
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from bitnet.errors import BitNetError
from bitnet.files.sentencepiece_model import CONTROL, UNKNOWN, USER, SentencePieceModel, merges

# How text is split before byte pairs are merged, by llama.cpp's names; of those of one pattern, llama.cpp writes the
# first. The pattern is LLaMA-3's, as in its tokenizer.json and in llama.cpp.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_PATTERNS = {"llama-bpe": _LLAMA_3, "llama3": _LLAMA_3, "llama-v3": _LLAMA_3}


def sentencepiece_json(model: SentencePieceModel, bos_id: int | None) -> str:
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
    return _document(
        added,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        post_processor=_add_bos_processor(bos_id, [piece.text for piece in model.pieces]),
        decoder={"type": "Sequence", "decoders": decoders},
        model=_bpe(
            {piece.text: id for id, piece in enumerate(model.pieces)},
            merges(model.pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        ),
    )


def byte_level_json(
    tokens: Sequence[str],
    merge_lines: Sequence[str],
    added: Sequence[int],
    special: Collection[int],
    pre: Any,
    bos_id: int | None,
) -> str:
    """The tokenizer.json of a byte-level BPE model.

    tokens: by id, "" where an id has none. merge_lines: "left right", best first. added: ids outside the BPE, special:
    those that are control tokens. pre: llama.cpp's name of the pre-tokenizer. bos_id: encoding starts with it, if any.
    Raises BitNetError for an unknown pre-tokenizer and for merges that are not two words.
    """
    if not isinstance(pre, str) or pre not in _PATTERNS:
        raise BitNetError(f"got the pre-tokenizer {pre!r:.40}, expected one of {', '.join(_PATTERNS)}")
    pairs = [line.split(" ") for line in merge_lines]
    if any(len(pair) != 2 for pair in pairs):
        raise BitNetError("got a merge that is not two words, expected 'left right'")
    outside = set(added)
    vocab = {token: id for id, token in enumerate(tokens) if token and id not in outside}
    if len(vocab) + len(outside) + sum(not token for token in tokens) != len(tokens):
        raise BitNetError("got a token twice, expected all tokens to differ")
    pattern = {"type": "Split", "pattern": {"Regex": _PATTERNS[pre]}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _document(
        [_added(id, tokens[id], id in special) for id in added],
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [pattern, to_bytes]},
        post_processor=_add_bos_processor(bos_id, tokens),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        # ignore_merges as in LLaMA-3: a word that is a token needs no merges.
        model=_bpe(vocab, pairs, ignore_merges=True),
    )


class BpeParts(NamedTuple):
    """What a GGUF file holds of a tokenizer besides its tokens."""

    pre: str  # llama.cpp's name of the pre-tokenizer; "" for SentencePiece
    merges: list[tuple[str, str]]  # best first
    prefix: bool = False  # a space is added before the text


def parse_tokenizer_json(text: str) -> BpeParts:
    """The inverse of `byte_level_json` and `sentencepiece_json`, for tokenizer.json files from anywhere.

    Raises BitNetError for any other tokenizer, which llama.cpp would not reproduce.
    """
    document = json.loads(text)
    model = document.get("model") or {}
    if model.get("type") != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise BitNetError(
            f"got a tokenizer of type {model.get('type')!r:.40}, expected BPE without dropout or prefixes"
        )
    if model.get("end_of_word_suffix"):
        raise BitNetError(f"got a BPE with the suffix {model['end_of_word_suffix']!r:.40} after words, expected none")
    for token in document.get("added_tokens") or []:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise BitNetError(
                f"got the token {token.get('content')!r:.40}, which strips spaces around it, expected none that does: "
                "GGUF cannot express it"
            )
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model.get("merges") or []]
    rules = [(left, right) for left, right in pairs]
    if any(" " in left + right for left, right in rules):
        raise BitNetError("got a merge of pieces with a space in them, expected none: GGUF separates pieces by a space")
    if model.get("byte_fallback"):
        return BpeParts("", rules, _adds_prefix(document))
    return BpeParts(_pre_tokenizer_name(document, bool(model.get("ignore_merges"))), rules)


def _pre_tokenizer_name(document: dict[str, Any], ignore_merges: bool) -> str:
    """llama.cpp's name of the way a byte-level BPE splits text."""
    if document.get("normalizer") is not None:
        raise BitNetError(
            f"got the normalizer {_short(document['normalizer'])}, expected none: llama.cpp does not normalise text"
        )
    parts = document.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", []) if parts.get("type") == "Sequence" else [parts]
    kinds = [part.get("type") for part in parts]
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("add_prefix_space") and not parts[1].get("use_regex", True):
        split = parts[0]
        pattern = (split.get("pattern") or {}).get("Regex")
        names = [name for name, known in _PATTERNS.items() if known == pattern]
        if names and split.get("behavior") == "Isolated" and not split.get("invert") and ignore_merges:
            return names[0]
    raise BitNetError(
        f"got the pre-tokenizer {_short(document.get('pre_tokenizer'))} {'with' if ignore_merges else 'without'} "
        f"ignore_merges, expected LLaMA-3's with it, which llama.cpp calls {next(iter(_PATTERNS))}"
    )


def _adds_prefix(document: dict[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer adds a space before a text. Raises BitNetError for other normalizers."""
    parts = document.get("normalizer") or {}
    parts = parts.get("normalizers", []) if parts.get("type") == "Sequence" else [parts]
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    first = {"type": "Prepend", "prepend": "\u2581"}
    if document.get("pre_tokenizer") is not None or parts not in ([mark], [first, mark]):
        got = f"{_short(document.get('normalizer'))} and {_short(document.get('pre_tokenizer'))}"
        raise BitNetError(f"got a normalizer and pre-tokenizer {got}, expected what SentencePiece does to spaces")
    return len(parts) == 2


def _short(part: Any) -> str:
    text = json.dumps(part, ensure_ascii=False)
    return text if len(text) <= 120 else text[:120] + "..."


def _document(added: list[dict[str, Any]], **parts: Any) -> str:
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return json.dumps({**head, **parts}, ensure_ascii=False)


def _bpe(vocab: dict[str, int], merges: Sequence[Sequence[str]], **options: Any) -> dict[str, Any]:
    """The "model" of a tokenizer.json. merges: (left, right), best first. options: other values than the defaults."""
    defaults = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {**defaults, **options, "vocab": vocab, "merges": [list(pair) for pair in merges]}


def _added(id: int, text: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": text, **flags, "special": special}


def _add_bos_processor(bos_id: int | None, tokens: Sequence[str]) -> dict[str, Any] | None:
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
