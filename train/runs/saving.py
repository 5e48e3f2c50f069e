"""Writing a save, by one process or by many, at once or in the background.

    begin   the main process makes step-N.tmp                       (bitnet/files/checkpoint.py has the protocol)
    write   every rank that holds something writes and syncs its files: the slow part, in a thread if `background`
    finish  once all ranks agree that all succeeded, the main process writes the manifest and renames the folder

Only the main thread uses collectives. A thread that did so too, as in torch.distributed.checkpoint's async_save, would
need a process group of its own and a way out when another rank dies inside it. So a background save is finished
between two training steps, the first ones after its last file was written.
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
    folder: Path
    step: int
    state: Mapping[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    written: bool = False
    error: OSError | None = None
    thread: threading.Thread | None = None


class SaveWriter:
    """Writes the saves of one run into the folder `saves`, of which the newest `keep` stay."""

    def __init__(self, processes: Processes, saves: Path, keep: int, background: bool) -> None:
        self._processes, self._saves, self._keep, self._background = processes, saves, keep, background
        self._pending: _Pending | None = None

    def save(
        self, step: int, groups: Groups, state: Mapping[str, Any], first_rows: Mapping[str, int] | None = None
    ) -> None:
        """Write a save. Collective: every rank passes the tensors it holds, possibly none.

        first_rows: on a rank that holds only rows, the number of the first one by tensor; None where the main process
        holds everything. Raises OSError when this rank cannot write and BitNetError when another one cannot; earlier
        saves are then untouched.
        """
        self.wait()
        processes = self._processes
        if processes.is_main:
            with processes.others_stop_on_failure():
                checkpoint.begin(self._saves, step)
        else:
            processes.wait_for_main()
        pending = _Pending(checkpoint.work_folder(self._saves, step), step, state)
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
        """Between two steps: finish a background save if all ranks have written their files. Collective."""
        if self._pending is not None and self._pending.thread is not None:
            writing = self._processes.all_max(int(self._pending.thread.is_alive()))
            if not writing:
                self.wait()

    def wait(self) -> None:
        """Finish a background save, if there is one. Collective. Raises as `save` does."""
        pending, self._pending = self._pending, None
        if pending is not None and pending.thread is not None:
            pending.thread.join()
            self._finish(pending)

    @contextmanager
    def finish_file_on_error(self) -> Iterator[None]:
        """When the block raises, let this rank's background write end first. Not collective: others may be gone."""
        try:
            yield
        except BaseException:
            if self._pending is not None and self._pending.thread is not None:
                self._pending.thread.join()
            raise

    def _finish(self, pending: _Pending) -> None:
        processes = self._processes
        if processes.all_max(int(not pending.written)):
            if processes.is_main:
                shutil.rmtree(pending.folder, ignore_errors=True)  # a partial save would keep a full disk full
            raise pending.error or BitNetError(
                "train: another process could not write its part of a save; its last line gives the reason"
            )
        written = processes.all_gather(pending.files)
        if not processes.is_main:
            processes.wait_for_main()
            return
        with processes.others_stop_on_failure():
            files = {name: entry for of_rank in written for name, entry in of_rank.items()}
            try:
                checkpoint.finish(pending.folder, pending.step, files, pending.state, self._keep)
            except BaseException:
                shutil.rmtree(pending.folder, ignore_errors=True)
                raise


def _write(pending: _Pending, groups: Groups, shard: int | None, first_rows: Mapping[str, int] | None) -> None:
    try:
        pending.files = checkpoint.write_files(pending.folder, groups, shard, first_rows)
        pending.written = True
    except OSError as error:
        pending.error = error
    except BaseException:
        shutil.rmtree(pending.folder, ignore_errors=True)
        raise  # threading prints it where this is a thread; `_finish` sees that nothing was written
