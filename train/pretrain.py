"""The training loop: one readable pass from a configuration to a run folder that can always be resumed.

Everything that decides a step (weights, optimiser, data order, random state, the step's number) is in a save, and
the data order is a function of (seed, step): N steps in one go and N steps with a kill in between end bit-equal.

Dimensions: B batch, T time, V vocabulary.
"""

import math
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet import checkpoint
from bitnet.config import ModelConfig
from bitnet.engine import TorchEngine, stream
from bitnet.errors import BitNetError
from bitnet.layers import keep_codes, set_ease
from bitnet.model import Transformer, parameters
from bitnet.sampling import Sampling
from bitnet.tokenizer import Tokenizer
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
from bitnet.train.distributed import Processes
from bitnet.train.evaluate import Evaluation, evaluate
from bitnet.train.optim import Optimizer
from bitnet.train.overview import duration, overview
from bitnet.train.plot import plot_run
from bitnet.train.precision import resolve_dtype
from bitnet.train.run import Run, empty_model, load_parameters
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


class Initial(Protocol):
    """A model to start from instead of random weights, read tensor by tensor (bitnet/formats/source.py)."""

    config: ModelConfig

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer it was trained with."""

    def dense(self, name: str) -> Tensor:
        """A parameter by its name."""

    def master(self, name: str) -> Tensor:
        """The float weight [N, K] of a projection."""


def pretrain(
    config: RunConfig, out: Path, device: torch.device, display: Display, initial: Initial | None = None
) -> Outcome:
    """Train until `config.train.steps`, going on from the newest save in `out` if there is one.

    initial: the model to start from where there is no save yet; the data is tokenised as it was for it.

    Raises BitNetError for settings, data or saves that cannot be used and for a run that diverges;
    OSError when a save cannot be written (the saves before it stay whole).
    """
    run = Run(out)
    if initial is not None:
        check_initial(config, initial)
    elif config.train.init and not checkpoint.folders(run.saves):
        raise BitNetError(f"train: got train.init '{config.train.init}', expected that model, opened (--init)")
    with ExitStack() as stack:
        processes = stack.enter_context(Processes(device))
        trackers: list[Tracker] = []
        if processes.first:
            with processes.others_stop_on_failure():
                run.check(config)  # before the lock, which is a file in the folder
                stack.enter_context(run.lock())
                run.check(config)  # again: it may have become a run in between
                trackers = make_trackers(config.train, run.path)
                dataset = prepare_data(config, run, display, initial)
        else:
            processes.wait_for_first()
            dataset = open_dataset(run.data)
        trainer = Trainer(config, run, dataset, processes, display, trackers, initial)
        if processes.first:
            run.write_config(config)
        return trainer.train()


def prepare_data(config: RunConfig, run: Run, display: Display, initial: Initial | None = None) -> TokenDataset:
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
    ) -> None:
        self.config, self.run, self.dataset, self.trackers = config, run, dataset, trackers
        self.settings: TrainConfig = config.train
        self.processes, self.display, self.device = processes, display, processes.device
        self.sequences = self.settings.batch_size * self.settings.accumulate * processes.size  # a step
        # The vocabulary asked for is an upper bound: a small corpus supports fewer tokens. And a model is worth no
        # longer a context than it was trained with.
        self.model_config = config.model.replace(
            vocab_size=dataset.tokenizer.vocab_size, max_position_embeddings=config.context
        )
        self.model = empty_model(self.model_config)
        if initial is None:
            self.model.init_weights(self.settings.seed)
        else:
            load_initial(self.model, initial)
        self.model.to(self.device)
        torch.manual_seed(self.settings.seed)
        self.optimizer = Optimizer(self.model, self.settings)
        self.step, self.tokens, self.skipped, self.seconds = 0, 0, 0, 0.0
        self.resumed = self._resume()
        self.telemetry = Telemetry(self.model)
        self.token_bytes = dataset.tokenizer.byte_lengths()
        # Live figure only: a token stands for this many bytes on average. Validation counts bytes exactly.
        self.bits_per_nat = len(dataset.train) / max(1, dataset.train.text_bytes) / math.log(2)
        compiled = cast(nn.Module, torch.compile(self.model)) if self.settings.compile else self.model
        self.network = processes.wrap(compiled)
        self.dtype = resolve_dtype(self.settings.dtype, self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16")
        self.sampler = Sampler(dataset.train, config.context, self.settings.seed)

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        """Run all steps that are left, then validate on the whole split, sample, plot and save."""
        settings, display = self.settings, self.display
        display.announce(
            overview(self.config, self.model_config, self.dataset, self.processes, self.dtype)
            | {"estimate": self._estimate()}
            | {"run": str(self.run.path) + (f", resumed at step {self.step}" if self.resumed else "")},
            self.config.to_toml(),
        )
        first_step, started = self.step, time.perf_counter()
        signal = None
        with stop_signals(display.note) as stop, display.live(settings.steps, self.step):
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
        self.seconds += time.perf_counter() - started
        outcome = Outcome(self.run.path, self.step, signal, trained=self.step > first_step)
        outcome.seconds, outcome.tokens_per_second = self.seconds, self.tokens / max(self.seconds, 1e-9)
        if signal is None and self.processes.first:
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
        if self.settings.ease:
            set_ease(self.model, min(1.0, (self.step + 1) / (self.settings.ease * self.settings.steps)))
        loss = self._gradients()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
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
        """Accumulate the gradients of this step's global batch. Returns the mean loss [] over all processes."""
        settings, processes = self.settings, self.processes
        total = torch.zeros((), device=self.device)
        first = self.step * self.sequences + processes.rank * settings.batch_size * settings.accumulate
        # Weights do not change between micro-batches: quantise them once. (A compiled graph quantises in itself.)
        kept = keep_codes(self.model) if settings.accumulate > 1 and not settings.compile else nullcontext()
        with kept:
            for micro in range(settings.accumulate):
                inputs, targets = self.sampler.windows(first + micro * settings.batch_size, settings.batch_size)
                last = micro == settings.accumulate - 1
                # Gradients travel once a step, with the last micro-batch.
                with self.network.no_sync() if processes.size > 1 and not last else nullcontext():  # type: ignore[operator]
                    loss = self._loss(inputs, targets)
                    (loss / settings.accumulate).backward()
                total += loss.detach()
        return processes.mean(total / settings.accumulate)

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss [] of one micro-batch [B, T] in the run's dtype."""
        with self.autocast:
            return next_token_loss(self.network, inputs.to(self.device), targets.to(self.device))

    def _skip(self, loss: float, norm: float) -> None:
        self.optimizer.zero_grad()
        self.skipped += 1
        reason = f"loss {loss}, gradient norm {norm}"
        self._record({"step": self.step, "skipped": reason})
        if self.processes.first:
            self.display.warn(f"step {self.step} skipped: {reason}")
        if self.skipped >= self.settings.skip_limit:
            saves = checkpoint.folders(self.run.saves)
            last = f"the last good save is {saves[0]}" if saves else "there is no save yet"
            raise BitNetError(
                f"training diverged: got {self.skipped} steps in a row without a finite gradient ({reason}), expected "
                f"none; {last}: lower train.lr and train in a new folder (--out)"
            )

    # -- looking at the model ------------------------------------------------------------------------------------

    def _validate(self, tokens: int | None, record: bool = True) -> Evaluation | None:
        """Score the validation split (its first `tokens` tokens) in fp32: the same integers a packed file gives."""
        if not self.processes.first:
            return None
        set_ease(self.model, 1.0)  # figures are those of the ternary model; the next step sets it anew
        batch = batch_for(self.config.context, self.model_config.vocab_size)
        windows = eval_windows(self.dataset.val, self.config.context, batch_size=batch, limit_tokens=tokens)
        total = min(len(self.dataset.val), tokens or len(self.dataset.val))
        with torch.inference_mode(), keep_codes(self.model):
            result = evaluate(
                lambda ids: self.model(ids.to(self.device)),
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
        if not self.processes.first:
            return ""
        set_ease(self.model, 1.0)
        tokenizer = self.dataset.tokenizer
        start = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
        ids = start + tokenizer.encode(self.settings.sample_prompt) or [0]
        with keep_codes(self.model):
            engine = TorchEngine(self.model)
            new = list(stream(engine, ids, length, Sampling(seed=self.settings.seed), stop=start))
        text = self.settings.sample_prompt + tokenizer.decode(new)
        if record:
            self.run.append_sample(self.step, text)
        return text

    def _report_telemetry(self) -> None:
        if self.processes.first and (rows := self.telemetry.report()):
            self._record({"step": self.step, "telemetry": rows})
            self.display.telemetry(summary(rows))

    def _plot(self) -> list[str]:
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
        inputs, targets = self.sampler.windows(0, self.settings.batch_size)
        passes = []
        for _ in range(3):
            started = time.perf_counter()
            loss = self._loss(inputs, targets)
            loss.backward()
            loss.item()
            passes.append(time.perf_counter() - started)
        seconds = min(passes[1:]) * self.settings.accumulate  # the first one paid for allocations and compilation
        self.optimizer.zero_grad()
        torch.set_rng_state(rng)
        return f"{duration(left * seconds)} for {left} steps (without the optimiser's share)"

    # -- saving and resuming -------------------------------------------------------------------------------------

    def _save(self, seconds: float) -> None:
        if not self.processes.first:
            return
        groups = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.tensors(),
            "random": {"cpu": torch.get_rng_state()},
        }
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "seconds": seconds,
            "sequences": self.sequences,
            "model": self.model_config.to_dict(),
            "data": self.dataset.fingerprint,
        }
        checkpoint.write_save(self.run.saves, self.step, groups, state, keep=self.settings.keep)

    def _resume(self) -> bool:
        save = checkpoint.latest_save(self.run.saves)
        if save is None:
            if self.processes.first:
                self.run.rewind(-1)
            return False
        if save.state.get("data") != self.dataset.fingerprint:
            raise BitNetError(
                f"train: the tokens in {self.run.data} are not those the save {save.path.name} was trained on; "
                "restore them or choose another folder (--out)"
            )
        if save.state.get("sequences") != self.sequences:
            raise BitNetError(
                f"train: the run takes {save.state.get('sequences')} sequences a step, got {self.sequences}; go on "
                "with as many processes as before"
            )
        load_parameters(self.model, save)
        self.optimizer.load_tensors(save.tensors("optimizer"))
        torch.set_rng_state(save.tensors("random")["cpu"])
        self.step, self.tokens, self.skipped = save.step, int(save.state["tokens"]), int(save.state["skipped"])
        self.seconds = float(save.state["seconds"])
        if self.processes.first:
            self.run.rewind(self.step)
        return True


