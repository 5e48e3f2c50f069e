"""The training loop: one readable pass from a configuration to a run folder that can always be resumed.

Everything that decides a step (weights, optimiser, data order, random state, the step's number) is in a save, and
the data order is a function of (seed, step): N steps in one go and N steps with a kill in between end bit-equal.

Dimensions: B batch, T time, V vocabulary.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet import checkpoint
from bitnet.engine import TorchEngine, stream
from bitnet.errors import BitNetError
from bitnet.layers import keep_codes
from bitnet.model import Transformer, float16_bytes, flops_per_token, packed_bytes, parameters
from bitnet.sampling import Sampling
from bitnet.train.config import RunConfig, TrainConfig
from bitnet.train.data import Sampler, TokenDataset, eval_windows, open_dataset, prepare
from bitnet.train.display import Display
from bitnet.train.distributed import Processes
from bitnet.train.evaluate import Evaluation, evaluate
from bitnet.train.optim import Optimizer
from bitnet.train.plot import plot_run
from bitnet.train.run import Run, load_parameters
from bitnet.train.telemetry import Telemetry, summary
from bitnet.train.trackers import make_trackers


@dataclass
class Outcome:
    """How a call to `pretrain` ended. `signal` is the number of the signal that stopped it, or None."""

    run: Path
    step: int
    signal: int | None
    validation: Evaluation | None = None
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    sample: str = ""
    pictures: list[str] = field(default_factory=list)


def pretrain(config: RunConfig, out: Path, device: torch.device, display: Display) -> Outcome:
    """Train until `config.train.steps`, going on from the newest save in `out` if there is one.

    Raises BitNetError for settings, data or saves that cannot be used and for a run that diverges;
    OSError when a save cannot be written (the saves before it stay whole).
    """
    with ExitStack() as stack:
        processes = stack.enter_context(Processes(device))
        run = Run(out)
        if processes.first:
            run.check(config)  # before the lock, which is a file in the folder
            stack.enter_context(run.lock())
            run.check(config)  # again: it may have become a run in between
            dataset = prepare_data(config, run, display)
            run.write_config(config)
        processes.barrier()
        if not processes.first:
            dataset = open_dataset(run.data)
        trainer = Trainer(config, run, dataset, processes, display)
        return trainer.train()


def prepare_data(config: RunConfig, run: Run, display: Display) -> TokenDataset:
    """Tokenise the corpus into the run's folder, unless that is done already."""
    dataset = prepare(
        config.data,
        run.data,
        tokenizer=None,
        kind=config.tokenizer.kind,
        vocab_size=config.model.vocab_size,
        report=display.preparing,
    )
    display.prepared()
    return dataset


