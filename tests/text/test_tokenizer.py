"""Tokenizers: lossless on any Unicode text, cut-invariant at newlines, deterministic, safe on damaged files."""

import io
import lzma
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitnet.errors import BitNetError
from bitnet.text.characters import CharTokenizer, train_char
from bitnet.text.load import load_tokenizer
from bitnet.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from bitnet.text.tokenizer import Tokenizer

KOREAN = "세상의 모든 물은 하나의 바다로 흐른다.\n작은 모형도 꾸준히 배우면 말을 한다.\n"
TEXT = (
    "def add(a, b):\n        return a + b  # 12345 + 678\n\n\nThe quick brown fox jumps over the lazy dog.\n"
    "\tTabs, CR LF\r\nand <s>markup</s> such as <0x0A> or <unk>.\n"
) * 8 + KOREAN * 4
# Strings that some tokenizer somewhere changes: control-looking text, white space of all kinds, marks that
# SentencePiece uses itself, characters never seen in training.
AWKWARD = [
    "", " ", "   ", "\n", "\n\n\n", " \n  \n", "\t\t", "a\r\nb\rc\n", "\0", "a\0\0b\n\0",
    "<s>", "</s>", "<unk> <pad> <0x0A><0xFF>", "\u2581", "a\u2581b \u2581\u2581 \n\u2581", "\u2585\u2047",
    "\ufeffBOM", "\u2028\u2029\x85\x0b\x0c\x1c", "\u00a0\u3000\u200b", "e\u0301 \u00e9 \ufb01 \u212b",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467", "\uffff\U0010ffff\ufffd", KOREAN,
    "  lead and trail  ", "1234567890",
]  # fmt: skip
any_text = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t\r\0<s>\u2581ab1\u00e9")), max_size=80)
many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def model() -> SentencePieceTokenizer:
    return train_sentencepiece([TEXT], 500)


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_awkward_text_survives(model: SentencePieceTokenizer, text: str) -> None:
    ids = model.encode(text)
    assert model.decode(ids) == text
    assert not {0, 1, 2} & set(ids)  # no control token out of text
    assert model.byte_lengths()[ids].sum() == len(text.encode())


@many
@given(text=any_text)
def test_any_text_survives(model: SentencePieceTokenizer, text: str) -> None:
    ids = model.encode(text)
    assert model.decode(ids) == text
    assert all(2 < id < model.vocab_size for id in ids)


@many
@given(before=any_text, after=any_text)
def test_cut_after_newline_changes_nothing(model: SentencePieceTokenizer, before: str, after: str) -> None:
    assert model.encode(before + "\n" + after) == model.encode(before + "\n") + model.encode(after)
    assert model.encode("\n") == [3 + ord("\n")]


def test_long_texts_and_batches_equal_single_lines(model: SentencePieceTokenizer) -> None:
    draw = random.Random(random.getrandbits(32))
    text = "".join(draw.choice(TEXT.splitlines(keepends=True)) for _ in range(3000)) + "x" * 5000
    by_line = [id for line in text.split("\n") for id in [*model.encode(line), 3 + ord("\n")]][:-1]
    assert model.encode(text) == by_line
    texts = [text, "", "\n", "a\u2581b", text[:4097], text[100:2149]]
    expected = [model.encode(item) for item in texts]
    assert model.encode_batch(texts) == expected
    assert model.encode_batch(texts, threads=2) == expected
    assert model.encode_batch([]) == []


@many
@given(data=st.data())
def test_stream_equals_decode(model: SentencePieceTokenizer, data: st.DataObject) -> None:
    # Byte tokens alone reach every invalid UTF-8 sequence; all ids reach every mixture.
    ids = data.draw(st.lists(st.one_of(st.integers(0, model.vocab_size - 1), st.integers(3, 258)), max_size=40))
    decoder = model.stream()
    assert "".join([decoder.push(id) for id in ids] + [decoder.flush()]) == model.decode(ids)
    assert decoder.flush() == ""


def test_stream_holds_back_incomplete_characters(model: SentencePieceTokenizer) -> None:
    decoder = model.stream()
    ids = model.encode("\U0001f600")
    assert [decoder.push(id) for id in ids] == ["", "", "", "\U0001f600"]
    assert decoder.push(ids[0]) == ""
    assert decoder.push(model.encode("a")[0]) == "\ufffda"
    assert decoder.push(1) == ""


def test_decode_drops_control_ids_and_refuses_foreign_ones(model: SentencePieceTokenizer) -> None:
    assert model.decode([1, *model.encode("hello\n"), 2, 0]) == "hello\n"
    assert model.decode(np.array(model.encode("hello"))) == "hello"
    for bad in (-1, model.vocab_size):
        with pytest.raises(BitNetError, match=rf"got the token id {bad}, expected 0 \.\. "):
            model.decode([bad])
        with pytest.raises(BitNetError, match="got the token id"):
            model.stream().push(bad)


