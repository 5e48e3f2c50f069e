"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) at four bits through Intel's Neural Compressor, which needs no GPU."""

import logging
from pathlib import Path

import torch

from bitnet.benchmarks.compare.artifact import GPTQ_BITS, GPTQ_GROUP, Artifact, write_model
from bitnet.benchmarks.compare.method import Method, Settings, needs, version
from bitnet.benchmarks.compare.pair import Pair

_INSTALL = "from a clone: pip install '.[compare-gptq]'"


def _make(pair: Pair, folder: Path, settings: Settings) -> Artifact:
    from neural_compressor.torch.quantization import GPTQConfig, convert, prepare

    logging.getLogger("neural_compressor").setLevel(logging.ERROR)
    model, tokenizer = pair.baseline_model(), pair.tokenizer()
    # model_path: the folder of a model on disk. The library needs one that exists, though it reads nothing there.
    config = GPTQConfig(
        dtype="int", bits=GPTQ_BITS, group_size=GPTQ_GROUP, use_sym=True, act_order=False, model_path=str(folder)
    )
    with torch.no_grad():
        prepared = prepare(model, config)
        for row in pair.training_windows(settings.calibration)[:, :-1]:
            prepared(row[None])
        quantised = convert(prepared)
    path = write_model(folder / "model.safetensors", quantised, tokenizer, builder="gptq")
    windows = f"{settings.calibration} windows of training text"
    note = f"weights int4, a scale per {GPTQ_GROUP}; {windows}; unpacked to fp32 when used"
    return Artifact(str(path), "torch", version("neural-compressor"), note)


METHODS = [Method("gptq-int4", "gptq", "GPTQ int4", needs("neural_compressor", _INSTALL), _make)]
