"""Text in, text out, with an engine between: what `bitnet generate` does."""

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from bitnet.engine.base import Engine
from bitnet.engine.load import load
from bitnet.engine.sampling import Sampling
from bitnet.errors import BitNetError
from bitnet.text.tokenizer import StreamDecoder, Tokenizer

_log = logging.getLogger("bitnet")

_BAR_BYTES = 100 << 20  # larger files take long enough to load for a progress bar


def write_text(
    model: Path,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    device: torch.device,
    *,
    context: int = 0,
    ignore_eos: bool = False,
    show: Callable[[str], None] | None = None,
    chat: bool = False,
    **options: str,
) -> dict[str, Any]:
    """Load a packed model and continue `prompt`; `show` gets the prompt and then each part of the new text.

    chat: the prompt is a user's message, put into the model's chat template; only the answer is shown.
    options: engine, head and cache of `bitnet.load`.

    Returns the text, ids and speeds as JSON values. Raises BitNetError for a model without a tokenizer and for an
    empty prompt where the tokenizer has no token to start with.
    """
    engine, tokenizer, limit = load_for_text(model, device, context, **options)
    ids = chat_ids(tokenizer, prompt) if chat else prompt_ids(tokenizer, prompt)
    if len(ids) > limit:
        _log.warning("the prompt has %d tokens and the context holds %d: only its end is used", len(ids), limit)
    stop = () if ignore_eos else stop_ids(tokenizer)
    if show and prompt and not chat:
        show(prompt)
    started = time.perf_counter()
    answer = _decode_stream(engine.stream(ids, max_new_tokens, sampling, stop, limit), tokenizer.stream(), show)
    prompt_seconds, decode_seconds = answer.first - started, answer.ended - answer.first
    decoded = len(answer.ids) - 1  # the first token is computed with the prompt
    return {
        "model": str(model),
        "engine": engine.name,
        "prompt": prompt,
        "text": answer.text,
        "ids": answer.ids,
        "prompt_tokens": len(ids),
        "tokens": len(answer.ids),
        "prompt_tokens_per_second": min(len(ids), limit) / prompt_seconds if prompt_seconds > 0 else 0.0,
        "tokens_per_second": decoded / decode_seconds if decoded > 0 else 0.0,
        "seed": sampling.seed,
        "stopped": len(answer.ids) < max_new_tokens,
    }


class _Answer(NamedTuple):
    text: str
    ids: list[int]
    first: float  # when the first token came, in seconds of time.perf_counter
    ended: float


def _decode_stream(tokens: Iterable[int], decoder: StreamDecoder, show: Callable[[str], None] | None) -> _Answer:
    """Decode tokens as they come, and show each part of the text that is complete."""
    ids: list[int] = []
    parts: list[str] = []

    def add(text: str) -> None:
        parts.append(text)
        if show and text:
            show(text)

    first = 0.0
    for token in tokens:
        if not ids:
            first = time.perf_counter()
        ids.append(token)
        add(decoder.push(token))
    ended = time.perf_counter()
    add(decoder.flush())
    return _Answer("".join(parts), ids, first or ended, ended)


def load_for_text(
    model: Path,
    device: torch.device,
    context: int = 0,
    loaded: Callable[[int], None] = lambda layer: None,
    /,
    **options: Any,
) -> tuple[Engine, Tokenizer, int]:
    """The engine of a packed file, its tokenizer, and the context in tokens (0: the model's).

    options: engine, head and cache of `bitnet.load`. A large file shows a progress bar on a terminal. loaded: called
    with the number of each layer that is ready.
    Raises BitNetError for a model without a tokenizer and for a context beyond the model's.
    """
    console = Console(stderr=True)
    large = model.is_file() and model.stat().st_size > _BAR_BYTES
    with Progress(console=console, transient=True, disable=not (console.is_terminal and large)) as progress:
        task = progress.add_task("loading", total=None)

        def ready(layer: int) -> None:
            progress.update(task, advance=1)
            loaded(layer)

        engine = load(model, device, progress=ready, **options)
    if engine.tokenizer is None:
        raise BitNetError(
            f"{model}: got a model without a tokenizer, expected one with a tokenizer; use bitnet.load() and ids"
        )
    longest = engine.config.context
    if context > longest:
        raise BitNetError(f"context: got {context} (-c), expected at most the model's {longest}")
    return engine, engine.tokenizer, context or longest


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids at which generation stops: those that end a text, and BOS, which would start the next one."""
    return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.end_ids]


def chat_ids(tokenizer: Tokenizer, message: str) -> list[int]:
    """The ids of a user's message in the model's chat template. Raises BitNetError for a model without one."""
    return tokenizer.encode_chat([{"role": "user", "content": message}])


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text` at the start of a document: preceded by BOS where the model expects one there."""
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return start + tokenizer.encode(text)