_INITIAL_MAY_CHANGE = ("linear", "max_position_embeddings", "initializer_range")  # none of them is in the weights


def check_initial(config: RunConfig, initial: Initial) -> None:
    """Raise BitNetError for a configuration that computes something else with the weights than their model did."""
    theirs = initial.config.to_dict()
    for key, value in config.model.to_dict().items():
        if key not in _INITIAL_MAY_CHANGE and value != theirs[key]:
            raise BitNetError(
                f"train: model.{key}: got {value!r}, expected {theirs[key]!r} as in '{config.train.init}': "
                "a model that is trained on keeps its shape; leave the setting away"
            )


def load_initial(model: Transformer, initial: Initial) -> None:
    """Copy a model's weights into ours. Raises BitNetError where it holds codes only, or is of another shape."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            projection = name.removesuffix(".weight")
            weight = initial.master(projection) if projection.endswith("_proj") else initial.dense(name)
            if weight.shape != parameter.shape:
                raise BitNetError(
                    f"train: {name}: got shape {list(weight.shape)}, expected {list(parameter.shape)}; a model that is "
                    "trained on keeps its shape"
                )
            parameter.copy_(weight)


def next_token_loss(network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy [] in nats a token, in fp32. inputs, targets: [B, T] int64."""
    logits = network(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
