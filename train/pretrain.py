"""The training loop: one readable pass from a configuration to a run folder that can always be resumed.

Everything that decides a step (weights, optimiser, data order, random state, the step's number) is in a save, and
the data order is a function of (seed, step): N steps in one go and N steps with a kill in between end bit-equal.

Dimensions: B batch, T time, V vocabulary.
"""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitnet import checkpoint
from bitnet.engine import TorchEngine, stream
from bitnet.errors import BitNetError
from bitnet.layers import keep_codes, set_ease
from bitnet.model import Transformer, parameters
from bitnet.quant import use_int8_gradients
from bitnet.sampling import Sampling
from bitnet.train.batches import micro_batches, sequences_a_step, share
from bitnet.train.compiling import check_compiler, compile_blocks, compiled
from bitnet.train.config import RunConfig, TrainConfig
from bitnet.train.data import (
    Sampler,
    TokenDataset,
    batch_for,
    check_lengths,
    eval_windows,
    open_dataset,
    open_tokenizer,
    prepare,
)
from bitnet.train.display import Display
from bitnet.train.distributed import Processes, first_line, other_ended
from bitnet.train.evaluate import Evaluation, evaluate
from bitnet.train.initial import (
    Initial,
    Teacher,
    check_initial,
    check_teacher,
    initial_weights,
    teacher_digest,
    teacher_tokenizer,
)
from bitnet.train.objective import Objective, needs_objective, next_token_loss
from bitnet.train.optim import Optimizer
from bitnet.train.overview import duration, overview
from bitnet.train.plot import plot_run
from bitnet.train.precision import resolve_dtype
from bitnet.train.run import Run, empty_model, load_parameters
from bitnet.train.saving import Saver
from bitnet.train.schedule import quantised_share
from bitnet.train.sharding import assign, clip_gradients, gathered, local, shard, span
from bitnet.train.signals import stop_signals
from bitnet.train.telemetry import Telemetry, summary
from bitnet.train.trackers import Tracker, make_trackers


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
) -> Outcome:
    """Train until `config.train.steps`, going on from the newest save in `out` if there is one.

    initial: the model to start from where there is no save yet; the data is tokenised as it was for it. teacher: the
    model that train.teacher names; it must have the same tokenizer.

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
        trainer = Trainer(config, run, dataset, processes, display, trackers, initial, model)
        if processes.first:
            run.write_config(config)
        return trainer.train()


@contextmanager
def lost_processes() -> Iterator[None]:
    """Say in one line that another process has ended, wherever that is noticed."""
    try:
        yield
    except RuntimeError as error:
        if not other_ended(error):
            raise
        raise BitNetError(
            "train: another process of this run ended, so that this one cannot go on; its own last line says why. All "
            f"whole saves are kept: start the same command again ({first_line(error)})"
        ) from error


def prepare_data(
    config: RunConfig, run: Run, display: Display, initial: Initial | None = None, teacher: Teacher | None = None
) -> TokenDataset:
    """Tokenise the corpus into the run's folder, unless that is done already.

    Raises BitNetError, and leaves nothing of a first try, when the text is too short for the settings.
    """
    tokenizer = None
    if initial is not None:
        tokenizer = initial.tokenizer
        if tokenizer is None:
            raise BitNetError(f"train: got no tokenizer in '{config.train.init}', expected the one it was trained with")
    elif config.train.init and (run.data / "manifest.json").exists():
        tokenizer = open_tokenizer(run.data)  # the run goes on without the model it began with
    elif teacher is not None:
        tokenizer = teacher_tokenizer(config, teacher)
    try:
        dataset = prepare(
            config.data,
            run.data,
            tokenizer=tokenizer,
            kind=config.tokenizer.kind,
            vocab_size=config.model.vocab_size,
            report=display.preparing,
        )
        check_lengths(dataset, config.context)
        dataset.tokenizer.encode(config.train.sample_prompt)  # refused now, not after the last step
        return dataset
    except BitNetError:
        if not run.exists():
            shutil.rmtree(run.data, ignore_errors=True)
        raise
    finally:
        display.prepared()


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
    ) -> None:
        self.config, self.run, self.dataset, self.trackers = config, run, dataset, trackers
        self.settings: TrainConfig = config.train
        self.processes, self.display, self.device = processes, display, processes.device
        self.sequences = sequences_a_step(self.settings, processes.size)
        # The vocabulary asked for is an upper bound: a small corpus supports fewer tokens. And a model is worth no
        # longer a context than it was trained with.
        self.model_config = config.model.replace(
            vocab_size=dataset.tokenizer.vocab_size, max_position_embeddings=config.context
        )
        self.sharded = self.settings.parallel == "fsdp" and processes.size > 1
        use_int8_gradients(self.settings.int8_gradients, self.device)
        self.teacher = teacher_digest(teacher) if teacher is not None else None
        self.network = self._build(teacher)
        self._fill(initial)
        torch.manual_seed(self.settings.seed)
        self.optimizer = Optimizer(self.model, self.settings)
        self.step, self.tokens, self.skipped, self.seconds = 0, 0, 0, 0.0
        self.resumed = self._resume()
        self.saver = Saver(processes, run.saves, self.settings.keep, self.settings.async_save)
        self.telemetry = Telemetry(self.model)
        self.token_bytes = dataset.tokenizer.byte_lengths()
        # Live figure only: a token stands for this many bytes on average. Validation counts bytes exactly.
        self.bits_per_nat = len(dataset.train) / max(1, dataset.train.text_bytes) / math.log(2)
        self.dtype = resolve_dtype(self.settings.dtype, self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16")
        self.sampler = Sampler(dataset.train, config.context, self.settings.seed)
        self._copy: Transformer | None = None  # of a model spread over processes, on the first one,
        self._copied = -1  # made at this step

    def _build(self, teacher: Transformer | None) -> nn.Module:
        """Make `self.model`, empty, and what the loop calls: it with its loss, compiled, on all processes."""
        settings = self.settings
        with torch.device("meta"):
            self.model = Transformer(self.model_config)
            for block in self.model.blocks():
                block.recompute = settings.recompute
            network: nn.Module = self.model
            if needs_objective(settings):
                network = Objective(self.model, settings, teacher and teacher.to(self.device))
        if not self.sharded:
            self.model.to_empty(device=self.device)
            return self.processes.wrap(compiled(network) if settings.compile else network)
        if settings.compile:
            compile_blocks(self.model.blocks())
        shard(network, self.model.blocks(), self.device)
        network.to_empty(device=self.device)  # this process's share and no more
        return network

    def _fill(self, initial: Initial | None) -> None:
        """Give the model its first weights, one parameter at a time."""
        parameters = dict(self.model.named_parameters())
        values = initial_weights(self.model, initial) if initial else self.model.fresh_weights(self.settings.seed)
        for name, value in values:
            if self.settings.zero_init and initial is None and name.endswith(("o_proj.weight", "down_proj.weight")):
                value = torch.zeros_like(value)
            assign(parameters[name], value)

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        """Run all steps that are left, then validate on the whole split, sample, plot and save."""
        settings, display = self.settings, self.display
        display.announce(
            overview(self.config, self.model_config, self.dataset, self.processes, self.dtype, self.sequences)
            | {"estimate": self._estimate()}
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
                    self._report_telemetry()
                if settings.eval_every and self.step % settings.eval_every == 0 and not last:
                    self._validate(settings.eval_tokens)
                if settings.sample_every and self.step % settings.sample_every == 0 and not last:
                    display.sample(self._sample())
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
            outcome.validation = self._validate(None, record=missing)
            outcome.sample = self._sample(record=missing)
            outcome.pictures = self._plot()
        self.processes.barrier()
        for tracker in self.trackers:
            tracker.close()
        return outcome

    def _step_and_record(self) -> None:
        row = self._training_step()
        if row is not None:
            self._record(row)
            self.display.step(row)

    def _training_step(self) -> dict[str, Any] | None:
        """One optimiser step. Returns its metrics, or None when it was skipped for want of a finite gradient."""
        started = time.perf_counter()
        rate = self.optimizer.set_step(self.step)
        self._copy, self._copied = None, -1
        if self.settings.ease or self.settings.float_share:
            set_ease(self.model, quantised_share(self.settings, self.step))
        loss = self._gradients()
        norm = clip_gradients(list(self.model.parameters()), self.settings.clip)
        loss_value, norm_value = torch.stack((loss, norm.detach())).tolist()  # the step's one wait for the device
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
        }

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
            if needs_objective(self.settings):
                loss, entropy = self.network(inputs, targets)
                return loss, entropy
            loss = next_token_loss(self.network, inputs, targets)
            return loss, loss.detach()

    def _skip(self, loss: float, norm: float) -> None:
        self.optimizer.zero_grad()
        self.skipped += 1
        reason = f"loss {loss}, gradient norm {norm}"
        self._record({"step": self.step, "skipped": reason})
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

    # -- looking at the model ------------------------------------------------------------------------------------

    def _whole(self) -> Transformer | None:
        """The model as one piece, for a look at it: None on all processes but the first. Collective.

        Of a model that is spread, the first process gets a copy, which lives until the next step.
        """
        if self.sharded and self._copied != self.step:
            copy = empty_model(self.model_config).to(self.device) if self.processes.first else None
            for name, parameter in self.model.named_parameters():
                value = gathered(parameter.detach())
                if copy is not None:
                    copy.get_parameter(name).detach().copy_(value)
            self._copy, self._copied = copy, self.step
        set_ease(self.model, 1.0)  # figures are those of the ternary model; the next step sets it anew
        return (self._copy if self.sharded else self.model) if self.processes.first else None

    def _validate(self, tokens: int | None, record: bool = True) -> Evaluation | None:
        """Score the validation split (its first `tokens` tokens) in fp32: the same integers a packed file gives."""
        model = self._whole()
        if model is None:
            return None
        batch = batch_for(self.config.context, self.model_config.vocab_size)
        windows = eval_windows(self.dataset.val, self.config.context, batch_size=batch, limit_tokens=tokens)
        total = min(len(self.dataset.val), tokens or len(self.dataset.val))
        with torch.inference_mode(), keep_codes(model):
            result = evaluate(
                lambda ids: model(ids.to(self.device)),
                windows,
                self.token_bytes,
                lambda done: self.display.validating(done, total),
            )
        whole = tokens is None or tokens >= len(self.dataset.val)
        row = {
            "step": self.step,
            "val_loss": result.loss,
            "val_bits_per_byte": result.bits_per_byte,
            "val_bits_per_byte_error": result.bits_per_byte_error,
            "val_tokens": result.tokens,
            "val_whole": whole,
        }
        if record:
            self._record(row)
        self.display.validation(row)
        return result

    def _sample(self, length: int = 120, record: bool = True) -> str:
        """A text from the model as it stands, the same random draws every time."""
        model = self._whole()
        if model is None:
            return ""
        tokenizer = self.dataset.tokenizer
        start = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
        ids = start + tokenizer.encode(self.settings.sample_prompt) or [0]
        with keep_codes(model):
            engine = TorchEngine(model)
            new = list(stream(engine, ids, length, Sampling(seed=self.settings.seed), stop=start))
        text = self.settings.sample_prompt + tokenizer.decode(new)
        if record:
            self.run.append_sample(self.step, text)
        return text

    def _report_telemetry(self) -> None:
        model = self._whole() if self.sharded else self.model
        if self.processes.first and (rows := self.telemetry.report(model)):
            self._record({"step": self.step, "telemetry": rows})
            self.display.telemetry(summary(rows))

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

    def _record(self, row: dict[str, Any]) -> None:
        if self.processes.first:
            self.run.append_metrics(row)
            for tracker in self.trackers:
                tracker.log(row)

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
        seconds = min(passes[1:]) * len(counts)  # the first one paid for allocations and compilation
        self.optimizer.zero_grad()
        torch.set_rng_state(rng)
        return f"{duration(left * seconds)} for {left} steps (without the optimiser's share)"

    # -- saving and resuming -------------------------------------------------------------------------------------

    def _save(self, seconds: float) -> None:
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "seconds": seconds,
            "sequences": self.sequences,
            "model": self.model_config.to_dict(),
            "data": self.dataset.fingerprint,
            "teacher": self.teacher,
        }
        held = {"model": self.model.state_dict(), "optimizer": self.optimizer.tensors()}
        if not self.sharded:
            groups = {**held, "random": {"cpu": torch.get_rng_state()}} if self.processes.first else {}
            self.saver.save(self.step, groups, state)
            return
        first_rows = {name: span(t)[0] for group in held.values() for name, t in group.items()}
        groups = {
            # A number without rows is the same on all processes: the first one writes it.
            name: {k: local(t) for k, t in group.items() if t.dim() or self.processes.first}
            for name, group in held.items()
        }
        if self.processes.first:
            groups["random"] = {"cpu": torch.get_rng_state()}
        self.saver.save(self.step, groups, state, first_rows)

    def _newest_save(self) -> checkpoint.Save | None:
        """The save to go on from: the first process chooses and verifies, all take the same."""
        save, step = None, 0
        if self.processes.first:
            with self.processes.others_stop_on_failure():
                save = checkpoint.latest_save(self.run.saves)
            step = save.step if save is not None else 0
        else:
            self.processes.wait_for_first()
        step = self.processes.largest(step)
        if self.processes.first or not step:
            return save
        return checkpoint.read_save(self.run.saves / f"step-{step:08d}", verify=False)

    def _resume(self) -> bool:
        save = self._newest_save()
        if save is None:
            if self.processes.first:
                self.run.rewind(-1)
            return False
        if save.state.get("data") != self.dataset.fingerprint:
            raise BitNetError(
                f"train: the tokens in {self.run.data} are not those the save {save.path.name} was trained on; "
                "restore them or choose another folder (--out)"
            )
        if save.state.get("teacher", self.teacher) != self.teacher:  # older saves do not tell
            raise BitNetError(
                f"train: the teacher '{self.settings.teacher}' is not the one that {save.path.name} learnt from: its "
                "weights have changed; restore it or choose another folder (--out)"
            )
        if save.state.get("sequences") != self.sequences:
            before = save.state.get("sequences")
            raise BitNetError(
                f"train: the run takes {before} sequences a step, got {self.sequences}; go on with as many processes "
                f"as before, or with any number and --set train.global_batch={before} --set train.accumulate=1"
            )
        if self.sharded:
            self._load_rows(save)
        else:
            load_parameters(self.model, save)
            self.optimizer.load_tensors(save.tensors("optimizer"))
        torch.set_rng_state(save.tensors("random")["cpu"])
        self.step, self.tokens, self.skipped = save.step, int(save.state["tokens"]), int(save.state["skipped"])
        self.seconds = float(save.state["seconds"])
        if self.processes.first:
            self.run.rewind(self.step)
        return True

    def _load_rows(self, save: checkpoint.Save) -> None:
        """Read the rows that this process holds, whoever wrote them."""
        parameters = dict(self.model.named_parameters())
        for name, rows in save.rows("model", {name: span(p) for name, p in parameters.items()}).items():
            assign(parameters[name], rows)
        wanted = {}
        for name, pieces in save.pieces("optimizer").items():
            parameter = parameters[name.rpartition("/")[0]]
            wanted[name] = span(parameter) if pieces[0].shape else (0, 1)
        self.optimizer.load_tensors(save.rows("optimizer", wanted))
