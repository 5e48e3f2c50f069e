"""The tuner: measures a few candidate tiles once per shape and keeps the choice on disk.

Every kernel module lists its candidates with the reasons for them. A choice is made the first time a shape is seen
(outside the capture of a CUDA graph, which must not wait), by the median of a few launches. The L2 cache is overwritten
between them, because in decode weights come from memory. Choices are kept in
`$XDG_CACHE_HOME/bitnet/tune-<GPU>-triton-<version>.json` for the next process; if that file cannot be written, tuning
is repeated. Token counts are grouped by powers of two: a prompt of 700 tokens uses what was best for 1024.

A candidate that needs more shared memory than the GPU has is skipped. The interpreter uses the first candidate, and so
does everything with `BITNET_TUNE=0`: for reproducible timings and fast tests.
"""

import json
import logging
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton

_log = logging.getLogger("bitnet")

Config = dict[str, int]
Key = tuple[int | str, ...]

ENVIRONMENT = "BITNET_TUNE"
_REPEATS = 7  # launches of a candidate: the median of seven tolerates three disturbed ones
_FLUSH_BYTES = 256 * 2**20  # written between launches; L2 is 50-60 MB on Hopper, 126 MB on Blackwell

_chosen: dict[str, Config] = {}
_files_read: set[Path] = set()


def bucket(tokens: int) -> int:
    """The power of two that stands for a number of tokens, at most 8,192."""
    return min(triton.next_power_of_2(max(tokens, 1)), 8192)


def best(
    kernel: str, key: Key, candidates: Sequence[Config], run: Callable[[Config], object], device: torch.device
) -> Config:
    """The candidate to run for this key, measured on first use. `run` launches the kernel with a candidate.

    Raises RuntimeError when no candidate fits the GPU.
    """
    if device.type != "cuda" or len(candidates) == 1 or os.environ.get(ENVIRONMENT) == "0":
        return candidates[0]
    file = _file(device)
    name = "/".join(map(str, (file.stem, kernel, *key)))
    _read(file)
    known = _chosen.get(name)
    if known is not None and known in candidates:  # an older version may have had other candidates
        return known
    if torch.cuda.is_current_stream_capturing():
        return candidates[0]  # a capture must not wait; engines run every shape once before they capture
    times = {i: seconds for i, c in enumerate(candidates) if (seconds := _measure(run, c, device)) is not None}
    if not times:
        raise RuntimeError(f"{kernel} {key}: no candidate fits this GPU's shared memory; expected at least one to")
    _chosen[name] = candidates[min(times, key=lambda i: times[i])]
    _write(file)
    return _chosen[name]


def _measure(run: Callable[[Config], object], config: Config, device: torch.device) -> float | None:
    from triton.runtime.errors import OutOfResources

    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    try:
        run(config)  # compiles
    except OutOfResources:
        return None
    marks = []
    for _ in range(_REPEATS):
        flush.zero_()  # takes longer than a launch from Python: the events then enclose only the kernel
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(config)
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def _file(device: torch.device) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    gpu = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return root / "bitnet" / f"tune-{gpu}-triton-{triton.__version__}.json"


def _read(file: Path) -> None:
    if file in _files_read:
        return
    _files_read.add(file)
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        _log.warning("%s cannot be read (%s): tiles are measured again", file, error)
        return
    for name, config in kept.items() if isinstance(kept, dict) else ():
        if isinstance(config, dict):
            _chosen.setdefault(name, config)


def _write(file: Path) -> None:
    mine = {name: config for name, config in _chosen.items() if name.startswith(file.stem + "/")}
    work = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        work.write_text(json.dumps(mine, indent=1), encoding="utf-8")
        work.replace(file)
    except OSError as error:
        _log.warning("%s cannot be written (%s): tiles are measured again next time", file, error.strerror)
