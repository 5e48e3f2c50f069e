"""How fast on this GPU: tests, copy bandwidth, GEMV, GEMM, decoding of the 2B4T shape, training steps; floors first.

    bash benchmarks/gpu.sh        sets up the import path, then runs this
    --again                       measures again what has a result
    --dry-run                     shows what would run, without a GPU

Each part (gpu_parts/) is a separate process with a time limit, and is printed as it ends: one that fails or hangs
costs only its own figures. Everything is in gpu.json, written after each part; a second call skips what has a result.
Weights are rotated through more memory than the L2 cache holds, contenders alternate within a round, figures are
medians. Launches are timed as replays of a CUDA graph that holds one launch for each copy of the weights, so Python is
not measured.
"""

import argparse
import importlib.util
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bitnet.benchmarks.gpu_parts.timing import EXPECTED, Result, floors

# Seconds; together less than the ten minutes that a lent machine allows a command.
LIMITS = {"tests": 120, "machine": 30, "gemv": 70, "gemm": 70, "decode": 90, "train-74M": 115, "train-350M": 85}
PARTS = tuple(part for part in LIMITS if part != "tests")
STARTED = time.perf_counter()


def measure(part: str) -> Result:
    """Measure one part in this process, which needs a GPU and Triton."""
    from bitnet.benchmarks.gpu_parts import decoding, products, timing, training

    if part.startswith("train-"):
        return training.train(part.removeprefix("train-"), STARTED, LIMITS[part])
    measures = {"machine": timing.machine, "gemv": products.gemv, "gemm": products.gemm, "decode": decoding.decode}
    return measures[part]()


def command(part: str) -> list[str]:
    """The command that runs a part."""
    if part != "tests":
        return [sys.executable, __file__, "--part", part]
    # Without the project's pytest settings: they need plugins that a GPU machine may lack, and turn warnings into
    # errors, which another version of torch may raise in its own code.
    words = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider"]
    words += ["--import-mode=importlib", "-o", "pythonpath=tests/support"]
    return words + (["-n", "6"] if importlib.util.find_spec("xdist") else []) + ["tests/kernels/test_gpu.py"]


