"""Threads: which numbers are accepted, what the default is, and what happens when the system refuses to start more.

Machines of other sizes are simulated by replacing `bitnet.machine.usable_cores`; results with many threads are real.
"""

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

import child_process
import pytest
import torch

from bitnet import threads
from bitnet.benchmarks.children import process
from bitnet.config import ModelConfig
from bitnet.engine.load import load
from bitnet.errors import BitNetError, is_thread_shortage
from bitnet.files.packed import write_packed
from bitnet.kernels import native
from bitnet.machine import affinity
from bitnet.model import Transformer

REPOSITORY = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(native.why_not() is not None, reason=native.why_not() or "")
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> "Cores":
    for name in (*threads.VARIABLES, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return Cores(monkeypatch)


class Cores:
    """Simulates a machine, or a container, with a number of cores."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, count: int, torchs: int | None = None) -> None:
        self._monkeypatch.setattr(threads, "usable_cores", lambda: count)
        if torchs is not None:
            self._monkeypatch.setattr(torch, "get_num_threads", lambda: torchs)


# ---- accepted numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 64, 256])
def test_one_to_all_cores_are_accepted(count: int, cores: Cores) -> None:
    cores(count)
    assert [threads.check_threads(str(n)) for n in (1, count)] == [1, count]
    for bad in (0, -1, count + 1, 10**6, 10**30):
        with pytest.raises(BitNetError, match=rf"^-t: got .*, expected 1(,| to the {count} cores)"):
            threads.check_threads(str(bad))


@pytest.mark.parametrize("text", ["", " ", "two", "1.0", "1e3", "+1", "--1", "٣", "1 2", "9" * 5000])
def test_other_text_is_refused(text: str, cores: Cores) -> None:
    cores(4)
    with pytest.raises(BitNetError, match="expected 1 to the 4 cores") as caught:
        threads.check_threads(text, "--threads")
    assert str(caught.value).startswith("--threads: got ")
    assert len(str(caught.value)) < 200


def test_torch_gets_the_number_asked_for(cores: Cores) -> None:
    cores(8)
    assert threads.use_threads(3) == torch.get_num_threads() == 3


# ---- the default -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usable", "torchs", "processes", "expected"),
    [(2, 64, 1, 2), (64, 32, 1, 32), (64, 64, 4, 16), (2, 2, 8, 1), (1, 1, 1, 1)],
    ids=["container of 2", "torch takes half", "4 of torchrun", "more processes than cores", "one core"],
)
def test_the_default(usable: int, torchs: int, processes: int, expected: int, cores: Cores) -> None:
    cores(usable, torchs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert threads.default_threads() == expected


@pytest.mark.parametrize("variable", threads.VARIABLES)
def test_a_number_in_the_environment_beyond_the_cores_is_reported(
    variable: str, cores: Cores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cores(2)
    for value, said in (("1000000", True), ("3,2", True), ("2", False), ("1", False), ("lots", False), ("", False)):
        monkeypatch.setenv(variable, value)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "bitnet"):
            assert threads.use_threads() <= 2
        lines = [record.getMessage() for record in caplog.records]
        assert bool(lines) == said, (value, lines)
        assert all(f"{variable}={value.partition(',')[0]}: this process may use 2 cores" in line for line in lines)


def test_an_option_overrides_the_environment(
    cores: Cores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cores(4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1000000")
    assert threads.use_threads(3) == 3
    assert not caplog.records


def test_the_environment_of_a_real_process() -> None:
    """torch alone takes any number; `bitnet` does not."""
    command = child_process.bitnet("generate", "-p", "a", "-n", 1, "--json")
    done = child_process.run(command, env=child_process.environment(OMP_NUM_THREADS=100_000))
    assert "OMP_NUM_THREADS=100000: this process may use" in done.stderr


# ---- the C++ team ------------------------------------------------------------------------------------------

AWKWARD = [(1, 1, 1), (1, 129, 257), (5, 7, 63), (3, 300, 100)]  # M, N, K: fewer rows and panels than threads


@needs_native
@pytest.mark.parametrize("shape", AWKWARD, ids=lambda shape: "M{}-N{}-K{}".format(*shape))
def test_products_of_3_to_256_threads_are_bit_equal(shape: tuple[int, int, int], rng: torch.Generator) -> None:
    m, n, k = shape
    q = torch.randint(-127, 128, (m, k), generator=rng, dtype=torch.int8)
    codes = torch.randint(-1, 2, (n, k), generator=rng, dtype=torch.int8)
    expected = (q.double() @ codes.double().T).to(torch.int32)  # exact below 2^53
    module, isa = native.module(), native.select()
    packed = _pack(codes)
    for count in (3, 5, 64, 256):
        prepared = torch.empty(module.prepared_bytes(isa, n, k), dtype=torch.uint8)
        out = torch.full((m, n), 0x55555555, dtype=torch.int32)
        module.prepare(isa, packed.numpy(), k, prepared.numpy(), count)
        module.matmul(isa, prepared.numpy(), n, k, q.numpy(), out.numpy(), count)
        assert torch.equal(out, expected), f"{count} threads"


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Four codes a byte, lowest bits first, as code + 1; padding is the code 0."""
    n, k = codes.shape
    fields = torch.ones(n, -(-k // 4) * 4, dtype=torch.int32)
    fields[:, :k] = codes.int() + 1
    return (fields.view(n, -1, 4) << torch.tensor([0, 2, 4, 6])).sum(-1).to(torch.uint8)


@needs_native
@pytest.mark.parametrize("head", ["file", "int8", "int4"])
def test_an_engine_of_1_to_256_threads_gives_the_same_bits(head: str, tmp_path: Path) -> None:
    """Two layers narrower than a panel: most of 256 threads have no work, and still pass every barrier."""
    model = Transformer(ModelConfig(40, 32, 44, 2, 2, 1, 32))
    model.init_weights(0)
    write_packed(tmp_path / "m.safetensors", model, None)
    ids = torch.randint(0, 40, (2, 9))
    scores = {n: load(tmp_path / "m.safetensors", threads=n, head=head).logits(ids) for n in (1, 3, 5, 64, 256)}
    assert all(torch.equal(scores[1], other) for other in scores.values())


@needs_native
def test_numbers_of_threads_that_no_machine_has_are_refused(tmp_path: Path) -> None:
    model = Transformer(ModelConfig(40, 32, 44, 1, 2, 1, 32))
    model.init_weights(0)
    write_packed(tmp_path / "m.safetensors", model, None)
    for count in (0, -1, 1025, 33_000, 2**31 - 1):
        with pytest.raises(ValueError, match=rf"threads: got {count}, expected 1 to 1024"):
            load(tmp_path / "m.safetensors", threads=count)
    with pytest.raises(BitNetError, match="threads: got 2 for the torch engine"):
        load(tmp_path / "m.safetensors", engine="torch", threads=2)


@needs_native
def test_the_default_of_an_engine_is_within_the_cores(
    tmp_path: Path, cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(2, torchs=64)
    model = Transformer(ModelConfig(40, 32, 44, 1, 2, 1, 32))
    model.init_weights(0)
    write_packed(tmp_path / "m.safetensors", model, None)
    seen: list[int] = []

    class Spy:
        def __init__(self, **options: int) -> None:
            seen.append(options["threads"])
            raise KeyboardInterrupt  # the number of threads is all that is needed

    monkeypatch.setattr(native, "module", lambda: type("Module", (), {"Engine": Spy}))
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path / "m.safetensors")
    assert seen == [2]


# ---- a system that refuses to start more -------------------------------------------------------------------

# With stacks of 8 MB the address space holds some sixty threads more. A limit of processes would not apply to root.
_LIMITED = """
import resource, sys, threading
import torch
from bitnet.kernels import native
torch.set_num_threads(1)
torch.randn(8, 8) @ torch.randn(8, 8)
q, out = torch.ones(3, 7, dtype=torch.int8), torch.empty(3, 5, dtype=torch.int32)
isa, module = native.select(), native.module()
prepared, _ = native.prepare(torch.full((5, 2), 0b01010101, dtype=torch.uint8), 7, isa)
def multiply(threads):
    module.matmul(isa, prepared.numpy(), 5, 7, q.numpy(), out.numpy(), threads)
multiply(2)
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, resource.RLIM_INFINITY))
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), resource.RLIM_INFINITY))
for wanted in (1000, 700):
    try:
        multiply(wanted)
    except ValueError as error:
        print(error)
running = len(__import__('os').listdir('/proc/self/task'))
out.fill_(0x55555555)
multiply(3)
print(running, out.eq(0).all().item())
"""


@needs_native
@linux
def test_a_team_that_cannot_start_is_reported_and_leaves_no_threads() -> None:
    done = child_process.run([sys.executable, "-c", _LIMITED])
    first, second, last = done.stdout.splitlines()
    for line, wanted in ((first, 1000), (second, 700)):
        assert line.startswith(f"threads: got {wanted}, expected at most the ")
        assert 2 < int(line.split("at most the ")[1].split()[0]) < 200
        assert "ask for fewer" in line
    running, right = last.split()
    assert int(running) < 10, "the threads that did start were not ended"
    assert right == "True"


def test_a_thread_that_torch_cannot_start_is_reported_in_one_line(
    cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP would print its own line and end the process."""
    cores(64)
    started: list[object] = []

    class Refused(threads.threading.Thread):
        def start(self) -> None:
            if len(started) == 5:
                raise RuntimeError("can't start new thread")
            started.append(self)
            super().start()

    monkeypatch.setattr(threads.threading, "Thread", Refused)
    with pytest.raises(BitNetError, match=r"threads: got 64, expected at most the 6 that .* use fewer \(-t\)"):
        threads.use_threads(64)
    assert not [one for one in started if isinstance(one, Refused) and one.is_alive()]
    assert torch.get_num_threads() == 1  # as before


@pytest.mark.parametrize("message", ["Resource temporarily unavailable", "can't start new thread"])
def test_a_shortage_is_not_blamed_on_the_file(message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitnet.cli.errors import describe

    def refused(*args: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("bitnet.files.packed.load_tokenizer", refused)
    with pytest.raises(RuntimeError, match=message) as caught:
        load()
    assert not isinstance(caught.value, ValueError)
    assert is_thread_shortage(caught.value)
    assert "refused to start another thread; use fewer (-t)" in describe(caught.value)


# ---- pinning -----------------------------------------------------------------------------------------------


def lay_out(root: Path, siblings: dict[int, str]) -> Path:
    """The files in which Linux describes a machine's CPUs: which of them share a core."""
    for cpu, text in siblings.items():
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
    return root


MACHINES: dict[str, tuple[dict[int, str], list[int], list[int]]] = {  # siblings, allowed, expected order
    "one CPU": ({0: "0"}, [0], [0]),
    "neighbours": ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, [0, 1, 2, 3], [0, 2, 1, 3]),
    "alternating": ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, [0, 1, 2, 3], [0, 1, 2, 3]),
    "no topology": ({}, [3, 5, 9], [3, 5, 9]),
    "an empty file": ({0: "", 1: "0-1"}, [0, 1], [0, 1]),
    "first hyperthread offline": ({2: "2", 1: "1,3", 3: "1,3"}, [1, 2, 3], [1, 2, 3]),
    "second hyperthreads of a container": ({4: "0,4", 5: "1,5"}, [4, 5], [4, 5]),
    "one core and half of another": ({0: "0,4", 4: "0,4", 5: "1,5"}, [0, 4, 5], [0, 5, 4]),
    "four to a core": ({n: "0-3" if n < 4 else "4-7" for n in range(8)}, [*range(8)], [0, 4, 1, 5, 2, 6, 3, 7]),
    "256 CPUs": (
        {n: f"{n % 128},{n % 128 + 128}" for n in range(256)},
        [*range(256)],
        [*range(256)],
    ),
    "256 CPUs, neighbours": (
        {n: f"{n - n % 2}-{n - n % 2 + 1}" for n in range(256)},
        [*range(256)],
        [*range(0, 256, 2), *range(1, 256, 2)],
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_cores_come_before_hyperthreads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    siblings, allowed, expected = MACHINES[name]
    monkeypatch.setattr(process, "affinity", lambda: allowed)
    assert process.cores_first(lay_out(tmp_path, siblings)) == expected


@pytest.mark.parametrize(("count", "cpus"), [(1, [0]), (2, [0, 2]), (4, [0, 2, 1, 3]), (5, None)])
def test_a_contender_gets_as_many_cpus_as_threads(
    count: int, cpus: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more threads than CPUs, or where the system does not list its CPUs, nothing is pinned."""
    pinned: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(process, "cores_first", lambda: [0, 2, 1, 3])
    monkeypatch.setattr(process.os, "sched_setaffinity", lambda who, where: pinned.append((who, where)), raising=False)
    process.pin(17, count)
    assert pinned == ([] if cpus is None else [(17, cpus)])


def test_the_cpus_of_this_machine() -> None:
    assert sorted(process.cores_first()) == list(affinity())


# ---- scripts -----------------------------------------------------------------------------------------------


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", REPOSITORY / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPTS: dict[str, list[str]] = {
    "cpu": [],
    "step_cost": [],
    "books": ["--data", "nowhere", "--val-data", "nowhere", "--out", "nowhere"],
    "serve": ["-m", "nowhere"],
}


@pytest.mark.parametrize("text", ["0", "100000", "words"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_refuse_bad_numbers_as_the_verbs_do(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitnet.cli import guarded

    pytest.importorskip("httpx")
    module = script(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *SCRIPTS[name], f"--threads={text}"])
    assert guarded(module.main) == 2
    shown = text if text != "words" else "'words'"
    assert f"threads: got {shown}, expected 1" in capsys.readouterr().err.splitlines()[-1].replace("-t:", "threads:")
