"""What a comparison holds: this process, and beside it one worker at a time that makes or measures one model.

A worker that makes a model loads the float baseline as fp32 masters from a mapped save and adds what its method needs;
one that measures holds the model in the form it runs in, logits of a batch of windows with their logarithms, and for
the divergence from the baseline one window in fp64 (benchmarks/compare/measure.py).

Dimensions: M tokens of a batch, D model, F ffn, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch

from bitnet.benchmarks.compare.method import Method
from bitnet.config import ModelConfig
from bitnet.files.tensors import embedding_parameters, linear_parameters, parameters
from bitnet.memory import INTERPRETER, Need, budget, check
from bitnet.train.config import RunConfig, TrainConfig
from bitnet.train.data.windows import batch_for
from bitnet.train.memory import Setting, training_need

_LIBRARY = 0.05e9  # of torchao and what it imports, measured
_QAT_WINDOWS = 8  # of a step, and of a pass that watches activations (torchao_methods.py)
# Fake-quantised operands keep their input, what they were divided by and which values were clipped, of every linear:
# with them a step of `mini` keeps 1.6 times what the float model does.
_QAT_ACTIVATIONS = 1.75


def method_needs(methods: Sequence[Method], config: ModelConfig) -> dict[str, Need]:
    """What each method's worker holds at most. config: of the run, its context that of training."""
    return {one.name: Need({"make": _making(one, config), "measure": _measuring(one, config)}) for one in methods}


def _making(method: Method, config: ModelConfig) -> Mapping[str, float]:
    count, linear = parameters(config), linear_parameters(config)
    held = {"libraries": INTERPRETER, "baseline": 8.0 * count}
    if method.name == "qat-int4":
        train = TrainConfig(optimizer="adamw", batch_size=_QAT_WINDOWS, dtype="fp32", quant_warmup=0.0)
        plain = config.replace(linear="float")
        need = training_need(Setting.of(RunConfig(model=plain, train=train), torch.device("cpu")))
        more = (_QAT_ACTIVATIONS - 1) * need.phases["passes"]["activations"]
        return {
            **need.phases["passes"],
            "mapped save": 4.0 * count,
            "optimiser": 8.0 * count,
            "fake quantisation": more,
        }
    if method.family in ("int8", "ptq"):
        held |= {"libraries": INTERPRETER + _LIBRARY, "quantised": linear + 2.0 * embedding_parameters(config)}
    if method.name == "ptq-static":  # watches activations of several windows: logits, those before them, and a block
        rows = _QAT_WINDOWS * config.context
        held["logits"] = 3 * 4.0 * rows * config.vocab_size
        held["activations"] = 4.0 * rows * (6 * config.hidden_size + 5 * config.intermediate_size)
    if method.family == "gptq":  # Hessians of the widest input, and what 64 windows of calibration are at one block
        held |= {"quantised": linear / 2 + 2.0 * embedding_parameters(config)}
        held["calibration"] = 4 * 4.0 * config.intermediate_size**2 + 2 * 64 * 4.0 * config.context * config.hidden_size
    if method.family == "gguf":  # written in fp32, then read whole by llama.cpp in a process of its own
        held["written file"] = 4.0 * count
    if method.name in ("fp16", "bf16"):
        held["rounded"] = 2.0 * count
    return held


def _measuring(method: Method, config: ModelConfig) -> Mapping[str, float]:
    count, linear, tables = parameters(config), linear_parameters(config), embedding_parameters(config)
    windows = batch_for(config.context, config.vocab_size)
    logits = 4.0 * windows * config.context * config.vocab_size
    # Mapped file, and fp32 tables and two-bit projections; for a float model, casts of a layer are small beside it.
    model = {"float": 4.0 * count, "bitnet": linear / 2 + 6.0 * tables}.get(method.family, 2.0 * linear + 6.0 * tables)
    return {
        "libraries": INTERPRETER + _LIBRARY,
        "model": model,
        "logits": 3 * logits,
        "divergence": (4 * 8 + 4.0) * config.context * config.vocab_size,
        "activations": 4.0 * windows * config.context * (6 * config.hidden_size + 5 * config.intermediate_size),
    }


def check_comparison(methods: Sequence[Method], config: ModelConfig, *, force: bool) -> None:
    """Refuse a comparison of which one method does not fit; the others are named."""
    device = torch.device("cpu")
    needs, have = method_needs(methods, config), budget(device)
    largest = max(needs, key=lambda name: needs[name].total)
    fits = [name for name, need in needs.items() if have is not None and need.total + INTERPRETER <= have]
    instead = f"--methods {','.join(fits)}" if fits else "compare smaller runs"
    need = Need({"": {**needs[largest].terms, "this process": INTERPRETER}})
    check(f"compare: {largest}", need, device, instead=instead, force=force)
