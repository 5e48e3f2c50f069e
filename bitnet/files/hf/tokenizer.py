"""The tokenizer files of a Hugging Face folder.

Ours are written as `tokenizer.model` (SentencePiece) and `tokenizer.json` (tokenizers), which give the same ids. Others
are read from whichever of the two we hold without loss: `tokenizer.model` where the folder says nothing beyond it.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitnet.errors import BitNetError
from bitnet.files.hf.tokenizer_json import sentencepiece_json
from bitnet.files.json_file import read_json
from bitnet.files.sentencepiece_model import read_pieces
from bitnet.text.json_tokenizer import JsonTokenizer, Settings
from bitnet.text.sentencepiece import SentencePieceTokenizer
from bitnet.text.tokenizer import Tokenizer

FILES = ("tokenizer.model", "tokenizer.json")
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


def read_tokenizer(
    folder: Path, config: Mapping[str, Any], vocab_size: int, files: Collection[str] = FILES
) -> Tokenizer | None:
    """The tokenizer of a folder, None where it has none. Raises BitNetError for one that cannot be used.

    config: the values of config.json, or nothing. files: which of `FILES` to look at.
    """
    model = folder / "tokenizer.model"
    path = folder / "tokenizer.json"
    there = "tokenizer.json" in files and path.is_file()
    found = _sentencepiece(model, vocab_size) if model.name in files else None
    if found is None and not there:
        if model.name in files and model.is_file():
            raise BitNetError(f"{folder}: got a tokenizer.model that loses text and no tokenizer.json; {_WAY_OUT}")
        return None
    if there and path.stat().st_size > _MAX_TOKENIZER:
        raise BitNetError(f"{path}: got {path.stat().st_size:,} bytes, expected at most {_MAX_TOKENIZER:,}; {_WAY_OUT}")
    try:
        settings = _settings(folder, config, vocab_size, path if there else None)
        if found is not None:
            return _with_settings(found, settings, path if there else None)
        return _from_json(path, settings)
    except (BitNetError, UnicodeDecodeError, RecursionError) as error:
        raise BitNetError(f"{path if there else model}: {error}") from error


def _from_json(path: Path, settings: Settings) -> JsonTokenizer:
    """A tokenizer.json, which says itself whether texts start with BOS: transformers goes by it alone."""
    tokenizer = JsonTokenizer(path.read_text(encoding="utf-8"), settings)
    tokenizer.settings = replace(settings, add_bos=tokenizer.starts_with_bos())
    return tokenizer


def _with_settings(found: SentencePieceTokenizer, settings: Settings, path: Path | None) -> Tokenizer:
    """A SentencePiece model, or where it does not hold all that the folder says, a tokenizer that does."""
    enough = (
        settings.bos_id in (None, found.bos_id)
        and settings.end_ids in ((), (found.eos_id,))
        and settings.chat_template is None
    )
    if path is None:
        if enough and settings.add_bos:
            return found
        bos = settings.bos_id if settings.add_bos else None
        return JsonTokenizer(sentencepiece_json(read_pieces(found.to_bytes()), bos), settings)
    try:
        other = _from_json(path, settings)
    except BitNetError:
        if enough:
            return found  # without the tokenizers package, say
        raise
    return found if enough and other.settings.add_bos == (found.bos_id is not None) else other


def _sentencepiece(path: Path, vocab_size: int) -> SentencePieceTokenizer | None:
    """A model that gives text back unchanged and has as many tokens as the model; None for another one."""
    if not path.is_file() or path.stat().st_size > _MAX_TOKENIZER:
        return None
    try:
        tokenizer = SentencePieceTokenizer(path.read_bytes())
    except BitNetError:
        return None  # with a prefix, or normalising: tokenizer.json holds it
    return tokenizer if tokenizer.vocab_size == vocab_size else None


def _settings(folder: Path, config: Mapping[str, Any], vocab_size: int, path: Path | None) -> Settings:
    """What the JSON files beside a tokenizer say of it. path: its tokenizer.json, if any, which knows ids by name."""
    generation, own = _optional(folder / "generation_config.json"), _optional(folder / "tokenizer_config.json")
    ends: list[int] = []
    for values in (generation, config):
        value = values.get("eos_token_id")
        ends += value if isinstance(value, list) else [] if value is None else [value]
    starts = [values["bos_token_id"] for values in (config, generation) if values.get("bos_token_id") is not None]
    if path is not None and not (starts and ends):  # a tokenizer that came without its model
        named = _added_tokens(path)
        starts = starts or [named[token] for token in _names(own.get("bos_token")) if token in named]
        ends = ends or [named[token] for token in _names(own.get("eos_token")) if token in named]
    ids = [*ends, *starts]
    if not all(type(id) is int and 0 <= id < vocab_size for id in ids):
        raise BitNetError(f"got bos and eos ids {ids!r:.80}, expected ids below {vocab_size}; {_WAY_OUT}")
    add_bos = own.get("add_bos_token", True)
    if not isinstance(add_bos, bool):
        raise BitNetError(f"tokenizer_config.json: add_bos_token: got {add_bos!r:.40}, expected true or false")
    template = own.get("chat_template")
    beside = folder / "chat_template.jinja"
    if beside.is_file() and beside.stat().st_size < 1 << 20:
        template = beside.read_text(encoding="utf-8")
    if isinstance(template, list):  # several, by name
        default = [t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = default[0] if default else None
    template = template if isinstance(template, str) else None
    return Settings(vocab_size, starts[0] if starts else None, tuple(dict.fromkeys(ends)), template, add_bos)


def _added_tokens(path: Path) -> dict[str, int]:
    """Id of every added token of a tokenizer.json, by its text."""
    found = read_json(path, _MAX_TOKENIZER).get("added_tokens")
    tokens = [token for token in found if isinstance(token, dict)] if isinstance(found, list) else []
    return {token["content"]: token.get("id", -1) for token in tokens if isinstance(token.get("content"), str)}


def _names(token: Any) -> list[str]:
    """A token as tokenizer_config.json spells it, a text or an object with one; nothing for another thing."""
    content = token.get("content") if isinstance(token, dict) else token
    return [content] if isinstance(content, str) else []


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
