"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) at four bits through Intel's Neural Compressor, which needs no GPU."""

import logging
from pathlib import Path

import torch
from torch import nn

from bitnet.train.compare.artifact import Artifact, is_linear, write_model
from bitnet.train.compare.methods import Method, Settings, needs, version
from bitnet.train.compare.pair import Pair

BITS, GROUP = 4, 64  # weights that share a scale
_INSTALL = "pip install 'bitnet-ternary[compare-gptq]'"


def _make(pair: Pair, folder: Path, settings: Settings) -> Artifact:
    from neural_compressor.torch.quantization import GPTQConfig, convert, prepare

    logging.getLogger("neural_compressor").setLevel(logging.ERROR)
    model, tokenizer = pair.twin_model(), pair.tokenizer()
    # model_path: where a model kept on disk would lie; it asks for a folder that exists even if it reads nothing there.
    config = GPTQConfig(dtype="int", bits=BITS, group_size=GROUP, use_sym=True, act_order=False, model_path=str(folder))
    with torch.no_grad():
        prepared = prepare(model, config)
        for row in pair.training_windows(settings.calibration)[:, :-1]:
            prepared(row[None])
        quantised = convert(prepared)
    path = write_model(folder / "model.safetensors", quantised, tokenizer, builder="gptq")
    note = f"weights int4, a scale for {GROUP}; {settings.calibration} windows of training text; fp32 once used"
    return Artifact(str(path), "torch", version("neural-compressor"), note)


def skeleton(model: nn.Module) -> None:
    """Put the library's packed linears in the place of a model's, for weights to be loaded into."""
    from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear

    for name, module in list(model.named_modules()):
        if is_linear(module, name):
            assert isinstance(module, nn.Linear)
            parent, _, child = name.rpartition(".")
            packed = INCWeightOnlyLinear(
                module.in_features,
                module.out_features,
                dtype="int",
                bits=BITS,
                group_size=GROUP,
                zp=False,
                bias=True,  # the library puts zeros there
                device="cpu",
            )
            setattr(model.get_submodule(parent), child, packed)


METHODS = [Method("gptq-int4", "gptq", "GPTQ int4", needs("neural_compressor", _INSTALL), _make)]
