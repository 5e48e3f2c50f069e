"""What is inside a packed file: sizes, bits per weight, zeros per layer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet.files.packed import PackedModel, PackedSource, read_packed
from bitnet.files.tensors import (
    float16_bytes,
    is_embedding,
    is_projection,
    kv_cache_bytes,
    linear_parameters,
    parameters,
    projections,
)


@dataclass(frozen=True)
class ProjectionReport:
    """One packed projection."""

    name: str
    shape: tuple[int, int]
    zeros: float  # share of codes that are 0
    scale: float


def projection_reports(packed: PackedModel) -> list[ProjectionReport]:
    """A report of every packed projection, in the order data flows through them. Empty for a float model."""
    if packed.config.linear == "float":
        return []
    source, rows = PackedSource(packed), []
    for name in projections(packed.config):
        codes, scale = source.codes(name)
        n, k = codes.shape
        rows.append(ProjectionReport(name, (n, k), float((codes == 0).float().mean()), float(scale)))
    return rows


def inspect_packed(path: Path) -> dict[str, Any]:
    """Everything `bitnet inspect` reports of a packed file, as JSON values. Raises BitNetError as `read_packed`."""
    packed = read_packed(path)
    config, rows = packed.config, projection_reports(packed)
    weights, size = linear_parameters(config), path.stat().st_size
    # "q_proj.weight" and "q_proj.weight_scale", "embed_tokens.weight" and "embed_tokens.scale".
    modules = [(name.rpartition(".")[0], tensor.nbytes) for name, tensor in packed.tensors.items()]
    projection_bytes = sum(count for name, count in modules if is_projection(name))
    return {
        "file": str(path),
        "config": config.to_dict(),
        "parameters": parameters(config),
        "ternary_parameters": weights if rows else 0,
        "file_bytes": size,
        "projection_bytes": projection_bytes,
        "table_bytes": sum(count for name, count in modules if is_embedding(name)),
        "float16_bytes": float16_bytes(config),
        "ratio_to_float16": float16_bytes(config) / size,
        "bits_per_weight": 8 * projection_bytes / weights,
        "bits_per_parameter": 8 * size / parameters(config),
        "zero_fraction": sum(r.zeros * r.shape[0] * r.shape[1] for r in rows) / weights if rows else None,
        "kv_cache_bytes": kv_cache_bytes(config, config.context),
        "tokenizer": packed.tokenizer.kind if packed.tokenizer else None,
        "training": packed.info,
        "layers": [{"name": r.name, "shape": list(r.shape), "zero_fraction": r.zeros, "scale": r.scale} for r in rows],
    }
