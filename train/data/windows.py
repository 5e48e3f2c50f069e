"""Windows of tokens: sampled for training, consecutive for scoring."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.train.data.shards import TokenDataset, TokenStream
from bitnet.train.evaluate import IGNORED

BATCH_LOGITS = 16_000_000  # per scored batch: 64 MB in fp32, where logits would otherwise dominate memory
BATCH_WINDOWS = 32  # per scored batch: small vocabularies would allow hundreds, but hidden states take memory too


class Sampler:
    """Training windows by number, without state: to resume at sample n is to ask for sample n.

    Each epoch cuts the stream into consecutive windows of `context` tokens from a random offset, and visits each once
    in random order. Offset and order depend on (seed, epoch) alone, through the raw output of PCG64, which NumPy
    guarantees never to change (it gives no such guarantee for permutation()).
    """

    def __init__(self, stream: TokenStream, context: int, seed: int) -> None:
        if context < 1 or seed < 0:
            raise BitNetError(f"got context {context} and seed {seed}, expected context >= 1 and seed >= 0")
        if len(stream) < context + 1:
            raise BitNetError(
                f"got {len(stream)} tokens of training text, expected at least {context + 1} for a context of "
                f"{context}; name more text or shorten the context"
            )
        self.stream, self.context, self.seed = stream, context, seed
        # One window fewer than fits, so that every epoch has the same number of them at any offset below T.
        self.windows_per_epoch = max(1, len(stream) // context - 1)
        self._slack = min(context - 1, len(stream) - 1 - self.windows_per_epoch * context)
        self._epoch = -1
        self._starts: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def windows(self, first: int, n: int) -> tuple[Tensor, Tensor]:
        """Samples first .. first + n - 1 of an endless sequence: inputs and next tokens, both int64 [n, T]."""
        assert min(first, n) >= 0, (first, n)
        tokens = np.empty((n, self.context + 1), dtype=np.int64)
        for row in range(n):
            tokens[row] = self.stream.read(self._start(first + row), self.context + 1)
        windows = torch.from_numpy(tokens)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _start(self, sample: int) -> int:
        epoch, i = divmod(sample, self.windows_per_epoch)
        if epoch != self._epoch:
            raw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.windows_per_epoch + 1)
            offset = int(raw[0] % np.uint64(self._slack + 1))
            self._starts = offset + self.context * np.argsort(raw[1:], kind="stable")
            self._epoch = epoch
        return int(self._starts[i])


def check_lengths(dataset: TokenDataset, context: int) -> None:
    """Raise BitNetError when a split is too short to train or to validate."""
    Sampler(dataset.train, context, seed=0)
    if len(dataset.val) < 2:
        raise BitNetError(
            f"got {len(dataset.val)} tokens of validation text, expected at least 2: one to read, one to predict; "
            "raise data.val_fraction or name data.val_paths"
        )


def batch_for(context: int, vocab_size: int) -> int:
    """How many windows of `context` tokens to score at a time: at most BATCH_WINDOWS and BATCH_LOGITS, at least one."""
    return max(1, min(BATCH_WINDOWS, BATCH_LOGITS // (context * vocab_size)))


def eval_windows(
    stream: TokenStream,
    context: int,
    *,
    batch_size: int = 8,
    limit_tokens: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, int64 [B, T], that predict every token but the first exactly once, in order.

    B is `batch_size`, or less in the last batch. Targets that are not text are IGNORED (-100): BOS, and the padding of
    the last window, whose inputs are 0. limit_tokens: the number of predictions after which to stop.
    Bits per byte = summed loss in nats / ln 2 / bytes of the targets, which are `stream.text_bytes` without a limit and
    otherwise the sum of tokenizer.byte_lengths() over the targets.
    """
    count = len(stream) - 1 if limit_tokens is None else min(limit_tokens, len(stream) - 1)
    if count < 1 or context < 1 or batch_size < 1:
        raise BitNetError(
            f"got {len(stream)} tokens, context {context}, batch size {batch_size} and limit {limit_tokens}, "
            "expected at least 2 tokens and 1 of each; name more validation text or correct the settings"
        )
    for start in range(0, count, batch_size * context):
        n = min(batch_size * context, count - start)
        rows = -(-n // context)
        tokens = torch.from_numpy(stream.read(start, n + 1))
        inputs = torch.zeros(rows * context, dtype=torch.int64)
        targets = torch.full((rows * context,), IGNORED, dtype=torch.int64)
        inputs[:n] = tokens[:-1]
        targets[:n] = tokens[1:]
        if stream.bos_id is not None:
            targets[targets == stream.bos_id] = IGNORED
        yield inputs.view(rows, context), targets.view(rows, context)


def spread_windows(stream: TokenStream, context: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, int64 [W, T], of at most `count` full windows, evenly spaced; targets are -100 at BOS.

    Raises BitNetError for text shorter than a window.
    """
    whole = (len(stream) - 1) // context
    if whole < 1:
        raise BitNetError(
            f"got {len(stream)} tokens of text, expected at least {context + 1}, a window of the context; "
            "name more text"
        )
    chosen = np.unique(np.linspace(0, whole - 1, min(count, whole)).astype(np.int64))
    tokens = np.stack([stream.read(int(i) * context, context + 1) for i in chosen])
    inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    if stream.bos_id is not None:
        targets[targets == stream.bos_id] = IGNORED
    return inputs, targets
