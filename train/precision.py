"""The dtype of the matrix products in training."""

from typing import Any

import torch


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """Resolve "auto" to "bf16" where the hardware multiplies bf16 natively, and to "fp32" elsewhere."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _has_bf16_cpu() else "fp32"


def _has_bf16_cpu() -> bool:
    """Whether this CPU has bf16 dot products (AVX-512 BF16, AMX)."""
    # torch before 2.12 has no get_capabilities: assume fp32, which is always right.
    read = getattr(torch.cpu, "get_capabilities", dict)
    capabilities: dict[str, Any] = read()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
