"""Fixtures that the tests of tokenizers share."""

import random
from typing import TYPE_CHECKING

import pytest
from bpe_models import PATTERN, SPECIALS, TEMPLATE, TEXTS

from bitnet.text.json_tokenizer import JsonTokenizer, Settings

if TYPE_CHECKING:
    import tokenizers


@pytest.fixture(scope="module")
def oracle() -> "tokenizers.Tokenizer":
    """A small LLaMA-3: byte-level BPE with its pattern, and its control tokens after the vocabulary."""
    pytest.importorskip("tokenizers", reason="tokenizers comes with the extra of that name")
    import tokenizers

    built = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = tokenizers.decoders.ByteLevel()
    words = ["".join(random.choices("helo wrd'st", k=random.randint(1, 9))) for _ in range(2000)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    built.train_from_iterator([" ".join(words), *TEXTS], trainer)
    built.add_special_tokens(SPECIALS)
    bos = (SPECIALS[0], built.token_to_id(SPECIALS[0]))
    built.post_processor = tokenizers.processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return built


@pytest.fixture
def ours(oracle: "tokenizers.Tokenizer") -> JsonTokenizer:
    size = oracle.get_vocab_size()
    ids = [oracle.token_to_id(special) for special in SPECIALS]
    return JsonTokenizer(oracle.to_str(), Settings(size + 5, ids[0], (ids[1], ids[2]), TEMPLATE))
