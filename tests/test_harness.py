"""lm-evaluation-harness on a model of ours: figures of `bitnet eval`, of log-softmax, and text of greedy decoding."""

import json
import math
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitnet.cli import main
from bitnet.packed import load
from bitnet.sampling import GREEDY

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval", reason="pip install 'bitnet-ternary[eval]'")
    from bitnet.train.harness import BitNetLM, cut

SHAPE = "hidden_size=32 intermediate_size=44 num_hidden_layers=1 num_attention_heads=2 num_key_value_heads=1"
WORDS = ["fade ", "bag ", "cabbage\n", "hedge "]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    (folder / "toy.txt").write_text("".join(random.choice(WORDS) for _ in range(2000)))
    sets = [f"model.{setting}" for setting in (*SHAPE.split(), "max_position_embeddings=16", "vocab_size=280")]
    sets += ["train.eval_every=0", "train.batch_size=4"]
    flags = ["--data", str(folder / "toy.txt"), "--out", str(folder / "run"), "--steps", "20", "--dtype", "fp32", "-q"]
    assert main(["train", *flags, *[part for s in sets for part in ("--set", s)]]) == 0
    assert main(["pack", str(folder / "run"), "-o", str(folder / "m.safetensors")]) == 0
    return folder / "m.safetensors"


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def text(words: int) -> str:
    return "".join(random.choice(WORDS) for _ in range(words))


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_a_continuation_is_scored_by_log_softmax(engine: str, model: Path) -> None:
    harness, plain = BitNetLM(str(model), engine=engine), load(model, engine="torch")
    tokenizer = plain.tokenizer
    assert tokenizer is not None
    for context, continuation in (
        (text(2).rstrip() + " ", text(1)),
        ("", "bag "),
        ("fade", " hedge "),
        (text(30), "bag"),
    ):
        ((got, greedy),) = harness.loglikelihood([request(context, continuation)])
        kept = context.rstrip(" ")
        whole = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
        count = len(whole) - 1 - len(tokenizer.encode(kept))
        window = torch.tensor(whole[-17:])  # a context of 16: the end counts
        scores = plain.logits(window[:-1]).double().log_softmax(-1)[-count:]
        wanted = scores.gather(1, window[-count:, None]).sum()
        assert got == pytest.approx(float(wanted), abs=1e-3)  # engines differ by KL of 1e-5 a token at most
        assert engine == "auto" or greedy == bool((scores.argmax(-1) == window[-count:]).all())


def test_generation_is_greedy_and_stops(model: Path) -> None:
    harness, plain = BitNetLM(str(model), engine="torch"), load(model, engine="torch")
    tokenizer = plain.tokenizer
    assert tokenizer is not None
    prompt = text(2)
    start, stop_at = [tokenizer.bos_id, *tokenizer.encode(prompt)], [tokenizer.bos_id, tokenizer.eos_id]
    ids = plain.generate(start, 12, GREEDY, stop_at)
    whole = tokenizer.decode(ids)
    (got,) = harness.generate_until([request(prompt, {"until": ["\x00"], "max_gen_toks": 12})])
    assert got == whole
    if len(whole) > 2:
        stop = whole[1:3]
        (got,) = harness.generate_until([request(prompt, {"until": [stop], "max_gen_toks": 12})])
        assert got == whole[: whole.index(stop)]


def test_cut() -> None:
    assert cut("one two three", ["two", "three"]) == "one "
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", ["x"]) == "one"


def harness(folder: Path, documents: list[str], module: str, kind: str, arguments: str) -> float:
    """Bits per byte that the harness finds for a task of these documents, run as a person runs it."""
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / "toy.yaml").write_text(
        f"""task: toy
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "documents.jsonl"}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""
    )
    command = [sys.executable, "-m", module, "run", "--model", kind, "--model_args", arguments]
    command += ["--tasks", "toy", "--include_path", str(folder), "--output_path", str(folder / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = (folder / "out").rglob("*.json")
    return float(json.loads(result.read_text())["results"]["toy"]["bits_per_byte,none"])


def bits_per_byte(model: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]) -> float:
    """What `bitnet eval` finds of all texts, each by itself: together their ends would share windows."""
    nats, size = 0.0, 0
    for text in texts:
        capsys.readouterr()
        assert main(["eval", "-m", str(model), "--data", str(text), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        nats, size = nats + found["loss"] * found["tokens"], size + found["bytes"]
    return nats / math.log(2) / size


@pytest.mark.slow
def test_a_task_from_a_file_gives_what_eval_gives(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = text(60)
    (tmp_path / "document.txt").write_text(document)
    got = harness(tmp_path, [document], "bitnet.train.harness", "bitnet", f"path={model}")
    assert got == pytest.approx(bits_per_byte(model, [tmp_path / "document.txt"], capsys), rel=1e-6)


@pytest.mark.slow
def test_its_client_of_our_server_gives_what_eval_gives(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]'")
    # Documents that fit the context: of longer ones that client makes windows of its own, which overlap.
    documents = [text(random.randint(1, 2)) for _ in range(8)]
    files = [tmp_path / f"{number}.txt" for number in range(len(documents))]
    for file, document in zip(files, documents, strict=True):
        file.write_text(document)
    command = [sys.executable, "-m", "bitnet.cli", "serve", "-m", str(model), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip().rstrip("/")
            arguments = f"model={model.stem},base_url={url}/v1/completions,tokenizer_backend=remote,max_length=16"
            got = harness(tmp_path, documents, "lm_eval", "local-completions", arguments)
        finally:
            server.terminate()
    assert got == pytest.approx(bits_per_byte(model, files, capsys), rel=1e-5)
