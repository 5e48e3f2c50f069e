"""Fixtures that the tests of file formats share."""

import random
from pathlib import Path

import pytest
from packed_models import CHARACTERS, trained

from bitnet.files.packed import write_packed
from bitnet.model import Transformer
from bitnet.text.characters import CharTokenizer
from bitnet.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    """Of two scripts, with fewer tokens than either test model may have."""
    words = ["".join(random.choices("abcdefghij", k=random.randint(1, 8))) for _ in range(400)]
    words += ["".join(chr(random.randrange(0xAC00, 0xAC40)) for _ in range(random.randint(1, 4))) for _ in range(300)]
    lines = [" ".join(random.choices(words, k=12)) for _ in range(400)]
    return train_sentencepiece(["\n".join(lines)], 400)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with packed weights, as published for 2B4T."""
    from hf_models import BASE, save_published, transformers_model  # skips where transformers is missing

    return save_published(transformers_model(BASE), tmp_path_factory.mktemp("published") / "in", "multiply")


@pytest.fixture
def model(seed: int) -> Transformer:
    """A trained model in the shape of `packed_models`."""
    return trained(seed)


@pytest.fixture
def file(model: Transformer, tmp_path: Path) -> Path:
    """A packed file of `model`, with a tokenizer."""
    return write_packed(tmp_path / "model.safetensors", model, CharTokenizer(CHARACTERS), info={"steps": 3})