def run_part(part: str) -> Result:
    """Run a part in a separate process. Returns its last JSON line (for the tests their output), or its error."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command(part), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    late = False
    try:
        out, errors = process.communicate(timeout=LIMITS[part])
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, signal.SIGKILL)  # with the workers of pytest
        out, errors = process.communicate()
    finally:
        if process.poll() is None:  # Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    result: Result = json.loads(lines[-1]) if lines and part != "tests" else {}
    failed = process.returncode != 0
    if part == "tests":
        result["text"] = out[-20_000:]
        failed = failed or " passed" not in out  # skipped tests are no result
    if failed:
        result |= {"error": (errors.strip() or out)[-3000:], "late": late}
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def lines_of(part: str, result: Result) -> list[str]:
    """A summary of a part: a line for each figure, with its floor and its target."""
    shown = _SHOWN[part](result)
    if "error" in result:
        last = (result["error"].strip().splitlines() or ["no message"])[-1]
        shown.append(f"{part} FAILED: {'ran out of its time; ' * result['late']}{last[:300]}")
    return shown


def _machine_lines(m: Result) -> list[str]:
    if "gpu" not in m:
        return []
    line = (
        f"{m['gpu']}, torch {m['torch']}, Triton {m['triton']}: copy {m['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
        f"bf16 {m['bf16_flops'] / 1e12:.0f} TFLOP/s, cuBLAS int8 {m['int8_ops_cublas'] / 1e12:.0f} Tops"
    )
    return [line]


def _gemv_lines(result: Result) -> list[str]:
    return [
        f"gemv M{r['m']} {r['n']}x{r['k']}: {r['us']:.2f} us, floor {r['floor_us']:.2f}, {r['bandwidth_share']:.0%} of "
        f"copy (60 %), {r['speedup']:.1f}x cuBLAS bf16 {r['cublas_bf16_us']:.1f} us (4x)"
        for r in result.get("rows", [])
    ]


def _gemm_lines(result: Result) -> list[str]:
    return [
        f"gemm M{r['m']} {r['n']}x{r['k']}: {r['us']:.0f} us, floor {r['floor_us']:.0f}, {r['tops']:.0f} Tops, "
        f"{r['speedup']:.2f}x cuBLAS bf16 (1.2x)"
        for r in result.get("rows", [])
    ]


def _decode_lines(result: Result) -> list[str]:
    return [
        f"2B4T decode batch {r['batch']} head {r['head']} pdl {r['pdl']}: {r['tokens_per_second']:,.0f} tokens/s, "
        f"{r['us_per_step']:.0f} us (floor {r['floor_us']:.0f}; 1,500/s at batch 1)"
        + "".join(f", {key} {r[key]:,.0f}" for key in r if key.startswith(("stream", "prefill")))
        + (f", same ids {r['pdl_same_ids']}" if "pdl_same_ids" in r else "")
        for r in result.get("rows", [])
    ]


def _train_lines(result: Result) -> list[str]:
    return [
        f"train {r['model']} {r['kind']}: left out, {r['left_out']}"
        if "left_out" in r
        else f"train {r['model']} {r['kind']}: {r['ms']:.1f} ms, {r['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {r['mfu_of_989_tflops']:.1%}, {r['ratio_to_float']:.2f} of the float baseline's time (714k/s published)"
        for r in result.get("rows", [])
    ]


_SHOWN: dict[str, Callable[[Result], list[str]]] = {
    "tests": lambda result: result.get("text", "").strip().splitlines()[-1:],
    "machine": _machine_lines, "gemv": _gemv_lines, "gemm": _gemm_lines, "decode": _decode_lines,
    "train-74M": _train_lines, "train-350M": _train_lines,
}  # fmt: skip


def _current_keys(found: Result) -> Result:
    """Results with the keys of this version: until 2026-11-28 the float baseline was called plain."""
    for part in found.values():
        for row in part.get("rows", []) if isinstance(part, dict) else []:
            if "ratio_to_plain" in row:
                row["ratio_to_float"] = row.pop("ratio_to_plain")
    return found


def read_results(path: Path, on: str) -> Result:
    """What an earlier call measured on the same GPU with the same versions."""
    fresh: Result = {"benchmark": "gpu", "on": on, "floors": floors()}
    if not path.exists():
        return fresh
    found: Result = json.loads(path.read_text(encoding="utf-8"))
    if found.get("on") != on:
        print(f"{path}: figures of {found.get('on', 'an older form')}, not of {on}: everything is measured again")
        return fresh
    return _current_keys(found)


def run_all(out: Path, on: str, again: bool) -> int:
    """Run the parts that have no result yet, printing each as it ends. Returns 1 where one failed."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gpu.json"
    if again:
        path.unlink(missing_ok=True)
    results = read_results(path, on)
    wanted = [part for part in LIMITS if part not in results or "error" in results[part]]
    print(f"at most {sum(LIMITS[part] for part in wanted)} s for {', '.join(wanted) or 'nothing'}", flush=True)
    for part in LIMITS:
        if part not in wanted:
            print(f"{part}: skipped, {path} has it (--again measures it again)", flush=True)
            continue
        results[part] = run_part(part)
        if part == "tests":
            (out / "gpu-tests.txt").write_text(results[part]["text"], encoding="utf-8")
        work = path.with_suffix(".tmp")
        work.write_text(json.dumps(results, indent=1), encoding="utf-8")
        work.replace(path)  # the file is complete even if the call is cut off here
        print("\n  ".join((f"{part}: {results[part]['seconds']} s", *lines_of(part, results[part]))), flush=True)
    return int(any("error" in results[part] for part in LIMITS))


def main() -> int:
    """Run one part or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="this part alone, in this process")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    parser.add_argument("--again", action="store_true", help="measure again what has a result")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.part is None:
        copy, bf16 = EXPECTED["copy"] / 1e12, EXPECTED["bf16"] / 1e12
        print(f"floors at {copy} TB/s and {bf16:.0f} TFLOP/s bf16, int8 twice that")
        for row in floors():
            print("  " + ", ".join(f"{key} {value:g}" for key, value in row.items()))
    if options.dry_run:
        print(f"at most {sum(LIMITS.values())} s in all")
        for part, limit in LIMITS.items():
            print(f"{part}: at most {limit} s: {shlex.join(['python', *command(part)[1:]])}")
        return 0
    if not torch.cuda.is_available():
        print("error: got no CUDA device, expected an NVIDIA GPU; what would run: --dry-run", file=sys.stderr)
        return 2
    if options.part:
        print(json.dumps(measure(options.part)))
        return 0
    on = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}"
    return run_all(options.out, on, options.again)


if __name__ == "__main__":
    sys.exit(main())
