"""What a large run costs on paper: time, money, memory and bytes between GPUs, from rates and stated assumptions.

    python benchmarks/scale_estimate.py                  # xl (1.15G parameters), 100G tokens, 8 and 64 GPUs
    python benchmarks/scale_estimate.py --rate 50000     # with tokens/s measured on one such GPU

Per step and GPU, with P parameters (M of them in matrices of blocks), n GPUs, k micro-batches, all in fp32:

    DDP    one ring all-reduce of gradients             2 (n-1)/n * 4 P        Patarasuk and Yuan 2009
    FSDP   two all-gathers of masters and one           3 (n-1)/n * 4 P * k    Zhao et al. 2023, arXiv 2304.11277;
           reduce-scatter of gradients a micro-batch                           train/sharding.py says why fp32
    Muon   of spread matrices: two all-to-alls in bf16  2 (n-1)/n * 2 M / n    train/muon.py

Arithmetic: 6 operations a parameter and token, and attention (Kaplan et al. 2020; bitnet.model.flops_per_token); with
recomputed blocks a third more. And a step: Muon's five iterations of Newton and Schulz, 4 n^2 m + 2 n^3 for a matrix
of n rows and m >= n columns each, which with DDP every GPU repeats and with FSDP they share. The last line is
one JSON document.
"""

import argparse
import json
from typing import Any

from bitnet.config import PRESETS, ModelConfig
from bitnet.model import flops_per_token, linear_parameters, parameters

GPU = "H100 SXM"
PEAK = 989e12  # operations a second, bf16 dense: NVIDIA's data sheet
NVLINK, NETWORK = 450e9, 50e9  # bytes a second and direction: NVLink 4 in a node of 8; 400 Gb/s a GPU between nodes
REACHED = 0.8  # share of that which collectives reach: an assumption; measure with nccl-tests
UTILISATION = (0.33, 0.50)  # of the peak: parameter-golf's ternary record, nanochat d24 (both 8 x H100, published)
NODE = 8


def token_operations(config: ModelConfig, recompute: bool) -> float:
    """Forward and backward pass, a token."""
    return flops_per_token(config, config.context, training=True) * (4 / 3 if recompute else 1)


def muon_operations(config: ModelConfig) -> float:
    """Newton and Schulz's iterations over all matrices of the blocks, a step."""
    d, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    shapes = 2 * [(d, d)] + 2 * [(kv, d)] + 3 * [(min(d, f), max(d, f))]
    return 5 * config.num_hidden_layers * sum(4 * n**2 * m + 2 * n**3 for n, m in shapes)


def estimate(config: ModelConfig, options: argparse.Namespace, gpus: int, parallel: str, used: float) -> dict[str, Any]:
    """One column: a model on so many GPUs at a share `used` of their peak."""
    P, M = parameters(config), linear_parameters(config)
    step_tokens = options.batch_tokens
    micro = max(1, round(step_tokens / gpus / options.micro_tokens))
    orthogonal = muon_operations(config) / (1 if parallel == "ddp" else gpus)
    compute = (step_tokens / gpus * token_operations(config, options.recompute) + orthogonal) / (PEAK * used)
    ring = (gpus - 1) / gpus
    if parallel == "ddp":
        sent = {"gradients": 2 * ring * 4 * P}
        state = 4 * P + 4 * P + 4 * M + 8 * (P - M) + M  # masters, gradients, Muon, AdamW, codes of this step
    else:
        sent = {"masters": 2 * ring * 4 * P * micro, "gradients": ring * 4 * P * micro, "muon": 2 * ring * 2 * M / gpus}
        block = M / config.num_hidden_layers
        state = (4 * P + 4 * P + 4 * M + 8 * (P - M)) / gpus + 4 * (P - M) + 2 * (4 + 4 + 1) * block
    line = (NVLINK if gpus <= NODE else NETWORK) * REACHED
    communication = sum(sent.values()) / line
    steps = options.tokens / step_tokens
    hours = [steps * seconds / 3600 for seconds in (max(compute, communication), compute + communication)]
    return {
        "gpus": gpus,
        "parallel": parallel,
        "utilisation": round(used, 3),
        "micro_batches": micro,
        "compute_seconds_a_step": compute,
        "of_it_muon_seconds": orthogonal / (PEAK * used),
        "sent_gigabytes_a_step": {name: count / 1e9 for name, count in sent.items()},
        "communication_seconds_a_step": communication,
        "state_gigabytes_a_gpu": state / 1e9,
        "hours_overlapped": hours[0],
        "hours_one_after_the_other": hours[1],
        "gpu_hours": [gpus * value for value in hours],
        "dollars": [gpus * value * options.price for value in hours],
        # What masters would take as int8 codes and as two bits, were weights quantised where they lie.
        "masters_gigabytes_as_codes": [sent.get("masters", 0.0) / 4 / 1e9, sent.get("masters", 0.0) / 16 / 1e9],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="xl", choices=PRESETS)
    parser.add_argument("--tokens", type=float, default=100e9)
    parser.add_argument("--batch-tokens", type=float, default=1e6, help="a step, over all GPUs")
    parser.add_argument("--micro-tokens", type=float, default=16384, help="a micro-batch of one GPU")
    parser.add_argument(
        "--rate", type=float, help="tokens/s of one GPU in both passes, measured; replaces the published utilisations"
    )
    parser.add_argument("--recompute", action="store_true", help="blocks are computed again in the backward pass")
    parser.add_argument("--price", type=float, default=2.5, help="dollars a GPU and hour: an assumption")
    options = parser.parse_args()
    config = PRESETS[options.preset]
    used = UTILISATION
    if options.rate:
        used = (options.rate * token_operations(config, options.recompute) / PEAK,)
    print(f"{options.preset}: {parameters(config) / 1e9:.2f}G parameters, {options.tokens / 1e9:.0f}G tokens, "
          f"{options.batch_tokens / 1e6:.2f}M a step, {options.tokens / options.batch_tokens:,.0f} steps")  # fmt: skip
    print(f"assumed: {GPU}, {PEAK / 1e12:.0f} TFLOP/s bf16; {NVLINK / 1e9:.0f} GB/s in a node of {NODE}, "
          f"{NETWORK / 1e9:.0f} between nodes, {REACHED:.0%} of it reached; ${options.price} a GPU-hour; "
          + ("utilisation from the measured rate" if options.rate else "utilisations published for other loops")
          + "; hours from all communication hidden to none of it")  # fmt: skip
    rows = [
        estimate(config, options, gpus, parallel, share)
        for gpus in (8, 64)
        for parallel in ("ddp", "fsdp")
        for share in used
    ]
    print("gpus  parallel  used  compute s  sent GB  comm s  state GB       hours         GPU-hours         dollars")
    for row in rows:
        low, high = row["hours_overlapped"], row["hours_one_after_the_other"]
        print(
            f"{row['gpus']:4}  {row['parallel']:8}  {row['utilisation']:4.2f}  {row['compute_seconds_a_step']:9.3f}  "
            f"{sum(row['sent_gigabytes_a_step'].values()):7.2f}  {row['communication_seconds_a_step']:6.3f}  "
            f"{row['state_gigabytes_a_gpu']:8.1f}  {low:5.0f} to {high:5.0f}  "
            f"{row['gpu_hours'][0]:6.0f} to {row['gpu_hours'][1]:6.0f}  "
            f"{row['dollars'][0]:7,.0f} to {row['dollars'][1]:7,.0f}"
        )
    print(json.dumps({"preset": options.preset, "tokens": options.tokens, "rows": rows}))


if __name__ == "__main__":
    main()
