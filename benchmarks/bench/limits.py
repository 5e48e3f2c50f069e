"""The least time a token can take: the bytes it reads over the bandwidth, or its multiply-adds over the peak.

    seconds per token >= max(bytes per token / bandwidth, multiply-adds per token / peak)        (the roofline)

Bytes are those of the naive version. Writing a token reads every projection, the head, and all keys and values before
it; the sequences of a batch share the weights. Reading a prompt reads the weights once for all its tokens. Activations
are not counted: they stay in the caches. The head is applied once per sequence for a prompt and once per token written.

A test that reads and writes is bound by the sum of both floors. The bandwidth is that of a working set as large as
what one step reads: a model that fits in a cache is held against the cache.
"""

from dataclasses import dataclass

from bitnet.benchmarks.bench.plan import Test
from bitnet.config import ModelConfig
from bitnet.files.tensors import linear_parameters

CACHED = 1.25  # a working set that is read so many times as fast as memory is in a cache


@dataclass(frozen=True)
class ModelBytes:
    """What one contender reads: bytes of projections and head, and of keys and values per position."""

    weight_bytes: int
    kv_bytes: float


@dataclass(frozen=True)
class Work:
    """One phase of a test, reading or writing: its tokens, and of each token bytes read and multiply-adds."""

    tokens: int
    bytes: float
    macs: float


@dataclass(frozen=True)
class Limit:
    """The most tokens per second of a test. `by` is "bandwidth" or "arithmetic", whichever takes longer."""

    tokens_per_second: float
    by: str


def phases(config: ModelConfig, read: ModelBytes, test: Test) -> list[Work]:
    """Reading and writing, as far as the test has them."""
    found = []
    linear, head = linear_parameters(config), config.vocab_size * config.hidden_size
    attention = 2 * config.num_hidden_layers * config.hidden_size  # q k and p v, per position attended to
    if test.prompt:
        shared = read.weight_bytes / (test.prompt * test.batch)
        kept = read.kv_bytes * (test.depth + test.prompt) / test.prompt
        macs = linear + head / test.prompt + attention * (test.depth + (test.prompt + 1) / 2)
        found.append(Work(test.prompt, shared + kept, macs))
    if test.predict:
        positions = test.depth + test.prompt + (test.predict + 1) / 2
        moved = read.weight_bytes / test.batch + read.kv_bytes * positions
        found.append(Work(test.predict, moved, linear + head + attention * positions))
    return found


def work(config: ModelConfig, read: ModelBytes, test: Test) -> Work:
    """The mean per token over all tokens of a test."""
    found = phases(config, read, test)
    total = sum(phase.tokens for phase in found)
    return Work(
        total,
        sum(phase.bytes * phase.tokens for phase in found) / total,
        sum(phase.macs * phase.tokens for phase in found) / total,
    )


def working_set(read: ModelBytes, test: Test) -> int:
    """Bytes that the last step of a test reads, to two digits, so that similar tests share a measurement."""
    size = int(read.weight_bytes + test.batch * read.kv_bytes * test.positions)
    unit = 10 ** max(0, len(str(size)) - 2)
    return max(1, round(size / unit)) * unit


def limit(found: list[Work], bandwidth: float, peak: float | None) -> Limit:
    """The limit of a test, from its phases. bandwidth: bytes/s; peak: multiply-adds/s, None where unknown."""
    seconds = {"bandwidth": 0.0, "arithmetic": 0.0}
    for phase in found:
        reading = phase.bytes / bandwidth
        computing = phase.macs / peak if peak else 0.0
        seconds["arithmetic" if computing > reading else "bandwidth"] += phase.tokens * max(reading, computing)
    by = max(seconds, key=lambda name: seconds[name])
    return Limit(sum(phase.tokens for phase in found) / sum(seconds.values()), by)
