"""Bits per byte and perplexity with their standard errors, for anything that scores token ids."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.errors import BitNetError

IGNORED = -100  # a target that is not scored, as in F.cross_entropy


@dataclass(frozen=True)
class Evaluation:
    """The result over all scored tokens.

    bits_per_byte = nats / ln 2 / UTF-8 bytes; it does not depend on the tokenizer, so it is the figure to compare.
    Standard errors treat windows as independent samples of text (a ratio estimate over windows); None for one window.
    """

    bits_per_byte: float
    bits_per_byte_error: float | None
    perplexity: float
    perplexity_error: float | None
    loss: float  # nats per token
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

    score: int64 ids [B, T] to logits [B, T, V] of any float dtype. windows: (inputs, targets), int64 [B, T]; targets of
    -100 are not scored. token_bytes: UTF-8 bytes of each token, [V]. progress: called with the number of tokens done.
    Raises BitNetError when nothing is scored.
    """
    lengths = torch.from_numpy(token_bytes.astype(np.int64))
    nats, tokens, sizes = [], [], []
    done = 0
    for inputs, targets in windows:
        logits = score(inputs).float()
        targets = targets.to(logits.device)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        scored = targets != IGNORED
        # In fp64, so that the sum over a million tokens keeps its last digits.
        nats.append(losses.view_as(targets).double().sum(dim=1).cpu())
        tokens.append(scored.sum(dim=1).cpu())
        sizes.append((lengths[targets.clamp(min=0).cpu()] * scored.cpu()).sum(dim=1))
        done += int(tokens[-1].sum())
        if progress:
            progress(done)
    return summarize(torch.cat(nats).numpy(), torch.cat(tokens).numpy(), torch.cat(sizes).numpy())


def summarize(nats: np.ndarray, tokens: np.ndarray, sizes: np.ndarray) -> Evaluation:
    """The result over windows, from the nats, scored tokens and bytes of each, all of shape [windows]."""
    scored = tokens > 0
    nats, tokens, sizes = nats[scored], tokens[scored], sizes[scored]
    loss, loss_error = ratio(nats, tokens)
    per_byte, per_byte_error = ratio(nats, sizes)
    # exp overflows above about 709.
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
    """sum(total) / sum(weight) and its standard error, linearised (Cochran 1977, chapter 6); both arrays [n].

    The error is None for n = 1. Raises BitNetError for weights that are all 0.
    """
    n = len(weight)
    if weight.sum() == 0:
        raise BitNetError("evaluate: got no text to score, expected at least two tokens; name more text")
    ratio = float(total.sum() / weight.sum())
    if n == 1:
        return ratio, None
    residual = total - ratio * weight
    return ratio, float(math.sqrt(n / (n - 1) * float((residual**2).sum())) / weight.sum())
