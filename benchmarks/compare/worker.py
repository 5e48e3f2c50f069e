"""One method, or one measurement, in a process of its own: peak memory, threads and a crash are then its own too.

    python -m bitnet.benchmarks.compare.worker JOB.json PARENT-ID

The answer is written to the file that the job names; an error is one line on stderr and exit code 2. A model whose
timing and scoring would not fit the job's budget, as a short call tells, is exit code 3. On Linux the process ends with
its parent.
"""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitnet.benchmarks.bench.worker import follow
from bitnet.benchmarks.compare.artifact import Artifact
from bitnet.benchmarks.compare.measure import score_all
from bitnet.benchmarks.compare.method import Settings
from bitnet.benchmarks.compare.pair import Pair
from bitnet.benchmarks.compare.registry import registry
from bitnet.benchmarks.compare.runners import Runner, open_runner
from bitnet.errors import BitNetError
from bitnet.train.data.windows import batch_for

TOO_SLOW = 3  # exit code
_PREFILL, _DECODE = 16, 2  # tokens of the short call


class TooSlowError(BitNetError):
    """What a job asks for would take longer than its budget."""


def make(job: dict[str, Any]) -> dict[str, Any]:
    """Let a method make its file."""
    paths = {key: None if value is None else Path(value) for key, value in job["pair"].items()}
    pair = Pair(**paths)  # type: ignore[arg-type]
    torch.manual_seed(0)
    return registry()[job["method"]].make(pair, Path(job["folder"]), Settings(**job["settings"])).to_dict()


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Time a model, ask for its memory and, if asked to, score the text with it."""
    text = Path(job["text"])
    inputs = torch.from_numpy(np.load(text / "inputs.npy"))
    runner = open_runner(Artifact(**job["artifact"]), Settings(**job["settings"]), inputs.shape[1], Path(job["scores"]))
    try:
        check_budget(runner, inputs, job)
        answer = {"times": timed(runner, inputs.flatten(), job), **runner.facts()}
        if job["reference"]:
            write_reference(runner, inputs, text, job["vocab"])
        if job["score"]:
            targets = torch.from_numpy(np.load(text / "targets.npy"))
            reference = np.load(text / "reference.npy", mmap_mode="r")
            batch = batch_for(inputs.shape[1], job["vocab"])
            scores = score_all(runner.score, inputs, targets, np.load(text / "compared.npy"), reference, batch=batch)
            np.savez(job["scores"], nats=scores.nats, kl=scores.kl, top1=scores.top1)
    finally:
        runner.close()
    return answer


def timed(runner: Runner, ids: torch.Tensor, job: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds of prefill and of the tokens after it, `repeats` times, one run before them to warm up."""
    ids = ids[: job["prefill"] + job["decode"]]
    return [runner.time(ids, job["prefill"]) for _ in range(job["repeats"] + 1)][1:]


def check_budget(runner: Runner, inputs: torch.Tensor, job: dict[str, Any]) -> None:
    """Raise TooSlowError where a few tokens, read and written, say that the job takes longer than its budget.

    inputs: windows [W, T].
    """
    context = inputs.shape[1]
    prefill = min(_PREFILL, max(1, context // 2))
    ids = inputs.flatten()[: prefill + min(_DECODE, context - prefill)]
    for again in (False, True):  # the first call warms up; who does not fit by it gets another
        seconds = runner.time(ids, prefill)
        reading = seconds["prefill"] / prefill
        writing = seconds["decode"] / max(1, len(ids) - prefill)
        windows = len(inputs) * job["score"] + len(np.load(Path(job["text"]) / "compared.npy")) * job["reference"]
        timing = (job["repeats"] + 1) * (job["prefill"] * reading + job["decode"] * writing)
        needed = timing + windows * context * reading
        if needed <= job["budget"]:
            return
        if again:
            raise TooSlowError(
                f"reads {1 / reading:,.3g} tokens/s here: timing and scoring would take {needed:,.0f} s of "
                f"{job['budget']:,.3g} (--budget)"
            )


def write_reference(runner: Runner, inputs: torch.Tensor, text: Path, vocab: int) -> None:
    """The logits [C, T, V] fp32 of the windows that are compared."""
    compared = np.load(text / "compared.npy")
    shape = (len(compared), inputs.shape[1], vocab)
    store = np.lib.format.open_memmap(text / "reference.npy", "w+", np.float32, shape)
    for i, window in enumerate(compared):
        store[i] = runner.score(inputs[window][None])[0].numpy()
    store.flush()


def main() -> int:
    """Do the job of the file in argv."""
    follow(int(sys.argv[2]))
    warnings.simplefilter("ignore")  # of the libraries; they would fill the terminal beside the table
    logging.disable(logging.WARNING)
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["settings"]["threads"])
    try:
        answer = {"make": make, "measure": measure}[job["do"]](job)
    except TooSlowError as error:
        print(error, file=sys.stderr)
        return TOO_SLOW
    except BitNetError as error:
        print(error, file=sys.stderr)
        return 2
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
