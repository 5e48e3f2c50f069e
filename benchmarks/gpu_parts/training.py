"""Training steps in bf16, of ternary models and of the float baseline."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from bitnet.benchmarks.gpu_parts.timing import Result, median_times
from bitnet.config import ModelConfig
from bitnet.files.tensors import flops_per_token, parameters
from bitnet.model import Transformer
from bitnet.quant import training_precision
from bitnet.train.config import TrainConfig
from bitnet.train.objective import Objective

TRAINED: dict[str, tuple[dict[str, Any], int]] = {
    # 75.5M parameters, 69.2M of them ternary, vocabulary of parameter-golf's record; 65,536 tokens a step
    "74M": ({"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 11,
             "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 1024}, 64),
    "350M": ({"vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 28,
              "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048}, 8),
}  # fmt: skip
# Half-way through the quantisation warm-up; gradients of the input (dx) and of the weights (dw) in int8.
KINDS = ("float", "ternary", "ternary-warmup", "ternary-int8-dx", "ternary-int8-dx-dw")
_COMPILING = 0.6  # of a part's limit: kinds that are not compiled by then are left out


def training_step(config: ModelConfig, kind: str, batch: int) -> Callable[[], Any]:
    """One step of a model of a kind on random ids [batch, T + 1]: forward, backward, update."""
    model = Transformer(config)
    model.init_weights(0)
    model.cuda()
    int8 = {"ternary-int8-dx": "dx", "ternary-int8-dx-dw": "all"}.get(kind, "none")
    precision = training_precision(0.5 if kind == "ternary-warmup" else 1.0, int8, torch.device("cuda"))
    for block in model.blocks():
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    network = Objective(model, TrainConfig())
    tokens = torch.randint(0, config.vocab_size, (batch, config.context + 1), device="cuda")

    def step() -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = network(tokens[:, :-1], tokens[:, 1:], precision)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def train(name: str, started: float, limit: float) -> Result:
    """A training step in bf16 of every kind, compiled block by block: it takes a third of the time of one large graph.

    started, limit: when the part began (`time.perf_counter`) and its seconds; later kinds are left out when time is
    short.
    """
    changes, batch = TRAINED[name]
    steps: dict[str, Callable[[], Any]] = {}
    rows: list[Result] = []
    for kind in KINDS:
        if len(steps) > 1 and time.perf_counter() - started > _COMPILING * limit:
            rows.append({"model": name, "kind": kind, "left_out": "no time to compile it"})
            continue
        config = ModelConfig(**changes).replace(linear="float" if kind == "float" else "ternary")
        step = training_step(config, kind, batch)
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        print(f"{name} {kind}: first step {time.perf_counter() - began:.0f} s", file=sys.stderr)
        steps[kind] = step
    times = median_times(steps, 9)
    count = batch * config.context
    for kind, seconds in times.items():
        flops = flops_per_token(config, config.context, training=True)
        rows.append({
            "model": name, "parameters": parameters(config), "kind": kind, "ms": seconds * 1e3,
            "tokens_per_second": count / seconds, "mfu_of_989_tflops": flops * count / seconds / 989e12,
            "ratio_to_float": seconds / times["float"],
        })  # fmt: skip
    return {"rows": rows, "published": {"tokens_per_second": 714_000, "what": "73.7M ternary, one H100 of eight"}}
