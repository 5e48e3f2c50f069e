"""The tokenizer files of a Hugging Face folder.

A SentencePiece model of ours is written as `tokenizer.model` and as `tokenizer.json`, which give the same ids. Other
tokenizers are read from `tokenizer.model` where it loses no text and holds all of the folder's settings, else from
`tokenizer.json`.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import singledispatch
from pathlib import Path
from typing import Any, NamedTuple

from bitnet.errors import BitNetError
from bitnet.files.hf.tokenizer_json import sentencepiece_json
from bitnet.files.json_file import read_json
from bitnet.files.sentencepiece_model import read_pieces
from bitnet.text.json_tokenizer import JsonTokenizer, Settings
from bitnet.text.sentencepiece import SentencePieceTokenizer
from bitnet.text.tokenizer import Tokenizer

FILES = ("tokenizer.model", "tokenizer.json")
_MAX_TOKENIZER = 1 << 27  # bytes; LLaMA-3's tokenizer.json has 17 MB
_OTHER_TOKENIZER = "give another one (--tokenizer FOLDER), or none (--tokenizer none)"


def token_ids(tokenizer: Tokenizer | None) -> dict[str, int | list[int] | None]:
    """bos_token_id and eos_token_id as config.json has them."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    ends = list(tokenizer.end_ids)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else tokenizer.eos_id}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """Write a tokenizer's files. Raises BitNetError for a kind that transformers has no class for."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    model = _model_files(tokenizer)
    for name, content in model.files.items():
        (folder / name).write_bytes(content)
    if model.unknown_token is not None:
        settings["unk_token"] = model.unknown_token
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    for key, id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if id is not None:
            settings[key] = model.tokens[id]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


class _ModelFiles(NamedTuple):
    files: dict[str, bytes]  # by name
    tokens: list[str]  # by id
    unknown_token: str | None  # to be named in tokenizer_config.json


@singledispatch
def _model_files(tokenizer: Tokenizer) -> _ModelFiles:
    raise BitNetError(
        f"export: got a tokenizer of kind '{tokenizer.kind}', which other tools cannot read; train with "
        "--tokenizer sentencepiece"
    )


@_model_files.register
def _(tokenizer: SentencePieceTokenizer) -> _ModelFiles:
    data = tokenizer.to_bytes()
    model = read_pieces(data)
    text = sentencepiece_json(model, tokenizer.bos_id)
    tokens = [piece.text for piece in model.pieces]
    return _ModelFiles({"tokenizer.model": data, "tokenizer.json": text.encode()}, tokens, tokens[0])


@_model_files.register
def _(tokenizer: JsonTokenizer) -> _ModelFiles:
    return _ModelFiles({"tokenizer.json": tokenizer.tokenizer_json.encode()}, tokenizer.tokens(), None)


def read_tokenizer(
    folder: Path, config: Mapping[str, Any], vocab_size: int, files: Collection[str] = FILES
) -> Tokenizer | None:
    """The tokenizer of a folder, None where it has none. Raises BitNetError for one that cannot be used.

    config: the values of config.json, {} without one. files: those of `FILES` that may be read.
    """
    model = folder / "tokenizer.model"
    path = folder / "tokenizer.json"
    has_json = "tokenizer.json" in files and path.is_file()
    found = _read_sentencepiece(model, vocab_size) if model.name in files else None
    if found is None and not has_json:
        if model.name in files and model.is_file():
            raise BitNetError(
                f"{folder}: got a tokenizer.model that loses text and no tokenizer.json; {_OTHER_TOKENIZER}"
            )
        return None
    if has_json and path.stat().st_size > _MAX_TOKENIZER:
        raise BitNetError(
            f"{path}: got {path.stat().st_size:,} bytes, expected at most {_MAX_TOKENIZER:,}; {_OTHER_TOKENIZER}"
        )
    try:
        settings = _read_settings(folder, config, vocab_size, path if has_json else None)
        if found is not None:
            return _with_settings(found, settings, path if has_json else None)
        return _from_json(path, settings)
    except (BitNetError, UnicodeDecodeError, RecursionError) as error:
        raise BitNetError(f"{path if has_json else model}: {error}") from error


def _from_json(path: Path, settings: Settings) -> JsonTokenizer:
    """The tokenizer of a tokenizer.json, which alone decides whether texts start with BOS, as in transformers."""
    return JsonTokenizer(path.read_text(encoding="utf-8"), replace(settings, add_bos=None))


def _with_settings(found: SentencePieceTokenizer, settings: Settings, path: Path | None) -> Tokenizer:
    """A SentencePiece model, or a JsonTokenizer where the folder has settings that the model cannot hold."""
    complete = (
        settings.bos_id in (None, found.bos_id)
        and settings.end_ids in ((), (found.eos_id,))
        and settings.chat_template is None
    )
    if path is None:
        if complete and settings.add_bos:
            return found
        bos = settings.bos_id if settings.add_bos else None
        return JsonTokenizer(sentencepiece_json(read_pieces(found.to_bytes()), bos), settings)
    try:
        other = _from_json(path, settings)
    except BitNetError:
        if complete:
            return found  # without the tokenizers package, say
        raise
    return found if complete and other.add_bos == found.add_bos else other


def _read_sentencepiece(path: Path, vocab_size: int) -> SentencePieceTokenizer | None:
    """The tokenizer of a tokenizer.model; None for one that loses text or has another number of tokens."""
    if not path.is_file() or path.stat().st_size > _MAX_TOKENIZER:
        return None
    try:
        tokenizer = SentencePieceTokenizer(path.read_bytes())
    except BitNetError:
        return None  # it adds a prefix or normalises: tokenizer.json can hold that
    return tokenizer if tokenizer.vocab_size == vocab_size else None


def _read_settings(folder: Path, config: Mapping[str, Any], vocab_size: int, path: Path | None) -> Settings:
    """A tokenizer's settings in the folder's JSON files. path: its tokenizer.json, if any, which maps names to ids."""
    generation, own = (
        _read_if_there(folder / "generation_config.json"),
        _read_if_there(folder / "tokenizer_config.json"),
    )
    ends: list[int] = []
    for values in (generation, config):
        value = values.get("eos_token_id")
        ends += value if isinstance(value, list) else [] if value is None else [value]
    starts = [values["bos_token_id"] for values in (config, generation) if values.get("bos_token_id") is not None]
    if path is not None and not (starts and ends):  # a tokenizer without a model
        named = _added_tokens(path)
        starts = starts or [named[token] for token in _token_names(own.get("bos_token")) if token in named]
        ends = ends or [named[token] for token in _token_names(own.get("eos_token")) if token in named]
    ids = [*ends, *starts]
    if not all(type(id) is int and 0 <= id < vocab_size for id in ids):
        raise BitNetError(f"got bos and eos ids {ids!r:.80}, expected ids below {vocab_size}; {_OTHER_TOKENIZER}")
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


def _token_names(token: Any) -> list[str]:
    """A token of tokenizer_config.json, a string or an object with one; nothing for any other value."""
    content = token.get("content") if isinstance(token, dict) else token
    return [content] if isinstance(content, str) else []


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
