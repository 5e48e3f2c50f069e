"""Without a GPU, test_gpu.py and the engines' conformance tests run in Triton's interpreter, in a process of their own.

The interpreter has to be chosen before the kernels are defined. On a machine with a GPU they run on the device.
"""

import ast
import os
import re
import sys
from pathlib import Path

import child_process
import pytest
import torch

TESTS = Path(__file__).parent.parent


# In three parts, so that cores share them: the interpreter takes over a minute of one for all.
PARTS = 3


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a part takes 25 s of a quiet core
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("file", ["kernels/test_gpu.py", "engine/test_conformance.py"], ids=["kernels", "engine"])
def test_in_the_interpreter(file: str, part: int, seed: int) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_", "BITNET_"))
    }
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"BITNET_TEST_SEED": str(seed)}
    path = TESTS / file
    definitions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    names = [node.name for node in definitions if node.name.startswith("test_")][part::PARTS]
    python = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-o", "timeout=1000"]
    done = child_process.run(
        [*python, *(f"{path}::{name}" for name in names)], limit=1100, check=False, env=environment
    )
    print(done.stdout[-20_000:], done.stderr[-2000:])
    assert done.returncode == 0
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    assert counts.get("passed", 0) >= len(names), "the tests were not run"
    assert set(counts) <= {"passed", "skipped"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_there_is_a_reason_and_no_silent_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitnet.kernels import ops

    for device, reason in (("cpu", "not on cpu"), ("cuda", "torch sees no CUDA device")):
        assert reason in str(ops.TRITON.why_not(torch.device(device)))
        assert ops.select(torch.device(device)) is not ops.TRITON
    monkeypatch.setenv(ops.ENVIRONMENT, "triton")
    with pytest.raises(ValueError, match=r"BITNET_BACKEND=triton cannot be used: Triton kernels run on an NVIDIA GPU"):
        ops.select(torch.device("cpu"))


def test_the_command_line_does_not_pay_for_triton() -> None:
    code = "import bitnet, bitnet.cli, bitnet.files.packed, sys; print('triton' in sys.modules)"
    done = child_process.run([sys.executable, "-c", code])
    assert done.stdout.strip() == "False"
