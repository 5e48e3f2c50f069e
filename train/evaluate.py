"""How good a model is: bits per byte and perplexity with their standard errors, on any way of scoring ids."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.errors import BitNetError

IGNORED = -100  # targets that are not scored, as in F.cross_entropy


@dataclass(frozen=True)
class Evaluation:
    """The result over all scored tokens.

    bits_per_byte = nats / ln 2 / UTF-8 bytes: independent of the tokenizer, the figure to compare.
    Standard errors treat windows as independent draws of text (a ratio estimate over windows); None with one window.
    """

    bits_per_byte: float
    bits_per_byte_error: float | None
    perplexity: float
    perplexity_error: float | None
    loss: float  # nats a token
    tokens: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def evaluate(
    score: Callable[[Tensor], Tensor],
    windows: Iterable[tuple[Tensor, Tensor]],
    token_bytes: np.ndarray,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score windows of text.

    score: ids [B, T] -> logits [B, T, V]. windows: (inputs, targets) [B, T] int64, targets -100 where nothing is
    scored. token_bytes: [V] UTF-8 bytes of each token. progress: called with the tokens done.
    """
    lengths = torch.from_numpy(token_bytes.astype(np.int64))
    nats, tokens, sizes = [], [], []
    done = 0
    for inputs, targets in windows:
        logits = score(inputs).float()
        targets = targets.to(logits.device)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        scored = targets != IGNORED
        # Summed in fp64: the loss of a million tokens keeps its last digits.
        nats.append(losses.view_as(targets).double().sum(dim=1).cpu())
        tokens.append(scored.sum(dim=1).cpu())
        sizes.append((lengths[targets.clamp(min=0).cpu()] * scored.cpu()).sum(dim=1))
        done += int(tokens[-1].sum())
        if progress:
            progress(done)
    return summarize(torch.cat(nats).numpy(), torch.cat(tokens).numpy(), torch.cat(sizes).numpy())


def summarize(nats: np.ndarray, tokens: np.ndarray, sizes: np.ndarray) -> Evaluation:
    """Join windows: nats, scored tokens and bytes of each, all of shape [windows]."""
    scored = tokens > 0
    nats, tokens, sizes = nats[scored], tokens[scored], sizes[scored]
    loss, loss_error = ratio(nats, tokens)
    per_byte, per_byte_error = ratio(nats, sizes)
    # A loss beyond 700 nats has no perplexity that a float can hold.
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(
        bits_per_byte=per_byte / math.log(2),
        bits_per_byte_error=None if per_byte_error is None else per_byte_error / math.log(2),
        perplexity=perplexity,
        perplexity_error=None if loss_error is None else perplexity * loss_error,
        loss=loss,
        tokens=int(tokens.sum()),
        bytes=int(sizes.sum()),
    )


def ratio(total: np.ndarray, weight: np.ndarray) -> tuple[float, float | None]:
    """sum(total) / sum(weight) and its standard error, linearised (Cochran 1977, chapter 6)."""
    n = len(weight)
    if weight.sum() == 0:
        raise BitNetError("evaluate: got no text to score, expected at least two tokens of it; name more text")
    ratio = float(total.sum() / weight.sum())
    if n == 1:
        return ratio, None
    residual = total - ratio * weight
    return ratio, float(math.sqrt(n / (n - 1) * float((residual**2).sum())) / weight.sum())
