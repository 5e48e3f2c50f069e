"""Who takes which sequences of a step: the same ones in all, for any number of processes and any micro-batch."""

from bitnet.errors import BitNetError
from bitnet.train.config import TrainConfig


def sequences_a_step(settings: TrainConfig, processes: int) -> int:
    """Sequences of a step over all processes. Raises BitNetError for fewer than there are processes."""
    count = settings.global_batch or settings.batch_size * settings.accumulate * processes
    if count < processes:
        raise BitNetError(
            f"train.global_batch: got {count} sequences for {processes} processes, expected at least one for each"
        )
    return count


def share(sequences: int, rank: int, size: int) -> range:
    """Numbers of a step's sequences that process `rank` of `size` takes: all are taken, none twice."""
    return range(rank * sequences // size, (rank + 1) * sequences // size)


def micro_batches(sequences: int, size: int, batch_size: int, mine: int | None = None) -> list[int]:
    """Sequences of each micro-batch for a process with `mine` of them (None: the largest share).

    At most `batch_size`, and as many micro-batches on every process: a zero where one has too few sequences.
    """
    largest = -(-sequences // size)
    count = -(-largest // batch_size)
    mine = largest if mine is None else mine
    return [mine // count + (i < mine % count) for i in range(count)]
