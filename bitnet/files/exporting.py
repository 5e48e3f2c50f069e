"""`bitnet export`: one door to the writers, and a report of what was written."""

from pathlib import Path
from typing import Any

from bitnet.errors import BitNetError
from bitnet.files.gguf.export import export_gguf
from bitnet.files.gguf.read import architecture
from bitnet.files.hf.export import export_hf, export_kind
from bitnet.files.opening import readers
from bitnet.files.source import Source

TARGETS = ("hf", "hf-packed", "gguf")


def export_model(source: Source, output: Path, target: str, kind: str | None = None) -> dict[str, Any]:
    """Write a model for another tool. Returns a report as JSON values.

    kind: the type of a GGUF's projections; None is tq2_0, or f16 for a plain model. Raises BitNetError for what the
    target cannot hold; nothing is written then.
    """
    if target not in TARGETS:
        raise BitNetError(f"export: got target '{target}', expected one of {', '.join(TARGETS)} (--to)")
    config = source.config
    if target == "gguf":
        kind = kind or ("f16" if config.linear == "float" else "tq2_0")
        export_gguf(source, output, kind)
        size, form = output.stat().st_size, f"GGUF, architecture '{architecture(config)}', {kind.upper()}"
    else:
        if kind is not None:
            raise BitNetError(f"export: got --type {kind} for {target}, expected it with --to gguf only")
        packed = target == "hf-packed"
        export_hf(source, output, packed=packed)
        size = sum(path.stat().st_size for path in output.iterdir())
        form = f"Hugging Face folder, {export_kind(config, packed)}"
    return {
        "output": str(output),
        "bytes": size,
        "format": form,
        "readers": [list(row) for row in readers(config, kind or target)],
    }
