"""The training loop: one readable pass from a configuration to a run folder that can always be resumed.

Everything that decides a step (weights, optimiser, data order, random state, the step's number) is in a save, and
the data order is a function of (seed, step): N steps in one go and N steps with a kill in between end bit-equal.

Dimensions: B batch, T time, V vocabulary.
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.files import checkpoint
from bitnet.layers import keep_codes, set_quant_warmup
from bitnet.machine import give_back_memory
from bitnet.model import Transformer, parameters
from bitnet.quant import use_int8_gradients
from bitnet.train.compiling import check_compiler, missing_compiler
from bitnet.train.config import RunConfig, TrainConfig
from bitnet.train.data.preparing import prepare_data
from bitnet.train.data.shards import TokenDataset, open_dataset
from bitnet.train.data.windows import Sampler
from bitnet.train.evaluate import Evaluation
from bitnet.train.initial import Initial, Teacher, check_initial, check_teacher, teacher_digest
from bitnet.train.memory import NONE, Others, Setting, summary, training_need
from bitnet.train.network import build_network, write_first_weights
from bitnet.train.optim import Optimizer
from bitnet.train.parallel.batches import micro_batches, sequences_a_step, share
from bitnet.train.parallel.distributed import Processes, lost_processes
from bitnet.train.parallel.sharding import clip_gradients
from bitnet.train.precision import resolve_dtype
from bitnet.train.report.display import Display
from bitnet.train.report.observer import Observer
from bitnet.train.report.overview import duration, overview
from bitnet.train.report.plot import plot_run
from bitnet.train.report.trackers import Tracker, make_trackers
from bitnet.train.runs.resuming import RunState
from bitnet.train.runs.run import Run
from bitnet.train.runs.saving import Saver
from bitnet.train.schedule import quantised_share, whole_from
from bitnet.train.signals import stop_signals

_WORTH_COMPILING = 600.0  # seconds of steps; torch.compile takes half a minute to two, and halves a step on a CPU


@dataclass
class Outcome:
    """How a call to `pretrain` ended; `signal` is the number of the signal that stopped it, or None.

    seconds and tokens_per_second are those of the whole run, over all its resumes.
    """

    run: Path
    step: int
    signal: int | None
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
    """Train until `config.train.steps`, going on from the newest save in `out` if there is one.

    initial: the model to start from where there is no save yet; the data is tokenised as it was for it. teacher: the
    model that train.teacher names; it must have the same tokenizer. others: both of them as memory sees them.

    Raises BitNetError for settings, data or saves that cannot be used and for a run that diverges;
    OSError when a save cannot be written (the saves before it stay whole).
    """
    run = Run(out)
    if initial is not None:
        check_initial(config, initial)
    elif config.train.init and not checkpoint.folders(run.saves):
        raise BitNetError(f"train: got train.init '{config.train.init}', expected that model, opened (--init)")
    if config.train.teacher and teacher is None:
        raise BitNetError(f"train: got train.teacher '{config.train.teacher}', expected that model, opened")
    if config.train.compile:
        check_compiler(device)
    with ExitStack() as stack:
        stack.enter_context(lost_processes())
        processes = stack.enter_context(Processes(device))
        trackers: list[Tracker] = []
        if processes.first:
            with processes.others_stop_on_failure():
                run.check(config)  # before the lock, which is a file in the folder
                stack.enter_context(run.lock())
                run.check(config)  # again: it may have become a run in between
                trackers = make_trackers(config.train, run.path)
                dataset = prepare_data(config, run, display, initial, teacher)
        else:
            processes.wait_for_first()
            dataset = open_dataset(run.data)
        if teacher is not None:
            check_teacher(config, dataset.tokenizer, teacher)
        model = teacher.model if teacher is not None else None
        trainer = Trainer(config, run, dataset, processes, display, trackers, initial, model, others)
        if processes.first:
            run.write_config(config)
        return trainer.train()


class Trainer:
    """The state of a run in memory and the loop over it."""

    def __init__(
        self,
        config: RunConfig,
        run: Run,
        dataset: TokenDataset,
        processes: Processes,
        display: Display,
        trackers: Sequence[Tracker] = (),
        initial: Initial | None = None,
        teacher: Transformer | None = None,
        others: Others = NONE,
    ) -> None:
        self.config, self.run, self.dataset = config, run, dataset
        self.settings: TrainConfig = config.train
        self.processes, self.display, self.device = processes, display, processes.device
        self.sequences = sequences_a_step(self.settings, processes.size)
        # The vocabulary asked for is an upper bound: a small corpus supports fewer tokens. And a model is worth no
        # longer a context than it was trained with.
        self.model_config = config.model.replace(
            vocab_size=dataset.tokenizer.vocab_size, max_position_embeddings=config.context
        )
        self.sharded = self.settings.parallel == "fsdp" and processes.size > 1
        setting = Setting.of(config, self.device, processes.size, self.model_config)
        # Before the model is made: what is available then, it may take.
        self.memory = summary(training_need(setting, others, resumes=bool(checkpoint.folders(run.saves))), self.device)
        use_int8_gradients(self.settings.int8_gradients, self.device)
        digest = teacher_digest(teacher) if teacher is not None else None
        self.model, self.network = build_network(self.model_config, self.settings, processes, self.sharded, teacher)
        torch.manual_seed(self.settings.seed)
        self.optimizer = Optimizer(self.model, self.settings)
        facts = {
            "sequences": self.sequences,
            "model": self.model_config.to_dict(),
            "data": dataset.fingerprint,
            "teacher": digest,
        }
        self.state = RunState(run, processes, self.model, self.optimizer, facts, self.sharded)
        self.step, self.tokens, self.skipped, self.seconds = 0, 0, 0, 0.0
        self.quantised = 0.0  # share of the operands in the step before
        self.resumed = self._resume()
        if not self.resumed:
            write_first_weights(self.model, self.settings, initial)
        self.saver = Saver(processes, run.saves, self.settings.keep, self.settings.async_save)
        self.observer = Observer(config, self.model, self.sharded, run, dataset, processes, display, trackers)
        # Live figure only: a token stands for this many bytes on average. Validation counts bytes exactly.
        self.bits_per_nat = len(dataset.train) / max(1, dataset.train.text_bytes) / math.log(2)
        self.dtype = resolve_dtype(self.settings.dtype, self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16")
        self.sampler = Sampler(dataset.train, config.context, self.settings.seed)

    def _resume(self) -> bool:
        save = self.state.resume(self.settings.teacher)
        if save is None:
            return False
        self.step, self.tokens, self.skipped = save.step, int(save.state["tokens"]), int(save.state["skipped"])
        self.seconds = float(save.state["seconds"])
        self.quantised = save.quantised
        return True

    def _save(self, seconds: float) -> None:
        counts = {"step": self.step, "tokens": self.tokens, "skipped": self.skipped, "quantised": self.quantised}
        tensors, first_rows = self.state.tensors()
        self.saver.save(self.step, tensors, {**counts, "seconds": seconds, **self.state.facts}, first_rows)

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        """Run all steps that are left, then validate on the whole split, sample, plot and save."""
        settings, display = self.settings, self.display
        subjects = overview(self.config, self.model_config, self.dataset, self.processes, self.dtype, self.sequences)
        self._set_quant_warmup()  # the estimate is of the steps that come first
        if self.quantised < 1:
            subjects["training"] += f", all of it {self.model_config.linear} from step {whole_from(settings)} on"
        display.announce(
            subjects
            | {"estimate": self._estimate()}
            | {"memory": self.memory}
            | {"run": str(self.run.path) + (f", resumed at step {self.step}" if self.resumed else "")},
            self.config.to_toml(),
        )
        first_step, started = self.step, time.perf_counter()
        signal = None
        with self.saver.left_whole(), stop_signals(display.note) as stop, display.live(settings.steps, self.step):
            while self.step < settings.steps and signal is None:
                self._step_and_record()
                last = self.step == settings.steps
                if self.step % settings.report_every == 0:
                    self.observer.report_telemetry(self.step)
                if settings.eval_every and self.step % settings.eval_every == 0 and not last:
                    self.observer.validate(self.step, settings.eval_tokens)
                if settings.sample_every and self.step % settings.sample_every == 0 and not last:
                    display.sample(self.observer.sample(self.step))
                signal = self.processes.largest(stop.received or 0) or None
                if self.step % settings.save_every == 0 or last or signal:
                    self._save(self.seconds + time.perf_counter() - started)
                else:
                    self.saver.poll()
            self.saver.wait()
        self.seconds += time.perf_counter() - started
        outcome = Outcome(self.run.path, self.step, signal, trained=self.step > first_step)
        outcome.seconds, outcome.tokens_per_second = self.seconds, self.tokens / max(self.seconds, 1e-9)
        if signal is None:
            # Written down once: not again by a start that finds all done, but by one after a kill behind the last save.
            missing = not any("val_loss" in row and row["step"] == self.step for row in self.run.metrics())
            outcome.validation = self.observer.validate(self.step, None, record=missing)
            outcome.sample = self.observer.sample(self.step, record=missing)
            outcome.pictures = self._plot()
        self.processes.barrier()
        self.observer.close()
        return outcome

    def _step_and_record(self) -> None:
        row = self._training_step()
        if row is not None:
            self.observer.record(row)
            self.display.step(row)

    def _training_step(self) -> dict[str, Any] | None:
        """One optimiser step. Returns its metrics, or None when it was skipped for want of a finite gradient."""
        started = time.perf_counter()
        rate = self.optimizer.set_step(self.step)
        self.observer.forget()
        self._set_quant_warmup()
        loss = self._gradients()
        norm = clip_gradients(list(self.model.parameters()), self.settings.clip)
        # The step's one wait for the device; several processes wait once more, to hear of each other's signals.
        loss_value, norm_value = torch.stack((loss, norm.detach())).tolist()
        self.step += 1
        self.tokens += self.sequences * self.config.context
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._skip(loss_value, norm_value)
            return None
        self.skipped = 0
        self.optimizer.step()
        seconds = time.perf_counter() - started
        return {
            "step": self.step,
            "loss": loss_value,
            "bits_per_byte": loss_value * self.bits_per_nat,
            "lr": rate,
            "grad_norm": norm_value,
            "tokens": self.tokens,
            "tokens_per_second": self.sequences * self.config.context / seconds,
            **({"quantised": self.quantised} if self.quantised < 1 else {}),
        }

    def _set_quant_warmup(self) -> None:
        """Set how much of the operands is quantised. It never falls, also where more steps than planned follow."""
        share = 1.0 if self.model_config.linear == "float" else quantised_share(self.settings, self.step)
        self.quantised = max(self.quantised, share)
        set_quant_warmup(self.model, self.quantised)

    def _gradients(self) -> Tensor:
        """Accumulate the gradients of this step's global batch. Returns the mean loss [] over all processes.

        Sequences are dealt by number: for any number of processes and any size of micro-batch, a step takes the same.
        """
        settings, processes = self.settings, self.processes
        mine = share(self.sequences, processes.rank, processes.size)
        counts = micro_batches(self.sequences, processes.size, settings.batch_size, len(mine))
        total = torch.zeros((), device=self.device)
        at = self.step * self.sequences + mine.start
        # Weights do not change between micro-batches: quantise them once. (A compiled graph quantises in itself, and
        # shares of weights are quantised where they are gathered.)
        keeps = len(counts) > 1 and not settings.compile and not self.sharded
        with keep_codes(self.model) if keeps else nullcontext():
            for micro, count in enumerate(counts):
                # A process with less to do than others goes through the motions: all meet at every gather and sum.
                inputs, targets = self.sampler.windows(at, max(1, count))
                at += count
                last = micro == len(counts) - 1
                with nullcontext() if last else self._without_sync():
                    loss, entropy = self._loss(inputs, targets)
                    # The mean over all processes of these terms is the mean over all sequences of the step.
                    (loss * 0 if not count else loss / (self.sequences / (count * processes.size))).backward()
                total += entropy * (count / counts[0])
        return processes.mean(total / (self.sequences / (counts[0] * processes.size)))

    def _without_sync(self) -> Any:
        """Gradients of whole models travel once a step, with the last micro-batch; those of spread ones every time."""
        travels_later = self.processes.size > 1 and not self.sharded
        return self.network.no_sync() if travels_later else nullcontext()  # type: ignore[operator]

    def _loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [] of one micro-batch [B, T] in the run's dtype, and the cross-entropy [] alone."""
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        with self.autocast:
            loss, entropy = self.network(inputs, targets)
        return loss, entropy

    def _skip(self, loss: float, norm: float) -> None:
        self.optimizer.zero_grad()
        self.skipped += 1
        reason = f"loss {loss}, gradient norm {norm}"
        self.observer.record({"step": self.step, "skipped": reason})
        if self.processes.first:
            self.display.warn(f"step {self.step} skipped: {reason}")
        if self.skipped >= self.settings.skip_limit:
            self.saver.wait()  # one that is being written in the background is good, too
            saves = checkpoint.folders(self.run.saves)
            last = f"the last good save is {saves[0]}" if saves else "there is no save yet"
            raise BitNetError(
                f"training diverged: got {self.skipped} steps in a row without a finite gradient ({reason}), expected "
                f"none; {last}: lower train.lr and train in a new folder (--out)"
            )

    # -- before and after the loop -------------------------------------------------------------------------------

    def _estimate(self) -> str:
        """Time one micro-batch's forward and backward pass; nothing of the state changes."""
        left = self.settings.steps - self.step
        if left <= 0:
            return "all steps are done"
        rng = torch.get_rng_state()
        counts = micro_batches(self.sequences, self.processes.size, self.settings.batch_size)
        inputs, targets = self.sampler.windows(0, counts[0])
        passes = []
        for _ in range(3):
            started = time.perf_counter()
            loss, _ = self._loss(inputs, targets)
            loss.backward()
            loss.item()
            passes.append(time.perf_counter() - started)
            # Allocated among holes of the pass before, the next one would take a third more than any step of training.
            give_back_memory()
        seconds = min(passes[1:]) * len(counts)  # the first one paid for allocations and compilation
        self.optimizer.zero_grad()
        torch.set_rng_state(rng)
        text = f"{duration(left * seconds)} for {left} steps (without the optimiser's share)"
        slow = left * seconds > _WORTH_COMPILING and not self.settings.compile
        return text + ("; --compile makes it faster" if slow and not missing_compiler(self.device) else "")

    def _plot(self) -> list[str]:
        if not self.processes.first:
            return []
        title = (
            f"{self.run.path.name}: {parameters(self.model_config) / 1e6:.1f}M parameters, {self.model_config.linear}"
        )
        try:
            return [str(path) for path in plot_run(self.run.metrics(), self.run.path / "loss", title)]
        except BitNetError as error:  # no matplotlib: the run itself is fine
            self.display.note(str(error))
            return []
