"""Whether transformers and llama.cpp compute the same as we do, for a trained model in every export format.

    python benchmarks/interop.py --run RUN --text heldout.txt --lines latin.txt other-script.txt

RUN holds a model that can be exported to all formats (--preset nano-portable). Logits are taken on windows of 125
positions of held-out text, each after a BOS; every projection of transformers' model and of ours gets the same input.

  hf, hf-packed    transformers in fp32 against our fp32 model: largest difference of a layer, KL, top-1
  f32, f16         llama.cpp computes in float: compared with the same ternary weights without int8 activations
  tq2_0, tq1_0     llama.cpp quantises activations in blocks of 256, we per token: KL and top-1 against our engine
  moved by ...     why the last two differ: our forward pass with one of llama.cpp's roundings at a time, against our
                   engine (rounding.py), and llama.cpp against the pass with all of them

"gap" is the largest difference of probability, in our model, between the two tokens where the best one differs; "error"
is the standard error of the top-1 share. Prints a table, and one JSON document as the last line of stdout.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # transformers would compile its quantisers: a minute for milliseconds

import cyllama.llama.llama_cpp as llama
import numpy as np
import rounding
import torch
import transformers
from torch import Tensor

from bitnet.doctor import examine
from bitnet.files.gguf.export import export_gguf
from bitnet.files.hf.export import export_hf
from bitnet.files.source import TrainedSource
from bitnet.files.tensors import projections
from bitnet.model import Transformer
from bitnet.text.tokenizer import Tokenizer
from bitnet.train.runs.run import Run

WINDOW = 125  # positions, BOS among them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lines", type=Path, nargs="+", default=[])
    parser.add_argument("--windows", type=int, default=4, help="Of 125 positions each.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    llama.disable_logging()
    run = Run(options.run)
    (model, save), tokenizer = run.load(), run.tokenizer()
    source = TrainedSource(model, tokenizer, {})
    ids = windows(tokenizer, options.text.read_text(encoding="utf-8"), options.windows)
    lines = [line for path in options.lines for line in pick(path, 1000 // len(options.lines))]
    with torch.no_grad():
        ours, floats = model(ids), as_float(model)(ids)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for target in ("hf", "hf-packed"):
            export_hf(source, folder / target, packed=target == "hf-packed")
            results[target] = against_transformers(folder / target, model, tokenizer, ids, ours, lines)
        for kind in ("f32", "f16", "tq2_0", "tq1_0"):
            path = export_gguf(source, folder / f"{kind}.gguf", kind)
            expected = floats if kind in ("f32", "f16") else ours
            got, tokens = from_llama_cpp(path, tokenizer, ids, lines)
            results[kind] = {**compared(expected, got), "same_tokens": tokens}
            if kind == "tq2_0":
                results |= reasons(source, ids, ours, got)
    for name, row in results.items():
        print(f"{name:34}", "  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    report = {
        "benchmark": "interop",
        "machine": examine()["cpu"]["name"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "steps": save.step,
        "positions": ids.numel(),
        "lines": len(lines),
        "results": results,
    }
    print(json.dumps(report))


def windows(tokenizer: Tokenizer, text: str, count: int) -> Tensor:
    """Ids [count, WINDOW] from places spread over the text, each after a BOS."""
    ids = tokenizer.encode(text)
    step = (len(ids) - WINDOW) // count
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return torch.tensor([[*start, *ids[i * step :]][:WINDOW] for i in range(count)])


def pick(path: Path, count: int) -> list[str]:
    """`count` lines spread over a file, without empty ones."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="ignore").splitlines() if line.strip()]
    return [lines[i * len(lines) // count] for i in range(count)]


def as_float(model: Transformer) -> Transformer:
    """The same ternary weights without int8 activations."""
    baseline = Transformer(model.config.replace(linear="float"))
    state, source = model.state_dict(), TrainedSource(model, None, {})
    for name in projections(model.config):
        codes, scale = source.codes(name)
        state[f"{name}.weight"] = codes * scale
    baseline.load_state_dict(state)
    return baseline


def compared(expected: Tensor, got: Tensor) -> dict[str, float]:
    """Relative error, mean and largest KL in nats, top-1 agreement with its error, and the gap. Both: [..., V]."""
    p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    best, other = p.max(-1), q.argmax(-1, keepdim=True)
    same = best.indices == other.squeeze(-1)
    top1 = float(same.double().mean())
    return {
        "relative": float((got - expected).norm() / expected.norm()),
        "kl": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1": top1,
        "error": (top1 * (1 - top1) / same.numel()) ** 0.5,
        "gap": float((best.values.exp() - p.exp().gather(-1, other).squeeze(-1)).max()),
    }


def reasons(source: TrainedSource, ids: Tensor, ours: Tensor, theirs: Tensor) -> dict[str, dict[str, float]]:
    """How much each of llama.cpp's roundings changes our model, and how far llama.cpp is from all of them together."""
    half = rounding.half
    changes: dict[str, dict[str, Any]] = {
        "the order of sums": {},
        "keys and values in fp16": {"cache": half},
        "scales in fp16": {"scales": half},
        "activations in blocks": {"activations": rounding.by_block},
        "activations not rounded": {"activations": rounding.exact},
        "all": {"activations": rounding.by_block, "cache": half, "scales": half, "head": half},
    }
    results = {}
    for name, change in changes.items():
        model = rounding.Rounded(source, **change)
        got = torch.stack([model(window) for window in ids])
        results[f"moved by {name}"] = compared(ours, got)
    return {**results, "tq2_0 against all of them": compared(got, theirs)}


def against_transformers(
    folder: Path, model: Transformer, tokenizer: Tokenizer, ids: Tensor, ours: Tensor, lines: list[str]
) -> dict[str, float]:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    worst = 0.0

    def compare(name: str, x: Tensor, expected: Tensor) -> None:
        nonlocal worst
        got = model.get_submodule(name)(x)
        worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))

    for name in projections(model.config):
        theirs.get_submodule(name).register_forward_hook(lambda _, args, y, name=name: compare(name, args[0], y))
    with torch.no_grad():
        got = theirs(ids).logits
    there = transformers.AutoTokenizer.from_pretrained(folder)
    same = [there.encode(line, add_special_tokens=False) == tokenizer.encode(line) for line in lines]
    return {"layer": worst, **compared(ours, got), "same_tokens": float(np.mean(same)) if same else float("nan")}


def from_llama_cpp(path: Path, tokenizer: Tokenizer, ids: Tensor, lines: list[str]) -> tuple[Tensor, float]:
    """Logits [..., V], and the share of lines that llama.cpp tokenizes as we do."""

    class Model(llama.LlamaModel):  # type: ignore[misc]
        n_vocab = tokenizer.vocab_size  # the wheel's get_logits_ith asks the model for it

    model = Model(str(path))
    rows = []
    for window in ids.tolist():
        settings = llama.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
        settings.n_threads = settings.n_threads_batch = 1
        context = llama.LlamaContext(model, settings)
        batch = llama.LlamaBatch(n_tokens=256, embd=0, n_seq_max=1)
        batch.set_batch(window, 0, True)
        context.decode(batch)
        rows.append(np.array([context.get_logits_ith(i) for i in range(len(window))]))
    vocab = model.get_vocab()
    same = [list(vocab.tokenize(line, False, False)) == tokenizer.encode(line) for line in lines]
    return torch.tensor(np.array(rows)), float(np.mean(same)) if same else float("nan")


if __name__ == "__main__":
    main()
