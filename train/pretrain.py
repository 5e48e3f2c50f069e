"""The training loop on one page: step, evaluate, sample, save.

A save holds everything that decides the next step: weights, optimiser state, random state and the number of steps done.
The data of a step is a function of the seed and its number. So N steps at once and N steps with a kill in between end
with the same bits.

Dimensions: B batch, T time.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.layers import keep_codes
from bitnet.machine import give_back_memory
from bitnet.quant import training_precision
from bitnet.train.config import RunConfig
from bitnet.train.evaluate import Evaluation
from bitnet.train.initial import Initial, Teacher
from bitnet.train.memory import NONE, Others
from bitnet.train.network import build_network, write_first_weights
from bitnet.train.optim import Optimizer
from bitnet.train.parallel.batches import StepBatches
from bitnet.train.parallel.sharding import clip_gradients
from bitnet.train.report.display import Display
from bitnet.train.report.observer import Observer
from bitnet.train.report.plot import plot_run
from bitnet.train.runs.saves import Progress, Saves
from bitnet.train.schedule import quantised_fraction
from bitnet.train.setup import Setup, set_up
from bitnet.train.signals import stop_signals


@dataclass
class Outcome:
    """How a call of `pretrain` ended. seconds and tokens_per_second cover the run with all its resumes."""

    run: Path
    step: int
    signal: int | None  # number of the signal that stopped it
    trained: bool  # False: all steps were done already
    validation: Evaluation | None = None
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    sample: str = ""
    pictures: list[str] = field(default_factory=list)


def pretrain(
    config: RunConfig,
    out: Path,
    device: torch.device,
    display: Display,
    initial: Initial | None = None,
    teacher: Teacher | None = None,
    others: Others = NONE,
) -> Outcome:
    """Train until `config.train.steps`, from the newest save in `out` if there is one.

    initial: the model that train.init names, for a run without a save; the run takes its tokenizer. teacher: the model
    that train.teacher names; it must have the run's tokenizer. others: what both of them take of memory.

    Raises BitNetError for settings, data or saves that cannot be used and for a run that diverges; OSError when a save
    cannot be written (earlier saves stay as they are).
    """
    with set_up(config, out, device, display, initial, teacher, others) as setup:
        trainer = Trainer(setup)
        if setup.processes.is_main:
            setup.run.write_config(setup.config)
        return trainer.train()


class Trainer:
    """A run in memory, new or restored from its newest save, and the loop over its steps."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config, self.settings = setup, setup.config, setup.config.train
        self.processes, self.display = setup.processes, setup.display
        self.batches = StepBatches(setup.dataset.train, self.config, self.processes)
        self.precision = training_precision(1.0, self.settings.int8_gradients, self.processes.device)
        self.model, self.network = build_network(
            self.config.model, self.settings, self.processes, setup.sharded, setup.teacher
        )
        torch.manual_seed(self.settings.seed)
        self.optimizer = Optimizer(self.model, self.settings)
        self.saves = Saves(setup, self.model, self.optimizer, self.batches.sequences)
        restored = self.saves.resume()
        self.progress = restored or Progress()
        self.resumed = restored is not None
        if not self.resumed:
            write_first_weights(self.model, self.settings, setup.initial)
        self.observer = Observer(setup, self.model)
        self.autocast = torch.autocast(self.processes.device.type, torch.bfloat16, enabled=setup.dtype == "bf16")

    def train(self) -> Outcome:
        """Take all remaining steps; then validate on the whole split, sample and plot."""
        settings, progress, observer, display = self.settings, self.progress, self.observer, self.display
        first_step, seconds_before, started = progress.step, progress.seconds, time.perf_counter()
        self.set_quant_warmup()  # for the estimate
        observer.announce(progress, self.batches, self.resumed, self.seconds_per_step())
        signal = None
        with (
            self.saves.finish_file_on_error(),
            stop_signals(display.note) as stop,
            display.live(settings.steps, progress.step),
        ):
            while progress.step < settings.steps and signal is None:
                self.training_step()
                step, is_last = progress.step, progress.step == settings.steps
                if step % settings.report_every == 0:
                    observer.report_telemetry(step)
                if settings.eval_every and step % settings.eval_every == 0 and not is_last:
                    observer.validate(step, settings.eval_tokens)
                if settings.sample_every and step % settings.sample_every == 0 and not is_last:
                    display.sample(observer.sample(step))
                signal = self.processes.all_max(stop.received or 0) or None
                if step % settings.save_every == 0 or is_last or signal:
                    progress.seconds = seconds_before + time.perf_counter() - started
                    self.saves.save(progress)
                else:
                    self.saves.poll()
            self.saves.wait()
        progress.seconds = seconds_before + time.perf_counter() - started
        outcome = Outcome(self.setup.run.path, progress.step, signal, trained=progress.step > first_step)
        outcome.seconds, outcome.tokens_per_second = progress.seconds, progress.tokens / max(progress.seconds, 1e-9)
        if signal is None:
            # Recorded once: not again when a finished run is started again, unless it was killed before this line.
            missing = not any("val_loss" in row and row["step"] == progress.step for row in self.setup.run.metrics())
            outcome.validation = observer.validate(progress.step, None, record=missing)
            outcome.sample = observer.sample(progress.step, record=missing)
            outcome.pictures = self._plot()
        self.processes.barrier()
        observer.close()
        return outcome

    def training_step(self) -> None:
        """One optimiser step, recorded; it changes no weight if the loss or the gradient norm is not finite."""
        started, progress = time.perf_counter(), self.progress
        lr = self.optimizer.set_step(progress.step)
        self.observer.drop_copy()
        self.set_quant_warmup()
        loss = self.gradients()
        norm = clip_gradients(list(self.model.parameters()), self.settings.clip)
        # The only wait for the device in a step; several ranks wait once more, to exchange signals.
        loss_value, norm_value = torch.stack((loss, norm.detach())).tolist()
        progress.step += 1
        progress.tokens += self.batches.tokens
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._skip(f"loss {loss_value}, gradient norm {norm_value}")
            return
        progress.skipped = 0
        self.optimizer.step()
        self.observer.record_step(
            progress, loss_value, norm_value, lr, self.batches.tokens, time.perf_counter() - started
        )

    def set_quant_warmup(self) -> None:
        """Quantise the fraction of the operands that the next step takes; it never falls, even if steps were added."""
        fraction = 1.0 if self.config.model.linear == "float" else quantised_fraction(self.settings, self.progress.step)
        self.progress.quantised = max(self.progress.quantised, fraction)
        self.precision = training_precision(
            self.progress.quantised, self.settings.int8_gradients, self.processes.device
        )

    def gradients(self) -> Tensor:
        """Accumulate the gradients of the next step's global batch. Returns its mean loss [] over all ranks."""
        batches, total, largest = self.batches, torch.zeros((), device=self.processes.device), 0
        # The weights are the same for all micro-batches: quantise them once. (A compiled graph quantises by itself, and
        # sharded weights are quantised where they are gathered.)
        keeps = len(batches) > 1 and not self.settings.compile and not self.setup.sharded
        with keep_codes(self.model) if keeps else nullcontext():
            for inputs, targets, count, is_last in batches.of_step(self.progress.step):
                largest = largest or count  # the first one is the largest
                with nullcontext() if is_last else self._no_sync():
                    loss, entropy = self._loss(inputs, targets)
                    (loss / batches.divisor(count) if count else loss * 0).backward()
                total += entropy * (count / largest)
        return self.processes.all_mean(total / batches.divisor(largest))

    def _loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [] of a micro-batch, int64 [B, T], in the run's dtype; and its cross-entropy [] alone."""
        device = self.processes.device
        with self.autocast:
            loss, entropy = self.network(inputs.to(device), targets.to(device), self.precision)
        return loss, entropy

    def _no_sync(self) -> AbstractContextManager[None]:
        """DDP reduces gradients once a step, with the last micro-batch; FSDP with every micro-batch."""
        reduces_later = self.processes.world_size > 1 and not self.setup.sharded
        return self.network.no_sync() if reduces_later else nullcontext()  # type: ignore[operator]

    def _skip(self, reason: str) -> None:
        """Drop the gradients of a step; after train.skip_limit of them in a row, raise BitNetError."""
        progress, limit = self.progress, self.settings.skip_limit
        self.optimizer.zero_grad()
        progress.skipped += 1
        self.observer.record_skip(progress.step, reason)
        if progress.skipped >= limit:
            self.saves.wait()  # a save that is still being written in the background counts too
            raise BitNetError(
                f"training diverged: got {progress.skipped} steps in a row without a finite gradient ({reason}), "
                f"expected fewer than {limit}; {self.saves.newest()}: lower train.lr and train in a new folder (--out)"
            )

    def seconds_per_step(self) -> float:
        """Time the forward and backward passes of a step, without changing the run's state; 0 if no step is left."""
        if self.progress.step >= self.settings.steps:
            return 0.0
        rng = torch.get_rng_state()
        inputs, targets = self.batches.largest()
        passes = []
        for _ in range(3):
            started = time.perf_counter()
            loss, _ = self._loss(inputs, targets)
            loss.backward()
            loss.item()
            passes.append(time.perf_counter() - started)
            give_back_memory()  # among the holes of this pass the next one would take a third more than any step does
        self.optimizer.zero_grad()
        torch.set_rng_state(rng)
        return min(passes[1:]) * len(self.batches)  # the first pass allocates and compiles

    def _plot(self) -> list[str]:
        if not self.processes.is_main:
            return []
        run = self.setup.run
        try:
            return [str(path) for path in plot_run(run.metrics(), run.curve, self.observer.title())]
        except BitNetError as error:  # matplotlib is not installed: the run itself is fine
            self.display.note(str(error))
            return []
