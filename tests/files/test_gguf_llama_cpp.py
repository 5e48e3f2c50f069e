"""llama.cpp running the GGUF files that we write: the same logits and the same tokens."""

import json
import random
import sys
from pathlib import Path

import child_process
import numpy as np
import pytest
import torch
from file_models import GGUF_BASE as BASE
from file_models import GGUF_VARIANTS as VARIANTS
from file_models import kl, random_model

from bitnet.engine.load import load
from bitnet.files.gguf.export import export_gguf
from bitnet.files.gguf.read import GgufSource
from bitnet.files.importing import import_model
from bitnet.files.source import TrainedSource
from bitnet.files.tensors import projections
from bitnet.model import Transformer
from bitnet.text.sentencepiece import SentencePieceTokenizer

# In a process of its own: llama.cpp ends the process it is in on some errors.
ORACLE = """
import json, sys
import numpy as np
import cyllama.llama.llama_cpp as llama

def main(path, vocabulary, request):
    class Model(llama.LlamaModel):
        n_vocab = vocabulary  # the wheel's get_logits_ith asks the model for it
    llama.disable_logging()
    model = Model(path)
    request = json.load(open(request))
    vocab = model.get_vocab()
    if request["ids"]:
        settings = llama.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = 1
        context = llama.LlamaContext(model, settings)
        batch = llama.LlamaBatch(n_tokens=512, embd=0, n_seq_max=1)
        batch.set_batch(request["ids"], 0, True)
        context.decode(batch)
        rows = [context.get_logits_ith(i) for i in range(len(request["ids"]))]
        np.save(path + ".npy", np.array(rows, np.float32))
    print(json.dumps([vocab.tokenize(line, False, False) for line in request["lines"]]))

main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
"""


