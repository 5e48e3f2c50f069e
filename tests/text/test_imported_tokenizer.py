"""Tokenizers of imported models, from and to Hugging Face folders, packed files and GGUF files."""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import child_process
import pytest
from bpe_models import ALPHABET, SPECIALS, TEMPLATE, TEXTS, model_for, wide_model

from bitnet.cli import main
from bitnet.config import ModelConfig
from bitnet.engine.load import load
from bitnet.errors import BitNetError
from bitnet.files.gguf.export import export_gguf
from bitnet.files.gguf.file import Float32, GgufFile, write_gguf
from bitnet.files.gguf.read import GgufSource
from bitnet.files.hf.export import export_hf
from bitnet.files.hf.read import HfSource
from bitnet.files.hf.tokenizer_json import sentencepiece_json
from bitnet.files.importing import import_model
from bitnet.files.sentencepiece_model import read_pieces
from bitnet.files.source import TrainedSource
from bitnet.generation import prompt_ids
from bitnet.model import Transformer
from bitnet.text.json_tokenizer import JsonTokenizer, Settings
from bitnet.text.sentencepiece import train_sentencepiece

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers comes with the extra of that name")


# ---- the first token ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("says", [None, True, False], ids=["says nothing", "says true", "says false"])
@pytest.mark.parametrize("itself", [True, False], ids=["puts it itself", "puts none"])
def test_texts_start_as_in_transformers(
    itself: bool, says: bool | None, ours: JsonTokenizer, seed: int, tmp_path: Path
) -> None:
    """BOS where AutoTokenizer puts one: by tokenizer.json alone, whatever tokenizer_config.json says."""
    transformers = pytest.importorskip("transformers", reason="transformers comes with the extra `interop`")
    folder = export_hf(TrainedSource(model_for(ours, seed), ours, {}), tmp_path / "hf", packed=False)
    if not itself:
        document = json.loads((folder / "tokenizer.json").read_text())
        document["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
        (folder / "tokenizer.json").write_text(json.dumps(document))
    if says is not None:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": says}))
    import_model(HfSource(folder), tmp_path / "m.safetensors", HfSource(folder).tokenizer)
    got = load(tmp_path / "m.safetensors").tokenizer
    expected = transformers.AutoTokenizer.from_pretrained(folder).encode("hello")
    assert (expected[0] == ours.bos_id) == itself
    assert prompt_ids(got, "hello") == list(expected)


@pytest.mark.parametrize("says", [True, False])
def test_a_sentencepiece_model_holds_less_than_its_folder(says: bool, seed: int, tmp_path: Path) -> None:
    """tokenizer.model has no second end id and no setting for texts without BOS: the files next to it do."""
    own = train_sentencepiece(["ab abc cab " * 200], 270)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 64}
    model = Transformer(ModelConfig(vocab_size=own.vocab_size, qk_norm=False, **shape))
    model.init_weights(seed)
    folder = export_hf(TrainedSource(model, own, {}), tmp_path / "hf", packed=False)
    assert HfSource(folder).tokenizer.kind == "sentencepiece"
    if says:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 7]}))
    else:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
        document = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**document, "post_processor": None}))
    for file in ("tokenizer.json", None):
        got = HfSource(folder).tokenizer
        assert got.kind == "tokenizer.json"
        assert prompt_ids(got, "abc") == [own.bos_id] * says + own.encode("abc")
        assert got.end_ids == ((2, 7) if says else (2,))
        if file:
            (folder / file).unlink()


# ---- the whole way --------------------------------------------------------------------------------------------


