"""Writing a run's saves, by one process or by many, at once or while training goes on.

    begin   the first process makes step-N.tmp                     (bitnet/files/checkpoint.py has the protocol)
    write   every process that holds something writes and syncs its file: the long part, in a thread if `background`
    finish  all agree that all succeeded; the first process writes the manifest and renames

Only the main thread talks to other processes. A thread that did so too, as torch.distributed.checkpoint's async_save
does, would need a process group of its own and a rule for what happens when one of them dies in it. So a background
save is finished between two steps: at the first after the last file was written.
"""

import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.files import checkpoint
from bitnet.train.parallel.distributed import Processes

Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass
class _Pending:
    work: Path
    step: int
    state: Mapping[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    written: bool = False
    error: OSError | None = None
    thread: threading.Thread | None = None


class Saver:
    """Writes the saves of one run."""

    def __init__(self, processes: Processes, saves: Path, keep: int, background: bool) -> None:
        self._processes, self._saves, self._keep, self._background = processes, saves, keep, background
        self._pending: _Pending | None = None

    def save(
        self, step: int, groups: Groups, state: Mapping[str, Any], first_rows: Mapping[str, int] | None = None
    ) -> None:
        """Write a save. Every process calls it, with the tensors it holds; with none it only takes part.

        first_rows: for a process that holds rows only, the first of them by tensor; None where the first process holds
        everything. Raises OSError when this process cannot write, BitNetError when another one cannot; the saves before
        this one are then untouched.
        """
        self.wait()
        processes = self._processes
        if processes.first:
            with processes.others_stop_on_failure():
                checkpoint.begin(self._saves, step)
        else:
            processes.wait_for_first()
        pending = _Pending(self._saves / f"step-{step:08d}.tmp", step, state)
        shard = None if first_rows is None else processes.rank
        if self._background:
            groups = {name: {k: t.detach().cpu().clone() for k, t in group.items()} for name, group in groups.items()}
            pending.thread = threading.Thread(target=_write, args=(pending, groups, shard, first_rows))
            pending.thread.start()
            self._pending = pending
        else:
            _write(pending, groups, shard, first_rows)
            self._finish(pending)

    def poll(self) -> None:
        """Between two steps: finish a background save if all processes have written their files. Collective."""
        if self._pending is not None and self._pending.thread is not None:
            still = self._processes.largest(int(self._pending.thread.is_alive()))
            if not still:
                self.wait()

    def wait(self) -> None:
        """Finish a background save, if there is one. Collective. Raises as `save` does."""
        pending, self._pending = self._pending, None
        if pending is not None and pending.thread is not None:
            pending.thread.join()
            self._finish(pending)

    @contextmanager
    def left_whole(self) -> Iterator[None]:
        """Leave the block with an error only when this process's file is written. The others are not asked."""
        try:
            yield
        except BaseException:
            if self._pending is not None and self._pending.thread is not None:
                self._pending.thread.join()
            raise

    def _finish(self, pending: _Pending) -> None:
        processes = self._processes
        if processes.largest(int(not pending.written)):
            if processes.first:
                shutil.rmtree(pending.work, ignore_errors=True)  # half a save on a full disk would keep it full
            raise pending.error or BitNetError(
                "train: a process could not write its share of a save; its own last line says why"
            )
        parts = processes.gather(pending.files)
        if not processes.first:
            processes.wait_for_first()
            return
        with processes.others_stop_on_failure():
            files = {name: measure for part in parts for name, measure in part.items()}
            try:
                checkpoint.finish(pending.work, pending.step, files, pending.state, self._keep)
            except BaseException:
                shutil.rmtree(pending.work, ignore_errors=True)
                raise


def _write(pending: _Pending, groups: Groups, shard: int | None, first_rows: Mapping[str, int] | None) -> None:
    try:
        pending.files = checkpoint.write_files(pending.work, groups, shard, first_rows)
        pending.written = True
    except OSError as error:
        pending.error = error
    except BaseException:
        shutil.rmtree(pending.work, ignore_errors=True)
        raise  # in a thread it is printed there; `_finish` sees that nothing was written
