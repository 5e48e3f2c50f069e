"""Which sequences of a step each rank takes, and in which micro-batches.

The global batch of a step is the same for any number of ranks and any micro-batch size.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.train.config import RunConfig, TrainConfig
from bitnet.train.data.shards import TokenStream
from bitnet.train.data.windows import Sampler
from bitnet.train.parallel.distributed import Processes


class MicroBatch(NamedTuple):
    """One micro-batch of this rank."""

    inputs: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], the next tokens
    sequences: int  # B; 0 for a placeholder of one sequence, on a rank that has fewer sequences than others
    is_last: bool  # of its step


class StepBatches:
    """This rank's training data as a function of the step number: there is no state to save."""

    def __init__(self, stream: TokenStream, config: RunConfig, processes: Processes) -> None:
        settings, self._world_size = config.train, processes.world_size
        self._sampler = Sampler(stream, config.context, settings.seed)
        self.sequences = sequences_per_step(settings, self._world_size)  # over all ranks
        self.tokens = self.sequences * config.context  # the same, in tokens
        mine = rank_sequences(self.sequences, processes.rank, self._world_size)
        self._first = mine.start
        self._counts = micro_batches(self.sequences, self._world_size, settings.batch_size, len(mine))
        self._largest = micro_batches(self.sequences, self._world_size, settings.batch_size)[0]

    def __len__(self) -> int:
        """Micro-batches per step, the same number on every rank."""
        return len(self._counts)

    def of_step(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of step 0, 1, ...; the largest comes first."""
        first = step * self.sequences + self._first
        for number, count in enumerate(self._counts):
            # Every rank joins every collective, so a rank without a sequence computes one and gives it no weight.
            inputs, targets = self._sampler.windows(first, max(1, count))
            yield MicroBatch(inputs, targets, count, number == len(self._counts) - 1)
            first += count

    def divisor(self, count: int) -> float:
        """What a mean over `count` sequences is divided by, so that the mean over ranks of all sums is the step's."""
        return self.sequences / (count * self._world_size)

    def largest(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [B, T], as large as the largest micro-batch of any rank."""
        return self._sampler.windows(0, self._largest)


def sequences_per_step(settings: TrainConfig, world_size: int) -> int:
    """Sequences of a step over all ranks. Raises BitNetError when there are fewer sequences than ranks."""
    count = settings.global_batch or settings.batch_size * settings.accumulate * world_size
    if count < world_size:
        raise BitNetError(
            f"train.global_batch: got {count} sequences for {world_size} processes, expected at least one for each"
        )
    return count


def rank_sequences(sequences: int, rank: int, world_size: int) -> range:
    """Which of a step's sequences a rank takes: over all ranks, each sequence exactly once."""
    return range(rank * sequences // world_size, (rank + 1) * sequences // world_size)


def micro_batches(sequences: int, world_size: int, batch_size: int, mine: int | None = None) -> list[int]:
    """Sizes of the micro-batches of a rank that takes `mine` sequences (None: the most that any rank takes).

    Each size is at most `batch_size`. Every rank has the same number of micro-batches, some of size 0 where needed.
    """
    largest = -(-sequences // world_size)
    count = -(-largest // batch_size)
    mine = largest if mine is None else mine
    return [mine // count + (i < mine % count) for i in range(count)]
