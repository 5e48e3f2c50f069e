"""What is inside a packed file: sizes, bits per weight, zeros per layer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet.files.packed import PackedModel, read_packed
from bitnet.kernels import packing
from bitnet.model import float16_bytes, in_features, kv_cache_bytes, linear_parameters, parameters


@dataclass(frozen=True)
class Projection:
    """One packed linear layer."""

    name: str
    shape: tuple[int, int]
    zeros: float  # share of codes that are 0
    scale: float


def projections(packed: PackedModel) -> list[Projection]:
    """All packed layers of a model, in order. Empty for a plain model."""
    rows = []
    for name, scale in packed.tensors.items():
        if not name.endswith(".weight_scale"):
            continue
        layer = name.removesuffix(".weight_scale")
        k = in_features(packed.config, layer)
        codes = packing.unpack(packed.tensors[f"{layer}.weight"], k)
        rows.append(Projection(layer, (codes.shape[0], k), float((codes == 0).float().mean()), float(scale)))
    return sorted(rows, key=lambda row: _order(row.name))


def inspect_packed(path: Path) -> dict[str, Any]:
    """Everything `bitnet inspect` reports of a packed file, as JSON values."""
    packed = read_packed(path)
    rows = projections(packed)
    weights = linear_parameters(packed.config)
    size = path.stat().st_size
    body = sum(t.numel() * t.element_size() for name, t in packed.tensors.items() if "_proj." in name)
    tables = sum(
        t.numel() * t.element_size() for name, t in packed.tensors.items() if "embed" in name or "head" in name
    )
    return {
        "file": str(path),
        "config": packed.config.to_dict(),
        "parameters": parameters(packed.config),
        "ternary_parameters": weights if rows else 0,
        "file_bytes": size,
        "projection_bytes": body,
        "table_bytes": tables,
        "float16_bytes": float16_bytes(packed.config),
        "ratio_to_float16": float16_bytes(packed.config) / size,
        "bits_per_weight": 8 * body / weights,
        "bits_per_parameter": 8 * size / parameters(packed.config),
        "zero_fraction": sum(r.zeros * r.shape[0] * r.shape[1] for r in rows) / weights if rows else None,
        "kv_cache_bytes": kv_cache_bytes(packed.config, packed.config.context),
        "tokenizer": packed.tokenizer.kind if packed.tokenizer else None,
        "training": packed.info,
        "layers": [{"name": r.name, "shape": list(r.shape), "zero_fraction": r.zeros, "scale": r.scale} for r in rows],
    }


_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _order(name: str) -> tuple[int, int]:
    """Layers in the order data flows through them; file order is alphabetical (layer 10 before layer 2)."""
    parts = name.split(".")
    return int(parts[2]), _KINDS.index(parts[-1])
