"""How many threads this process computes with: what was asked for, checked against the cores it may use.

torch takes any number and asks the machine for its cores, not the process for its limits: in a container with two of 64
cores it starts 64 threads, and 100,000 of them end it in a segmentation fault inside of OpenMP.
"""

import logging
import os
import threading

import torch

from bitnet.errors import BitNetError
from bitnet.machine import usable_cores

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # where torch takes its number from
_log = logging.getLogger("bitnet")


def check_threads(text: str | int, name: str = "-t") -> int:
    """A number of threads that this process can use: 1 to its cores. Raises BitNetError for anything else."""
    cores = usable_cores()
    if not _is_number(text) or not 1 <= int(text) <= cores:
        many = f"1 to the {cores} cores" if cores > 1 else "1, for the one core"
        raise BitNetError(
            f"{name}: got {_short(text)}, expected {many} that this process may use; leave it out for the default"
        )
    return int(text)


def default_threads() -> int:
    """torch's own number of threads, cut to the cores that this process may use.

    Processes that torchrun started on one machine share its cores.
    """
    return min(torch.get_num_threads(), _share())


def _share() -> int:
    """This process's part of the cores."""
    return max(1, usable_cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def use_threads(count: str | int | None = None, name: str = "-t") -> int:
    """Let torch compute with `count` threads (None: `default_threads`), and return how many that are.

    Raises BitNetError for a number that this process cannot use and where the system does not start as many.
    """
    chosen = default_threads() if count is None else check_threads(count, name)
    if count is None:
        _say_capped(chosen)
    _try_to_start(chosen - 1)
    if chosen != torch.get_num_threads():
        torch.set_num_threads(chosen)
    return chosen


def _say_capped(chosen: int) -> None:
    """Say that a number the user has set is not followed; torch's own guess is replaced without a word."""
    for variable in VARIABLES:
        wanted = os.environ.get(variable, "").partition(",")[0].strip()  # OpenMP has a list: a number for each level
        if _is_number(wanted) and int(wanted) > _share():
            cores = usable_cores()
            _log.warning(
                f"{variable}={_short(wanted)}: this process may use {cores} core{'s' * (cores > 1)}; it computes with "
                f"{chosen} thread{'s' * (chosen > 1)}"
            )
            return


def _try_to_start(count: int) -> None:
    """Have `count` more threads for a moment. OpenMP, which finds out later, would end the process."""
    done, started = threading.Event(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=done.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise BitNetError(
            f"threads: got {count + 1}, expected at most the {len(started) + 1} that the system let this process have "
            f"({error}); use fewer (-t), or raise its limit of processes (ulimit -u, or the container's)"
        ) from error
    finally:
        done.set()
        for thread in started:
            thread.join()


def _is_number(text: str | int) -> bool:
    return isinstance(text, int) or (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 1000)


def _short(text: str | int) -> str:
    """What was typed, in a length that fits a line."""
    shown = str(text) if _is_number(text) else f"'{text}'"
    return shown if len(shown) <= 40 else f"{shown[:30]}... ({len(str(text))} characters)"
