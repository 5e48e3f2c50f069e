"""Tokenizers of imported models, from their `tokenizer.json`, through Hugging Face's tokenizers package (an extra).

Byte-level BPE (LLaMA-3, BitNet b1.58 2B4T) and SentencePiece-like BPE both reduce to spellings, id -> bytes, with which
the rest of the project works. A chat template is a program by whoever made the model: it runs in jinja2's sandbox.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from bitnet.errors import BitNetError
from bitnet.text.sentencepiece import SPACE_MARK
from bitnet.text.tokenizer import BaseTokenizer, check_unicode

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")
FORMAT = "bitnet-tokenizer-json"
_MAX_CHAT = 1 << 22  # characters of a rendered conversation: a template may loop forever
_MAX_VOCAB = 1 << 22  # ids: their spellings take memory before a token is seen
_WRONG = "expected what the import wrote; import the model again"


@dataclass(frozen=True)
class Settings:
    """What tokenizer.json does not record."""

    vocab_size: int  # the model's; it may be larger than the number of tokens
    bos_id: int | None
    end_ids: tuple[int, ...]  # each ends a text: end of text, end of turn
    chat_template: str | None
    add_bos: bool | None = True  # whether a text starts with bos_id, where there is one; None: as tokenizer.json has it


class JsonTokenizer(BaseTokenizer):
    """A tokenizer.json and its settings."""

    kind = "tokenizer.json"

    def __init__(self, text: str, settings: Settings) -> None:
        """Raises BitNetError where the tokenizers package is missing or cannot read `text`."""
        self._text, self._model = text, _parse(text)
        self._model.encode_special_tokens = True  # "<|eot_id|>" in a prompt is text, not a control token
        super().__init__(_spellings(self._model, settings.vocab_size))
        self.bos_id = settings.bos_id
        self.eos_id = settings.end_ids[0] if settings.end_ids else None
        self.settings = settings if settings.add_bos is not None else replace(settings, add_bos=self.starts_with_bos())

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self.settings.end_ids

    @property
    def add_bos(self) -> bool:
        return bool(self.settings.add_bos) and self.bos_id is not None

    @property
    def chat_template(self) -> str | None:
        return self.settings.chat_template

    @property
    def tokenizer_json(self) -> str:
        """The text of the tokenizer.json."""
        return self._text

    def tokens(self) -> list[str]:
        """The spelling of every id, "" for those that no token has."""
        return [self._model.id_to_token(id) or "" for id in range(self.vocab_size)]

    def added_tokens(self) -> dict[int, bool]:
        """The ids outside the BPE, and whether each is a control token."""
        return {id: bool(token.special) for id, token in self._model.get_added_tokens_decoder().items()}

    @property
    def unknown_token(self) -> str | None:
        """The token for text that cannot be encoded; None for a tokenizer that encodes any text."""
        return getattr(self._model.model, "unk_token", None)

    def starts_with_bos(self) -> bool:
        """Whether tokenizer.json itself puts BOS before a text."""
        ids = _call(self._model.encode, "", add_special_tokens=True).ids
        return self.bos_id is not None and ids[:1] == [self.bos_id]

    def encode(self, text: str) -> list[int]:
        check_unicode(text)
        ids: list[int] = _call(self._model.encode, text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def to_bytes(self) -> bytes:
        content = {"format": FORMAT, "version": 1, "tokenizer": self._text, **asdict(self.settings)}
        return json.dumps(content).encode("ascii")

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation, ready for the model's turn. messages: {"role", "content"} each.

        Raises BitNetError for a model without a template, for a template that fails, and for content that spells a
        control token, which could end the turn it is part of.
        """
        if self.chat_template is None:
            return super().encode_chat(messages)
        specials = [str(token) for token in self._model.get_added_tokens_decoder().values() if token.special]
        for message in messages:
            found = [special for special in specials if special in message["content"]]
            if found:
                raise BitNetError(f"chat: got the control token {found[0]} in a message, expected text; remove it")
        text = self._render(self.chat_template, messages)
        check_unicode(text)
        self._model.encode_special_tokens = False
        try:
            return _call(self._model.encode, text, add_special_tokens=False).ids
        finally:
            self._model.encode_special_tokens = True

    def _render(self, source: str, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise BitNetError(
                "chat: got a model with a chat template, expected the jinja2 package to run it; "
                "from a clone: pip install '.[tokenizers]'"
            ) from None

        def refuse(reason: str) -> str:
            raise jinja2.TemplateError(reason)

        # {% break %} and {% continue %}: published templates use them.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        name = {id: None if id is None else self._model.id_to_token(id) for id in (self.bos_id, self.eos_id)}
        values = {"bos_token": name[self.bos_id] or "", "eos_token": name[self.eos_id] or ""}
        try:
            template = environment.from_string(source)
            parts: list[str] = []
            size = 0
            for part in template.generate(messages=[dict(m) for m in messages], add_generation_prompt=True, **values):
                size += len(part)
                if size > _MAX_CHAT:
                    refuse(f"it wrote more than {_MAX_CHAT:,} characters")
                parts.append(part)
            return "".join(parts)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise BitNetError(f"chat: the model's template cannot be used: {error}; omit --chat") from error


def load_json_tokenizer(data: bytes) -> JsonTokenizer:
    """The tokenizer that `to_bytes` wrote. Raises BitNetError for damaged bytes."""
    try:
        content = json.loads(data)
        if content.pop("format") != FORMAT or content.pop("version") != 1:
            raise BitNetError(f"got a tokenizer of another format or version, {_WRONG}")
        text = content.pop("tokenizer")
        settings = Settings(**{**content, "end_ids": tuple(content["end_ids"])})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, BitNetError):
            raise
        raise BitNetError(f"got a tokenizer that cannot be read ({error}), {_WRONG}") from error
    ids = [settings.bos_id, *settings.end_ids]
    template = settings.chat_template
    if type(settings.add_bos) is not bool or not (template is None or isinstance(template, str)):
        raise BitNetError(f"got a tokenizer whose settings have the wrong types, {_WRONG}")
    if type(settings.vocab_size) is not int or not all(i is None or type(i) is int for i in ids):
        raise BitNetError(f"got a tokenizer whose ids are not whole numbers, {_WRONG}")
    if not 0 < settings.vocab_size <= _MAX_VOCAB or not all(i is None or 0 <= i < settings.vocab_size for i in ids):
        raise BitNetError(f"got a tokenizer of {settings.vocab_size} ids, with control ids {ids!r:.80}, {_WRONG}")
    if not isinstance(text, str):
        raise BitNetError(f"got a tokenizer whose text is a {type(text).__name__}, {_WRONG}")
    check_unicode(text)
    return JsonTokenizer(text, settings)


