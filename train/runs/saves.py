"""The saves of a run: its state in memory written as a save, and read back into it, on any number of ranks.

This module decides what a save holds; saving.py writes the files, bitnet/files/checkpoint.py defines their format.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bitnet.errors import BitNetError
from bitnet.files import checkpoint
from bitnet.model import Transformer
from bitnet.train.initial import teacher_digest
from bitnet.train.optim import Optimizer
from bitnet.train.parallel.sharding import assign, local_rows, row_range
from bitnet.train.runs.run import load_parameters
from bitnet.train.runs.saving import Groups, SaveWriter
from bitnet.train.setup import Setup


@dataclass
class Progress:
    """How far a run has come: the part of its state that is not tensors."""

    step: int = 0  # completed steps
    tokens: int = 0  # trained on
    skipped: int = 0  # steps in a row without a finite gradient, up to now
    quantised: float = 0.0  # quantised fraction of the operands in the last step
    seconds: float = 0.0  # of training, over all resumes

    @classmethod
    def of(cls, save: checkpoint.Save) -> "Progress":
        """The progress that a save recorded."""
        state = save.state
        return cls(
            save.step, int(state["tokens"]), int(state["skipped"]), save.quantised, seconds=float(state["seconds"])
        )


class Saves:
    """Writes and restores a run's weights, optimiser state, random state and progress.

    sequences: of a step over all ranks. Every method is collective.
    """

    def __init__(self, setup: Setup, model: Transformer, optimizer: Optimizer, sequences: int) -> None:
        self._setup, self._model, self._optimizer = setup, model, optimizer
        self._run, self._processes = setup.run, setup.processes
        # Recorded in each save; all but the model must be the same on resume.
        self._facts: Mapping[str, Any] = {
            "sequences": sequences,
            "model": setup.config.model.to_dict(),
            "data": setup.dataset.fingerprint,
            "teacher": teacher_digest(setup.teacher) if setup.teacher is not None else None,
        }
        settings = setup.config.train
        self._writer = SaveWriter(setup.processes, setup.run.saves, settings.keep, settings.async_save)

    def save(self, progress: Progress) -> None:
        """Write a save, in the background with train.async_save.

        Raises OSError when this rank cannot write and BitNetError when another cannot; earlier saves stay as they are.
        """
        tensors, first_rows = self._tensors()
        self._writer.save(progress.step, tensors, {**asdict(progress), **self._facts}, first_rows)

    def poll(self) -> None:
        """Complete a background save if all ranks have written their files."""
        self._writer.poll()

    def wait(self) -> None:
        """Wait for a background save and complete it. Raises as `save` does."""
        self._writer.wait()

    def finish_file_on_error(self) -> AbstractContextManager[None]:
        """When the block raises, wait for this rank's background write: the folder's lock is released after it."""
        return self._writer.finish_file_on_error()

    def newest(self) -> str:
        """The newest save in words, for an error message."""
        saves = checkpoint.folders(self._run.saves)
        return f"the last good save is {saves[0]}" if saves else "there is no save yet"

    def resume(self) -> Progress | None:
        """Restore everything from the newest save, and cut the run's metrics back to it; None when there is no save.

        Raises BitNetError for a save of other data, another teacher or another global batch.
        """
        save = self._newest_save()
        if save is not None:
            self._check(save)
            if self._setup.sharded:
                self._load_rows(save)
            else:
                load_parameters(self._model, save)
                self._optimizer.load_tensors(save.tensors("optimizer"))
            torch.set_rng_state(save.tensors("random")["cpu"])
        if self._processes.is_main:
            self._run.rewind(save.step if save is not None else -1)
        return Progress.of(save) if save is not None else None

    def _tensors(self) -> tuple[Groups, dict[str, int] | None]:
        """What this rank writes, and for a rank that holds only rows, the first row by tensor (see SaveWriter.save)."""
        is_main = self._processes.is_main
        state = {"model": self._model.state_dict(), "optimizer": self._optimizer.tensors()}
        random = {"random": {"cpu": torch.get_rng_state()}} if is_main else {}
        if not self._setup.sharded:
            return ({**state, **random} if is_main else {}), None
        first_rows = {name: row_range(t)[0] for group in state.values() for name, t in group.items()}
        # A tensor without dimensions is the same on every rank: only the main process writes it.
        held = {
            name: {k: local_rows(t) for k, t in group.items() if t.dim() or is_main} for name, group in state.items()
        }
        return {**held, **random}, first_rows

    def _newest_save(self) -> checkpoint.Save | None:
        """The save to resume from: the main process picks and verifies it, all ranks take that one."""
        save, step = None, 0
        if self._processes.is_main:
            with self._processes.others_stop_on_failure():
                save = checkpoint.latest_save(self._run.saves)
            step = save.step if save is not None else 0
        else:
            self._processes.wait_for_main()
        step = self._processes.all_max(step)
        if self._processes.is_main or not step:
            return save
        return checkpoint.read_save(checkpoint.save_folder(self._run.saves, step), verify=False)

    def _check(self, save: checkpoint.Save) -> None:
        facts, before = self._facts, save.state
        if before.get("data") != facts["data"]:
            raise BitNetError(
                f"train: the tokens in {self._run.data} are not those the save {save.path.name} was trained on; "
                "restore them or choose another folder (--out)"
            )
        if before.get("teacher", facts["teacher"]) != facts["teacher"]:  # older saves do not record it
            raise BitNetError(
                f"train: got a teacher '{self._setup.config.train.teacher}' whose weights have changed, expected the "
                f"one that {save.path.name} was trained with; restore it or choose another folder (--out)"
            )
        if (sequences := before.get("sequences")) != facts["sequences"]:
            raise BitNetError(
                f"train: the run takes {sequences} sequences a step, got {facts['sequences']}; resume with as many "
                f"processes as before, or with any number and --set train.global_batch={sequences} "
                "--set train.accumulate=1"
            )

    def _load_rows(self, save: checkpoint.Save) -> None:
        """Read only the rows that this rank holds, whichever rank wrote them."""
        parameters = dict(self._model.named_parameters())
        for name, rows in save.rows("model", {name: row_range(p) for name, p in parameters.items()}).items():
            assign(parameters[name], rows)
        wanted = {}
        for name, stored in save.stored_rows("optimizer").items():
            parameter = parameters[name.rpartition("/")[0]]
            wanted[name] = row_range(parameter) if stored[0].shape else (0, 1)
        self._optimizer.load_tensors(save.rows("optimizer", wanted))
