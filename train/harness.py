"""lm-evaluation-harness on our engines: the model type `bitnet` (the extra `eval`).

    python -m bitnet.train.harness run --model bitnet --model_args path=books.safetensors --tasks lambada_openai

Everything behind `--model_args` is the harness's own command line. Arguments of the model: path, engine, head, cache,
device, context, as `bitnet eval` has them. Text is scored as `bitnet eval` scores it: a document begins with BOS, and
one longer than the context is cut into windows that do not overlap.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.engine import stream
from bitnet.errors import BitNetError
from bitnet.generation import load_for_text, stop_ids
from bitnet.sampling import Sampling

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    raise BitNetError(
        "harness: got no lm_eval, expected lm-evaluation-harness; pip install 'bitnet-ternary[eval]'"
    ) from None

_log = logging.getLogger("bitnet")
NEW_TOKENS = 256  # where a task does not say how many


@register_model("bitnet")
class BitNetLM(LM):  # type: ignore[misc, unused-ignore]
    """A packed model as the harness wants one."""

    def __init__(
        self,
        path: str,
        engine: str = "auto",
        head: str = "file",
        cache: str = "fp32",
        device: str = "cpu",
        context: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        """batch_size, max_batch_size: what the harness passes to every model; texts are scored one by one here."""
        super().__init__()
        options = {"engine": engine, "head": head, "cache": cache}
        if device.startswith("cuda") and not torch.cuda.is_available():
            _log.warning("harness: it asks for %s by default and there is no GPU here; going on with the CPU", device)
            device = "cpu"
        self.engine, self.text, self.context = load_for_text(Path(path), torch.device(device), int(context), **options)
        self._start = [] if self.text.bos_id is None else [self.text.bos_id]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the continuation's log-probability, and whether it is the greedy choice."""
        return [self._continuation(*request.args) for request in requests]

    def _continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        # Trailing spaces go to the continuation: the harness's rule, for the sake of pieces that begin with a space.
        kept = context.rstrip(" ")
        continuation = context[len(kept) :] + continuation
        before = self._start + self.text.encode(kept)
        whole = self._start + self.text.encode(kept + continuation)
        if len(whole) <= len(before):  # a piece reaches across the border
            whole = before + self.text.encode(continuation)
        if not before:
            before = whole[:1]  # no BOS and no context: the first token cannot be scored
        length = len(whole) - len(before)
        ids = whole[-(self.context + 1) :]  # the end counts
        if length >= len(ids):
            raise BitNetError(
                f"harness: got a continuation of {length} tokens, expected fewer than the context of {self.context}"
            )
        scores, greedy = self._score(ids, length)
        return float(scores.sum()), greedy

    def _score(self, ids: list[int], count: int) -> tuple[Tensor, bool]:
        """Log-probabilities [count] in fp64 of the last `count` ids, and whether each of them is the likeliest."""
        logits = self.engine.logits(torch.tensor(ids[:-1]))[-count:].double()
        targets = torch.tensor(ids[-count:])
        scores = -F.cross_entropy(logits, targets, reduction="none")
        return scores, bool((logits.argmax(dim=-1) == targets).all())

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole document."""
        return [sum(self._windows(request.args[0])) for request in requests]

    def _windows(self, text: str) -> Iterator[float]:
        ids = self._start + self.text.encode(text)
        for start in range(0, len(ids) - 1, self.context):
            window = ids[start : start + self.context + 1]
            yield float(self._score(window, len(window) - 1)[0].sum())

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context up to the first of its stop strings, the stop string left out."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        top_k, top_p = int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0)
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=0.0, seed=0)
        ids = self._start + self.text.encode(context)
        count = int(settings.get("max_gen_toks") or NEW_TOKENS)
        decoder, text = self.text.stream(), ""
        for token in stream(self.engine, ids, count, sampling, stop_ids(self.text), self.context):
            text += decoder.push(token)
            if any(stop in text for stop in until):
                break
        else:
            text += decoder.flush()
        return cut(text, until)


def cut(text: str, until: Iterable[str]) -> str:
    """The text before the first stop string in it."""
    ends = [text.find(stop) for stop in until]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def main() -> None:
    """The harness's command line, with our model type in it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
