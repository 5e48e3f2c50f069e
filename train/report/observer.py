"""Looking at a model while it is trained: validation, samples, telemetry, and the rows that are written down.

All processes call it, since a model that is spread over them must be gathered; the first one looks, shows and writes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from bitnet.engine.sampling import Sampling
from bitnet.engine.torch import TorchEngine
from bitnet.layers import BitLinear, keep_codes
from bitnet.model import Transformer
from bitnet.train.config import RunConfig
from bitnet.train.data.shards import TokenDataset
from bitnet.train.data.windows import batch_for, eval_windows
from bitnet.train.evaluate import Evaluation, evaluate
from bitnet.train.parallel.distributed import Processes
from bitnet.train.parallel.sharding import gathered
from bitnet.train.report.display import Display
from bitnet.train.report.telemetry import Telemetry, summary
from bitnet.train.report.trackers import Tracker
from bitnet.train.runs.run import Run, empty_model


class Observer:
    """Looks at the model of one run. sharded: each process holds a share of its parameters."""

    def __init__(
        self,
        config: RunConfig,
        model: Transformer,
        sharded: bool,
        run: Run,
        dataset: TokenDataset,
        processes: Processes,
        display: Display,
        trackers: Sequence[Tracker],
    ) -> None:
        self._config, self._model, self._sharded = config, model, sharded
        self._run, self._dataset, self._processes = run, dataset, processes
        self._display, self._trackers = display, trackers
        self._telemetry = Telemetry(model)
        self._token_bytes = dataset.tokenizer.byte_lengths()
        self._copy: Transformer | None = None  # of a model spread over processes, on the first one,
        self._copied = -1  # made at this step

    def forget(self) -> None:
        """Let go of what was made for a look at the last step: the next step changes the model and needs the memory."""
        self._copy, self._copied = None, -1

    def record(self, row: dict[str, Any]) -> None:
        """Write down one row of metrics, here and at all trackers."""
        if self._processes.first:
            self._run.append_metrics(row)
            for tracker in self._trackers:
                tracker.log(row)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.close()

    def validate(self, step: int, tokens: int | None, record: bool = True) -> Evaluation | None:
        """Score the validation split (its first `tokens` tokens) in fp32: the same integers a packed file gives."""
        model = self._whole(step)
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
            self.record(row)
        self._display.validation(row)
        return result

    def sample(self, step: int, length: int = 120, record: bool = True) -> str:
        """A text from the model as it stands, the same random draws every time; "" on all processes but the first."""
        model = self._whole(step)
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
        """Show and write down what the quantised weights do."""
        model = _OneByOne(self._model) if self._sharded else self._model
        if not self._processes.first:
            for _ in model.named_modules():  # of a spread one, all gather each layer
                pass
        elif rows := self._telemetry.report(model):
            self.record({"step": step, "telemetry": rows})
            self._display.telemetry(summary(rows))

    def _whole(self, step: int) -> Transformer | None:
        """The model as one piece, for a look at it: None on all processes but the first. Collective.

        Of a model that is spread, the first process gets a copy, which lives until the next step.
        """
        if self._sharded and self._copied != step:
            copy = empty_model(self._model.config).to(self._processes.device) if self._processes.first else None
            for name, parameter in self._model.named_parameters():
                value = gathered(parameter.detach())
                if copy is not None:
                    copy.get_parameter(name).detach().copy_(value)
            self._copy, self._copied = copy, step
        return (self._copy if self._sharded else self._model) if self._processes.first else None


class _OneByOne(nn.Module):
    """The quantised layers of a model that is spread, for a walk through them: each is whole, and one at a time.

    Telemetry looks every few dozen steps, and all masters at once are what no process has room for. Collective.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._spread = (model,)  # no submodule

    def named_modules(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        """Names as in the model, and layers that live until the next one."""
        for name, layer in self._spread[0].named_modules(*args, **options):
            if isinstance(layer, BitLinear):
                whole = BitLinear(layer.in_features, layer.out_features, False, device="meta", linear=layer.linear)
                whole.weight = nn.Parameter(gathered(layer.weight.detach()), requires_grad=False)
                yield name, whole
