"""A complete run on books: train, pack, and score the packed file on other books.

    python benchmarks/books.py --data TRAIN... --val-data VAL... --out RUN [--steps 1200] [--set KEY=VALUE ...]

The same as `bitnet train`, `bitnet pack` and `bitnet eval`; a run that was stopped is resumed. Reported are the bits
per byte of the packed file and those measured in training. The last line of stdout is one JSON document.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from bitnet.benchmarks.bench import machine, table
from bitnet.cli import guarded
from bitnet.engine.sampling import Sampling
from bitnet.files.packed import write_packed
from bitnet.generation import write_text
from bitnet.inspection import inspect_packed
from bitnet.threads import use_threads
from bitnet.train.command import run_training
from bitnet.train.runs.run import Run
from bitnet.train.scoring import score_text

PROMPT = "It was"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--linear", default="ternary")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--val-data", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def main() -> int:
    """Train or resume, pack, score, write a sample, print the JSON line."""
    options = parse()
    use_threads(options.threads, "--threads")
    here = machine.describe()
    flags = {
        "model": {"linear": options.linear},
        "data": {"paths": options.data, "val_paths": options.val_data},
        "tokenizer": {},
        "train": {"steps": options.steps, "seed": options.seed},
    }
    cpu = torch.device("cpu")
    trained, code = run_training(options.preset, None, flags, options.set, options.out, cpu)
    if trained is None:
        return code
    run = Run(options.out)
    model, save = run.load()
    path = write_packed(options.out / "model.safetensors", model, run.tokenizer(), info={"steps": save.step})
    packed = score_text(path, options.val_data, cpu)
    report = inspect_packed(path)
    text = write_text(path, PROMPT, 150, Sampling(seed=1), cpu)
    result = {
        "preset": options.preset,
        "linear": options.linear,
        "parameters": report["parameters"],
        "steps": save.step,
        "tokens": save.state["tokens"],
        "seconds": round(trained["seconds"]),
        "tokens_per_second": round(trained["tokens_per_second"]),
        "trained_bits_per_byte": trained["validation"]["bits_per_byte"],
        **{
            f"packed_{key}": packed[key]
            for key in ("bits_per_byte", "bits_per_byte_error", "perplexity", "loss", "bytes")
        },
        **{key: report[key] for key in ("file_bytes", "float16_bytes", "ratio_to_float16", "zero_fraction")},
        "settings": options.set,
    }
    print(table.machine_line(here))
    for key, value in result.items():
        print(f"{key:>24}  {value}")
    print(f"\n{PROMPT}{text['text']}\n")
    print(json.dumps({"benchmark": "books", "machine": here, "results": [result], "sample": PROMPT + text["text"]}))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
