"""What easing is worth: a float llama-shaped checkpoint turned ternary at once, or with quantisers that come in slowly.

    python benchmarks/ease.py --data TRAIN... --val-data VAL... --out FOLDER [--steps 360] [--more 120]

The recipe of the README, as its commands: `nano-portable` without sub-norms is trained in float and exported to a
Hugging Face folder; from there `--linear ternary` trains on, once for each share in --ease and each seed, for equal
steps. Bits per byte of the validation text, before and after. Runs that were stopped go on. The last line is one JSON
document.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bitnet.doctor import examine
from bitnet.train.run import Run

SHAPE = ["--preset", "nano-portable", "--set", "model.sub_norms=false"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--val-data", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=360, help="Of the float model: three minutes on two cores.")
    parser.add_argument("--more", type=int, default=120, help="Of each conversion.")
    parser.add_argument("--ease", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--lr", type=float, default=0.001, help="Of the conversions.")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="Of the float model.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    text = ["--data", *options.data, "--val-data", *options.val_data, "--set", "train.eval_every=0"]
    changes = [part for setting in options.set for part in ("--set", setting)]
    start, folder = options.out / "float", options.out / "hf"
    before = train(start, [*SHAPE, "--linear", "plain", *changes, "--steps", str(options.steps), *text])
    if not folder.exists():
        bitnet("export", str(start), "-o", str(folder), "--to", "hf")
    low = ["--lr", str(options.lr), "--set", f"train.table_lr={options.lr}", "--steps", str(options.more)]
    rows: dict[str, list[float]] = {}
    for seed in options.seeds:
        for ease in options.ease:
            more = ["--init", str(folder), "--linear", "ternary", "--seed", str(seed), "--set", f"train.ease={ease}"]
            figure = train(options.out / f"ease-{ease}-{seed}", [*more, *low, *changes_of_training(options.set), *text])
            rows.setdefault(str(ease), []).append(figure)
            print(f"ease {ease}, seed {seed}: {figure:.4f} bits per byte (float: {before:.4f})", flush=True)
    report = {
        "benchmark": "ease",
        "machine": examine()["cpu"]["name"],
        "float_steps": options.steps,
        "steps": options.more,
        "lr": options.lr,
        "set": options.set,
        "float_bits_per_byte": before,
        "bits_per_byte": rows,
        "mean": {ease: statistics.mean(figures) for ease, figures in rows.items()},
    }
    print(json.dumps(report))


def changes_of_training(settings: list[str]) -> list[str]:
    """The settings of the loop, which conversions share; the model's come with the checkpoint."""
    return [part for setting in settings if setting.startswith("train.") for part in ("--set", setting)]


def train(out: Path, args: list[str]) -> float:
    """Bits per byte at the end of a run, which is trained, or goes on, or is done."""
    bitnet("train", "--out", str(out), *args)
    last: dict[str, Any] = Run(out).metrics()[-1]
    return float(last["val_bits_per_byte"])


def bitnet(*args: str) -> None:
    if subprocess.run([sys.executable, "-m", "bitnet.cli", *args], check=False, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"failed: bitnet {' '.join(args)}")


if __name__ == "__main__":
    main()
