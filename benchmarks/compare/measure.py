"""The figures of quality: bits per byte of a text, and the distance to the float baseline, with standard errors.

bits per byte = nats / ln 2 / UTF-8 bytes. KL = sum over the vocabulary of p (ln p - ln q), p of the baseline, in nats
per position. Standard errors are those of a ratio over consecutive stretches of the text: neighbouring windows come
from one book and are not independent, long stretches nearly are. The difference to the baseline is taken window by
window before it is averaged: both read the same text, so its error is far smaller than that of either.

Dimensions: W windows, C compared windows, T time, V vocabulary, S stretches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bitnet.train.evaluate import IGNORED, ratio, summarize

STRETCHES = 32  # a standard error estimated from 32 values is itself uncertain by an eighth

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """The scores of windows: nats [W]; of compared ones also sums over positions [C], of KL and of equal top-1."""

    nats: Floats
    kl: Floats
    top1: Floats


def window_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each window, [W] fp64. logits: [W, T, V], targets: [W, T] int64, -100 where nothing is scored."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets).double().sum(dim=1)


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) of each position, [...] fp64 in nats. Both: [..., V]."""
    p, q = (x.double().log_softmax(-1) for x in (reference, logits))
    return (p.exp() * (p - q)).sum(-1)


def agreement(reference: Tensor, logits: Tensor) -> Tensor:
    """Where the likeliest token is the same, [...] bool. Both: [..., V]."""
    return reference.argmax(-1) == logits.argmax(-1)


def stretches(values: NDArray[Any]) -> NDArray[Any]:
    """Sums [S] over at most STRETCHES stretches of neighbouring windows [W], as even as possible."""
    return np.array([stretch.sum() for stretch in np.array_split(values, min(STRETCHES, len(values)))])


def figures(
    scores: Scores, reference: Scores, tokens: NDArray[np.int64], sizes: NDArray[np.int64], positions: int
) -> dict[str, Any]:
    """The quality of one row, as JSON values.

    tokens, sizes: [W] scored tokens and UTF-8 bytes of each window. positions: T of a compared window.
    """
    own = summarize(stretches(scores.nats), stretches(tokens), stretches(sizes))
    more = summarize(stretches(scores.nats - reference.nats), stretches(tokens), stretches(sizes))
    weights = stretches(np.full(len(scores.kl), positions))
    kl, kl_error = ratio(stretches(scores.kl), weights)
    top1, top1_error = ratio(stretches(scores.top1), weights)
    return {
        "bits_per_byte": own.bits_per_byte,
        "bits_per_byte_error": own.bits_per_byte_error,
        "more_than_baseline": more.bits_per_byte,
        "more_than_baseline_error": more.bits_per_byte_error,
        "perplexity": own.perplexity,
        "kl": kl,
        "kl_error": kl_error,
        "top1": top1,
        "top1_error": top1_error,
    }


def score_all(
    score: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    compared: NDArray[np.int64],
    reference: NDArray[np.float32],
    *,
    batch: int,
) -> Scores:
    """Score windows [W, T] in batches; those with indices `compared` [C] also against reference logits [C, T, V].

    score: ids [B, T] -> logits [B, T, V].
    """
    place = {int(window): i for i, window in enumerate(compared)}
    nats: list[Tensor] = []
    kl, top1 = np.zeros(len(compared)), np.zeros(len(compared))
    for start in range(0, len(inputs), batch):
        logits = score(inputs[start : start + batch])
        nats.append(window_nats(logits, targets[start : start + batch]))
        for row in range(len(logits)):
            if start + row in place:
                i = place[start + row]
                expected = torch.from_numpy(np.array(reference[i]))  # T, V
                kl[i] = float(divergence(expected, logits[row]).sum())
                top1[i] = float(agreement(expected, logits[row]).sum())
    return Scores(torch.cat(nats).numpy(), kl, top1)
