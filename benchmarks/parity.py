"""Whether packing preserves the model: the training forward pass in fp32 against the packed engine, on real text.

    python benchmarks/parity.py RUN --data TEXT... [--tokens 4096]

Compares, for the newest save of a run, the int32 sums of every product, the output of every block (largest relative
difference), and the distributions over the next token (KL divergence, top-1 agreement). The packed file is written to a
temporary folder. The last line of stdout is one JSON document; the exit code is 1 where a bound of the contract is
broken: equal sums, blocks to 1e-6, KL to 1e-5.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.benchmarks.bench import machine
from bitnet.engine.load import load
from bitnet.engine.torch import TorchEngine
from bitnet.files.packed import write_packed
from bitnet.kernels import ops
from bitnet.train.data.prepare import tokenize
from bitnet.train.data.windows import eval_windows
from bitnet.train.runs.run import Run

BLOCK_BOUND, KL_BOUND = 1e-6, 1e-5


def observe(engine: TorchEngine, ids: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The int32 sums of every product in order, the output of every block, and the logits of ids [B, T]."""
    sums: list[Tensor] = []
    outputs: list[Tensor] = []
    originals = {name: getattr(ops, name) for name in ("codes_matmul", "packed_matmul")}

    def recorded(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(q: Tensor, weights: Any) -> Tensor:
            result = product(q, weights)
            sums.append(result)
            return result

        return run

    hooks = [block.register_forward_hook(lambda m, i, out: outputs.append(out)) for block in engine.model.model.layers]
    for name, product in originals.items():
        setattr(ops, name, recorded(product))
    try:
        logits = engine.logits(ids)
    finally:
        for name, product in originals.items():
            setattr(ops, name, product)
        for hook in hooks:
            hook.remove()
    return sums, outputs, logits


def compare(trained: TorchEngine, packed: TorchEngine, ids: Tensor) -> dict[str, float]:
    """The figures of one batch of windows [B, T]."""
    sums, outputs, logits = observe(trained, ids)
    packed_sums, packed_outputs, packed_logits = observe(packed, ids)
    # Training computes q, k, v (and gate, up) in one product; the engine computes them one after the other.
    joined, theirs = torch.cat([s.flatten(0, -2).T for s in sums]), torch.cat([s.T for s in packed_sums])
    log_p, log_q = logits.double().log_softmax(-1), packed_logits.double().log_softmax(-1)
    return {
        "unequal_sums": int((joined != theirs).sum()) if joined.shape == theirs.shape else joined.numel(),
        "sums": joined.numel(),
        "block_difference": max(
            float((a - b).abs().max() / a.abs().max()) for a, b in zip(outputs, packed_outputs, strict=True)
        ),
        "positions": ids.numel(),
        "kl": float((log_p.exp() * (log_p - log_q)).sum()),
        "same_top1": int((log_p.argmax(-1) == log_q.argmax(-1)).sum()),
    }


def main() -> int:
    """Compare window by window and print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--data", nargs="+", required=True, help="text to compare on")
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    run = Run(options.run)
    model, save = run.load()
    with tempfile.TemporaryDirectory() as folder:
        packed = load(write_packed(Path(folder) / "model.safetensors", model, run.tokenizer()), engine="torch")
        stream = tokenize(tuple(options.data), run.tokenizer(), Path(folder))
        trained = TorchEngine(model)
        windows = eval_windows(stream, packed.config.context, limit_tokens=options.tokens)
        rows = [compare(trained, packed, inputs) for inputs, _ in windows]
    positions = sum(row["positions"] for row in rows)
    result = {
        "run": options.run.name,
        "step": save.step,
        "tokens": options.tokens,
        "sums": sum(row["sums"] for row in rows),
        "unequal_sums": sum(row["unequal_sums"] for row in rows),
        "block_difference": max(row["block_difference"] for row in rows),
        "kl": sum(row["kl"] for row in rows) / positions,
        "top1": sum(row["same_top1"] for row in rows) / positions,
    }
    good = result["unequal_sums"] == 0 and result["block_difference"] <= BLOCK_BOUND and result["kl"] <= KL_BOUND
    print(f"int32 sums       {result['unequal_sums']:,} of {result['sums']:,} differ   (bound: none)")
    print(f"block outputs    {result['block_difference']:.1e} largest relative difference   (bound: {BLOCK_BOUND:.0e})")
    print(f"KL divergence    {result['kl']:.1e} nats   (bound: {KL_BOUND:.0e})")
    print(f"top-1 agreement  {result['top1']:.2%}")
    print(json.dumps({"benchmark": "parity", "machine": machine.describe(), "good": good, "results": [result]}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
