"""Estimate a large run: time, money, memory and bytes between GPUs, from rates and stated assumptions.

    python benchmarks/scale_estimate.py                  # xl (1.15G parameters), 100G tokens, 8 and 64 GPUs
    python benchmarks/scale_estimate.py --rate 50000     # with tokens/s measured on one such GPU

Bytes that each GPU sends in a step, with M weights in matrices of blocks, T in embeddings and norm gains, P = M + T, n
GPUs, k micro-batches and r = (n-1)/n (rings: Patarasuk and Yuan 2009; FSDP: Zhao et al. 2023, arXiv 2304.11277):

    ddp          gradients, once a step               2 r 4 P
    fsdp         masters for the forward pass         r 4 M k      train/parallel/sharding.py explains why in fp32
                 embeddings and gains                 r 4 T k      they stay for the backward pass
                 gradients                            r 4 P k      after every micro-batch: train/parallel/sharding.py
                 Muon's rows, there and back in bf16  2 r 2 M / n  train/muon.py
    fsdp-twice   fsdp, and masters for the backward   r 4 M k      float, recomputed or compiled blocks; until
                 pass as well                                      2026-11-26 all of them
    fsdp-int8    fsdp with codes instead of masters   r M k        not built; embeddings and gains stay in fp32
    fsdp-2bit    the same, packed                     r M k / 4    not built

Bytes that each GPU holds, without activations and logits:

    ddp          masters and gradients 4 + 4 per parameter, Muon 4 per weight, AdamW 8 for the rest, and what the
                 backward pass reads: bf16 mixtures of weights, 2, during the quantisation warm-up (codes, 1, after it)
    fsdp         an n-th of that, but the mixtures of all blocks (of one, if recomputed); all embeddings and gains,
                 their gradients, and a second copy of these while they are sent; two blocks in flight, each gathered
                 and copied out, or a gradient and its part that is sent (both at once if gathered twice)

Arithmetic: 6 operations per parameter and token, and attention (Kaplan et al. 2020; bitnet.model.flops_per_token); a
third more with recomputed blocks. In each step also Muon's five Newton-Schulz iterations, 4 n^2 m + 2 n^3 each for a
matrix of n rows and m >= n columns; with DDP every GPU repeats them, with FSDP the GPUs share them.

Hours range from all communication overlapped with arithmetic to none of it. The last line of stdout is one JSON
document.
"""

import argparse
import json
import shlex
import sys
from datetime import date
from typing import Any

from bitnet.config import PRESETS, ModelConfig
from bitnet.files.tensors import flops_per_token, linear_parameters, parameters

GPU = "H100 SXM"
PEAK = 989e12  # operations per second, bf16 dense: NVIDIA's data sheet
NVLINK, NETWORK = 450e9, 50e9  # bytes per second and direction: NVLink 4 in a node of 8; 400 Gb/s per GPU between
REACHED = 0.8  # share of that which collectives reach: an assumption; measure with nccl-tests
UTILISATION = (0.33, 0.50)  # of the peak: parameter-golf's ternary record, nanochat d24 (both 8 x H100, published)
NODE = 8

# Bytes a weight that are gathered for the forward and for the backward pass; train/parallel/sharding.py does the first.
GATHERS = {"fsdp": (4.0, 0.0), "fsdp-twice": (4.0, 4.0), "fsdp-int8": (1.0, 0.0), "fsdp-2bit": (0.25, 0.0)}
DECISION = (
    "Decision: gathering codes instead of masters is not built. It pays where gathers are not overlapped, which a run "
    "on several nodes has to show; gradients, 4 bytes per parameter, are sent in any case. A code also needs its "
    "matrix's scale before it is sent, a mean of |w| over all processes: unless that sum is exact, its last bit, and "
    "codes at a rounding boundary, differ from those of the packed file. int8 would come first: it saves nearly as "
    "much as two bits and needs no packing."
)


