"""Mutated inputs against the readers of other people's files: nothing but our own error may come out.

    python benchmarks/fuzz.py --inputs 1000000        (make fuzz; half GGUF, half safetensors)

Whole small files of both formats are mutated: bits flipped, lengths overwritten with numbers that overflow, parts cut,
repeated, moved. Each goes through the header and what a header promises (every string, every tensor's bytes); one in
100 goes the whole way of `bitnet import` to a packed file on the disk. Counted: read, and refused with BitNetError;
anything else ends the run, its input kept in build/fuzz. An input that takes over 5 seconds is a hang, and memory
may grow by 64 MiB over the run. Exit code 1 for a failure; one JSON document as the last line.
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.formats import gguf_file, safetensors_file
from bitnet.formats.gguf import GgufSource
from bitnet.formats.gguf_export import export_gguf
from bitnet.formats.hf import HfSource
from bitnet.formats.hf_export import export_hf
from bitnet.formats.packing import import_model
from bitnet.formats.source import TrainedSource
from bitnet.model import Transformer
from bitnet.tokenizer import train_sentencepiece

HANG = 5.0  # seconds
GROWTH = 64 << 20  # bytes
WHOLE = 100  # one in so many inputs is imported from the disk
NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    31,
    32,
    255,
    2**15,
    2**16,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63,
    2**64 - 1,
]
JSON_PARTS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"0",
    b"-1",
    b"1e9",
    b"9" * 20,
    b"null",
    b"true",
    b'"F32"',
    b'"U8"',
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(31))
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(options.seed)
    counts: Counter[str] = Counter()
    slowest, started = 0.0, time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        targets = make_targets(folder)
        for _, seed, read, whole in targets:  # once each, and undamaged: what memory reading takes
            read(seed)
            whole(seed)
        before = peak_memory()
        for i in range(options.inputs):
            label, seed, read, whole = targets[i % len(targets)]
            data = mutate(seed, label)
            path = whole if i // len(targets) % WHOLE == 0 else read
            begun = time.perf_counter()
            outcome = "failed"
            try:
                path(data)
                outcome = "read"
            except BitNetError:
                outcome = "refused"
            finally:  # anything else ends the run with its traceback
                if outcome == "failed":
                    keep(label, data, "not our own error", options.seed, i)
            seconds = time.perf_counter() - begun
            if seconds > HANG:
                outcome = "hung"
                keep(label, data, f"{seconds:.1f} s", options.seed, i)
            slowest = max(slowest, seconds)
            counts[f"{label} {outcome}"] += 1
    growth = peak_memory() - before
    report = {
        "benchmark": "fuzz",
        "inputs": options.inputs,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "slowest_input_seconds": round(slowest, 3),
        "memory_growth_bytes": growth,
        "counts": dict(sorted(counts.items())),
    }
    bad = sum(count for key, count in counts.items() if key.endswith("hung"))
    print(f"{options.inputs:,} inputs, {bad} failures, memory grew by {growth / 2**20:.1f} MiB")
    print(json.dumps(report))
    return 1 if bad or growth > GROWTH else 0


Target = tuple[str, bytes, Callable[[bytes], object], Callable[[bytes], object]]


def make_targets(folder: Path) -> list[Target]:
    """Both formats: label, a good file, the reading of its header and tensors, and the whole import."""
    tokenizer = train_sentencepiece(["ab abc abcd\n" * 50], 270)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=16,
        hidden_act="silu",
        qk_norm=False,
    )
    model = Transformer(config)
    model.init_weights(0)
    source = TrainedSource(model, tokenizer, {})
    gguf_path = export_gguf(source, folder / "m.gguf", "q2_0")
    hf_path = export_hf(source, folder / "hf", packed=True)
    out = folder / "out.safetensors"

    def read_gguf(data: bytes) -> None:
        header = gguf_file.parse_header(data)
        for value in header.keys.values():
            if isinstance(value, gguf_file.StringArray):
                for _ in zip(value, range(1000), strict=False):
                    pass
        for place in header.tensors.values():
            np.frombuffer(data, np.uint8, place.size, place.offset)

    def import_gguf(data: bytes) -> None:
        gguf_path.write_bytes(data)
        found = GgufSource(gguf_path)
        import_model(found, out, found.tokenizer)

    def read_safetensors(data: bytes) -> None:
        _, places = safetensors_file.parse_header(data, len(data))
        length = 8 + int.from_bytes(data[:8], "little")
        for place in places.values():
            np.frombuffer(data, np.uint8, place.size, length + place.start)

    def import_hf(data: bytes) -> None:
        (hf_path / "model.safetensors").write_bytes(data)
        found = HfSource(hf_path)
        import_model(found, out, found.tokenizer)

    safetensors = (hf_path / "model.safetensors").read_bytes()
    return [
        ("gguf", gguf_path.read_bytes(), read_gguf, import_gguf),
        ("safetensors", safetensors, read_safetensors, import_hf),
    ]


def mutate(seed: bytes, label: str) -> bytes:
    """One to four random changes, most of them where the header is."""
    data = bytearray(seed)
    header = 12_000 if label == "gguf" else 8 + int.from_bytes(seed[:8], "little")
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        at = random.randrange(min(header, len(data))) if random.random() < 0.9 else random.randrange(len(data))
        change = random.randrange(8)
        if change == 0:
            data[at] ^= 1 << random.randrange(8)
        elif change == 1:
            data[at] = random.randrange(256)
        elif change in (2, 3):
            size = random.choice((1, 2, 4, 8))
            data[at : at + size] = (random.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        elif change == 4:
            del data[random.randrange(1, len(data)) :]
        elif change == 5:
            end = at + random.randrange(1, 200)
            data[at:at] = data[at:end] * random.choice((1, 1, 2, 50))
        elif change == 6:
            del data[at : at + random.randrange(1, 100)]
        else:
            part = random.choice(JSON_PARTS) if label != "gguf" else random.randbytes(random.randrange(1, 16))
            data[at : at + random.choice((0, len(part)))] = part
        if len(data) < 2:
            break
        if label == "safetensors" and random.random() < 0.5:  # let the length fit, or all would end there
            end = data.find(b"}}", 8, header + 2000)
            if end > 0:
                data[:8] = (end + 2 - 8).to_bytes(8, "little")
    return bytes(data)


def keep(label: str, data: bytes, what: str, seed: int, number: int) -> None:
    """Save an input that failed."""
    folder = Path("build/fuzz")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{label}-{seed}-{number}").write_bytes(data)
    print(f"{label} input {number} of seed {seed}: {what}", file=sys.stderr)


def peak_memory() -> int:
    """Bytes this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
