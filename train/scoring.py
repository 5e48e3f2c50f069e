"""Scoring text with a packed model (`bitnet eval`) or with a run (`bitnet sweep`)."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from bitnet.generation import load_for_text
from bitnet.train.data.prepare import tokenize
from bitnet.train.data.windows import batch_for, eval_windows, spread_windows
from bitnet.train.evaluate import evaluate
from bitnet.train.runs.run import Run


def score_text(
    model: Path,
    paths: Sequence[str],
    device: torch.device,
    *,
    context: int = 0,
    limit: int = 0,
    documents: str = "file",
    **options: str,
) -> dict[str, Any]:
    """Score all text that `paths` lead to in windows of `context` tokens, each token but the first exactly once.

    options: engine, head and cache of `bitnet.load`. documents: what starts with a BOS token, a "file", "line" or
    "paragraph"; use that of the training run. limit: tokens to score; 0: all.
    Returns bits per byte, perplexity, their standard errors and what was scored, as JSON values. Raises BitNetError
    for a model without a tokenizer, a context beyond the model's, and text that cannot be read.
    """
    engine, tokenizer, context = load_for_text(model, device, context, **options)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="bitnet-eval-") as folder:
        stream = tokenize(tuple(paths), tokenizer, Path(folder), documents=documents)
        total = min(len(stream) - 1, limit or len(stream))
        batch = batch_for(context, engine.config.vocab_size)
        windows = eval_windows(stream, context, batch_size=batch, limit_tokens=limit or None)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("scoring", total=total)
            started = time.perf_counter()
            result = evaluate(
                engine.logits, windows, tokenizer.byte_lengths(), lambda done: progress.update(task, completed=done)
            )
            seconds = time.perf_counter() - started
    return {
        "model": str(model),
        "data": list(paths),
        "engine": engine.name,
        "context": context,
        **result.to_dict(),
        "seconds": seconds,
        "tokens_per_second": result.tokens / seconds,
    }


def score_run(run: Run, paths: Sequence[str], limit: int, device: torch.device) -> dict[str, Any]:
    """Score text with the newest save of a run, ternary, binary or float, in fp32.

    limit: tokens, in full windows of the run's context, evenly spaced over the text; 0: all full windows. The text
    after the last full window is not scored. Returns the values of an Evaluation. Raises BitNetError for a run without
    a save, and for text that cannot be read or is shorter than a window.
    """
    model, _ = run.load()
    model.to(device).eval()
    settings, tokenizer = run.config(), run.tokenizer()
    with tempfile.TemporaryDirectory(prefix="bitnet-score-") as folder:
        stream = tokenize(tuple(paths), tokenizer, Path(folder), documents=settings.data.documents)
        inputs, targets = spread_windows(stream, settings.context, limit // settings.context or len(stream))
    batch = batch_for(settings.context, model.config.vocab_size)
    windows = zip(torch.from_numpy(inputs).split(batch), torch.from_numpy(targets).split(batch), strict=True)
    with torch.inference_mode():
        result = evaluate(lambda ids: model(ids.to(device)), windows, tokenizer.byte_lengths())
    return result.to_dict()