class Trainer:
    """The state of a run in memory and the loop over it."""

    def __init__(
        self, config: RunConfig, run: Run, dataset: TokenDataset, processes: Processes, display: Display
    ) -> None:
        self.config, self.run, self.dataset = config, run, dataset
        self.settings: TrainConfig = config.train
        self.processes, self.display, self.device = processes, display, processes.device
        # The vocabulary asked for is an upper bound: a small corpus supports fewer tokens.
        self.model_config = config.model.replace(vocab_size=dataset.tokenizer.vocab_size)
        self.model = Transformer(self.model_config)
        self.model.init_weights(self.settings.seed)
        self.model.to(self.device)
        torch.manual_seed(self.settings.seed)
        self.optimizer = Optimizer(self.model, self.settings)
        self.step, self.tokens, self.skipped = 0, 0, 0
        self.resumed = self._resume()
        self.telemetry = Telemetry(self.model)
        self.trackers = make_trackers(self.settings, run.path) if processes.first else []
        self.token_bytes = dataset.tokenizer.byte_lengths()
        self.prompt = dataset.tokenizer.encode(self.settings.sample_prompt)  # refused now, not after the last step
        # Live figure only: a token stands for this many bytes on average. Validation counts bytes exactly.
        self.bits_per_nat = len(dataset.train) / max(1, dataset.train.text_bytes) / math.log(2)
        compiled = cast(nn.Module, torch.compile(self.model)) if self.settings.compile else self.model
        self.network = processes.wrap(compiled)
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=resolve_dtype(self.settings.dtype, self.device) == "bf16"
        )
        per_process = self.settings.batch_size * self.settings.accumulate
        self.sequences = per_process * processes.size  # a step, over all processes
        self.sampler = Sampler(dataset.train, config.context, self.settings.seed)

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        """Run all steps that are left, then validate on the whole split, sample, plot and save."""
        settings, display = self.settings, self.display
        self._announce()
        started, first_step = time.perf_counter(), self.step
        outcome = Outcome(self.run.path, self.step, None)
        with stop_signals() as stop, display.live(settings.steps, self.step):
            while self.step < settings.steps:
                row = self._training_step()
                if row is not None:
                    self._record(row)
                    display.step(row)
                if self.step % settings.report_every == 0:
                    self._report_telemetry()
                if settings.eval_every and self.step % settings.eval_every == 0 and self.step < settings.steps:
                    self._validate(settings.eval_tokens)
                if settings.sample_every and self.step % settings.sample_every == 0 and self.step < settings.steps:
                    display.sample(self._sample())
                outcome.signal = self.processes.largest(stop.received or 0) or None
                if self.step % settings.save_every == 0 or self.step == settings.steps or outcome.signal:
                    self._save()
                if outcome.signal:
                    break
        outcome.step = self.step
        outcome.seconds = time.perf_counter() - started
        trained = (self.step - first_step) * self.sequences * self.config.context
        outcome.tokens_per_second = trained / outcome.seconds if trained else 0.0
        if outcome.signal is None and self.processes.first:
            outcome.validation = self._validate(None)
            outcome.sample = self._sample()
            outcome.pictures = self._plot()
        self.processes.barrier()
        return outcome

    def _training_step(self) -> dict[str, Any] | None:
        """One optimiser step. Returns its metrics, or None when it was skipped for want of a finite gradient."""
        started = time.perf_counter()
        rate = self.optimizer.set_step(self.step)
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
                network = self.network
                # Gradients travel once a step, with the last micro-batch.
                with network.no_sync() if processes.size > 1 and not last else nullcontext():  # type: ignore[operator]
                    with self.autocast:
                        loss = next_token_loss(network, inputs.to(self.device), targets.to(self.device))
                    (loss / settings.accumulate).backward()
                total += loss.detach()
        return processes.mean(total / settings.accumulate)

    def _skip(self, loss: float, norm: float) -> None:
        self.optimizer.zero_grad()
        self.skipped += 1
        reason = f"loss {loss}, gradient norm {norm}"
        self._record({"step": self.step, "skipped": reason})
        if self.processes.first:
            self.display.warn(f"step {self.step} skipped: {reason}")
        if self.skipped >= self.settings.skip_limit:
            saves = checkpoint.folders(self.run.saves)
            raise BitNetError(
                f"training diverged: got {self.skipped} steps in a row without a finite gradient ({reason}), expected "
                f"none; the last good save is {saves[0] if saves else 'none yet'}: lower train.lr and train in a new "
                "folder (--out)"
            )

    # -- looking at the model ------------------------------------------------------------------------------------

    def _validate(self, tokens: int | None) -> Evaluation | None:
        """Score the validation split (its first `tokens` tokens) in fp32: the same integers a packed file gives."""
        if not self.processes.first:
            return None
        windows = eval_windows(self.dataset.val, self.config.context, limit_tokens=tokens)
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
        self._record(row)
        self.display.validation(row)
        return result

    def _sample(self, length: int = 120) -> str:
        """A text from the model as it stands, the same random draws every time."""
        if not self.processes.first:
            return ""
        tokenizer = self.dataset.tokenizer
        start = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
        ids = start + self.prompt or [0]
        with keep_codes(self.model):
            engine = TorchEngine(self.model)
            new = list(stream(engine, ids, length, Sampling(seed=self.settings.seed), stop=start))
        text = self.settings.sample_prompt + tokenizer.decode(new)
        with self.run.samples_file.open("a", encoding="utf-8") as file:
            file.write(f"--- step {self.step}\n{text}\n")
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

    def _announce(self) -> None:
        model, settings = self.model_config, self.settings
        seconds = self._seconds_a_step()
        per_step = self.sequences * self.config.context
        left = (settings.steps - self.step) * seconds
        dtype = resolve_dtype(settings.dtype, self.device)
        lines = {
            "model": f"{parameters(model) / 1e6:.2f}M parameters, {model.linear}; packed {_size(packed_bytes(model))}, "
            f"fp16 {_size(float16_bytes(model))}",
            "data": f"{len(self.dataset.train):,} training tokens, {len(self.dataset.val):,} for validation, "
            f"{model.vocab_size:,} in the vocabulary",
            "training": f"{settings.steps} steps of {per_step:,} tokens on {self.device.type} in {dtype}"
            + (f", {self.processes.size} processes" if self.processes.size > 1 else ""),
            "estimate": f"{duration(left)} for {settings.steps - self.step} steps, "
            f"{flops_per_token(model, self.config.context, training=True) * per_step / seconds / 1e9:.0f} GFLOP/s",
            "run": str(self.run.path) + (f", resumed at step {self.step}" if self.resumed else ""),
        }
        self.display.announce(lines, self.config.to_toml())

    def _seconds_a_step(self) -> float:
        """Time a step's forward and backward pass on the first batch; nothing of the state changes."""
        if self.step >= self.settings.steps:
            return 1.0
        rng = torch.get_rng_state()
        self._gradients()  # the first pass pays for allocations and compilation
        started = time.perf_counter()
        float(self._gradients())
        seconds = time.perf_counter() - started
        self.optimizer.zero_grad()
        torch.set_rng_state(rng)
        return seconds

    # -- saving and resuming -------------------------------------------------------------------------------------

    def _save(self) -> None:
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
            "vocab_size": self.model_config.vocab_size,
            "data": self.dataset.fingerprint,
        }
        checkpoint.write_save(self.run.saves, self.step, groups, state, keep=self.settings.keep)

    def _resume(self) -> bool:
        save = checkpoint.latest_save(self.run.saves)
        if save is None:
            if self.processes.first:
                self.run.rewind_metrics(-1)
            return False
        if save.state.get("data") != self.dataset.fingerprint:
            raise BitNetError(
                f"train: the tokens in {self.run.data} are not those the save {save.path.name} was trained on; "
                "restore them or choose another folder (--out)"
            )
        load_parameters(self.model, save)
        self.optimizer.load_tensors(save.tensors("optimizer"))
        torch.set_rng_state(save.tensors("random")["cpu"])
        self.step, self.tokens, self.skipped = save.step, int(save.state["tokens"]), int(save.state["skipped"])
        if self.processes.first:
            self.run.rewind_metrics(self.step)
        return True


def next_token_loss(network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy [] in nats a token, in fp32. inputs, targets: [B, T] int64."""
    logits = network(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """ "auto" as "bf16" where the hardware multiplies bf16 natively, else "fp32"."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if has_bf16_cpu() else "fp32"


def has_bf16_cpu() -> bool:
    """Whether this CPU has bf16 dot products (AVX-512 BF16, AMX)."""
    # torch before 2.12 cannot tell; fp32 is then the safe answer.
    read = getattr(torch.cpu, "get_capabilities", dict)
    capabilities: dict[str, Any] = read()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@dataclass
class StopSignal:
    """The first signal that asked the run to stop, or None."""

    received: int | None = None


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Note SIGINT and SIGTERM instead of dying of them; a second one ends the process at once."""
    stop = StopSignal()
    previous: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        stop.received = number
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        previous[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 48 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