def test_layout_of_ids(model: SentencePieceTokenizer) -> None:
    assert (model.kind, model.vocab_size, model.bos_id, model.eos_id) == ("sentencepiece", 500, 1, 2)
    assert [model.decode([3 + byte]) for byte in range(128)] == [chr(byte) for byte in range(128)]
    assert model.byte_lengths().shape == (500,)
    assert model.byte_lengths()[:4].tolist() == [0, 0, 0, 1]


def test_digits_are_split_and_spaces_are_merged(model: SentencePieceTokenizer) -> None:
    assert len(model.encode("12345")) == 5
    assert len(model.encode("        return")) < 8


def test_lone_surrogate_is_refused(model: SentencePieceTokenizer) -> None:
    with pytest.raises(BitNetError, match=r"lone surrogate '\\ud800' at position 2"):
        model.encode("ab\ud800")
    with pytest.raises(BitNetError, match="lone surrogate"):
        train_sentencepiece(["ab\ud800"], 500)
    with pytest.raises(BitNetError, match="lone surrogate"):
        train_char(["ab\ud800"])


def test_training_is_deterministic(model: SentencePieceTokenizer) -> None:
    assert train_sentencepiece(iter([TEXT]), 500).to_bytes() == model.to_bytes()


def test_training_samples_evenly_and_with_the_seed() -> None:
    # A hundred stretches of text with a letter pair each: a prefix would know only the first ones.
    pairs = [chr(ord("a") + i // 10) + chr(ord("A") + i % 10) for i in range(100)]
    texts = [f"{pair * 30}\n" * 700 for pair in pairs]  # 42 KB each
    small = train_sentencepiece(texts, 400, sample_bytes=1_000_000, seed=1)
    assert small.to_bytes() == train_sentencepiece(iter(texts), 400, sample_bytes=1_000_000, seed=1).to_bytes()
    assert small.to_bytes() != train_sentencepiece(texts, 400, sample_bytes=1_000_000, seed=2).to_bytes()
    assert any(len(small.encode(pair * 8)) <= 8 for pair in pairs[90:])


def test_reading_is_lazy() -> None:
    pulled = 0

    def endless_enough() -> object:
        nonlocal pulled
        for _ in range(50):
            pulled += 1
            yield TEXT

    train_sentencepiece(endless_enough(), 300, sample_bytes=10_000)  # type: ignore[arg-type]
    assert pulled == 50


@pytest.mark.parametrize("text", ["a", "ab", "ab ab", "\u2581\u2585x", "中", "x" * 200_000, "中文" * 70_000])
def test_small_or_odd_corpora_give_the_largest_vocabulary_they_support(text: str) -> None:
    tokenizer = train_sentencepiece([text], 8192)
    assert 260 <= tokenizer.vocab_size < 8192
    for sample in (text[:1000], *AWKWARD):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample


@pytest.mark.parametrize("vocab_size", [260, 261, 262, 263, 300])
def test_a_large_alphabet_fits_a_small_vocabulary(vocab_size: int) -> None:
    text = "".join(chr(0xAC00 + i) for i in range(3000)) * 2 + KOREAN
    tokenizer = train_sentencepiece([text], vocab_size)
    assert tokenizer.vocab_size <= vocab_size
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_lines_are_not_lost() -> None:
    text = "zebra quilt " * 20_000  # one line of 240 KB; SentencePiece by default drops lines over 4,192 bytes
    tokenizer = train_sentencepiece([text], 300)
    assert len(tokenizer.encode("zebra quilt zebra quilt")) <= 5


@pytest.mark.parametrize("texts", [[], [""], ["", "\n\n"], ["\0\u2581\n"]], ids=ascii)
def test_nothing_to_train_on(texts: list[str]) -> None:
    with pytest.raises(BitNetError, match="got no text"):
        train_sentencepiece(texts, 1000)


def test_vocab_size_has_a_floor() -> None:
    with pytest.raises(BitNetError, match="got vocab_size 259, expected at least 260"):
        train_sentencepiece([TEXT], 259)


def test_training_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    train_sentencepiece([TEXT], 300)
    assert capfd.readouterr() == ("", "")


def test_korean_reviews_survive(shared: Path) -> None:
    with lzma.open(shared / "korean-reviews.txt.xz", "rt", encoding="utf-8", newline="") as file:
        text = file.read(400_000)
    tokenizer = train_sentencepiece([text], 4000)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text)  # whole syllables and words, not three bytes a syllable


# --- characters ---


@many
@given(text=any_text.filter(bool), data=st.data())
def test_char_round_trip(text: str, data: st.DataObject) -> None:
    tokenizer = train_char([text[:3], text[3:]])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == [sorted(set(text)).index(character) for character in text]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    decoder = tokenizer.stream()
    assert "".join([decoder.push(id) for id in ids] + [decoder.flush()]) == tokenizer.decode(ids)
    again = load_tokenizer("char", tokenizer.to_bytes())
    assert again.encode(text) == tokenizer.encode(text)
    assert again.to_bytes() == tokenizer.to_bytes()


@pytest.mark.parametrize("stranger", ["B", "\0", "é", "z", "\U0010ffff", "\ud800"], ids=ascii)
def test_char_names_an_unknown_character(stranger: str) -> None:
    tokenizer = train_char(["ACk\n"])
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (
        "char",
        4,
        None,
        None,
    )
    with pytest.raises(BitNetError) as caught:
        tokenizer.encode("AC\n" + stranger + "A" + stranger)
    assert f"got the character {stranger!a} at position 3" in str(caught.value)


def test_char_needs_text() -> None:
    with pytest.raises(BitNetError, match="got no characters"):
        train_char(["", ""])


# --- files ---


def test_reload_gives_the_same_tokenizer(model: SentencePieceTokenizer) -> None:
    again = load_tokenizer("sentencepiece", model.to_bytes())
    assert again.to_bytes() == model.to_bytes()
    assert again.encode(TEXT) == model.encode(TEXT)
    assert again.kind == "sentencepiece"


def test_unknown_kind() -> None:
    with pytest.raises(BitNetError, match="got tokenizer kind 'bpe', expected 'sentencepiece', 'char' or"):
        load_tokenizer("bpe", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b"null", b"1" * 5000,
        b'{"format": "bitnet-char", "version": 2, "characters": "ab"}',
        b'{"format": "bitnet-char", "version": 1}',
        b'{"format": "bitnet-char", "version": 1, "characters": ""}',
        b'{"format": "bitnet-char", "version": 1, "characters": ["a"]}',
        b'{"format": "bitnet-char", "version": 1, "characters": "ba"}',
        b'{"format": "bitnet-char", "version": 1, "characters": "aa"}',
        b'{"format": "bitnet-char", "version": 1, "characters": "\\ud800"}',
    ],
    ids=lambda data: ascii(data[:60]),
)  # fmt: skip
@pytest.mark.parametrize("kind", ["char", "sentencepiece"])
def test_damaged_files(kind: str, data: bytes) -> None:
    with pytest.raises(BitNetError) as caught:
        load_tokenizer(kind, data)
    assert "\n" not in str(caught.value)