def test_import_and_generate(
    ours: JsonTokenizer, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_hf(TrainedSource(model_for(ours, seed), ours, {}), tmp_path / "hf", packed=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == list(ours.end_ids)
    packed = tmp_path / "m.safetensors"
    assert main(["import", str(folder), "-o", str(packed)]) == 0
    engine = load(packed)
    assert isinstance(engine.tokenizer, JsonTokenizer)
    assert engine.tokenizer.settings == ours.settings
    assert engine.tokenizer.encode(TEXTS[0]) == ours.encode(TEXTS[0])
    capsys.readouterr()
    for extra in ([], ["--chat"]):
        assert main(["generate", "-m", str(packed), "-p", "hello", "-n", "5", "-s", "1", "--json", *extra]) == 0
        report = json.loads(capsys.readouterr().out)
        expected = [ours.bos_id, *ours.encode("hello")]
        if extra:
            expected = ours.encode_chat([{"role": "user", "content": "hello"}])
        assert report["prompt_tokens"] == len(expected)
        assert report["ids"] == engine.generate(expected, 5, sampling(), stop=[ours.bos_id, *ours.end_ids])


def sampling() -> object:
    from bitnet.engine.sampling import Sampling

    return Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, seed=1)


def test_chat_without_a_template(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    from bitnet.files.packed import write_packed
    from bitnet.text.characters import train_char

    tokenizer = train_char(["abc"])
    model = Transformer(ModelConfig(vocab_size=3, hidden_size=64, intermediate_size=64, num_hidden_layers=1))
    model.init_weights(seed)
    write_packed(tmp_path / "m.safetensors", model, tokenizer)
    assert main(["generate", "-m", str(tmp_path / "m.safetensors"), "-p", "a", "--chat"]) == 2
    assert "--chat" in capsys.readouterr().err


def test_byte_level_bpe_of_a_gguf_file(
    ours: JsonTokenizer, oracle: "tokenizers.Tokenizer", seed: int, tmp_path: Path
) -> None:
    """As the published 2B4T has it: model gpt2, pre llama-bpe, tokens, merges, types."""
    model = model_for(ours, seed)
    path = export_gguf(TrainedSource(model, None, {}), tmp_path / "m.gguf", "q2_0")
    file = GgufFile(path)
    keys = {key: Float32(value) if isinstance(value, float) else value for key, value in file.keys.items()}
    tokens = [token or f"[PAD{i}]" for i, token in enumerate(ours.tokens())]
    merges = [" ".join(pair) for pair in json.loads(oracle.to_str())["model"]["merges"]]
    types = [3 if token in SPECIALS or token.startswith("[PAD") else 1 for token in tokens]
    keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens}
    keys |= {"tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": types, "tokenizer.chat_template": TEMPLATE}
    keys |= {f"tokenizer.ggml.{name}_token_id": tokens.index(t) for name, t in zip(("bos", "eos", "eot"), SPECIALS)}
    plan = [(p.name, p.shape, p.type) for p in file.tensors.values()]
    data = [file.read(name) for name in file.tensors]
    with path.open("wb") as out:
        write_gguf(out, keys, plan, iter(data))
    assert main(["import", str(path), "-o", str(tmp_path / "m.safetensors")]) == 0
    got = load(tmp_path / "m.safetensors").tokenizer
    assert got.settings == ours.settings
    for text in TEXTS:
        assert got.encode(text) == ours.encode(text), text
    assert prompt_ids(got, "hello") == [ours.bos_id, *ours.encode("hello")]  # what llama.cpp does where nothing is said
    for says in (True, False):
        with path.open("wb") as out:
            write_gguf(out, {**keys, "tokenizer.ggml.add_bos_token": says}, plan, iter(data))
        assert prompt_ids(GgufSource(path).tokenizer, "hello") == [ours.bos_id] * says + ours.encode("hello")
        assert GgufSource(path).tokenizer.starts_with_bos() == says
    with path.open("wb") as out:
        write_gguf(out, {**keys, "tokenizer.ggml.pre": "qwen2"}, plan, iter(data))
    assert main(["import", str(path), "-o", str(tmp_path / "n.safetensors")]) == 2
    assert not (tmp_path / "n.safetensors").exists()
    assert main(["import", str(path), "-o", str(tmp_path / "n.safetensors"), "--tokenizer", "none"]) == 0
    assert load(tmp_path / "n.safetensors").tokenizer is None


# In a process of its own: llama.cpp ends the process it is in on some errors.
LLAMA_CPP = """
import json, sys
import cyllama.llama.llama_cpp as llama
llama.disable_logging()
model = llama.LlamaModel(sys.argv[1])  # the vocabulary lives as long as it
vocab = model.get_vocab()
print(json.dumps([vocab.tokenize(line, False, False) for line in json.load(sys.stdin)]))
"""


def llama_cpp_tokens(path: Path, lines: list[str]) -> list[list[int]]:
    command = [sys.executable, "-c", LLAMA_CPP, str(path)]
    done = child_process.run(command, stdin=json.dumps(lines))
    return json.loads(done.stdout.splitlines()[-1])


def test_byte_level_bpe_is_exported_to_gguf(
    ours: JsonTokenizer, oracle: "tokenizers.Tokenizer", seed: int, tmp_path: Path
) -> None:
    """llama.cpp cuts a thousand lines in two scripts as tokenizers does, and the file comes back as it was."""
    pytest.importorskip("cyllama", reason="cyllama comes with the extra `interop`")
    path = export_gguf(TrainedSource(wide_model(ours, seed), ours, {}), tmp_path / "m.gguf", "tq2_0")
    lines = ["".join(random.choices(ALPHABET, k=random.randint(1, 60))) for _ in range(1000)]
    tokens = llama_cpp_tokens(path, [*lines, *TEXTS])
    assert tokens == ours.encode_batch([*lines, *TEXTS])
    assert tokens[:1000] == [oracle.encode(line, add_special_tokens=False).ids for line in lines]
    back = GgufSource(path).tokenizer
    assert isinstance(back, JsonTokenizer)
    assert back.settings == ours.settings
    assert back.encode_batch(lines) == tokens[:1000]
    assert back.tokens() == ours.tokens()
    assert back.decode(range(ours.vocab_size)) == ours.decode(range(ours.vocab_size))


def test_a_sentencepiece_json_is_exported_to_gguf(seed: int, tmp_path: Path) -> None:
    """LLaMA-2's kind, with a space before every text: scores are made from the order of the merges."""
    pytest.importorskip("cyllama", reason="cyllama comes with the extra `interop`")
    text = "".join(random.choices("abcdefghij \n \ud55c\uad6d\uc5b4\ub9d0", k=20_000))
    model = read_pieces(train_sentencepiece([text], 420).to_bytes())
    for prefix in (True, False):
        settings = Settings(len(model.pieces) + 3, 1, (2,), TEMPLATE, add_bos=prefix)
        ours = JsonTokenizer(sentencepiece_json(model._replace(dummy_prefix=prefix), 1), settings)
        path = export_gguf(TrainedSource(wide_model(ours, seed), ours, {}), tmp_path / "m.gguf", "tq2_0")
        lines = ["".join(random.choices(ALPHABET, k=random.randint(1, 60))) for _ in range(500)]
        tokens = llama_cpp_tokens(path, lines)
        assert tokens == ours.encode_batch(lines)
        back = GgufSource(path).tokenizer
        assert back.settings == settings
        assert back.encode_batch(lines) == tokens


NO_NAME: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "pattern": (lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+"), "pre-tokenizer"),
    "GPT-2's": (lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True), "pre-tokenizer"),
    "merges first": (lambda d: d["model"].update(ignore_merges=False), "without ignore_merges"),
    "normalizer": (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer"),
    "spaces": (lambda d: d["added_tokens"][1].update(rstrip=True), "strips spaces"),
    "dropout": (lambda d: d["model"].update(dropout=0.1), "BPE without dropout"),
    "spaced": (
        lambda d: [d["model"]["vocab"].update({" b": 404, "a b": 405}), d["model"]["merges"].append(["a", " b"])],
        "a space",
    ),
    "suffix": (lambda d: d["model"].update(end_of_word_suffix="</w>"), "suffix"),
}


@pytest.mark.parametrize(("change", "part"), NO_NAME.values(), ids=list(NO_NAME))
def test_a_bpe_that_llama_cpp_does_not_have_is_refused(
    change: Callable[[dict[str, Any]], object], part: str, ours: JsonTokenizer, seed: int, tmp_path: Path
) -> None:
    document = json.loads(ours.tokenizer_json)
    change(document)
    other = JsonTokenizer(json.dumps(document), ours.settings)
    with pytest.raises(BitNetError, match=f"export: .*{part}.*--to hf-packed"):
        export_gguf(TrainedSource(wide_model(other, seed), other, {}), tmp_path / "m.gguf", "tq2_0")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_from_elsewhere(ours: JsonTokenizer, seed: int, tmp_path: Path) -> None:
    source = TrainedSource(model_for(ours, seed), ours, {})
    with_it = export_hf(source, tmp_path / "with", packed=True)
    without = export_hf(TrainedSource(source.model, None, {}), tmp_path / "without", packed=True)
    packed = tmp_path / "m.safetensors"
    assert HfSource(without).tokenizer is None
    assert main(["import", str(without), "-o", str(packed), "--tokenizer", str(with_it)]) == 0
    (with_it / "generation_config.json").unlink()  # config.json alone has the ids
    for choice in (with_it, with_it / "tokenizer.json", packed):
        assert main(["import", str(without), "-o", str(packed), "--tokenizer", str(choice)]) == 0
        assert load(packed).tokenizer.settings == ours.settings
        assert load(packed).tokenizer.encode("hello") == ours.encode("hello")
    assert main(["import", str(without), "-o", str(packed), "--tokenizer", str(without)]) == 2
    assert main(["import", str(without), "-o", str(packed), "--tokenizer", str(without / "tokenizer.json")]) == 2
    # A tokenizer that came without its model: its own configuration names the two tokens.
    (with_it / "config.json").unlink()
    assert main(["import", str(without), "-o", str(packed), "--tokenizer", str(with_it)]) == 0
    assert load(packed).tokenizer.settings == replace(ours.settings, end_ids=ours.end_ids[:1])


def test_import_notes_a_model_without_a_tokenizer(ours: JsonTokenizer, seed: int, tmp_path: Path) -> None:
    folder = export_hf(TrainedSource(model_for(ours, seed), None, {}), tmp_path / "hf", packed=False)
    source = HfSource(folder)
    (note,) = import_model(source, tmp_path / "m.safetensors", source.tokenizer)
    assert note.startswith("no tokenizer is inside")
    assert "--tokenizer FOLDER" in note
    assert load(tmp_path / "m.safetensors").tokenizer is None
    assert not import_model(source, tmp_path / "m.safetensors", ours)
