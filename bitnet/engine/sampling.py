"""Choosing the next token: llama.cpp's filters, in its order (top-k, top-p, min-p, temperature)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet import schema


@dataclass(frozen=True)
class Sampling:
    """How to draw a token. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 disable a filter.

    The same `seed` gives the same text on one engine. Raises BitNetError for values out of range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        schema.check_types(self, "sampling")
        schema.check_range(self, "sampling", ("temperature",), 0.0, 100.0)
        schema.check_range(self, "sampling", ("top_k",), 0)
        schema.check_range(self, "sampling", ("min_p",), 0.0, 1.0)
        schema.check_range(self, "sampling", ("top_p",), 1e-6, 1.0)
        schema.check_range(self, "sampling", ("seed",), 0, 2**63 - 1)


GREEDY = Sampling(temperature=0.0)


class Sampler:
    """Draws ids from logits, with its own random state."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        # On the CPU for every engine: a draw from a few hundred numbers gains nothing from a GPU.
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def draw(self, logits: Tensor) -> Tensor:
        """logits: [B, V] float, any device. Returns ids [B] int64 on the CPU."""
        if self.sampling.temperature == 0:  # on the logits' device: moves one id instead of all logits
            return logits.detach().argmax(dim=-1).cpu()
        logits = logits.detach().float().cpu()
        if not (self.sampling.top_k or self.sampling.top_p < 1 or self.sampling.min_p):
            return self._draw_from_all(logits)
        probabilities, index = likeliest(logits, self.sampling)
        drawn = torch.multinomial(probabilities, 1, generator=self._generator)
        return index.gather(-1, drawn).squeeze(1)

    def _draw_from_all(self, logits: Tensor) -> Tensor:
        """Without a filter nothing has to be sorted: find where a uniform number falls in the cumulative weights."""
        weights = ((logits - logits.amax(dim=-1, keepdim=True)) / _divisor(self.sampling, logits)).exp_()
        sums = weights.cumsum(dim=-1, dtype=torch.float64)  # an fp32 sum would lose the tail of a large vocabulary
        total = sums[:, -1:]
        if not total.isfinite().all():
            raise RuntimeError("sampling: got logits that are not finite, expected numbers")
        uniform = torch.rand(total.shape, generator=self._generator, dtype=torch.float64) * total
        below = torch.minimum(uniform, total.nextafter(torch.zeros_like(total)))  # a product may round up to the total
        return torch.searchsorted(sums, below, right=True).squeeze(1)


def _divisor(sampling: Sampling, logits: Tensor) -> float:
    """The temperature, but at least the smallest positive normal number of the logits' dtype."""
    return max(sampling.temperature, torch.finfo(logits.dtype).tiny)


def likeliest(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The candidates: their probabilities [B, C] after all filters, in falling order, and their ids [B, C].

    logits: [B, V] fp32. C is top_k if that is set, else V. Every row keeps at least its likeliest token.
    """
    candidates = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    ordered, index = logits.topk(candidates, dim=-1)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    probabilities = ordered.softmax(dim=-1)
    if sampling.top_p < 1:  # at 1 the rounding of the sum would cut the tail
        # A token stays while the tokens before it hold less than top_p.
        keep &= probabilities.cumsum(dim=-1) - probabilities < sampling.top_p
    keep &= probabilities >= sampling.min_p * probabilities[:, :1]
    keep[:, 0] = True
    # Differences to the largest, so that a tiny temperature does not divide a large number.
    ordered = (ordered - ordered[:, :1]) / _divisor(sampling, ordered)
    return ordered.masked_fill(~keep, -torch.inf).softmax(dim=-1), index


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities of all tokens [B, V] after all filters (see `likeliest`). logits: [B, V] fp32."""
    probabilities, index = likeliest(logits, sampling)
    return torch.zeros_like(logits).scatter(-1, index, probabilities)