def llama_cpp(path: Path, vocab_size: int, ids: list[int], lines: list[str]) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits [T, V] of `ids`, and the tokens of `lines`, by llama.cpp (cyllama's build)."""
    request = path.with_suffix(".json")
    request.write_text(json.dumps({"ids": ids, "lines": lines}))
    command = [sys.executable, "-c", ORACLE, str(path), str(vocab_size), str(request)]
    done = child_process.run(command)
    tokens = json.loads(done.stdout.splitlines()[-1])
    return torch.from_numpy(np.load(f"{path}.npy")) if ids else torch.empty(0), tokens


def as_float(model: Transformer) -> Transformer:
    """The same ternary weights without int8 activations: what llama.cpp computes from F32 and F16 files."""
    float_model = Transformer(model.config.replace(linear="float"))
    state = model.state_dict()
    for name in projections(model.config):
        codes, scale = TrainedSource(model, None, {}).codes(name)
        state[f"{name}.weight"] = codes * scale
    float_model.load_state_dict(state)
    return float_model


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["f32", "f16", "tq2_0", "tq1_0"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_runs_the_export(
    variant: str, kind: str, tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path
) -> None:
    """F32: 2e-3 of the same weights in float; llama.cpp keeps keys and values in fp16, which alone is 1e-3.

    Ternary types: int8 activations on both sides, but llama.cpp takes a scale for every 256 of them: two roundings
    that have nothing to do with each other, 2.5 % of a random model's logits, and little of its distribution.
    """
    pytest.importorskip("cyllama", reason="cyllama comes with the extra `interop`")
    model = random_model(BASE.replace(vocab_size=tokenizer.vocab_size, **VARIANTS[variant]), seed)
    path = export_gguf(TrainedSource(model, tokenizer, {}), tmp_path / "m.gguf", kind)
    ids = torch.randint(3, tokenizer.vocab_size, (100,))
    got, _ = llama_cpp(path, tokenizer.vocab_size, ids.tolist(), [])
    with torch.no_grad():
        expected = (as_float(model) if kind in ("f32", "f16") else model)(ids[None])[0]
    assert relative(got, expected) <= {"f32": 2e-3, "f16": 4e-3}.get(kind, 6e-2)
    assert kl(expected, got) <= 2e-3


def test_llama_cpp_has_the_same_tokens(tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path) -> None:
    """A thousand lines in two scripts, with characters that only bytes can spell, and runs of spaces."""
    pytest.importorskip("cyllama", reason="cyllama comes with the extra `interop`")
    model = random_model(BASE.replace(vocab_size=tokenizer.vocab_size), seed)
    path = export_gguf(TrainedSource(model, tokenizer, {}), tmp_path / "m.gguf", "tq2_0")
    alphabet = "abcdefghij  .1é\t" + "한국어말은😀힣"
    lines = ["".join(random.choices(alphabet, k=random.randint(1, 60))) for _ in range(1000)]
    _, tokens = llama_cpp(path, tokenizer.vocab_size, [], lines)
    assert tokens == tokenizer.encode_batch(lines)


def test_a_tokenizer_that_puts_a_space_first(tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path) -> None:
    """LLaMA-2's habit, which our own tokenizers do not have: read through tokenizers, the same ids as llama.cpp."""
    pytest.importorskip("cyllama", reason="cyllama comes with the extra `interop`")
    pytest.importorskip("tokenizers", reason="tokenizers comes with the extra of that name")
    model = random_model(BASE.replace(vocab_size=tokenizer.vocab_size), seed)
    path = export_gguf(TrainedSource(model, tokenizer, {}), tmp_path / "m.gguf", "tq2_0")
    raw = path.read_bytes()
    name = b"tokenizer.ggml.add_space_prefix" + (7).to_bytes(4, "little")
    assert raw.count(name + b"\0") == 1
    path.write_bytes(raw.replace(name + b"\0", name + b"\1"))
    lines = ["".join(random.choices("abcdefghij  .1é 한국어말은힣", k=random.randint(1, 40))) for _ in range(300)]
    _, tokens = llama_cpp(path, tokenizer.vocab_size, [], lines)
    source = GgufSource(path)
    assert source.tokenizer.kind == "tokenizer.json"
    assert source.tokenizer.encode_batch(lines) == tokens
    import_model(source, tmp_path / "m.safetensors", source.tokenizer)
    assert load(tmp_path / "m.safetensors").tokenizer.bos_id == tokenizer.bos_id


def test_a_new_llama_cpp_runs_q2_0(tokenizer: SentencePieceTokenizer, seed: int, tmp_path: Path) -> None:
    """xllamacpp, the newer build, gives the same next-token probabilities from Q2_0 and TQ2_0 as we do."""
    pytest.importorskip("xllamacpp", reason="xllamacpp comes with the extra `interop`")
    model = random_model(BASE.replace(vocab_size=tokenizer.vocab_size), seed)
    ids = torch.randint(259, tokenizer.vocab_size, (20,)).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    for kind in ("q2_0", "tq2_0"):
        path = export_gguf(TrainedSource(model, tokenizer, {}), tmp_path / f"{kind}.gguf", kind)
        command = [sys.executable, "-c", SERVER, str(path), json.dumps(ids)]
        done = child_process.run(command)
        top = json.loads(done.stdout.splitlines()[-1])
        expected = logits.log_softmax(-1)
        assert len(top) == 100
        gaps = [abs(float(expected[id]) - logprob) for id, logprob in top]
        assert sum(gaps) / len(gaps) <= 0.05, (kind, gaps)  # the noise of int8 activations; swapped codes give 1


SERVER = """
import json, sys
import xllamacpp as x
params = x.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = x.Server(params)
ids = json.loads(sys.argv[2])
# It tells no probabilities where the drawn token is half a letter or ends the text: a bias, which they leave out, makes
# it one of the prompt's.
request = {"prompt": ids, "max_tokens": 1, "logprobs": 100, "temperature": 0, "cache_prompt": False}
request["logit_bias"] = [[ids[0], 1000.0]]
result = server.handle_completions(request)
top = result["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print(json.dumps([[entry["id"], entry["logprob"]] for entry in top]), flush=True)
import os
os._exit(0)  # threads of the server hold the interpreter
"""
