"""How fast on this GPU: tests, copy bandwidth, GEMV, GEMM, decode of the 2B4T shape, training steps; floors first.

    bash benchmarks/gpu.sh        sets up the import path, then runs this
    --again                       measures anew what has a result
    --dry-run                     says what would run, without a GPU

Each part is a process of its own with a time limit, and is printed as it ends: one that fails or hangs costs its own
figures only. Everything is in gpu.json, written after each part; a second call skips what has a result there already.
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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

# What is expected of an H200 until the run has measured it: bytes/s copied, bf16 operations/s; int8 is twice bf16.
EXPECTED = {"copy": 4.3e12, "bf16": 790e12}
SHAPES = ((13824, 2560), (2560, 6912), (3840, 2560), (2560, 2560))  # gate/up, down, q/k/v, o of 2B4T
# Seconds; together less than the ten minutes that a lent machine has for a command.
LIMITS = {"tests": 120, "machine": 30, "gemv": 70, "gemm": 70, "decode": 90, "train-74M": 115, "train-350M": 85}
_COMPILING = 0.6  # of a training part's limit: kinds that were not compiled by then are left out
ROTATED = 512 * 2**20  # bytes of weights a contender walks through: ten times the L2 cache of an H200
ROUNDS = 9
Result = dict[str, Any]
STARTED = time.perf_counter()


def floors() -> list[Result]:
    """Least times of each product, from bytes and operations alone."""
    rows = []
    for n, k in SHAPES:
        packed, full = n * k / 4, 2 * n * k
        row: Result = {"n": n, "k": k, "gemv_us": packed / EXPECTED["copy"] * 1e6}
        row["gemv_bf16_us"] = full / EXPECTED["copy"] * 1e6
        for m in (512, 4096):
            row[f"gemm_{m}_us"] = (
                max(2 * m * n * k / 2 / EXPECTED["bf16"], (packed + m * (k + 2 * n)) / EXPECTED["copy"]) * 1e6
            )
            row[f"gemm_{m}_bf16_us"] = 2 * m * n * k / EXPECTED["bf16"] * 1e6
        rows.append({key: round(value, 2) for key, value in row.items()})
    return rows


def median_times(contenders: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each contender, which take turns in every round."""
    for run in contenders.values():
        run()
    torch.cuda.synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        order = list(contenders) if i % 2 else list(contenders)[::-1]
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contenders[name]()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in seconds.items()}


def graph_of(run: Callable[[int], Any], count: int) -> Callable[[], None]:
    """A graph with one launch for each of `count` copies, as a callable."""
    for i in range(min(count, 3)):
        run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            run(i)
    return graph.replay


def bandwidth() -> float:
    """Bytes a second of a device-to-device copy, read and written both counted."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / median_times({"copy": lambda: target.copy_(source)})["copy"]


def machine() -> Result:
    """What the GPU is, and its two ceilings in this very run."""
    import triton

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c, d = (torch.randint(-127, 128, (8192, 8192), device="cuda", dtype=torch.int8) for _ in range(2))
    times = median_times({"bf16": lambda: a @ b, "int8": lambda: torch._int_mm(c, d.T)})
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": date.today().isoformat(),
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "copy_bytes_per_second": bandwidth(),
        "bf16_flops": 2 * 8192**3 / times["bf16"],
        "int8_ops_cublas": 2 * 8192**3 / times["int8"],
    }


def random_weights(n: int, k: int) -> Any:
    """Packed random trits on the GPU, in the kernels' tiles."""
    from bitnet.kernels import packing
    from bitnet.kernels.gpu import layout

    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8, device="cuda")
    return layout.arrange(packing.pack(codes), k)


