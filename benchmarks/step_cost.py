"""What ternary training costs: time per step against the float baseline, interleaved in one run.

    python benchmarks/step_cost.py [--preset nano] [--batch-size 16] [--repeats 15] [--threads 2]

Three models of the same shape, data, optimiser and dtype: ternary, ternary half-way through its quantisation warm-up
("warmup"), and the float baseline ("float"). A round times one step of each. Reported: medians and quartiles of the
step, of its phases, and of the ratio to the baseline within each round. The last line of stdout is one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from bitnet.benchmarks.bench import machine, table
from bitnet.benchmarks.bench.interleaving import in_turn, quartiles
from bitnet.cli import guarded
from bitnet.config import PRESETS, preset
from bitnet.files.tensors import parameters
from bitnet.model import Transformer
from bitnet.quant import training_precision
from bitnet.threads import use_threads
from bitnet.train.config import TrainConfig
from bitnet.train.objective import Objective
from bitnet.train.optim import Optimizer

PHASES = ("forward", "backward", "optimiser")
KINDS = ("ternary", "warmup", "float")
_WARM_UP = 3  # rounds that are discarded


class TrainedModel:
    """A model of one kind with its optimiser and a batch."""

    def __init__(self, name: str, kind: str, batch_size: int, optimizer: str) -> None:
        config = preset(name).replace(linear="float" if kind == "float" else "ternary")
        self.kind = kind
        self.model = Transformer(config)
        self.model.init_weights(0)
        self.precision = training_precision(0.5 if kind == "warmup" else 1.0)
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
        return [after - before for before, after in pairwise(marks)]


def measure(name: str, batch_size: int, dtype: str, optimizer: str, repeats: int) -> dict[str, Any]:
    """Time all kinds for `repeats` rounds. Returns one row of the result."""
    models = [TrainedModel(name, kind, batch_size, optimizer) for kind in KINDS]
    turns = range(repeats + _WARM_UP)
    rounds = [{model.kind: model.step(dtype) for model in in_turn(models, turn)} for turn in turns][_WARM_UP:]
    row: dict[str, Any] = {"preset": name, "dtype": dtype, "optimizer": optimizer, "batch_size": batch_size}
    for kind in KINDS:
        ratio = {key: round(x, 3) for key, x in quartiles([sum(r[kind]) / sum(r["float"]) for r in rounds]).items()}
        row |= {f"{kind}_ratio": ratio["median"], f"{kind}_ratio_quartiles": [ratio["low"], ratio["high"]]}
        columns = list(zip(*(r[kind] for r in rounds), strict=True))
        for phase, values in zip(PHASES, columns, strict=True):
            row[f"{kind}_{phase}_ms"] = round(1e3 * statistics.median(values), 1)
        row[f"{kind}_ms"] = round(1e3 * statistics.median([sum(r[kind]) for r in rounds]), 1)
        row[f"{kind}_tokens_per_second"] = round(batch_size * preset(name).context / row[f"{kind}_ms"] * 1e3)
    return row


def main() -> int:
    """Measure, print a table, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    print("| dtype | | step ms | to float (quartiles) | forward | backward | optimiser | tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for dtype in ("fp32", "bf16"):
        row = measure(options.preset, options.batch_size, dtype, options.optimizer, options.repeats)
        rows.append(row)
        for kind in KINDS:
            phases = " | ".join(f"{row[f'{kind}_{phase}_ms']}" for phase in PHASES)
            low, high = row[f"{kind}_ratio_quartiles"]
            print(
                f"| {dtype} | {kind} | {row[f'{kind}_ms']} | {row[f'{kind}_ratio']:.2f} ({low:.2f} to {high:.2f}) "
                f"| {phases} | {row[f'{kind}_tokens_per_second']:,} |"
            )
    print(json.dumps({"benchmark": "step_cost", "machine": before, "results": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
