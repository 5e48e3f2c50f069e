"""Writing a Hugging Face folder: masters to train on ("hf"), or packed codes to run ("hf-packed").

Models with sub-norms are packed in the convention of 2B4T, where the scale multiplies; llama-shaped ones in that of
Falcon-E, where it divides. Embeddings hold the bf16 values that training uses; norms and scales keep all of their bits.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.checkpoint import sync
from bitnet.files.hf.config import WeightForm, to_config
from bitnet.files.hf.tokenizer import token_ids, write_tokenizer
from bitnet.files.safetensors_file import Plan, TensorWriter
from bitnet.files.source import Source
from bitnet.files.tensors import dense_shapes, projection_shape, projections
from bitnet.files.ternary import pack_hf


def export_form(config: ModelConfig, packed: bool) -> WeightForm:
    """How a model's projections are written. Raises BitNetError for a float model that is to be packed."""
    if config.linear == "float":
        if packed:
            raise BitNetError(
                "export: got a model with float weights for hf-packed, expected ternary ones; use --to hf"
            )
        return WeightForm.FLOAT
    if not packed:
        return WeightForm.MASTER
    return WeightForm.MULTIPLY if config.sub_norms else WeightForm.DIVIDE


def export_hf(source: Source, folder: Path, *, packed: bool) -> Path:
    """Write a folder that transformers loads; it appears under its name once it is complete.

    Raises BitNetError, and writes nothing, for a model that the format cannot hold, for codes where masters are needed,
    and for a folder that is not empty.
    """
    config = source.config
    form = export_form(config, packed)
    values = to_config(config, form, token_ids(source.tokenizer))
    if form is WeightForm.MASTER:
        try:
            source.master(projections(config)[0])  # raises now where there are codes only
        except BitNetError as error:
            raise BitNetError(f"export: {error}; or export the codes: --to hf-packed") from error
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise BitNetError(f"export: '{folder}' exists and is not empty; remove it or choose another one (-o)")
    if not folder.parent.is_dir():
        raise BitNetError(f"export: got no folder '{folder.parent}', expected an existing one; create it first")
    work = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    work.mkdir()
    try:
        _write_weights(work / "model.safetensors", source, form)
        (work / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        ids = {key: values[key] for key in ("bos_token_id", "eos_token_id") if values[key] is not None}
        generation = {**ids, "do_sample": True, "max_length": config.context}
        (work / "generation_config.json").write_text(json.dumps(generation, indent=1), encoding="utf-8")
        if source.tokenizer is not None:
            write_tokenizer(work, source.tokenizer, config.context)
        for path in work.iterdir():
            sync(path)
        sync(work)
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _write_weights(path: Path, source: Source, form: WeightForm) -> None:
    config = source.config
    plan: Plan = {}
    for name, shape in dense_shapes(config).items():
        plan[name] = torch.float32, shape
    for name in projections(config):
        n, k = projection_shape(config, name)
        if form in (WeightForm.MASTER, WeightForm.FLOAT):
            plan[f"{name}.weight"] = torch.float32, (n, k)
        else:
            plan[f"{name}.weight"] = torch.uint8, (n // 4, k)
            plan[f"{name}.weight_scale"] = torch.float32, (1,)
    metadata = {"format": "pt"} | (
        {"weight_scale": str(form)} if form in (WeightForm.MULTIPLY, WeightForm.DIVIDE) else {}
    )
    with path.open("wb") as file:
        writer = TensorWriter(file, plan, metadata)
        for name, tensor in _converted_tensors(source, form):
            writer.write(name, tensor)
        writer.finish()


def move_from_edges(master: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Masters [N, K] whose codes do not depend on the last bit of mean |W|, which programs sum in different orders.

    Weights within 2^-18 of the edge between two codes (one in 100,000 or so) move to 2^-17 from it, on the same
    side: far more than the rounding of the sum, and negligible for training.
    """
    distance = master.abs() / scale  # in units of the scale; the edge is at 0.5
    near = (distance - 0.5).abs() < 2.0**-18
    moved = torch.where(codes == 0, 0.5 - 2.0**-17, 0.5 + 2.0**-17) * scale
    return torch.where(near, torch.copysign(moved, master), master)


def _converted_tensors(source: Source, form: WeightForm) -> Iterator[tuple[str, Tensor]]:
    config = source.config
    for name in dense_shapes(config):
        yield name, source.dense(name).float()
    for name in projections(config):
        if form is WeightForm.FLOAT:
            yield f"{name}.weight", source.master(name).float()
            continue
        codes, scale = source.codes(name)
        if form is WeightForm.MASTER:
            yield f"{name}.weight", move_from_edges(source.master(name).float(), codes, scale)
            continue
        yield f"{name}.weight", pack_hf(codes)
        stored = scale.reciprocal() if form is WeightForm.DIVIDE else scale
        yield f"{name}.weight_scale", stored.float().reshape(1)
