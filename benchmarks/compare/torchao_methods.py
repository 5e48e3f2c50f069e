"""Post-training quantisation and quantisation-aware training of the float baseline through torchao.

Everything runs eagerly on torchao's modules, as it does for a user who calls `quantize_`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet.benchmarks.compare.artifact import Artifact, is_linear, write_model
from bitnet.benchmarks.compare.method import Method, Settings, needs, version
from bitnet.benchmarks.compare.pair import Pair
from bitnet.model import Transformer

_INSTALL = "from a clone: pip install '.[compare]'"
_GROUP = 32  # weights that share a scale at four bits, as in GGUF's Q4_0
_QAT_LR = 1e-4  # of AdamW, falling to 0: the baseline is trained already and only adapts to the rounding
_QAT_BATCH = 8  # windows per step


def _int8_absmax(model: Transformer, pair: Pair, settings: Settings) -> str:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_linear)
    return "weights int8, a scale per row"


def _int8_zero_point(model: Transformer, pair: Pair, settings: Settings) -> str:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, quantize_

    config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0), mapping_type=MappingType.ASYMMETRIC)
    quantize_(model, config, filter_fn=is_linear)
    return "weights int8, a scale and a zero point per row"


def _dynamic(model: Transformer, pair: Pair, settings: Settings) -> str:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=is_linear)
    return "weights and activations int8, a scale per row and per token"


def _static(model: Transformer, pair: Pair, settings: Settings) -> str:
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor, quantize_

    largest = activation_ranges(model, pair.training_windows(settings.calibration)[:, :-1])
    for name, value in largest.items():
        config = Int8StaticActivationInt8WeightConfig(
            # As many dimensions as the activations [B, T, K] have.
            act_quant_scale=(value.clamp(min=1e-12) / 127).view(1, 1, 1),
            granularity=[PerTensor(), PerRow()],
        )
        quantize_(model, config, filter_fn=lambda module, path, name=name: path == name)
    return f"weights and activations int8, one scale per layer from {settings.calibration} windows of training text"


@torch.no_grad()
def activation_ranges(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The largest absolute input [] of every nn.Linear by name, over ids [B, T]."""
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            here = args[0].abs().max().float()
            largest[name] = torch.maximum(largest.get(name, here), here)

        return hook

    linears = [(name, module) for name, module in model.named_modules() if is_linear(module, name)]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears]
    for rows in ids.split(_QAT_BATCH):
        model(rows)
    for handle in handles:
        handle.remove()
    return largest


def _int4_base() -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        weight_granularity=PerGroup(_GROUP),
    )


_INT4 = f"weights int4, a scale per {_GROUP}; activations int8; two to a byte in the file, a byte each in memory"


def _int4(model: Transformer, pair: Pair, settings: Settings) -> str:
    from torchao.quantization import quantize_

    quantize_(model, _int4_base(), filter_fn=is_linear)
    return f"{_INT4}; not trained"


def _qat(model: Transformer, pair: Pair, settings: Settings) -> str:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(model, QATConfig(_int4_base(), step="prepare"), filter_fn=is_linear)
    train_on(model, pair.training_windows(_QAT_BATCH * settings.qat_steps))
    quantize_(model, QATConfig(_int4_base(), step="convert"), filter_fn=is_linear)
    return f"{_INT4}; steps: {settings.qat_steps}, each of {_QAT_BATCH} windows of training text"


def train_on(model: nn.Module, windows: Tensor) -> list[float]:
    """Train on windows [steps * 8, T + 1], each once; the learning rate falls to 0. Returns the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_QAT_LR, betas=(0.9, 0.95), weight_decay=0.0)
    batches = windows.split(_QAT_BATCH)
    losses = []
    model.train()
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = _QAT_LR * (1 - step / len(batches))
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
    model.eval()
    return losses


def _method(name: str, family: str, title: str, quantise: Callable[[Transformer, Pair, Settings], str]) -> Method:
    def make(pair: Pair, folder: Path, settings: Settings) -> Artifact:
        model = pair.baseline_model()
        note = quantise(model, pair, settings)
        path = write_model(folder / "model.safetensors", model, pair.tokenizer(), builder="torchao")
        return Artifact(str(path), "torch", version("torchao"), note)

    return Method(name, family, title, needs("torchao", _INSTALL), make)


METHODS = [
    _method("int8-absmax", "int8", "INT8 symmetric (absmax)", _int8_absmax),
    _method("int8-zeropoint", "int8", "INT8 asymmetric (zero point)", _int8_zero_point),
    _method("ptq-dynamic", "ptq", "PTQ int8, dynamic", _dynamic),
    _method("ptq-static", "ptq", "PTQ int8, static", _static),
    _method("ptq-int4", "ptq", "PTQ int4, rounded to nearest", _int4),
    _method("qat-int4", "qat", "QAT int4", _qat),
]