def token_operations(config: ModelConfig, recompute: bool) -> float:
    """Operations of the forward and the backward pass per token."""
    return flops_per_token(config, config.context, training=True) * (4 / 3 if recompute else 1)


def muon_operations(config: ModelConfig) -> float:
    """Operations of the Newton-Schulz iterations over all matrices of the blocks, per step."""
    d, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    shapes = 2 * [(d, d)] + 2 * [(kv, d)] + 3 * [(min(d, f), max(d, f))]
    return 5 * config.num_hidden_layers * sum(4 * n**2 * m + 2 * n**3 for n, m in shapes)


def bytes_sent(config: ModelConfig, gpus: int, way: str, micro: int, recompute: bool) -> dict[str, float]:
    """Bytes sent by one GPU in a step of `micro` micro-batches, by purpose. way: "ddp" or one of GATHERS."""
    P, M = parameters(config), linear_parameters(config)
    ring = (gpus - 1) / gpus
    if way == "ddp":
        return {"gradients": 2 * ring * 4 * P}
    forward, backward = GATHERS[way]
    backward = forward if recompute else backward
    return {
        "matrices_forward": ring * forward * M * micro,
        "matrices_backward": ring * backward * M * micro,
        "tables_and_gains": ring * 4 * (P - M) * micro,
        "gradients": ring * 4 * P * micro,
        "muon": 2 * ring * 2 * M / gpus,
    }


def bytes_held(config: ModelConfig, gpus: int, way: str, recompute: bool) -> float:
    """Bytes held by one GPU, without activations and logits."""
    P, M = parameters(config), linear_parameters(config)
    T, block = P - M, M / config.num_hidden_layers
    state = 4 * P + 4 * P + 4 * M + 8 * T
    if way == "ddp":
        return state + 2 * M
    mixtures = 2 * (block if recompute else M)
    gathers_twice = way == "fsdp-twice" or recompute
    in_flight = 2 * (4 + 4) * block * (2 if gathers_twice else 1)
    return state / gpus + mixtures + 3 * 4 * T + in_flight


def estimate(config: ModelConfig, options: argparse.Namespace, gpus: int, way: str, used: float) -> dict[str, Any]:
    """One row: a model on so many GPUs that reach a share `used` of their peak."""
    step_tokens = options.batch_tokens
    micro = max(1, round(step_tokens / gpus / options.micro_tokens))
    orthogonal = muon_operations(config) / (1 if way == "ddp" else gpus)
    compute = (step_tokens / gpus * token_operations(config, options.recompute) + orthogonal) / (PEAK * used)
    sent = bytes_sent(config, gpus, way, micro, options.recompute)
    communication = sum(sent.values()) / ((NVLINK if gpus <= NODE else NETWORK) * REACHED)
    steps = options.tokens / step_tokens
    hours = [steps * seconds / 3600 for seconds in (max(compute, communication), compute + communication)]
    return {
        "gpus": gpus,
        "way": way,
        "utilisation": round(used, 3),
        "micro_batches": micro,
        "compute_seconds_a_step": compute,
        "of_it_muon_seconds": orthogonal / (PEAK * used),
        "sent_gigabytes_a_step": {name: count / 1e9 for name, count in sent.items()},
        "communication_seconds_a_step": communication,
        "state_gigabytes_a_gpu": bytes_held(config, gpus, way, options.recompute) / 1e9,
        "hours": hours,
        "gpu_hours": [gpus * value for value in hours],
        "dollars": [gpus * value * options.price for value in hours],
    }


