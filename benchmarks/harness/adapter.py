"""lm-evaluation-harness on our engines: the model type `bitnet` (the extra `eval`).

    python -m bitnet.benchmarks.harness run --model bitnet --model_args path=books.safetensors --tasks lambada_openai

Arguments of the model: path, engine, head, cache, context, as for `bitnet eval`. Everything else is the harness's own
command line, `--device` included, whose default is the first GPU. Text is scored as `bitnet eval` scores it: a document
begins with BOS, and one longer than the context is cut into windows that do not overlap. `TextModel` takes and returns
plain values and needs no harness; `model_type` wraps it in the harness's class.
"""

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.engine.sampling import Sampling
from bitnet.errors import BitNetError
from bitnet.generation import load_for_text, stop_ids
from bitnet.threads import use_threads

_log = logging.getLogger("bitnet")
NEW_TOKENS = 256  # where a task sets no length
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one that is set counts
SETTINGS = {*LENGTHS, "until", "do_sample", "temperature", "top_k", "top_p"}


class TextModel:
    """A packed model as tasks use one: it gives log-probabilities of texts, and continues texts."""

    def __init__(
        self,
        path: str,
        engine: str = "auto",
        head: str = "file",
        cache: str = "fp32",
        device: str = "cpu",
        context: int = 0,
    ) -> None:
        options = {"engine": engine, "head": head, "cache": cache}
        if device.startswith("cuda") and not torch.cuda.is_available():
            _log.warning("harness: got device %s, its default, and no GPU; using the CPU", device)
            device = "cpu"
        self.engine, self.text, self.context = load_for_text(Path(path), torch.device(device), int(context), **options)
        self._start = [] if self.text.bos_id is None else [self.text.bos_id]
        self._seeds = count()  # one for each sampled text: a task may ask for several after one context
        self._ignored: set[str] = set()

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """The log-probability of a continuation, and whether each of its tokens is the most likely one.

        Raises BitNetError for a continuation without tokens, and for one longer than the context.
        """
        # Trailing white space moves to the continuation, by the harness's rule: tokens begin with a space.
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        before = self._start + self.text.encode(kept)
        whole = self._start + self.text.encode(kept + continuation)
        if len(whole) <= len(before):  # a token crosses the boundary
            whole = before + self.text.encode(continuation)
        if not before:
            before = whole[:1]  # no BOS and no context: the first token cannot be scored
        length = len(whole) - len(before)
        if not 0 < length <= self.context:
            raise BitNetError(
                f"harness: got a continuation with {length} tokens to score, expected 1 to {self.context}, the context"
            )
        scores, greedy = self._score(whole[-(self.context + 1) :], length)  # too long a text loses its beginning
        return float(scores.sum()), greedy

    def _score(self, ids: list[int], length: int) -> tuple[Tensor, bool]:
        """Log-probabilities [length] fp64 of the last ids, and whether each of them is the most likely one."""
        logits = self.engine.logits(torch.tensor(ids[:-1]))[-length:].double()
        targets = torch.tensor(ids[-length:])
        scores = -F.cross_entropy(logits, targets, reduction="none")
        return scores, bool((logits.argmax(dim=-1) == targets).all())

    def rolling(self, document: str) -> float:
        """The log-probability of a document of any length."""
        return sum(self._windows(document), 0.0)

    def _windows(self, document: str) -> Iterator[float]:
        ids = self._start + self.text.encode(document)
        for start in range(0, len(ids) - 1, self.context):
            window = ids[start : start + self.context + 1]
            yield float(self._score(window, len(window) - 1)[0].sum())

    def generate(self, context: str, settings: Mapping[str, Any]) -> str:
        """The text after the context, up to and without the first stop string (`until`)."""
        self._warn_of_unknown(settings)
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        ids = self._start + self.text.encode(context)
        length = next((int(settings[key]) for key in LENGTHS if settings.get(key) is not None), NEW_TOKENS)
        decoder, text = self.text.stream(), ""
        for token in self.engine.stream(ids, length, self._sampling(settings), stop_ids(self.text), self.context):
            text += decoder.push(token)
            if any(stop in text for stop in until):
                break
        else:
            text += decoder.flush()
        return cut(text, until)

    def _sampling(self, settings: Mapping[str, Any]) -> Sampling:
        # The harness's rule: a temperature alone turns sampling on, do_sample alone does not.
        temperature = 0.0 if settings.get("do_sample") is False else float(settings.get("temperature") or 0.0)
        top_k, top_p = int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0)
        seed = next(self._seeds) if temperature else 0
        return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=0.0, seed=seed)

    def _warn_of_unknown(self, settings: Mapping[str, Any]) -> None:
        if unknown := settings.keys() - SETTINGS - self._ignored:
            self._ignored |= unknown
            _log.warning("harness: tasks set %s, which has no effect here", ", ".join(sorted(unknown)))


def cut(text: str, until: Iterable[str]) -> str:
    """The text before the first stop string in it."""
    ends = [text.find(stop) for stop in until]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


@functools.cache  # a name can be registered once
def model_type() -> Any:
    """The harness's model class, registered as `bitnet`. Raises BitNetError where the harness is not installed."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError:
        raise BitNetError(
            "harness: got no lm_eval, expected lm-evaluation-harness; from a clone: pip install '.[eval]'"
        ) from None

    @register_model("bitnet")
    class BitNetLM(LM):  # type: ignore[misc, unused-ignore]
        """A packed model in the harness's interface."""

        def __init__(self, path: str, batch_size: Any = 1, max_batch_size: Any = None, **options: Any) -> None:
            """batch_size, max_batch_size: passed to every model; unused, because texts are scored one by one."""
            super().__init__()
            self._model = TextModel(path, **options)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return [self._model.loglikelihood(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return [self._model.rolling(*request.args) for request in requests]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [self._model.generate(*request.args) for request in requests]

    return BitNetLM


def main() -> None:
    """Run the harness's command line with our model type registered."""
    use_threads()
    model_type()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
