"""`make demo`: text to a ternary model that writes, in about four minutes on two CPU cores.

Trains the `nano` preset on the sources of the Python standard library (on every machine, no download), packs it,
lets it write and measures what packing kept. Run again, it resumes where it stopped. `make demo DEMO="--steps 40"` does
all of it with fewer training steps, in a folder of its own.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from rich.console import Console

from bitnet.cli import guarded
from bitnet.cli.terminal import write_now
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


def main() -> int:
    """Run the whole line. Returns an exit code."""
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, help="training steps (default: those of the preset nano)")
    steps = parser.parse_args().steps
    out = OUT if steps is None else OUT.with_name(f"{OUT.name}-{steps}")
    use_threads()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(
        "[bold]1  train[/bold]  a ternary transformer on Python's own library (Ctrl-C saves; run again to go on)"
    )
    flags = {"model": {}, "data": {}, "tokenizer": {}, "train": {"sample_prompt": PROMPT, "steps": steps}}
    summary, code = run_training("nano", None, flags, [], out, torch.device("cpu"))
    if summary is None:
        return code

    console.print("\n[bold]2  pack[/bold]  to two bits a weight")
    run = Run(out)
    model, save = run.load()
    path = write_packed(out / "model.safetensors", model, run.tokenizer(), info={"steps": save.step})
    report = inspect_packed(path)

    console.print(f"[bold]3  write[/bold]  bitnet generate -m {path} -p {PROMPT!r}\n")
    text = write_text(path, PROMPT, 120, Sampling(temperature=0.7, seed=1), torch.device("cpu"), show=write_now)
    print()

    console.print("\n[bold]4  measure[/bold]  the packed file on text it has never seen")
    packed = _score(path, out / "data")
    trained = summary["validation"]
    rows = {
        "trained": f"{duration(summary['seconds'])}, {summary['tokens_per_second']:,.0f} tokens/s",
        "bits per byte": f"{trained['bits_per_byte']:.4f} before packing, {packed.bits_per_byte:.4f} after "
        f"on {packed.bytes / 1e3:,.0f} kB of text",
        "file": f"{report['file_bytes'] / 1e6:.2f} MB with its tokenizer; fp16 would be "
        f"{report['float16_bytes'] / 1e6:.2f} MB, {report['ratio_to_float16']:.1f} times as much",
        "ternary weights": f"{report['bits_per_weight']:.2f} bits each, {report['zero_fraction']:.0%} are zero",
        "writing": f"{text['tokens_per_second']:,.0f} tokens/s on {torch.get_num_threads()} threads",
        "loss curve": summary["pictures"][0] if summary["pictures"] else "needs matplotlib",
        "model": str(path),
    }
    width = shutil.get_terminal_size().columns
    Console(width=max(width, 80)).print(facts(rows, title="\nsummary"))
    console.print("\na model that was trained for longer, on books, comes along:  bitnet generate -p 'It was'")
    return 0


def _score(path: Path, data: Path) -> Evaluation:
    """The packed model on the run's validation split: the same windows that training scored."""
    engine, dataset = load(path), open_dataset(data)
    windows = eval_windows(dataset.val, engine.config.context)
    return evaluate(engine.logits, windows, dataset.tokenizer.byte_lengths())


if __name__ == "__main__":
    sys.exit(guarded(main))
