"""A small tokenizer in the manner of LLaMA-3, and models with its vocabulary."""

from bitnet.config import ModelConfig
from bitnet.model import Transformer
from bitnet.text.json_tokenizer import JsonTokenizer

# The way LLaMA-3 cuts text into words, spelt by hand for the oracle below.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
# 2B4T's, in its manner.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)
ALPHABET = "helo wrd'sSTt0123456789  .,!?-\t\n\u00e9" + "\u00f1\ud55c\uad6d\uc5b4\ub9d0\uc740 \u4e2d\U0001f600"
TEXTS = [
    "Hello world, it's 12345 o'clock.\n\n  Don't",
    "\uc548\ub155 \U0001f600 \u00e9\u0301\t x",
    "",
    " ",
    "\r\n\r\n a",
    "<|eot_id|>",
]


def model_for(tokenizer: JsonTokenizer, seed: int, width: int = 64) -> Transformer:
    shape = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "max_position_embeddings": 64}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_act="silu", qk_norm=False, **shape))
    model.init_weights(seed)
    return model


def wide_model(tokenizer: JsonTokenizer, seed: int) -> Transformer:
    return model_for(tokenizer, seed, 256)
