"""One method, or one measurement, in a separate child, so that peak memory, threads and crashes are its own.

Run by children/child.py. A model too slow for its budget, as a short call shows, is answered with `too_slow`.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitnet.benchmarks.bench.series import PREDICT, PROMPT
from bitnet.benchmarks.compare.artifact import Artifact
from bitnet.benchmarks.compare.measure import score_all
from bitnet.benchmarks.compare.method import Settings
from bitnet.benchmarks.compare.models import Model, open_model
from bitnet.benchmarks.compare.pair import Pair
from bitnet.benchmarks.compare.registry import registry
from bitnet.train.data.windows import batch_for


def load(settings: dict[str, Any]) -> "Jobs":
    """The jobs that child.py asks for. settings: the fields of `Settings`."""
    warnings.simplefilter("ignore")  # of the libraries; they would fill the terminal beside the table
    logging.disable(logging.WARNING)
    torch.set_num_threads(settings["threads"])
    return Jobs(Settings(**settings))


class Jobs:
    """What a child of `bitnet compare` can do."""

    def __init__(self, settings: Settings) -> None:
        self.facts: dict[str, Any] = {}
        self._settings = settings

    def make(self, method: str, pair: dict[str, str | None], folder: str) -> dict[str, Any]:
        """Let a method make its file. Returns the fields of its `Artifact`."""
        paths = {key: None if value is None else Path(value) for key, value in pair.items()}
        torch.manual_seed(0)
        artifact = registry()[method].make(Pair(**paths), Path(folder), self._settings)  # type: ignore[arg-type]
        return artifact.to_dict()

    def measure_model(self, artifact: dict[str, Any], scores: str, **job: Any) -> dict[str, Any]:
        """Time a model, ask for its memory and, if asked to, score the text with it.

        job: text (folder), vocab, prefill, decode, repeats, reference, score, budget; as `command.py` sends it.
        """
        text = Path(job["text"])
        inputs = torch.from_numpy(np.load(text / "inputs.npy"))
        logits = Path(scores).with_suffix(".logits")
        model = open_model(Artifact(**artifact), self._settings, inputs.shape[1], logits, job["budget"])
        try:
            if too_slow := over_budget(model, inputs, job):
                return {"too_slow": too_slow}
            answer = {"times": timed(model, inputs.flatten(), job), **model.facts()}
            if job["reference"]:
                write_reference(model, inputs, text, job["vocab"])
            if job["score"]:
                targets = torch.from_numpy(np.load(text / "targets.npy"))
                reference = np.load(text / "reference.npy", mmap_mode="r")
                batch = batch_for(inputs.shape[1], job["vocab"])
                found = score_all(model.score, inputs, targets, np.load(text / "compared.npy"), reference, batch=batch)
                np.savez(scores, nats=found.nats, kl=found.kl, top1=found.top1)
        finally:
            model.close()
        return answer


def timed(model: Model, ids: torch.Tensor, job: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds of a prefill of ids [T] and of the tokens after it, `repeats` times after one warm-up."""
    ids = ids[: job["prefill"] + job["decode"]]
    return [model.time(ids, job["prefill"]) for _ in range(job["repeats"] + 1)][1:]


def over_budget(model: Model, inputs: torch.Tensor, job: dict[str, Any]) -> str:
    """Why the job would take longer than its budget, as reading and writing a few tokens shows; "" where it fits.

    inputs: windows [W, T].
    """
    context = inputs.shape[1]
    prefill = min(PROMPT, max(1, context // 2))
    ids = inputs.flatten()[: prefill + min(PREDICT, context - prefill)]
    windows = len(inputs) * job["score"] + len(np.load(Path(job["text"]) / "compared.npy")) * job["reference"]
    for _ in range(2):  # the first call may be slow because it is the first: what misses the budget by it gets another
        seconds = model.time(ids, prefill)
        reading = seconds["prefill"] / prefill
        writing = seconds["decode"] / max(1, len(ids) - prefill)
        timing = (job["repeats"] + 1) * (job["prefill"] * reading + job["decode"] * writing)
        needed = timing + windows * context * reading
        if needed <= job["budget"]:
            return ""
    return (
        f"reads {1 / reading:,.3g} tokens/s here: timing and scoring would take {needed:,.0f} s of "
        f"{job['budget']:,.3g} (--budget)"
    )


def write_reference(model: Model, inputs: torch.Tensor, text: Path, vocab: int) -> None:
    """Write the logits [C, T, V] fp32 of the windows that are compared."""
    compared = np.load(text / "compared.npy")
    shape = (len(compared), inputs.shape[1], vocab)
    store = np.lib.format.open_memmap(text / "reference.npy", "w+", np.float32, shape)
    for i, window in enumerate(compared):
        store[i] = model.score(inputs[window][None])[0].numpy()
    store.flush()
