"""Looking at a model during training: validation, samples, telemetry; and the rows that are recorded.

All ranks call it, because a sharded model has to be gathered; only the main process looks, shows and records.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bitnet.engine.sampling import Sampling
from bitnet.engine.torch import TorchEngine
from bitnet.files.tensors import parameters
from bitnet.layers import BitLinear, keep_codes
from bitnet.model import Transformer
from bitnet.train.data.windows import batch_for, eval_windows
from bitnet.train.evaluate import Evaluation, evaluate
from bitnet.train.parallel.batches import StepBatches
from bitnet.train.parallel.sharding import gathered
from bitnet.train.report.overview import estimate, overview
from bitnet.train.report.telemetry import Telemetry, summary
from bitnet.train.runs.run import empty_model
from bitnet.train.runs.saves import Progress
from bitnet.train.setup import Setup

SAMPLE_TOKENS = 120


class Observer:
    """Reports on the model of one run."""

    def __init__(self, setup: Setup, model: Transformer) -> None:
        self._setup, self._config, self._model = setup, setup.config, model
        self._run, self._dataset, self._processes = setup.run, setup.dataset, setup.processes
        self._display = setup.display
        self._telemetry = Telemetry(model)
        self._token_bytes = setup.dataset.tokenizer.byte_lengths()
        # For the live figure, from the average token of the corpus; validation counts bytes exactly.
        train = setup.dataset.train
        self._bits_per_nat = len(train) / max(1, train.text_bytes) / math.log(2)
        self._copy: Transformer | None = None  # of a sharded model, on the main process
        self._copied_at = -1  # the step it is of

    def announce(self, progress: Progress, batches: StepBatches, resumed: bool, seconds_per_step: float) -> None:
        """Show what is about to be trained and how long that takes."""
        subjects = overview(self._setup, batches.tokens, progress.quantised < 1)
        left = self._config.train.steps - progress.step
        subjects["estimate"] = estimate(self._config.train, self._processes.device, left, seconds_per_step)
        if self._setup.memory:
            subjects["memory"] = self._setup.memory
        subjects["run"] = str(self._run.path) + (f", resumed at step {progress.step}" if resumed else "")
        self._display.announce(subjects, self._config.to_toml())

    def title(self) -> str:
        """The run, its size and kind in a few words."""
        model = self._config.model
        return f"{self._run.path.name}: {parameters(model) / 1e6:.1f}M parameters, {model.linear}"

    def record_step(
        self, progress: Progress, loss: float, grad_norm: float, lr: float, tokens: int, seconds: float
    ) -> None:
        """Record and show a training step of so many tokens and seconds. loss: mean nats per token."""
        row = {
            "step": progress.step,
            "loss": loss,
            "bits_per_byte": loss * self._bits_per_nat,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": progress.tokens,
            "tokens_per_second": tokens / seconds,
            **({"quantised": progress.quantised} if progress.quantised < 1 else {}),
        }
        self._record(row)
        self._display.step(row)

    def record_skip(self, step: int, reason: str) -> None:
        """Record and show that a step changed no weight."""
        self._record({"step": step, "skipped": reason})
        if self._processes.is_main:
            self._display.warn(f"step {step} skipped: {reason}")

    def drop_copy(self) -> None:
        """Free the gathered copy of a sharded model: the next step changes the model and needs the memory."""
        self._copy, self._copied_at = None, -1

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._setup.trackers:
            tracker.close()

    def validate(self, step: int, tokens: int | None, record: bool = True) -> Evaluation | None:
        """Score the first `tokens` tokens of the validation split (None: all) in fp32, as a packed file would.

        Collective. Returns None on all ranks but the main process.
        """
        model = self._full_model(step)
        if model is None:
            return None
        context, val = self._config.context, self._dataset.val
        batch = batch_for(context, model.config.vocab_size)
        windows = eval_windows(val, context, batch_size=batch, limit_tokens=tokens)
        total = min(len(val), tokens or len(val))
        with torch.inference_mode(), keep_codes(model):
            result = evaluate(
                lambda ids: model(ids.to(self._processes.device)),
                windows,
                self._token_bytes,
                lambda done: self._display.validating(done, total),
            )
        row = {
            "step": step,
            "val_loss": result.loss,
            "val_bits_per_byte": result.bits_per_byte,
            "val_bits_per_byte_error": result.bits_per_byte_error,
            "val_tokens": result.tokens,
            "val_whole": tokens is None or tokens >= len(val),
        }
        if record:
            self._record(row)
        self._display.validation(row)
        return result

    def sample(self, step: int, length: int = SAMPLE_TOKENS, record: bool = True) -> str:
        """Generate text with the run's seed. Collective. Returns "" on all ranks but the main process."""
        model = self._full_model(step)
        if model is None:
            return ""
        settings, tokenizer = self._config.train, self._dataset.tokenizer
        start = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
        ids = start + tokenizer.encode(settings.sample_prompt) or [0]
        with keep_codes(model):
            engine = TorchEngine(model)
            new = list(engine.stream(ids, length, Sampling(seed=settings.seed), stop=start))
        text = settings.sample_prompt + tokenizer.decode(new)
        if record:
            self._run.append_sample(step, text)
        return text

    def report_telemetry(self, step: int) -> None:
        """Record and show statistics of the quantised weights. Collective."""
        model = _LayerByLayer(self._model) if self._setup.sharded else self._model
        if not self._processes.is_main:
            for _ in model.named_modules():  # joins the gathering of each layer
                pass
        elif rows := self._telemetry.report(model):
            self._record({"step": step, "telemetry": rows})
            self._display.telemetry(summary(rows))

    def _record(self, row: dict[str, Any]) -> None:
        if self._processes.is_main:
            self._run.append_metrics(row)
            for tracker in self._setup.trackers:
                tracker.log(row)

    def _full_model(self, step: int) -> Transformer | None:
        """The model with all its weights; None on all ranks but the main process. Collective.

        Of a sharded model, the main process makes a copy, which it keeps until the next step.
        """
        if self._setup.sharded and self._copied_at != step:
            copy = empty_model(self._model.config).to(self._processes.device) if self._processes.is_main else None
            for name, parameter in self._model.named_parameters():
                value = gathered(parameter.detach())
                if copy is not None:
                    copy.get_parameter(name).detach().copy_(value)
            self._copy, self._copied_at = copy, step
        return (self._copy if self._setup.sharded else self._model) if self._processes.is_main else None


class _LayerByLayer(nn.Module):
    """The quantised layers of a sharded model, gathered one at a time during iteration. Collective.

    Telemetry runs every few dozen steps, and no rank has room for all masters at once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._sharded = (model,)  # in a tuple, so that it is no submodule

    def named_modules(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        """(name, layer) as in the model; a layer is freed when the next one is asked for."""
        for name, layer in self._sharded[0].named_modules(*args, **options):
            if isinstance(layer, BitLinear):
                full = BitLinear(layer.in_features, layer.out_features, False, device="meta", linear=layer.linear)
                full.weight = nn.Parameter(gathered(layer.weight.detach()), requires_grad=False)
                yield name, full
