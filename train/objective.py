"""The loss of a micro-batch, computed for some of its logits at a time.

    loss = (1 - w) CE + w t^2 KL(teacher || student, both at temperature t) + z mean(logsumexp^2)

The second term is distillation (Hinton et al. 2015, arXiv 1503.02531); the third keeps logits near zero (PaLM, arXiv
2204.02311). The cross-entropy alone is reported, so that runs compare.

With `loss_chunk`, logits are computed for that many tokens at a time, and again in the backward pass. For a vocabulary
of 128,256 and 16,384 tokens, all logits take 8.4 GB in fp32 and their gradient as much again.
torch.nn.functional.linear_cross_entropy (torch 2.13) works in chunks too, but older versions of torch lack it, and it
supports neither a teacher nor the z term.

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
    """A model with its loss.

    teacher: any model with the same vocabulary. It is not registered as a submodule, so that it is neither trained, nor
    sharded, nor saved.
    """

    def __init__(self, model: Transformer, settings: TrainConfig, teacher: Transformer | None = None) -> None:
        super().__init__()
        self.model, self._settings, self._teacher = model, settings, (teacher,)
        if teacher is not None:
            keep_codes(teacher).__enter__()  # never left: its weights do not change

    def forward(self, inputs: Tensor, targets: Tensor, precision: Precision = QUANTISED) -> tuple[Tensor, Tensor]:
        """inputs, targets: [B, T] int64. Returns the loss [] to differentiate and the cross-entropy [] to report."""
        model, (teacher,) = self.model, self._teacher
        hidden = model.hidden(inputs, precision=precision).flatten(0, 1)  # M, D
        head = (model.model.embed_tokens if model.lm_head is None else model.lm_head).values()
        teacher_hidden = None
        if teacher is not None:
            # In fp32, as when the teacher runs on its own.
            with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
                teacher_hidden = teacher.hidden(inputs).flatten(0, 1)
        sums = torch.zeros(2, device=hidden.device)
        flat = targets.flatten()
        chunk = self._settings.loss_chunk or len(flat)
        for first in range(0, len(flat), chunk):
            part = slice(first, first + chunk)
            arguments = hidden[part], head, flat[part], None if teacher_hidden is None else teacher_hidden[part]
            if chunk < len(flat):
                sums = sums + checkpoint(self._sums, *arguments, use_reentrant=False)
            else:
                sums = sums + self._sums(*arguments)
        # Two new tensors: FSDP cannot put hooks on views, and warns.
        return sums[0] / len(flat), sums[1].detach() / len(flat)

    def _sums(self, hidden: Tensor, head: Tensor, targets: Tensor, teacher_hidden: Tensor | None) -> Tensor:
        """Loss and cross-entropy [2], summed over tokens.

        hidden: [M, D], head: [V, D], targets: [M] int64, teacher_hidden: [M, teacher's D].
        """
        settings = self._settings
        logits = F.linear(hidden, head).float()  # M, V
        entropy = F.cross_entropy(logits, targets, reduction="sum")
        total = entropy
        (teacher,) = self._teacher
        if teacher is not None and teacher_hidden is not None:
            with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                teacher_logits = teacher.logits(teacher_hidden).float()
            divergence = distillation(logits, teacher_logits, settings.temperature)
            total = (1 - settings.distill) * entropy + settings.distill * divergence
        if settings.z_loss:
            total = total + settings.z_loss * logits.logsumexp(dim=-1).square().sum()
        return torch.stack((total, entropy))


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """t^2 KL(teacher || student) [] at temperature t, in nats, summed over tokens. Both logits: [M, V]."""
    student, teacher = (F.log_softmax(x / temperature, dim=-1) for x in (logits, teacher_logits))
    return temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True)