def test_mutated_models_give_a_lossless_tokenizer_or_our_error(model: SentencePieceTokenizer) -> None:
    original = model.to_bytes()
    draw = random.Random(random.getrandbits(32))
    for _ in range(1500):
        data = bytearray(original)
        for _ in range(draw.choice((1, 1, 4))):
            at = draw.randrange(len(data))
            match draw.randrange(4):
                case 0:
                    data[at] ^= 1 << draw.randrange(8)
                case 1:
                    del data[at : at + draw.randrange(1, 20)]
                case 2:
                    data[at:at] = draw.randbytes(draw.randrange(1, 9))
                case _:
                    del data[at:]
            if not data:
                break
        try:
            mutant = load_tokenizer("sentencepiece", bytes(data))
        except BitNetError:
            continue
        mutant.decode(mutant.encode(TEXT[:300] + AWKWARD[-1]))


def test_foreign_models_that_lose_text_are_refused() -> None:
    lossy: dict[str, dict[str, Any]] = {
        "dummy prefix": {"add_dummy_prefix": True, "byte_fallback": True},
        "no bytes": {"add_dummy_prefix": False, "byte_fallback": False},
    }
    for options in lossy.values():
        file = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.split("\n")),
            model_writer=file,
            model_type="bpe",
            vocab_size=400,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
        with pytest.raises(BitNetError, match="SentencePiece model"):
            load_tokenizer("sentencepiece", file.getvalue())


def test_every_tokenizer_follows_the_protocol(model: SentencePieceTokenizer) -> None:
    both: list[Tokenizer] = [model, CharTokenizer("ab")]
    for tokenizer in both:
        assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
        assert tokenizer.end_ids == tuple(id for id in [tokenizer.eos_id] if id is not None)
        assert tokenizer.add_bos == (tokenizer.bos_id is not None)
        assert tokenizer.chat_template is None
        with pytest.raises(BitNetError, match="without a chat template"):
            tokenizer.encode_chat([{"role": "user", "content": "ab"}])