def _parse(text: str) -> "tokenizers.Tokenizer":
    try:
        import tokenizers
    except ImportError:
        raise BitNetError(
            "got a model with a tokenizer.json, expected the tokenizers package to read it; "
            "from a clone: pip install '.[tokenizers]'"
        ) from None
    return _call(tokenizers.Tokenizer.from_str, text)


def _call(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """What a function of the tokenizers package returns. Raises BitNetError for its errors and its panics."""
    try:
        return function(*args, **options)
    except BaseException as error:  # it raises Exception itself, or panics, which is not an Exception
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise BitNetError(f"got a tokenizer.json that cannot be used ({error}); download it again") from error
        raise


def _spellings(model: "tokenizers.Tokenizer", vocab_size: int) -> list[bytes]:
    """Id -> bytes. Raises BitNetError for a decoder that is neither byte-level nor SentencePiece-like."""
    vocab = model.get_vocab(with_added_tokens=True)
    if vocab and max(vocab.values()) >= vocab_size:
        raise BitNetError(
            f"got a tokenizer with ids up to {max(vocab.values())}, expected {vocab_size} as in the model; use its own"
        )
    # From the decoder's state: all of LLaMA-3's tokenizer.json would take 90 MB in Python's objects.
    decoders = _decoder_types(None if model.decoder is None else json.loads(model.decoder.__getstate__()))
    if "ByteLevel" in decoders:
        alphabet = byte_alphabet()

        def spell(token: str) -> bytes:
            return bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode()
    elif "ByteFallback" in decoders or "Metaspace" in decoders:
        hexadecimal = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}

        def spell(token: str) -> bytes:
            return hexadecimal.get(token) or token.replace(SPACE_MARK, " ").encode()
    else:
        raise BitNetError(
            f"got a tokenizer.json with the decoder {sorted(decoders)}, expected ByteLevel or ByteFallback; "
            "other tokenizers are not supported"
        )
    spellings = [b""] * vocab_size
    for token, id in vocab.items():
        spellings[id] = spell(token)
    for id, added in model.get_added_tokens_decoder().items():
        spellings[id] = b"" if added.special else added.content.encode()
    return spellings


def _decoder_types(part: Any) -> set[str]:
    """The types in a decoder of tokenizer.json, those inside a Sequence included."""
    if not isinstance(part, dict):
        return set()
    inner = part.get("decoders", [])
    return {str(part.get("type"))} | set(
        chain.from_iterable(_decoder_types(p) for p in inner if isinstance(inner, list))
    )


def byte_alphabet() -> dict[str, int]:
    """Character -> byte: GPT-2's alphabet, in which every byte is a printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
