"""A run is a folder. This module owns its file names, reads and writes its small files, and locks it for one writer.

config.toml     the resolved configuration        metrics.jsonl    one JSON object a line
data/           token shards and tokenizer        samples.txt      text generated during training
saves/step-N/   weights, optimiser, state         loss.png, .svg   the loss curve
lock            id of the process that trains     tensorboard/     event files, with train.tensorboard
"""

import fcntl
import json
import math
import os
import re
from pathlib import Path
from typing import IO, Any

import torch

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.checkpoint import Save, folders, latest_save, replacing, unfinished
from bitnet.model import Transformer
from bitnet.text.tokenizer import Tokenizer
from bitnet.train.config import RunConfig, read_config
from bitnet.train.data.shards import open_tokenizer, work_folder

TENSORBOARD = "tensorboard"  # folder of event files

# Settings that may change on resume: the training up to there does not depend on them.
_MAY_CHANGE = frozenset(
    f"train.{name}"
    for name in (
        "steps eval_every eval_tokens sample_every sample_prompt save_every keep report_every skip_limit "
        "tensorboard wandb compile parallel recompute loss_chunk async_save global_batch"
    ).split()
)
# A global batch may be split differently on resume. That it has the size it had is checked against the newest save.
_FREE_WITH_GLOBAL_BATCH = frozenset({"train.batch_size", "train.accumulate"})


class Run:
    """The folder of one run, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.metrics_file = path / "metrics.jsonl"
        self.samples_file = path / "samples.txt"
        self.lock_file = path / "lock"
        self.data = path / "data"
        self.saves = path / "saves"
        self.curve = path / "loss"  # of the two pictures, less the suffix

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config_file.is_file()

    def has_saves(self) -> bool:
        """Whether there is a finished save, damaged or not."""
        return bool(folders(self.saves))

    def check(self, config: RunConfig) -> None:
        """Raise BitNetError when the folder holds something else or a run with other settings. Writes nothing."""
        if self.exists():
            self._check_same(config)
        elif self.path.is_dir():
            # What a start leaves that failed or was killed before its first step.
            ours = {self.lock_file, self.data, work_folder(self.data), *unfinished(self.config_file)}
            ours |= {self.path / TENSORBOARD, self.path / "wandb"}
            if set(self.path.iterdir()) - ours:
                raise BitNetError(f"train: '{self.path}' is not empty and holds no run; choose another folder (--out)")
        elif self.path.exists():
            raise BitNetError(f"train: got a file at '{self.path}', expected a folder or nothing; change --out")

    def write_config(self, config: RunConfig) -> None:
        """Make the folder a run. Called when training is about to begin: settings that failed do not bind a retry."""
        with replacing(self.config_file) as work:
            work.write_text(config.to_toml(), encoding="utf-8")

    def _check_same(self, config: RunConfig) -> None:
        for key, new, old in config.differences(self.config()):
            free = config.train.global_batch > 0 and key in _FREE_WITH_GLOBAL_BATCH
            if key not in _MAY_CHANGE and not free:
                raise BitNetError(
                    f"train: '{self.path}' holds a run with {key} = {old!r}, got {new!r}; "
                    "keep the old value to resume, or choose another folder (--out)"
                )

    def lock(self) -> IO[str]:
        """Hold the folder for this process until the returned file is closed. Raises BitNetError if it is held."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.lock_file.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise BitNetError(
                f"train: '{self.path}' is being written by process {owner}; wait or choose another folder (--out)"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for path in (self.config_file, self.metrics_file, self.samples_file):
            for leftover in unfinished(path):
                leftover.unlink()
        return file

    def config(self) -> RunConfig:
        """The run's configuration, resolved. Raises BitNetError when there is no run here."""
        if not self.exists():
            kind = (
                "a file" if self.path.is_file() else "a folder without config.toml" if self.path.is_dir() else "nothing"
            )
            raise BitNetError(
                f"run: got {kind} at '{self.path}', expected the folder of a run; start one with: "
                f"bitnet train --out {self.path}"
            )
        return read_config(self.config_file)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run's data."""
        return open_tokenizer(self.data)

    def load(self) -> tuple[Transformer, Save]:
        """The model of the newest intact save, in fp32 on the CPU. Raises BitNetError when there is none."""
        self.config()  # raises if this is no run
        save = latest_save(self.saves)
        if save is None:
            raise BitNetError(f"run: got no save in '{self.path}' yet, expected at least one; train it for longer")
        model = empty_model(ModelConfig.from_dict(save.state["model"]))
        load_parameters(model, save)
        return model, save

    def saved_shape(self) -> ModelConfig:
        """The shape of the model of the newest save, of which no weights are read; of the run where there is none."""
        for folder in folders(self.saves):
            try:
                state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                return ModelConfig.from_dict(state["model"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged, as `load` will say
        return self.config().model

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl, except a last line that a kill cut short."""
        if not self.metrics_file.exists():
            return []
        rows = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def rewind(self, step: int) -> None:
        """Drop the metrics and samples of steps after `step`, which a resumed run writes again."""
        if self.metrics_file.exists():
            rows = [row for row in self.metrics() if row["step"] <= step]
            with replacing(self.metrics_file) as work:
                work.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if self.samples_file.exists():
            kept = [text for at, text in self.samples() if at <= step]
            with replacing(self.samples_file) as work:
                work.write_text("".join(kept), encoding="utf-8", newline="")

    def samples(self) -> list[tuple[int, str]]:
        """(step, text with its heading) of every sample written so far."""
        with self.samples_file.open(encoding="utf-8", newline="") as file:
            parts = re.split(r"^--- step (\d+)\n", file.read(), flags=re.MULTILINE)[1:]
        return [(int(at), f"--- step {at}\n{text}") for at, text in zip(parts[::2], parts[1::2], strict=True)]

    def append_sample(self, step: int, text: str) -> None:
        """Add one sample under a heading with its step."""
        with self.samples_file.open("a", encoding="utf-8", newline="") as file:
            file.write(f"--- step {step}\n{text}\n")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one row; numbers that are not finite become null."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row)) + "\n")


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def empty_model(config: ModelConfig) -> Transformer:
    """A model on the CPU with uninitialised weights."""
    with torch.device("meta"):
        model = Transformer(config)
    return model.to_empty(device="cpu")


def load_parameters(model: Transformer, save: Save) -> None:
    """Copy a save's weights into a model. Raises BitNetError when names or shapes differ."""
    try:
        model.load_state_dict(save.tensors("model"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise BitNetError(f"{save.path}: the weights do not fit the run's configuration: {reason}") from error
