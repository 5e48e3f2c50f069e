"""What of a run in memory goes into a save, and how a run goes on from its newest one, on one process or on many.

The loop brings its counters; how files are written is saving.py's, what lies in them bitnet/files/checkpoint.py's.
"""

from collections.abc import Mapping
from typing import Any

import torch

from bitnet.errors import BitNetError
from bitnet.files import checkpoint
from bitnet.model import Transformer
from bitnet.train.optim import Optimizer
from bitnet.train.parallel.distributed import Processes
from bitnet.train.parallel.sharding import assign, local, span
from bitnet.train.runs.run import Run, load_parameters
from bitnet.train.runs.saving import Groups


class RunState:
    """The tensors of a run, for a save and from one, and the facts that have to be the same for it to go on.

    facts: "sequences" a step, the "model"'s configuration, the "data"'s fingerprint, the "teacher"'s digest or None.
    sharded: each process holds a share of the parameters.
    """

    def __init__(
        self,
        run: Run,
        processes: Processes,
        model: Transformer,
        optimizer: Optimizer,
        facts: Mapping[str, Any],
        sharded: bool,
    ) -> None:
        self._run, self._processes, self._model, self._optimizer = run, processes, model, optimizer
        self.facts, self._sharded = facts, sharded

    def tensors(self) -> tuple[Groups, dict[str, int] | None]:
        """What this process writes of a save, and where it holds rows only the first of them (see Saver.save)."""
        first = self._processes.first
        held = {"model": self._model.state_dict(), "optimizer": self._optimizer.tensors()}
        random = {"random": {"cpu": torch.get_rng_state()}} if first else {}
        if not self._sharded:
            return ({**held, **random} if first else {}), None
        first_rows = {name: span(t)[0] for group in held.values() for name, t in group.items()}
        # A number without rows is the same on all processes: the first one writes it.
        shares = {name: {k: local(t) for k, t in group.items() if t.dim() or first} for name, group in held.items()}
        return {**shares, **random}, first_rows

    def resume(self, teacher: str) -> checkpoint.Save | None:
        """Put everything back as it was at the newest save, and the run's metrics with it; None: there is no save.

        teacher: its name, for the message. Raises BitNetError for a save of other data, another teacher or other steps.
        """
        save = self._newest()
        if save is not None:
            self._check(save, teacher)
            if self._sharded:
                self._load_rows(save)
            else:
                load_parameters(self._model, save)
                self._optimizer.load_tensors(save.tensors("optimizer"))
            torch.set_rng_state(save.tensors("random")["cpu"])
        if self._processes.first:
            self._run.rewind(save.step if save is not None else -1)
        return save

    def _newest(self) -> checkpoint.Save | None:
        """The save to go on from: the first process chooses and verifies, all take the same."""
        save, step = None, 0
        if self._processes.first:
            with self._processes.others_stop_on_failure():
                save = checkpoint.latest_save(self._run.saves)
            step = save.step if save is not None else 0
        else:
            self._processes.wait_for_first()
        step = self._processes.largest(step)
        if self._processes.first or not step:
            return save
        return checkpoint.read_save(self._run.saves / f"step-{step:08d}", verify=False)

    def _check(self, save: checkpoint.Save, teacher: str) -> None:
        facts, before = self.facts, save.state
        if before.get("data") != facts["data"]:
            raise BitNetError(
                f"train: the tokens in {self._run.data} are not those the save {save.path.name} was trained on; "
                "restore them or choose another folder (--out)"
            )
        if before.get("teacher", facts["teacher"]) != facts["teacher"]:  # older saves do not tell
            raise BitNetError(
                f"train: the teacher '{teacher}' is not the one that {save.path.name} learnt from: its "
                "weights have changed; restore it or choose another folder (--out)"
            )
        if (sequences := before.get("sequences")) != facts["sequences"]:
            raise BitNetError(
                f"train: the run takes {sequences} sequences a step, got {facts['sequences']}; go on with as many "
                f"processes as before, or with any number and --set train.global_batch={sequences} "
                "--set train.accumulate=1"
            )

    def _load_rows(self, save: checkpoint.Save) -> None:
        """Read the rows that this process holds, whoever wrote them."""
        parameters = dict(self._model.named_parameters())
        for name, rows in save.rows("model", {name: span(p) for name, p in parameters.items()}).items():
            assign(parameters[name], rows)
        wanted = {}
        for name, pieces in save.stored_rows("optimizer").items():
            parameter = parameters[name.rpartition("/")[0]]
            wanted[name] = span(parameter) if pieces[0].shape else (0, 1)
        self._optimizer.load_tensors(save.rows("optimizer", wanted))
