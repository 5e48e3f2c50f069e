"""What every test gets: a fresh seed that a failure prints, one torch thread, and a few fixtures.

Fresh seeds find what a frozen one never would; `BITNET_TEST_SEED=<n> pytest -k <test>` repeats a failure.
"""

import os
import random
import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from bitnet.machine import available_memory, usable_cores

REPOSITORY = Path(__file__).resolve().parent.parent
SEED_VARIABLE = "BITNET_TEST_SEED"
SEED_KEY = pytest.StashKey[int]()

# No deadline: a shared two-core machine stalls at times. The blob reproduces a failure found elsewhere.
hypothesis.settings.register_profile("bitnet", deadline=None, print_blob=True)
hypothesis.settings.load_profile("bitnet")


torch.set_num_threads(1)  # for fixtures of a whole module, which run before a test's own


# A shell that starts the tests in the background has them ignore Ctrl-C, which every process they start would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


_WORKER_BYTES = 2 << 30  # of memory at most: torch and its like 0.5 GB, the rest for a test and the processes it starts


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers() -> int | None:
    """`-n auto`: a worker a core that this process may use, a container's limits included, as far as memory reaches."""
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None  # xdist reads it
    memory = available_memory()
    return max(1, min(usable_cores(), usable_cores() if memory is None else memory // _WORKER_BYTES))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What the marker `gpu` asks for cannot be had everywhere; the kernels themselves are tested in the interpreter.
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed and SEED_KEY in item.stash:
        report.sections.append(("seed", f"again with {SEED_VARIABLE}={item.stash[SEED_KEY]}"))
    return report


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """This test's seed; Python's, NumPy's and torch's global generators start from it."""
    value = int(os.environ.get(SEED_VARIABLE) or secrets.randbits(31))
    request.node.stash[SEED_KEY] = value
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002  # the global generator is the point: code under test may draw from it
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Toy models: a second thread waits longer than it works. Undoes what a test sets."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """A generator of the test's own, for `torch.randn(..., generator=rng)`."""
    return torch.Generator().manual_seed(seed)


def fill_with_poison(buffer: torch.Tensor) -> torch.Tensor:
    if buffer.is_floating_point() or buffer.is_complex():
        return buffer.fill_(float("nan"))
    if buffer.dtype is torch.bool:
        return buffer.fill_(True)
    return buffer.fill_(int.from_bytes(b"\x55" * buffer.element_size(), "little"))


@pytest.fixture(scope="session")
def poison() -> Callable[[torch.Tensor], torch.Tensor]:
    """Fills an output buffer with NaN or 0x55 bytes and returns it: what a kernel forgets to write shows."""
    return fill_with_poison


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer from `torch.empty` is filled with NaN or 0x55 bytes."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: fill_with_poison(empty(*args, **kwargs)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text beside the checkout; tests that need it are skipped where it is not there."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return folder
