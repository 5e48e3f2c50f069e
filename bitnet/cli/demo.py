"""`make demo`: from text to a ternary model that generates, in about four minutes on two CPU cores.

Trains the `nano` preset on the sources of the Python standard library (no download), packs it, generates with it and
measures what packing cost. When it is started again, it resumes. `make demo DEMO="--steps 40"` does the same with fewer
training steps, in its own folder.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bitnet.cli import guarded
from bitnet.cli.terminal import print_tables, write_now
from bitnet.engine.load import load
from bitnet.engine.sampling import Sampling
from bitnet.files.packed import write_packed
from bitnet.generation import write_text
from bitnet.inspection import inspect_packed
from bitnet.tables import facts
from bitnet.threads import use_threads
from bitnet.train.command import run_training
from bitnet.train.data.shards import open_dataset
from bitnet.train.data.windows import eval_windows
from bitnet.train.evaluate import Evaluation, evaluate
from bitnet.train.report.overview import duration
from bitnet.train.runs.run import Run

OUT = Path("runs/demo")
PROMPT = "def read_lines(path):\n"
CPU = torch.device("cpu")


def main() -> int:
    """Train, pack, generate, measure. Returns an exit code."""
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, help="training steps (default: those of the preset nano)")
    steps = parser.parse_args().steps
    out = OUT if steps is None else OUT.with_name(f"{OUT.name}-{steps}")
    use_threads()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(
        "[bold]1  train[/bold]  a ternary transformer on Python's library (Ctrl-C saves; run again to resume)"
    )
    flags = {"model": {}, "data": {}, "tokenizer": {}, "train": {"sample_prompt": PROMPT, "steps": steps}}
    summary, code = run_training("nano", None, flags, [], out, CPU)
    if summary is None:
        return code

    console.print("\n[bold]2  pack[/bold]  to two bits per weight")
    run = Run(out)
    model, save = run.load()
    path = write_packed(out / "model.safetensors", model, run.tokenizer(), info={"steps": save.step})

    console.print(f"[bold]3  generate[/bold]  bitnet generate -m {path} -p {PROMPT!r}\n")
    text = write_text(path, PROMPT, 120, Sampling(temperature=0.7, seed=1), CPU, show=write_now)
    print()

    console.print("\n[bold]4  measure[/bold]  the packed file on text it was not trained on")
    print_tables(facts(_summary(summary, path, _score(path, out / "data"), text), title="\nsummary"))
    console.print("\na model trained for longer, on books, is included:  bitnet generate -p 'It was'")
    return 0


def _score(path: Path, data: Path) -> Evaluation:
    """The packed model on the run's validation split: the same windows that training scored."""
    engine, dataset = load(path), open_dataset(data)
    windows = eval_windows(dataset.val, engine.config.context)
    return evaluate(engine.logits, windows, dataset.tokenizer.byte_lengths())


def _summary(summary: dict[str, Any], path: Path, packed: Evaluation, text: dict[str, Any]) -> dict[str, str]:
    """What the demo shows at the end. summary: of the training; packed: the file's score; text: of `write_text`."""
    report, trained = inspect_packed(path), summary["validation"]
    return {
        "trained": f"{duration(summary['seconds'])}, {summary['tokens_per_second']:,.0f} tokens/s",
        "bits per byte": f"{trained['bits_per_byte']:.4f} before packing, {packed.bits_per_byte:.4f} after "
        f"on {packed.bytes / 1e3:,.0f} kB of text",
        "file": f"{report['file_bytes'] / 1e6:.2f} MB with its tokenizer; fp16 would be "
        f"{report['float16_bytes'] / 1e6:.2f} MB, {report['ratio_to_float16']:.1f} times as much",
        "ternary weights": f"{report['bits_per_weight']:.2f} bits each, {report['zero_fraction']:.0%} are zero",
        "generation": f"{text['tokens_per_second']:,.0f} tokens/s on {torch.get_num_threads()} threads",
        "loss curve": summary["pictures"][0] if summary["pictures"] else "needs matplotlib",
        "model": str(path),
    }


if __name__ == "__main__":
    sys.exit(guarded(main))
