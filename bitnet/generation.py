"""Text in, text out, around an engine: what `bitnet generate` does."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from bitnet.engine.base import Engine
from bitnet.engine.load import load
from bitnet.engine.sampling import Sampling
from bitnet.errors import BitNetError
from bitnet.text.json_tokenizer import JsonTokenizer
from bitnet.text.tokenizer import Tokenizer

_log = logging.getLogger("bitnet")

_BIG = 100 << 20  # bytes of a file that takes long enough to load for a bar


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
    """Load a packed model and continue `prompt`; `show` gets the prompt and then each piece of new text.

    chat: the prompt is a user's message, put into the model's chat template; only the answer is shown.
    options: engine, head and cache of `bitnet.load`.

    Returns the text, ids and speeds as JSON values. Raises BitNetError for a model without a tokenizer and for an
    empty prompt where the tokenizer has no token to start with.
    """
    engine, tokenizer, limit = load_for_text(model, device, context, **options)
    ids = chat_ids(tokenizer, prompt) if chat else prompt_ids(tokenizer, prompt)
    if len(ids) > limit:
        _log.warning("the prompt has %d tokens and the context holds %d: only its end is read", len(ids), limit)
    stop = () if ignore_eos else stop_ids(tokenizer)
    decoder = tokenizer.stream()
    new: list[int] = []
    pieces: list[str] = []
    if show and prompt and not chat:
        show(prompt)
    started = first = time.perf_counter()
    for token in engine.stream(ids, max_new_tokens, sampling, stop, limit):
        if not new:
            first = time.perf_counter()
        new.append(token)
        pieces.append(decoder.push(token))
        if show and pieces[-1]:
            show(pieces[-1])
    ended = time.perf_counter()
    pieces.append(decoder.flush())
    if show and pieces[-1]:
        show(pieces[-1])
    decoded = len(new) - 1  # the first token comes out of the prompt
    return {
        "model": str(model),
        "engine": engine.name,
        "prompt": prompt,
        "text": "".join(pieces),
        "ids": new,
        "prompt_tokens": len(ids),
        "tokens": len(new),
        "prompt_tokens_per_second": min(len(ids), limit) / (first - started) if first > started else 0.0,
        "tokens_per_second": decoded / (ended - first) if decoded > 0 else 0.0,
        "seed": sampling.seed,
        "stopped": len(new) < max_new_tokens,
    }


def load_for_text(
    model: Path,
    device: torch.device,
    context: int = 0,
    loaded: Callable[[int], None] = lambda layer: None,
    /,
    **options: Any,
) -> tuple[Engine, Tokenizer, int]:
    """The engine of a packed file, its tokenizer, and the context in tokens (0: the model's).

    options: engine, head and cache of `bitnet.load`. A big file shows a progress bar on a terminal; loaded is called
    with each layer that is ready.
    Raises BitNetError for a model without a tokenizer and for a context beyond the model's.
    """
    console = Console(stderr=True)
    big = model.is_file() and model.stat().st_size > _BIG
    with Progress(console=console, transient=True, disable=not (console.is_terminal and big)) as progress:
        task = progress.add_task("loading", total=None)

        def ready(layer: int) -> None:
            progress.update(task, advance=1)
            loaded(layer)

        engine = load(model, device, progress=ready, **options)
    if engine.tokenizer is None:
        raise BitNetError(f"{model}: got a model without a tokenizer, expected one inside; use bitnet.load() and ids")
    longest = engine.config.context
    if context > longest:
        raise BitNetError(f"context: got {context} (-c), expected at most the model's {longest}")
    return engine, engine.tokenizer, context or longest


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text: BOS, which starts the next one, EOS, and an imported model's end of turn."""
    ends = tokenizer.stop_ids if isinstance(tokenizer, JsonTokenizer) else (tokenizer.eos_id,)
    return [i for i in (tokenizer.bos_id, *ends) if i is not None]


def chat_ids(tokenizer: Tokenizer, message: str) -> list[int]:
    """The ids of a user's message in the model's chat template. Raises BitNetError for a model without one."""
    if not isinstance(tokenizer, JsonTokenizer):
        raise BitNetError(
            f"chat: got a model with a tokenizer of kind '{tokenizer.kind}', expected an imported chat model, which "
            "has a template; leave --chat away"
        )
    return tokenizer.encode_chat([{"role": "user", "content": message}])


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids that start a document with `text`: BOS, where the model's texts start with one, and the text's own."""
    bos = tokenizer.bos_id
    if isinstance(tokenizer, JsonTokenizer) and not tokenizer.settings.add_bos:
        bos = None
    return ([bos] if bos is not None else []) + tokenizer.encode(text)