def copies_of(weights: Any) -> list[Any]:
    """Enough copies of packed weights to leave the cache."""
    from bitnet.kernels.gpu.layout import GpuWeights

    count = max(2, -(-ROTATED // weights.data.nbytes))
    return [weights, *(GpuWeights(weights.data.clone(), weights.n, weights.k) for _ in range(count - 1))]


def gemv() -> Result:
    """1 to 16 tokens at the 2B4T shapes: every candidate and cuBLAS in bf16."""
    from bitnet.kernels.gpu import products, quantize

    copy, rows = bandwidth(), []
    for n, k in SHAPES:
        weights = copies_of(random_weights(n, k))
        full = [
            torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, -(-ROTATED // (2 * n * k))))
        ]
        for m in (1, 4, 16) if n == 13824 else (1,):
            x = torch.randn(m, k, device="cuda")
            q, half = quantize.quantize_rows(x, width=quantize.padded(k)), x.bfloat16()
            configs = products.candidates(m, weights[0], q.codes.device)
            contenders = {"cublas": graph_of(lambda i, h=half, f=full: h @ f[i].T, len(full))}
            for j, config in enumerate(configs):
                contenders[str(j)] = graph_of(
                    lambda i, c=config, w=weights, r=q: products.partial_sums(r.codes, r.sums, w[i], c), len(weights)
                )
            times = median_times(contenders)
            each = {name: s / len(full if name == "cublas" else weights) * 1e6 for name, s in times.items()}
            best = min((name for name in each if name != "cublas"), key=lambda name: each[name])
            packed = n * k / 4
            rows.append({
                "m": m, "n": n, "k": k, "us": each[best], "cublas_bf16_us": each["cublas"],
                "floor_us": packed / copy * 1e6, "bandwidth_share": packed / (each[best] / 1e6) / copy,
                "speedup": each["cublas"] / each[best], "config": configs[int(best)],
                "all_us": {json.dumps(c): each[str(j)] for j, c in enumerate(configs)},
            })  # fmt: skip
        del weights, full
    return {"copy_bytes_per_second": copy, "rows": rows}


def gemm() -> Result:
    """Prefill products with the scales in the epilogue against cuBLAS in bf16."""
    from bitnet.kernels.gpu import packed_gemm, products, quantize

    rows = []
    for n, k in SHAPES[:3]:
        weights = copies_of(random_weights(n, k))[:8]
        full = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        one = torch.ones(1, device="cuda")
        for m in (512, 1024, 2048, 4096):
            x = torch.randn(m, k, device="cuda")
            q, half = quantize.quantize_rows(x, width=quantize.padded(k)), x.bfloat16()
            configs = [c for c in products.candidates(m, weights[0], half.device) if not c["gemv"]]
            contenders: dict[str, Callable[[], Any]] = {"cublas": graph_of(lambda i, h=half, f=full: h @ f[i % 4].T, 8)}
            for j, config in enumerate(configs):
                contenders[str(j)] = graph_of(
                    lambda i, c=config, w=weights, r=q, s=one: packed_gemm.packed_gemm_scaled(
                        r.codes, r.sums, w[i], r.inv_scale, s, torch.bfloat16, c
                    ),
                    8,
                )
            each = {name: s / 8 * 1e6 for name, s in median_times(contenders, 7).items()}
            best = min((name for name in each if name != "cublas"), key=lambda name: each[name])
            rows.append({
                "m": m, "n": n, "k": k, "us": each[best], "cublas_bf16_us": each["cublas"],
                "floor_us": max(m * n * k / EXPECTED["bf16"], (n * k / 4 + m * (k + 2 * n)) / EXPECTED["copy"]) * 1e6,
                "tops": 2 * m * n * k / (each[best] / 1e6) / 1e12, "speedup": each["cublas"] / each[best],
                "config": configs[int(best)],
                "all_us": {json.dumps(c): each[str(j)] for j, c in enumerate(configs)},
            })  # fmt: skip
    return {"rows": rows}


def random_model(config: Any, embedding: str) -> Any:
    """A packed model of random trits, made on the GPU."""
    from bitnet.files.packed import PackedModel, expected_tensors
    from bitnet.kernels import packing

    tensors = {}
    for name, (shape, kinds) in expected_tensors(config).items():
        if torch.uint8 in kinds:
            k = config.intermediate_size if "down_proj" in name else config.hidden_size
            codes = torch.randint(-1, 2, (shape[0], k), dtype=torch.int8, device="cuda")
            tensors[name] = packing.pack(codes)
        elif name.endswith("_scale"):
            tensors[name] = torch.full(shape, 0.02, device="cuda")
        elif torch.int8 in kinds and embedding == "int8":
            tensors[name] = torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
            tensors[name.removesuffix("weight") + "scale"] = torch.full((shape[0], 1), 2e-4, device="cuda")
        elif torch.int8 in kinds:
            tensors[name] = (torch.randn(shape, device="cuda") * 0.02).bfloat16()
        else:
            tensors[name] = torch.ones(shape, device="cuda")
    return PackedModel(config, tensors, None, {})


def decode() -> Result:
    """Tokens a second of the 2B4T shape, end to end: ids in, logits, greedy choice on the device, ids in again."""
    from bitnet.config import preset
    from bitnet.engine.gpu import TritonEngine
    from bitnet.engine.sampling import GREEDY

    config, rows = preset("2b4t"), []
    for embedding in ("int8", "bf16"):
        packed, written = random_model(config, embedding), {}
        for pdl in (False, True):
            if pdl and torch.cuda.get_device_capability() < (9, 0):
                continue
            engine = TritonEngine(packed, torch.device("cuda"), pdl=pdl)
            for batch in (1, 8, 64) if pdl else (1,):
                row: Result = {"head": embedding, "pdl": pdl, "batch": batch, "weight_bytes": engine.weight_bytes}
                prompt = torch.arange(batch * 512).view(batch, 512) % config.vocab_size
                session = engine.session(batch, 1024)
                prompt = prompt if batch == 1 else prompt[:, :32]
                logits = session.prefill(prompt)
                if batch == 1:
                    again = engine.session(1, 1024)
                    torch.cuda.synchronize()
                    started = time.perf_counter()
                    again.prefill(prompt)
                    torch.cuda.synchronize()
                    row["prefill_512_tokens_per_second"] = 512 / (time.perf_counter() - started)
                ids, kept = logits.argmax(dim=-1), []
                for _ in range(5):
                    ids = session.decode(ids).argmax(dim=-1)
                    kept.append(ids)
                torch.cuda.synchronize()
                started = time.perf_counter()
                for _ in range(128):
                    ids = session.decode(ids).argmax(dim=-1)
                    kept.append(ids)
                torch.cuda.synchronize()
                seconds = time.perf_counter() - started
                row |= {"us_per_step": seconds / 128 * 1e6, "tokens_per_second": batch * 128 / seconds}
                row["floor_us"] = engine.weight_bytes / EXPECTED["copy"] * 1e6
                if batch == 1:
                    written[pdl] = torch.stack(kept)
                    started = time.perf_counter()
                    count = len(list(engine.stream([1, 2, 3], 128, GREEDY, limit=256)))
                    row["stream_tokens_per_second"] = count / (time.perf_counter() - started)
                rows.append(row)
            del engine
        if True in written:
            rows[-1]["pdl_same_ids"] = torch.equal(written[False], written[True])
    return {"rows": rows}


TRAINED = {
    # 75.5M parameters, 69.2M of them ternary, vocabulary of parameter-golf's record; 65,536 tokens a step
    "74M": ({"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 11,
             "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 1024}, 64),
    "350M": ({"vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 28,
              "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048}, 8),
}  # fmt: skip


def train(name: str) -> Result:
    """A training step in bf16, compiled block by block (a third of the time that one graph of all layers takes):
    ternary (and with int8 gradients, and half-way eased in) against the float twin."""
    from bitnet.config import ModelConfig
    from bitnet.model import Transformer, flops_per_token, parameters
    from bitnet.quant import training_precision
    from bitnet.train.config import TrainConfig
    from bitnet.train.objective import Objective

    changes, batch = TRAINED[name]
    steps: dict[str, Callable[[], Any]] = {}
    rows: list[Result] = []
    for kind in ("float", "ternary", "ternary-warmup", "ternary-int8-dx", "ternary-int8-dx-dw"):
        if len(steps) > 1 and time.perf_counter() - STARTED > _COMPILING * LIMITS[f"train-{name}"]:
            rows.append({"model": name, "kind": kind, "left_out": "no time to compile it"})
            continue
        config = ModelConfig(**changes).replace(linear="float" if kind == "float" else "ternary")
        model = Transformer(config)
        model.init_weights(0)
        model.cuda()
        int8 = {"ternary-int8-dx": "dx", "ternary-int8-dx-dw": "all"}.get(kind, "none")
        precision = training_precision(0.5 if kind == "ternary-warmup" else 1.0, int8, torch.device("cuda"))
        for block in model.blocks():
            block.forward = torch.compile(block.forward)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        network = Objective(model, TrainConfig())
        tokens = torch.randint(0, config.vocab_size, (batch, config.context + 1), device="cuda")

        def step(network: Any = network, optimizer: Any = optimizer, tokens: Any = tokens, how: Any = precision) -> Any:
            with torch.autocast("cuda", torch.bfloat16):
                loss, _ = network(tokens[:, :-1], tokens[:, 1:], how)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        print(f"{name} {kind}: first step {time.perf_counter() - started:.0f} s", file=sys.stderr)
        steps[kind] = step
    times = median_times(steps, 9)
    count = batch * config.context
    for kind, seconds in times.items():
        flops = flops_per_token(config, config.context, training=True)
        rows.append({
            "model": name, "parameters": parameters(config), "kind": kind, "ms": seconds * 1e3,
            "tokens_per_second": count / seconds, "mfu_of_989_tflops": flops * count / seconds / 989e12,
            "ratio_to_plain": seconds / times["float"],
        })  # fmt: skip
    return {"rows": rows, "published": {"tokens_per_second": 714_000, "what": "73.7M ternary, one H100 of eight"}}


PARTS: dict[str, Callable[[], Result]] = {
    "machine": machine, "gemv": gemv, "gemm": gemm, "decode": decode,
    "train-74M": lambda: train("74M"), "train-350M": lambda: train("350M"),
}  # fmt: skip


def command(part: str) -> list[str]:
    """What runs a part."""
    if part != "tests":
        return [sys.executable, __file__, "--part", part]
    # Without the project's pytest settings: they need plugins that a GPU machine may lack, and turn warnings, which
    # another version of torch may raise in its own code, into errors.
    words = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider"]
    words += ["--import-mode=importlib", "-o", "pythonpath=tests/support"]
    return words + (["-n", "6"] if importlib.util.find_spec("xdist") else []) + ["tests/kernels/test_gpu.py"]


def run_part(part: str) -> Result:
    """Run a part in a process of its own. Returns its last JSON line (of the tests: their text), or what went wrong."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command(part), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    late = False
    try:
        out, errors = process.communicate(timeout=LIMITS[part])
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, signal.SIGKILL)  # the workers of pytest, too
        out, errors = process.communicate()
    finally:
        if process.poll() is None:  # Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    result: Result = json.loads(lines[-1]) if lines and part != "tests" else {}
    failed = process.returncode != 0
    if part == "tests":
        result["text"] = out[-20_000:]
        failed = failed or " passed" not in out  # all skipped is no result
    if failed:
        result |= {"error": (errors.strip() or out)[-3000:], "late": late}
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def lines_of(part: str, result: Result) -> list[str]:
    """The short version of a part: a line a figure, with its floor and its target."""
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
        f"MFU {r['mfu_of_989_tflops']:.1%}, {r['ratio_to_plain']:.2f} of the float twin's time (714k/s published)"
        for r in result.get("rows", [])
    ]


_SHOWN: dict[str, Callable[[Result], list[str]]] = {
    "tests": lambda result: result.get("text", "").strip().splitlines()[-1:],
    "machine": _machine_lines, "gemv": _gemv_lines, "gemm": _gemm_lines, "decode": _decode_lines,
    "train-74M": _train_lines, "train-350M": _train_lines,
}  # fmt: skip


def read_results(path: Path, on: str) -> Result:
    """What a call before this one has measured, on the same GPU with the same versions."""
    fresh: Result = {"benchmark": "gpu", "on": on, "floors": floors()}
    if not path.exists():
        return fresh
    found: Result = json.loads(path.read_text(encoding="utf-8"))
    if found.get("on") != on:
        print(f"{path}: figures of {found.get('on', 'an older form')}, not of {on}: everything is measured anew")
        return fresh
    return found


def run_all(out: Path, on: str, again: bool) -> int:
    """Every part that has no result yet, each printed as it ends. Returns 1 where one failed."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gpu.json"
    if again:
        path.unlink(missing_ok=True)
    results = read_results(path, on)
    wanted = [part for part in LIMITS if part not in results or "error" in results[part]]
    print(f"at most {sum(LIMITS[part] for part in wanted)} s for {', '.join(wanted) or 'nothing'}", flush=True)
    for part in LIMITS:
        if part not in wanted:
            print(f"{part}: skipped, {path} has it (--again measures it anew)", flush=True)
            continue
        results[part] = run_part(part)
        if part == "tests":
            (out / "gpu-tests.txt").write_text(results[part]["text"], encoding="utf-8")
        work = path.with_suffix(".tmp")
        work.write_text(json.dumps(results, indent=1), encoding="utf-8")
        work.replace(path)  # whole, also where the call is cut off here
        print("\n  ".join((f"{part}: {results[part]['seconds']} s", *lines_of(part, results[part]))), flush=True)
    return int(any("error" in results[part] for part in LIMITS))


def main() -> int:
    """Run one part or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=list(PARTS), help="this one alone, in this process")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    parser.add_argument("--again", action="store_true", help="measure anew what has a result")
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
        print(json.dumps(PARTS[options.part]()))
        return 0
    on = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}"
    return run_all(options.out, on, options.again)


if __name__ == "__main__":
    sys.exit(main())
