"""benchmarks/gpu.sh without a GPU: where it imports from, what it runs, prints, keeps and skips."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from types import ModuleType

import child_process
import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "benchmarks" / "gpu.sh"
Captured = pytest.CaptureFixture[str]


def called(*args: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    names = ("PYTHON", "PYTEST", "BITNET", "TRITON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    command = ["bash", str(SCRIPT), *map(str, args)]
    return child_process.run(command, check=False, env=kept | environment, cwd="/")


def test_its_syntax() -> None:
    child_process.run(["bash", "-n", SCRIPT])


# ---- a bare checkout ---------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A Python that has our dependencies, but not us: an editable install hooks into imports by a .pth file."""
    venv.create(tmp_path / "bare", symlinks=True)
    return tmp_path / "bare" / "bin" / "python"


@pytest.mark.parametrize("safe", [True, False], ids=["as it is", "without the safe path"])
def test_a_bare_checkout_imports_its_own_package(safe: bool, bare: Path, tmp_path: Path) -> None:
    """The stand-in of a Python collects the tests in place of running them, in the environment that it is given."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f"export TRITON_INTERPRET=1 PYTHONSAFEPATH={'$PYTHONSAFEPATH' if safe else ''}\n"
        f"exec {bare} -m pytest --collect-only -q -p no:cacheprovider tests/kernels/test_gpu.py\n"
    )
    python.chmod(0o755)
    done = called(python, PYTHONPATH=sysconfig.get_paths()["purelib"])
    if safe:
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("::test_") > 80
    else:  # what was seen on a GPU
        assert done.returncode != 0
        assert "No module named 'bitnet.kernels" in done.stdout


def test_what_it_gives_to_python(tmp_path: Path) -> None:
    """Options go through, settings that would change figures do not; the import folder is gone afterwards."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nenv\nls "${PYTHONPATH%%:*}/bitnet"\necho "words: $*"\nexit 7\n')
    python.chmod(0o755)
    done = called(
        python, "--again", OUT=str(tmp_path), TRITON_INTERPRET="1", BITNET_BACKEND="float", PYTHONPATH="/mine"
    )
    assert done.returncode == 7
    lines = done.stdout.splitlines()
    assert f"words: benchmarks/gpu.py --out {tmp_path} --again" in lines
    assert "PYTHONSAFEPATH=1" in lines
    assert not [line for line in lines if line.startswith(("TRITON_INTERPRET", "BITNET_"))]
    folder, _, mine = next(line for line in lines if line.startswith("PYTHONPATH=")).partition("=")[2].partition(":")
    assert mine == "/mine"
    assert {"kernels", "train", "model.py", "cli"} <= set(lines)
    assert not Path(folder).exists()


def test_a_dry_run_prints_the_worst_case_first() -> None:
    done = called(sys.executable, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if " at most " in f" {line}"]
    total = int(lines[0].split()[2])
    assert lines[0] == f"at most {total} s in all"
    assert total == sum(int(line.split("at most ")[1].split()[0]) for line in lines[1:])
    assert total <= 590, "a lent machine gives a command ten minutes, its start included"
    assert [line.partition(":")[0] for line in lines[1:]][:2] == ["tests", "machine"]


def test_without_a_gpu_it_is_an_error() -> None:
    done = called(sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: got no CUDA device, expected an NVIDIA GPU; what would run: --dry-run"]


# ---- its parts ---------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script's module, with three parts of which each writes its name down where it runs."""
    spec = importlib.util.spec_from_file_location("script_gpu", REPOSITORY / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LIMITS", {"tests": 60, "gemv": 60, "decode": 60})
    return module


FIGURES = {"m": 1, "n": 8, "k": 4, "us": 2, "floor_us": 1, "bandwidth_share": 0.5, "speedup": 4, "cublas_bf16_us": 8}
GOOD = {
    "tests": "print('12 passed in 3 s')",
    "gemv": f"print('words'); print('{json.dumps({'rows': [FIGURES]})}')",
    "decode": "print('{}')",
}


def play(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, log: Path, **parts: str) -> None:
    """Have each part run a small program."""
    start = f"open({str(log)!r}, 'a').write(%r + ' ');"
    programs = {**GOOD, **parts}
    monkeypatch.setattr(gpu, "command", lambda part: [sys.executable, "-c", start % part + programs[part]])


def test_parts_are_printed_and_kept_as_they_end(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    there = f"import pathlib; assert 'gemv' in pathlib.Path({str(out / 'gpu.json')!r}).read_text(); print('{{}}')"
    play(gpu, monkeypatch, log, decode=there)  # the last part finds what the one before it has left
    assert gpu.run_all(out, "a GPU", False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "at most 180 s for tests, gemv, decode"
    assert "  12 passed in 3 s" in lines
    assert [line for line in lines if line.startswith("  gemv M1 8x4: 2.00 us, floor 1.00")]
    assert (out / "gpu-tests.txt").read_text() == "12 passed in 3 s\n"
    assert log.read_text().split() == ["tests", "gemv", "decode"]


def test_a_second_call_runs_what_has_no_result(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    play(gpu, monkeypatch, log, gemv="raise SystemExit('no luck')")
    assert gpu.run_all(out, "a GPU", False) == 1
    assert "  gemv FAILED: no luck" in capsys.readouterr().out.splitlines()
    log.unlink()
    play(gpu, monkeypatch, log)
    assert gpu.run_all(out, "a GPU", False) == 0
    assert log.read_text().split() == ["gemv"]
    assert "at most 60 s for gemv" in capsys.readouterr().out
    assert gpu.run_all(out, "a GPU", False) == 0
    assert log.read_text().split() == ["gemv"]
    assert "at most 0 s for nothing" in capsys.readouterr().out
    assert gpu.run_all(out, "a GPU", True) == 0  # --again
    assert len(log.read_text().split()) == 4


def test_figures_of_another_gpu_are_discarded(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    log = tmp_path / "log"
    play(gpu, monkeypatch, log)
    gpu.run_all(tmp_path, "a GPU", False)
    gpu.run_all(tmp_path, "another GPU", False)
    assert "figures of a GPU, not of another GPU: everything is measured again" in capsys.readouterr().out
    assert len(log.read_text().split()) == 6
    assert json.loads((tmp_path / "gpu.json").read_text())["on"] == "another GPU"


def test_a_part_that_hangs_ends_with_all_its_processes(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    log, child = tmp_path / "log", tmp_path / "child"
    hangs = (
        "import subprocess, sys, time; print('{}', flush=True);"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    )
    play(gpu, monkeypatch, log, gemv=hangs)
    monkeypatch.setitem(gpu.LIMITS, "gemv", 5)
    assert gpu.run_all(tmp_path, "a GPU", False) == 1
    assert "gemv FAILED: ran out of its time" in capsys.readouterr().out
    assert log.read_text().split() == ["tests", "gemv", "decode"]  # the parts after it have their turn
    for _ in range(100):  # a killed process is a zombie until its parent has waited for it
        if ended(int(child.read_text())):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of a part that was ended lives on")


def ended(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def test_skipped_tests_are_no_result(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    play(gpu, monkeypatch, tmp_path / "log", tests="print('1 skipped in 0.3 s')")
    assert gpu.run_all(tmp_path, "a GPU", False) == 1
    assert "tests FAILED: 1 skipped" in capsys.readouterr().out


def test_every_part_has_a_limit_and_its_lines() -> None:
    spec = importlib.util.spec_from_file_location("script_gpu", REPOSITORY / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.LIMITS) == {"tests", *module.PARTS} == set(module._SHOWN)
