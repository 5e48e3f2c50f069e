"""The least time a token can take: what it reads over the read bandwidth, or its multiply-adds over the peak.

Counted in the naive version. Writing a token reads every projection, the head and all keys and values before it; a
batch shares the weights. Reading a prompt reads the weights once for all of it. Activations are not counted: they stay
in the caches. The head is applied once a sequence for a prompt and once a token written.

    seconds a token >= max(bytes a token / bandwidth, multiply-adds a token / peak)

which is the roofline; a test of both parts is bound by the sum of theirs. The bandwidth is that of a working set as
large as what one step reads: a model that fits in a cache is held against the cache.
"""

from dataclasses import dataclass

from bitnet.benchmarks.bench.plan import Test
from bitnet.config import ModelConfig
from bitnet.files.tensors import linear_parameters

# A working set that is read this much faster than the memory's sits in a cache.
CACHED = 1.25


@dataclass(frozen=True)
class Weights:
    """What one contender reads: bytes of projections and head, and of keys and values a position."""

    weight_bytes: int
    kv_bytes: float


@dataclass(frozen=True)
class Work:
    """Of one part of a test, a token: bytes read, and multiply-adds."""

    tokens: int
    bytes: float
    macs: float


@dataclass(frozen=True)
class Limit:
    """The floor of a test. `by` is "bandwidth" or "arithmetic", whichever takes longer."""

    tokens_per_second: float
    by: str


def parts(config: ModelConfig, weights: Weights, test: Test) -> list[Work]:
    """Reading and writing, those of the two that the test has."""
    found = []
    linear, head = linear_parameters(config), config.vocab_size * config.hidden_size
    attention = 2 * config.num_hidden_layers * config.hidden_size  # q k and p v, a position looked at
    if test.prompt:
        shared = weights.weight_bytes / (test.prompt * test.batch)
        kept = weights.kv_bytes * (test.depth + test.prompt) / test.prompt
        macs = linear + head / test.prompt + attention * (test.depth + (test.prompt + 1) / 2)
        found.append(Work(test.prompt, shared + kept, macs))
    if test.predict:
        positions = test.depth + test.prompt + (test.predict + 1) / 2
        read = weights.weight_bytes / test.batch + weights.kv_bytes * positions
        found.append(Work(test.predict, read, linear + head + attention * positions))
    return found


def work(config: ModelConfig, weights: Weights, test: Test) -> Work:
    """The mean over all tokens of a test."""
    found = parts(config, weights, test)
    total = sum(part.tokens for part in found)
    return Work(
        total,
        sum(part.bytes * part.tokens for part in found) / total,
        sum(part.macs * part.tokens for part in found) / total,
    )


def working_set(weights: Weights, test: Test) -> int:
    """Bytes that the last step of a test reads, to two digits, so that neighbours share a measurement."""
    size = int(weights.weight_bytes + test.batch * weights.kv_bytes * test.room)
    unit = 10 ** max(0, len(str(size)) - 2)
    return max(1, round(size / unit)) * unit


def limit(found: list[Work], bandwidth: float, peak: float | None) -> Limit:
    """The floor of a test's parts. bandwidth: bytes/s; peak: multiply-adds/s, None where unknown."""
    seconds = {"bandwidth": 0.0, "arithmetic": 0.0}
    for part in found:
        reading = part.bytes / bandwidth
        computing = part.macs / peak if peak else 0.0
        seconds["arithmetic" if computing > reading else "bandwidth"] += part.tokens * max(reading, computing)
    by = max(seconds, key=lambda name: seconds[name])
    return Limit(sum(part.tokens for part in found) / sum(seconds.values()), by)
