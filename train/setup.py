"""Everything before the first step: refuse what cannot work, lock the folder, tokenise, resolve the configuration."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bitnet.model import Transformer
from bitnet.train.compiling import check_compiler
from bitnet.train.config import RunConfig
from bitnet.train.data.preparing import prepare_data
from bitnet.train.data.shards import TokenDataset, open_dataset
from bitnet.train.initial import Initial, Teacher, check_opened, check_teacher
from bitnet.train.memory import NONE, Others, Setting, summary, training_need
from bitnet.train.parallel.distributed import Processes, lost_processes
from bitnet.train.precision import resolve_dtype
from bitnet.train.report.display import Display
from bitnet.train.report.trackers import Tracker, make_trackers
from bitnet.train.runs.run import Run


@dataclass(frozen=True)
class Setup:
    """What a run has before its model: fixed from here on."""

    config: RunConfig  # resolved: with the vocabulary of the tokenizer and the context of the run
    run: Run
    dataset: TokenDataset
    processes: Processes
    display: Display
    trackers: Sequence[Tracker] = ()  # on the main process
    initial: Initial | None = None
    teacher: Transformer | None = None
    memory: str = ""  # what the run needs of what is available, in words

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a shard of every parameter (FSDP)."""
        return self.config.train.parallel == "fsdp" and self.processes.world_size > 1

    @property
    def dtype(self) -> str:
        """The dtype of matrix products in training: "fp32" or "bf16"."""
        return resolve_dtype(self.config.train.dtype, self.processes.device)


@contextmanager
def set_up(
    config: RunConfig,
    out: Path,
    device: torch.device,
    display: Display,
    initial: Initial | None = None,
    teacher: Teacher | None = None,
    others: Others = NONE,
) -> Iterator[Setup]:
    """Join the other processes, lock the run's folder and prepare its data for as long as the block lasts.

    Raises BitNetError for settings, data or models that cannot be used together; then a new folder stays no run.
    """
    run = Run(out)
    check_opened(config, run, initial, teacher)
    if config.train.compile:
        check_compiler(device)
    with ExitStack() as stack:
        stack.enter_context(lost_processes())
        processes = stack.enter_context(Processes(device))
        trackers: list[Tracker] = []
        if processes.is_main:
            with processes.others_stop_on_failure():
                run.check(config)  # before the lock, which is itself a file in the folder
                stack.enter_context(run.lock())
                run.check(config)  # again: another process may have made it a run in between
                trackers = make_trackers(config.train, run.path)  # a missing one is refused before text is tokenised
                dataset = prepare_data(config, run, display, initial, teacher)
        else:
            processes.wait_for_main()
            dataset = open_dataset(run.data)
        if teacher is not None:
            check_teacher(config, dataset.tokenizer, teacher)
        config = config.resolved(dataset.tokenizer.vocab_size)
        teacher_model = None if teacher is None else teacher.model
        setting = Setting.of(config, processes.device, processes.world_size, config.model)
        # Before the model is made: memory that is available now may be taken by it.
        memory = summary(training_need(setting, others, resumes=run.has_saves()), processes.device)
        yield Setup(config, run, dataset, processes, display, trackers, initial, teacher_model, memory)
