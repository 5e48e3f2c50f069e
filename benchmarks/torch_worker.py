"""Dense torch as a contender: the ternary linears of a shape alone, in one dtype, through oneDNN.

    python torch_worker.py '{"hidden_size": 2560, ...}' THREADS DTYPE

DTYPE is fp32 or bf16. Attention, norms and head are left out, in torch's favour. Every layer has its own weights: a
decoded token reads all of them from memory.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F
from worker import serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Allocate the weights and serve."""
    config, threads, dtype = json.loads(sys.argv[1]), int(sys.argv[2]), DTYPES[sys.argv[3]]
    torch.set_num_threads(threads)
    d, f = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * (d // config["num_attention_heads"])
    shapes = [(d + 2 * kv, d), (d, d), (2 * f, d), (d, f)]
    first = [(torch.rand(n, k) * 2 - 1).to(dtype) for n, k in shapes]
    layers = [[weight.clone() for weight in first] for _ in range(config["num_hidden_layers"])]

    @torch.inference_mode()
    def answer(command: dict) -> dict:
        result = {}
        for name, tokens, times in (("prefill", command["prefill"], 1), ("decode", 1, command["decode"])):
            inputs = {k: torch.rand(tokens, k).to(dtype) for k in (d, f)}
            started = time.perf_counter()
            for _ in range(times):
                for layer in layers:
                    for weight in layer:
                        F.linear(inputs[weight.shape[1]], weight)
            result[name] = time.perf_counter() - started
        return result

    serve(answer)


if __name__ == "__main__":
    main()
