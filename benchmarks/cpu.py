"""The CPU kernels and engine against torch, llama.cpp and the memory: python benchmarks/cpu.py

    --part kernels   each instruction set: GEMV on > 300 MB of rotating weights, GEMM at 8, 64 and 256 tokens
    --part models    end to end, prefill 256 and decode 64, for --shapes (presets, 110m, 2b4t)
    --llama PYTHON   a Python with llama-cpp-python compiled for this CPU: a contender on a TQ2_0 file of the same shape

Contenders take turns within one run; medians and quartiles are reported, beside the memory's read bandwidth measured
between them. The last line is one JSON document.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import shapes
import torch
from rich.console import Console
from rich.table import Table
from worker import Worker

from bitnet.config import ModelConfig
from bitnet.engine_cpu import CpuEngine
from bitnet.kernels import native, packing
from bitnet.packed import load

N, K = 2560, 6912  # down_proj of 2B4T, the largest in-features there are
ROTATED = 300e6  # bytes of weights a GEMV walks through: more than any cache that one core may fill
PREFILL, DECODE = 256, 64


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def seconds(action: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


# ---- kernels


def kernel_contenders() -> dict[str, tuple[Callable[[int], Callable[[], object]], int, float]]:
    """name -> (a call for so many tokens, copies of the weights it rotates through, bytes of one copy)."""
    generator = torch.Generator().manual_seed(0)
    codes = shapes.random_codes(N, K, generator)
    packed = packing.pack(codes)
    contenders = {}

    def ternary(isa: str) -> tuple[Callable[[int], Callable[[], object]], int, float]:
        first, _ = native.prepare(packed, K, isa)
        copies = [first.clone() for _ in range(int(ROTATED / first.numel()) + 1)]
        state = {"next": 0}

        def call(tokens: int) -> Callable[[], object]:
            q = torch.randint(-127, 128, (tokens, K), generator=generator, dtype=torch.int8)

            def once() -> object:
                state["next"] = (state["next"] + 1) % len(copies)
                return native.ternary_matmul(q, copies[state["next"]], N, isa)

            return once

        return call, len(copies), first.numel()

    def dense(dtype: torch.dtype) -> tuple[Callable[[int], Callable[[], object]], int, float]:
        weight = codes.to(dtype)
        copies = [weight.clone() for _ in range(int(ROTATED / weight.nbytes) + 1)]
        state = {"next": 0}

        def call(tokens: int) -> Callable[[], object]:
            x = torch.randn(tokens, K, generator=generator).to(dtype)

            def once() -> object:
                state["next"] = (state["next"] + 1) % len(copies)
                return torch.nn.functional.linear(x, copies[state["next"]])

            return once

        return call, len(copies), weight.nbytes

    for one in native.instruction_sets():
        if one.why_not is None:
            contenders[one.name] = ternary(one.name)
    contenders["torch fp32"], contenders["torch bf16"] = dense(torch.float32), dense(torch.bfloat16)
    return contenders


def kernels(rounds: int) -> dict[str, Any]:
    """GEMV in GB/s and weights/s, GEMM in multiply-accumulates/s; one of each contender a round."""
    contenders = kernel_contenders()
    times: dict[str, dict[int, list[float]]] = {name: {} for name in contenders}
    bandwidth = []
    with torch.inference_mode():
        for turn in range(rounds + 1):
            bandwidth.append(machine.read_bandwidth(1))
            for name, (call, copies, _) in contenders.items():
                for tokens in (1, 8, 64, 256):
                    if name == "scalar" and tokens > 8:
                        continue
                    action = call(tokens)
                    repeats = copies if tokens == 1 else 2
                    taken = seconds(lambda action=action, repeats=repeats: [action() for _ in range(repeats)]) / repeats
                    if turn:  # the first round warms up
                        times[name].setdefault(tokens, []).append(taken)
    rows = {}
    for name, by_tokens in times.items():
        size = contenders[name][2]
        rows[name] = {
            "bits_per_weight": size * 8 / (N * K),
            "gemv_gigabytes_per_second": spread([size / t / 1e9 for t in by_tokens[1]]),
            "gemv_gigaweights_per_second": spread([N * K / t / 1e9 for t in by_tokens[1]]),
            "gemm_gigamacs_per_second": {
                str(tokens): spread([tokens * N * K / t / 1e9 for t in taken])
                for tokens, taken in by_tokens.items()
                if tokens > 1
            },
        }
    return {"n": N, "k": K, "read_gigabytes_per_second": spread(bandwidth), "contenders": rows}


def kernel_table(report: dict[str, Any]) -> Table:
    """The kernels' figures for a person."""
    read = report["read_gigabytes_per_second"]["median"]
    table = Table(title=f"products, {N} x {K}, memory reads {read:.1f} GB/s", title_justify="left")
    for column in ("kernel", "bits", "GEMV GB/s", "of memory", "Gweights/s", "8 tokens", "64", "256 GMAC/s"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for name, row in report["contenders"].items():
        gemv = row["gemv_gigabytes_per_second"]["median"]
        gemm = row["gemm_gigamacs_per_second"]
        table.add_row(
            name,
            f"{row['bits_per_weight']:.2f}",
            f"{gemv:.1f}",
            f"{gemv / read:.0%}",
            f"{row['gemv_gigaweights_per_second']['median']:.0f}",
            *(f"{gemm[t]['median']:.0f}" if t in gemm else "-" for t in ("8", "64", "256")),
        )
    return table


# ---- models


class Ours:
    """The C++ engine on a packed file."""

    def __init__(self, path: Path, head: str) -> None:
        engine = load(path, engine="cpu", head=head)
        assert isinstance(engine, CpuEngine)
        self.engine = engine
        # What a token has to read: projections and head. (Keys and values come to it with the context.)
        self.bytes_per_token = engine.weight_bytes + engine.head_bytes

    def run(self, prefill: int, decode: int) -> dict[str, float]:
        """Seconds of each, from an empty session."""
        ids = torch.randint(0, self.engine.config.vocab_size, (1, prefill + decode))
        session = self.engine.session(1, prefill + decode)
        read = seconds(lambda: session.prefill(ids[:, :prefill]))
        return {
            "prefill": read,
            "decode": seconds(lambda: [session.decode(ids[:, prefill + i]) for i in range(decode)]),
        }


def model(name: str, config: ModelConfig, rounds: int, llama: str, cache: Path) -> dict[str, Any]:
    """Prefill and decode of every contender on one shape."""
    threads = torch.get_num_threads()
    path = cache / f"{name}.safetensors"
    if not path.exists():
        shapes.write_random(config, path)
    prefill, decode = min(PREFILL, config.context // 2), min(DECODE, config.context // 2)
    loading = seconds(lambda: load(path, engine="cpu"))
    ours = {f"bitnet, head {head}": Ours(path, head) for head in ("file", "int8", "int4")}
    runners: dict[str, Callable[[], dict[str, float]]] = {
        label: lambda one=one: one.run(prefill, decode) for label, one in ours.items()
    }
    workers: dict[str, Worker] = {}
    settings = json.dumps(config.to_dict())
    if llama:
        workers["llama.cpp TQ2_0"] = Worker(
            "llama_worker.py", settings, str(cache / f"{name}.gguf"), str(threads), python=llama
        )
    workers["torch bf16, linears"] = Worker("torch_worker.py", settings, str(threads), "bf16")
    if "amx_bf16" in machine.examine()["cpu"]["features"]:
        workers["torch bf16 without AMX"] = Worker(
            "torch_worker.py", settings, str(threads), "bf16", ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16"
        )
    for label, worker in workers.items():
        # A dense decode reads eight times the bytes: a few tokens tell as much.
        tokens = decode if "llama" in label else 4
        runners[label] = lambda worker=worker, tokens=tokens: {
            key: value * (decode / tokens if key == "decode" else 1)
            for key, value in worker.ask(prefill=prefill, decode=tokens).items()
        }
    speeds: dict[str, dict[str, list[float]]] = {label: {"prefill": [], "decode": []} for label in runners}
    bandwidth = []
    for turn in range(rounds + 1):
        bandwidth.append(machine.read_bandwidth(1))
        order = list(runners)
        for label in order if turn % 2 else reversed(order):
            taken = runners[label]()
            if turn:
                speeds[label]["prefill"].append(prefill / taken["prefill"])
                speeds[label]["decode"].append(decode / taken["decode"])
    for worker in workers.values():
        worker.close()
    read = statistics.median(bandwidth)
    rows: dict[str, Any] = {
        label: {key: spread(values) for key, values in both.items()} for label, both in speeds.items()
    }
    for label, one in ours.items():
        limit = read * 1e9 / one.bytes_per_token
        rows[label] |= {
            "bytes_per_token": one.bytes_per_token,
            "decode_limit": limit,
            "decode_of_limit": rows[label]["decode"]["median"] / limit,
        }
    return {
        "prefill": prefill,
        "decode": decode,
        "load_seconds": loading,
        "read_gigabytes_per_second": spread(bandwidth),
        "contenders": rows,
    }


def model_table(name: str, report: dict[str, Any]) -> Table:
    """One shape's figures for a person."""
    read = report["read_gigabytes_per_second"]["median"]
    title = f"{name}: prefill {report['prefill']}, decode {report['decode']}; memory reads {read:.1f} GB/s"
    table = Table(title=title, title_justify="left")
    for column in ("engine", "prefill tokens/s", "decode tokens/s", "of memory's limit"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for label, row in report["contenders"].items():
        limit = f"{row['decode_of_limit']:.0%} of {row['decode_limit']:,.1f}" if "decode_limit" in row else ""
        table.add_row(label, f"{row['prefill']['median']:,.1f}", f"{row['decode']['median']:,.1f}", limit)
    return table


def main() -> None:
    """Measure, print tables and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("kernels", "models", "all"), default="all")
    parser.add_argument("--shapes", nargs="+", default=["nano", "110m", "2b4t"])
    parser.add_argument("--llama", default="", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="keep the models of random weights in this folder")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    report: dict[str, Any] = {"machine": machine.describe(), "instruction_set": native.select()}
    console.print(machine.line(report["machine"]))
    if options.part in ("kernels", "all"):
        report["kernels"] = kernels(options.rounds)
        console.print(kernel_table(report["kernels"]))
    with tempfile.TemporaryDirectory(prefix="bitnet-cpu-") as folder:
        cache = options.cache or Path(folder)
        for name in options.shapes if options.part in ("models", "all") else []:
            one = model(name, shapes.shape(name), options.rounds, options.llama, cache)
            report.setdefault("models", {})[name] = one
            console.print(model_table(name, one))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
