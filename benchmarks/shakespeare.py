"""tiny-shakespeare, character level, in nanoGPT's CPU setting: ternary weights and int8 activations against float.

    python benchmarks/shakespeare.py INPUT.TXT [--seeds 1 2 3] [--out FOLDER]

4 layers, 4 heads, width 128, context 64, batches of 12, 2,000 steps; the first 90 % of the characters train, the
loss is over the whole of the last 10 %, in windows of 64. nanoGPT's float model gives 1.88 there. Both twins run the
same loop on the same tokens in the same order, each at its own best learning rate (RECIPES); the ternary figure is
also taken from the packed file. The last line is one JSON document.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from bitnet.bench import machine, table
from bitnet.config import ModelConfig
from bitnet.packed import load, write_packed
from bitnet.train.config import RunConfig, TokenizerConfig, TrainConfig
from bitnet.train.data import DataConfig, eval_windows, open_dataset
from bitnet.train.display import Display
from bitnet.train.evaluate import evaluate
from bitnet.train.pretrain import pretrain
from bitnet.train.run import Run

MODEL = ModelConfig(
    vocab_size=65,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
)
# Each twin at the best of the same small sweep (benchmarks/results/LOG.md); everything else is shared.
RECIPES = {"plain": {"lr": 0.006}, "ternary": {"lr": 0.006}}


def train_one(text: Path, linear: str, seed: int, folder: Path, act: str = "relu2") -> dict[str, Any]:
    """Train one model, pack it and score both. Returns its figures."""
    config = RunConfig(
        model=MODEL.replace(linear=linear, hidden_act=act),
        tokenizer=TokenizerConfig(kind="char"),
        data=DataConfig(paths=(str(text),), val_fraction=0.1),
        train=TrainConfig(
            steps=2000, batch_size=12, seed=seed, eval_every=0, save_every=2000, report_every=500, **RECIPES[linear]
        ),
    )
    run = Run(folder / f"{linear}-{seed}")
    outcome = pretrain(config, run.path, torch.device("cpu"), Display(every=500))
    assert outcome.validation is not None
    row = {"linear": linear, "seed": seed, "seconds": round(outcome.seconds, 1), "loss": outcome.validation.loss}
    if linear == "ternary":
        model, _ = run.load()
        engine = load(write_packed(run.path / "model.safetensors", model, run.tokenizer()))
        dataset = open_dataset(run.data)
        windows = eval_windows(dataset.val, MODEL.context, batch_size=64)
        row["packed_loss"] = evaluate(engine.logits, windows, dataset.tokenizer.byte_lengths()).loss
    return row


def main() -> None:
    """Train all seeds of both twins, print the table, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="tiny-shakespeare's input.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--act", default="relu2", choices=["relu2", "silu"], help="gate of the feed-forward")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary folder)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    here = machine.describe()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            for linear in ("plain", "ternary"):
                rows.append(train_one(options.text, linear, seed, options.out or Path(temporary), options.act))
                print(rows[-1], file=sys.stderr)
    print(table.machine_line(here))
    print("\n| seed | float | ternary | gap | ternary, packed file |\n|---|---|---|---|---|")
    gaps = []
    for seed in options.seeds:
        plain, ternary = (next(r for r in rows if r["seed"] == seed and r["linear"] == kind) for kind in RECIPES)
        gaps.append(ternary["loss"] - plain["loss"])
        print(
            f"| {seed} | {plain['loss']:.4f} | {ternary['loss']:.4f} | {gaps[-1]:.4f} | {ternary['packed_loss']:.4f} |"
        )
    means = {kind: statistics.mean(r["loss"] for r in rows if r["linear"] == kind) for kind in RECIPES}
    print(f"| mean | {means['plain']:.4f} | {means['ternary']:.4f} | {statistics.mean(gaps):.4f} | |")
    summary = {"act": options.act, "mean_loss": means, "mean_gap": statistics.mean(gaps), "recipes": RECIPES}
    print(json.dumps({"benchmark": "shakespeare", "machine": here, **summary, "results": rows}))


if __name__ == "__main__":
    main()
