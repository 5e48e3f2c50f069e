"""What a micro-batch costs: the cross-entropy, what is added to it, and how much of the logits is held at a time.

    loss = (1 - w) CE + w t^2 KL(teacher || student, both at temperature t) + z mean(logsumexp^2)

(Hinton et al. 2015, arXiv 1503.02531; the last term, which keeps logits near zero, from PaLM, arXiv 2204.02311.) The
reported figure is the cross-entropy alone, so that runs compare. With `loss_chunk`, logits are made for so many
tokens at a time and once more in the backward pass: of a vocabulary of 128,256 and 16,384 tokens, 8.4 GB in fp32 and
as much again for their gradient shrink to a chunk's. torch.nn.functional.linear_cross_entropy (torch 2.13) chunks
too, but is not in every torch we run with, and knows neither a teacher nor the z term.

Dimensions: B batch, T time, M = B * T tokens, D model, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitnet.layers import keep_codes
from bitnet.model import Transformer
from bitnet.quant import QUANTISED, Precision
from bitnet.train.config import TrainConfig


class Objective(nn.Module):
    """A model with its loss: ids and targets in, two numbers out.

    teacher: any model over the same vocabulary; it is no submodule, so nobody trains, spreads or saves it.
    """

    def __init__(self, model: Transformer, settings: TrainConfig, teacher: Transformer | None = None) -> None:
        super().__init__()
        self.model, self._settings, self._teacher = model, settings, (teacher,)
        if teacher is not None:
            keep_codes(teacher).__enter__()  # for good: nobody trains it

    def forward(self, inputs: Tensor, targets: Tensor, precision: Precision = QUANTISED) -> tuple[Tensor, Tensor]:
        """inputs, targets: [B, T] int64. Returns the loss [] to differentiate and the cross-entropy [] to report."""
        model, (teacher,) = self.model, self._teacher
        hidden = model.hidden(inputs, precision=precision).flatten(0, 1)  # M, D
        head = (model.model.embed_tokens if model.lm_head is None else model.lm_head).values()
        taught = None
        if teacher is not None:
            # Outside autocast: it says what it says anywhere else.
            with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
                taught = teacher.hidden(inputs).flatten(0, 1)
        sums = torch.zeros(2, device=hidden.device)
        flat = targets.flatten()
        chunk = self._settings.loss_chunk or len(flat)
        for first in range(0, len(flat), chunk):
            part = slice(first, first + chunk)
            arguments = hidden[part], head, flat[part], None if taught is None else taught[part]
            if chunk < len(flat):
                sums = sums + checkpoint(self._sums, *arguments, use_reentrant=False)
            else:
                sums = sums + self._sums(*arguments)
        # Two tensors of their own: of views FSDP warns, which cannot hook them.
        return sums[0] / len(flat), sums[1].detach() / len(flat)

    def _sums(self, hidden: Tensor, head: Tensor, targets: Tensor, taught: Tensor | None) -> Tensor:
        """Loss and cross-entropy [2], summed over tokens. hidden: [M, D], head: [V, D], taught: [M, teacher's D]."""
        settings = self._settings
        logits = F.linear(hidden, head).float()  # M, V
        entropy = F.cross_entropy(logits, targets, reduction="sum")
        total = entropy
        (teacher,) = self._teacher
        if teacher is not None and taught is not None:
            with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                wanted = teacher.logits(taught).float()
            divergence = distillation(logits, wanted, settings.temperature)
            total = (1 - settings.distill) * entropy + settings.distill * divergence
        if settings.z_loss:
            total = total + settings.z_loss * logits.logsumexp(dim=-1).square().sum()
        return torch.stack((total, entropy))


def distillation(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """t^2 KL(wanted || logits) [] at temperature t, in nats, summed over tokens. logits, wanted: [M, V]."""
    student, teacher = (F.log_softmax(x / temperature, dim=-1) for x in (logits, wanted))
    return temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True)
