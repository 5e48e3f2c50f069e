"""What being ternary costs: time per training step against the float twin, interleaved in one run.

    python benchmarks/step_cost.py [--preset nano] [--batch-size 16] [--repeats 15] [--threads 2]

All have the same shape, data, optimiser and dtype: the ternary model with its quantisers all in, the same one half-way
there ("eased"), and its float twin ("float"). A round times one step of each, in alternating order, so that a change of
the machine's load meets all. Reported: medians and quartiles of the step, of its parts, and of the ratio to the twin
within each round. The last line is one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import itertools

from bitnet.benchmarks.bench import machine, table
from bitnet.cli import guarded
from bitnet.config import PRESETS, preset
from bitnet.model import Transformer, parameters
from bitnet.quant import training_precision
from bitnet.threads import use_threads
from bitnet.train.config import TrainConfig
from bitnet.train.objective import Objective
from bitnet.train.optim import Optimizer

PARTS = ("forward", "backward", "optimiser")
KINDS = ("ternary", "eased", "float")


class Twin:
    """One contender: a model with its optimiser."""

    def __init__(self, name: str, kind: str, batch_size: int, optimizer: str) -> None:
        config = preset(name).replace(linear="float" if kind == "float" else "ternary")
        self.kind = kind
        self.model = Transformer(config)
        self.model.init_weights(0)
        self.precision = training_precision(0.5 if kind == "eased" else 1.0)
        self.objective = Objective(self.model, TrainConfig())
        self.optimizer = Optimizer(self.model, TrainConfig(optimizer=optimizer))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, config.vocab_size, (batch_size, config.context + 1), generator=generator)
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:]

    def step(self, dtype: str) -> list[float]:
        """Seconds of the forward pass, the backward pass, and clipping with the update."""
        self.optimizer.set_step(100)
        marks = [time.perf_counter()]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss, _ = self.objective(self.inputs, self.targets, self.precision)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)]


def measure(name: str, batch_size: int, dtype: str, optimizer: str, repeats: int) -> dict[str, Any]:
    """Time all contenders for `repeats` rounds after three to warm up."""
    twins = [Twin(name, kind, batch_size, optimizer) for kind in KINDS]
    rounds: list[dict[str, list[float]]] = []
    for i in range(repeats + 3):
        order = twins if i % 2 else twins[::-1]
        rounds.append({twin.kind: twin.step(dtype) for twin in order})
    rounds = rounds[3:]
    row: dict[str, Any] = {"preset": name, "dtype": dtype, "optimizer": optimizer, "batch_size": batch_size}
    for kind in KINDS:
        low, middle, high = statistics.quantiles([sum(r[kind]) / sum(r["float"]) for r in rounds], n=4)
        row |= {f"{kind}_ratio": round(middle, 3), f"{kind}_ratio_quartiles": [round(low, 3), round(high, 3)]}
        columns = list(zip(*(r[kind] for r in rounds), strict=True))
        for part, values in zip(PARTS, columns, strict=True):
            row[f"{kind}_{part}_ms"] = round(1e3 * statistics.median(values), 1)
        row[f"{kind}_ms"] = round(1e3 * statistics.median([sum(r[kind]) for r in rounds]), 1)
        row[f"{kind}_tokens_per_second"] = round(batch_size * preset(name).context / row[f"{kind}_ms"] * 1e3)
    return row


def main() -> int:
    """Measure, print a table, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nano", choices=list(PRESETS))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads")
    parser.add_argument("--optimizer", default="muon", choices=["muon", "adamw"])
    options = parser.parse_args()
    use_threads(options.threads, "--threads")
    before = machine.describe()
    print(table.machine_line(before))
    count = parameters(preset(options.preset)) / 1e6
    print(f"{options.preset}: {count:.1f}M parameters, {options.batch_size} sequences, {options.optimizer}\n")
    print("| dtype | | step ms | to plain (quartiles) | forward | backward | optimiser | tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for dtype in ("fp32", "bf16"):
        row = measure(options.preset, options.batch_size, dtype, options.optimizer, options.repeats)
        rows.append(row)
        for kind in KINDS:
            parts = " | ".join(f"{row[f'{kind}_{part}_ms']}" for part in PARTS)
            low, high = row[f"{kind}_ratio_quartiles"]
            print(
                f"| {dtype} | {kind} | {row[f'{kind}_ms']} | {row[f'{kind}_ratio']:.2f} ({low:.2f} to {high:.2f}) "
                f"| {parts} | {row[f'{kind}_tokens_per_second']:,} |"
            )
    print(json.dumps({"benchmark": "step_cost", "machine": before, "results": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
