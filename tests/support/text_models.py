"""Tiny models for tests of what people start: the verbs, the chat, the server and its page."""

from pathlib import Path

import pytest

from bitnet.config import ModelConfig
from bitnet.files.packed import write_packed
from bitnet.model import Transformer
from bitnet.text.json_tokenizer import JsonTokenizer, Settings
from bitnet.text.sentencepiece import train_sentencepiece
from bitnet.text.tokenizer import Tokenizer

TINY = {  # a model that `bitnet train` trains in a second, see `set_options`
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
WORDS = "the quick brown fox jumps over the lazy dog, né 한국 🙂 "
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}bot: "


def set_options(shape: dict[str, int]) -> list[str]:
    """The options of `bitnet train` that give a model this shape."""
    return [part for key, value in shape.items() for part in ("--set", f"model.{key}={value}")]


def model_for(tokenizer: Tokenizer, seed: int, context: int, width: int = 48, layers: int = 2) -> Transformer:
    """A model whose large random weights give varied text."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        initializer_range=0.3,
    )
    model = Transformer(config)
    model.init_weights(seed)
    return model


def packed_model(path: Path, tokenizer: Tokenizer, seed: int, context: int = 2048) -> Path:
    """A packed file of such a model."""
    return write_packed(path, model_for(tokenizer, seed, context), tokenizer)


def text_tokenizer() -> Tokenizer:
    """A small vocabulary with byte fallback."""
    return train_sentencepiece([WORDS * 30], 320)


def chat_tokenizer(text: str = "hello world, what is it? ") -> JsonTokenizer:
    """A tokenizer.json with a chat template; the test is skipped without the package `tokenizers`."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers comes with the extra of that name")
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    built.train_from_iterator([text * 9], trainer)
    built.add_special_tokens(["<|start|>", "<|end|>"])
    start, end = (built.token_to_id(name) for name in ("<|start|>", "<|end|>"))
    return JsonTokenizer(built.to_str(), Settings(built.get_vocab_size(), start, (end,), TEMPLATE))
