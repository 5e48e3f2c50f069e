"""The tokenizer files of a Hugging Face folder.

Ours are written as `tokenizer.model` (SentencePiece) and `tokenizer.json` (tokenizers), which give the same ids. Others
are read from whichever of the two we hold without loss, `tokenizer.model` first.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitnet.errors import BitNetError
from bitnet.formats.safetensors_file import read_json
from bitnet.formats.sentencepiece_model import read_pieces
from bitnet.formats.tokenizer_json import sentencepiece_json
from bitnet.json_tokenizer import JsonTokenizer, Settings
from bitnet.tokenizer import SentencePieceTokenizer, Tokenizer

_MAX_TOKENIZER = 1 << 27  # bytes; LLaMA-3's tokenizer.json has 17 MB
_WAY_OUT = "give another one (--tokenizer FOLDER), or none (--tokenizer none)"


def token_ids(tokenizer: Tokenizer | None) -> dict[str, int | list[int] | None]:
    """bos_token_id and eos_token_id as config.json has them."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    ends = list(tokenizer.stop_ids) if isinstance(tokenizer, JsonTokenizer) else []
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else tokenizer.eos_id}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """Write a tokenizer's files. Raises BitNetError for a kind that transformers has no class for."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        data = tokenizer.to_bytes()
        model = read_pieces(data)
        (folder / "tokenizer.model").write_bytes(data)
        text = sentencepiece_json(model, tokenizer.bos_id)
        names = [piece.text for piece in model.pieces]
        settings["unk_token"] = names[0]
    elif isinstance(tokenizer, JsonTokenizer):
        text, names = tokenizer.tokenizer_json, tokenizer.tokens()
        if tokenizer.settings.chat_template is not None:
            settings["chat_template"] = tokenizer.settings.chat_template
    else:
        raise BitNetError(
            f"export: got a tokenizer of kind '{tokenizer.kind}', which other tools cannot read; train with "
            "--tokenizer sentencepiece"
        )
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    for key, id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if id is not None:
            settings[key] = names[id]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def read_tokenizer(folder: Path, config: Mapping[str, Any], vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a folder, None where it has none. Raises BitNetError for one that cannot be used."""
    found = _sentencepiece(folder / "tokenizer.model", vocab_size)
    if found is not None:
        return found
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            raise BitNetError(f"{folder}: got a tokenizer.model that loses text and no tokenizer.json; {_WAY_OUT}")
        return None
    if path.stat().st_size > _MAX_TOKENIZER:
        raise BitNetError(f"{path}: got {path.stat().st_size:,} bytes, expected at most {_MAX_TOKENIZER:,}; {_WAY_OUT}")
    try:
        return JsonTokenizer(path.read_text(encoding="utf-8"), _settings(folder, config, vocab_size))
    except (BitNetError, UnicodeDecodeError, RecursionError) as error:
        raise BitNetError(f"{path}: {error}") from error


def _sentencepiece(path: Path, vocab_size: int) -> SentencePieceTokenizer | None:
    """A model that gives text back unchanged and has as many tokens as the model; None for another one."""
    if not path.is_file() or path.stat().st_size > _MAX_TOKENIZER:
        return None
    try:
        tokenizer = SentencePieceTokenizer(path.read_bytes())
    except BitNetError:
        return None  # with a prefix, or normalising: tokenizer.json holds it
    return tokenizer if tokenizer.vocab_size == vocab_size else None


def _settings(folder: Path, config: Mapping[str, Any], vocab_size: int) -> Settings:
    generation = _optional(folder / "generation_config.json")
    ends: list[int] = []
    for values in (generation, config):
        value = values.get("eos_token_id")
        ends += value if isinstance(value, list) else [] if value is None else [value]
    bos = config.get("bos_token_id", generation.get("bos_token_id"))
    ids = [*ends, *([] if bos is None else [bos])]
    if not all(type(id) is int and 0 <= id < vocab_size for id in ids):
        raise BitNetError(f"got bos and eos ids {ids!r:.80}, expected ids below {vocab_size}; {_WAY_OUT}")
    template = _optional(folder / "tokenizer_config.json").get("chat_template")
    beside = folder / "chat_template.jinja"
    if beside.is_file() and beside.stat().st_size < 1 << 20:
        template = beside.read_text(encoding="utf-8")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return Settings(vocab_size, bos, tuple(dict.fromkeys(ends)), template if isinstance(template, str) else None)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