def answers(rows: list[dict[str, Any]]) -> list[str]:
    """Whether gathering codes would pay, and what a second gather costs: each way against the present one."""
    lines = []
    for gpus in sorted({row["gpus"] for row in rows}):
        now, *others = ([row for row in rows if (row["gpus"], row["way"]) == (gpus, way)] for way in GATHERS)
        covers = [row["communication_seconds_a_step"] / row["compute_seconds_a_step"] for row in now]
        lines.append(f"{gpus} GPUs, fsdp: sending takes {_spread(covers, '.0%')} of the time of the arithmetic")
        for other in others:
            hidden, bare = (
                [b["hours"][i] / a["hours"][i] - 1 for a, b in zip(now, other, strict=True)] for i in (0, 1)
            )
            lines.append(
                f"{gpus} GPUs, {other[0]['way']} instead: GPU-hours {_spread(hidden, '+.1%')} where all "
                f"communication is overlapped, {_spread(bare, '+.1%')} where none is"
            )
    return [*lines, DECISION]


def _spread(values: list[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def assumptions(options: argparse.Namespace) -> dict[str, Any]:
    """All assumptions of the estimate."""
    published = "assumed: published for other training loops (parameter-golf's ternary record, nanochat d24; 8 x H100)"
    return {
        "gpu": GPU,
        "peak_operations_a_second": PEAK,
        "bytes_a_second_in_a_node": NVLINK,
        "bytes_a_second_between_nodes": NETWORK,
        "gpus_a_node": NODE,
        "share_that_collectives_reach": REACHED,
        "utilisation": f"measured: {options.rate} tokens/s of one GPU" if options.rate else published,
        "dollars_a_gpu_hour": options.price,
        "tokens_a_step": options.batch_tokens,
        "tokens_a_micro_batch": options.micro_tokens,
        "recompute": options.recompute,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="xl", choices=PRESETS)
    parser.add_argument("--tokens", type=float, default=100e9)
    parser.add_argument("--batch-tokens", type=float, default=1e6, help="per step, over all GPUs")
    parser.add_argument("--micro-tokens", type=float, default=16384, help="per micro-batch of one GPU")
    parser.add_argument(
        "--rate", type=float, help="tokens/s of one GPU in both passes, measured; replaces the published utilisations"
    )
    parser.add_argument("--recompute", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--price", type=float, default=2.5, help="dollars per GPU and hour: an assumption")
    return parser.parse_args()


def main() -> None:
    options = parse()
    config = PRESETS[options.preset]
    assumed = assumptions(options)
    used = UTILISATION
    if options.rate:
        used = (options.rate * token_operations(config, options.recompute) / PEAK,)
    print(f"{options.preset}: {parameters(config) / 1e9:.2f}G parameters, {options.tokens / 1e9:.0f}G tokens, "
          f"{options.batch_tokens / 1e6:.2f}M a step, {options.tokens / options.batch_tokens:,.0f} steps")  # fmt: skip
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in assumed.items()}
    print("estimated from:", "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items()))
    rows = [
        estimate(config, options, gpus, way, share) for gpus in (8, 64) for way in ("ddp", *GATHERS) for share in used
    ]
    print("gpus  way         used  compute s  sent GB  comm s  state GB       hours         GPU-hours         dollars")
    for row in rows:
        (low, high), (least, most), (cheap, dear) = row["hours"], row["gpu_hours"], row["dollars"]
        print(
            f"{row['gpus']:4}  {row['way']:10}  {row['utilisation']:4.2f}  {row['compute_seconds_a_step']:9.3f}  "
            f"{sum(row['sent_gigabytes_a_step'].values()):7.2f}  {row['communication_seconds_a_step']:6.3f}  "
            f"{row['state_gigabytes_a_gpu']:8.1f}  {low:5.0f} to {high:5.0f}  {least:6.0f} to {most:6.0f}  "
            f"{cheap:7,.0f} to {dear:7,.0f}"
        )
    lines = answers(rows)
    print(*lines, sep="\n")
    command = shlex.join(["python", "benchmarks/scale_estimate.py", *sys.argv[1:]])
    head = {"date": date.today().isoformat(), "command": command, "preset": options.preset, "tokens": options.tokens}
    print(json.dumps({**head, "measured": False, "assumptions": assumed, "rows": rows, "answers": lines}))


if __name__ == "__main__":
    main()
