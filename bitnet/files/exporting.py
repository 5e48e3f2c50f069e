"""`bitnet export`: any source into another tool's format, and which tools can run the result."""

from pathlib import Path
from typing import Any, NamedTuple

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.gguf.export import export_gguf
from bitnet.files.gguf.names import architecture
from bitnet.files.hf.export import export_form, export_hf
from bitnet.files.source import Source

TARGETS = ("hf", "hf-packed", "gguf")


def export_model(source: Source, output: Path, target: str, kind: str | None = None) -> dict[str, Any]:
    """Write a model for another tool. Returns a report as JSON values.

    target: one of TARGETS. kind: the type of a GGUF file's projections; by default tq2_0, or f16 for a float model.
    Raises BitNetError for what the target cannot hold; nothing is written then.
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
        form = f"Hugging Face folder, {export_form(config, packed)}"
    return {
        "output": str(output),
        "bytes": size,
        "format": form,
        "readers": [list(reader) for reader in readers(config, kind or target)],
    }


class Reader(NamedTuple):
    """A tool, and whether it runs an export."""

    tool: str
    runs: bool
    why: str


def readers(config: ModelConfig, target: str) -> list[Reader]:
    """Which tools run an export. target: "hf", "hf-packed", or the type of a GGUF file's projections."""
    if target not in ("hf", "hf-packed"):
        return _gguf_readers(config, target)
    if config.linear != "float":
        relu2 = config.hidden_act == "relu2" and config.sub_norms
        return [
            Reader(
                "transformers 5", True, "with accelerate; on a CPU it needs a C++ compiler or TORCHDYNAMO_DISABLE=1"
            ),
            Reader("mlx-lm", relu2 and target == "hf-packed", "its bitnet model is packed and computes ReLU^2 only"),
            Reader("vLLM, SGLang", False, "they have no BitNet engine"),
            Reader(
                "Ollama, LM Studio",
                False,
                "they run llama-shaped GGUF files: --set model.sub_norms=false, --to gguf",
            ),
        ]
    if not config.sub_norms and config.hidden_act == "silu":
        return [
            Reader("transformers 5", True, "an ordinary Llama checkpoint"),
            Reader("vLLM, SGLang, mlx-lm", True, "likewise"),
            Reader("Ollama, LM Studio", False, "they take GGUF files: export --to gguf"),
        ]
    others = "vLLM, SGLang, mlx-lm, Ollama, LM Studio"
    return [
        Reader("transformers 5", True, "as a float model, without quantisers"),
        Reader(others, False, "they have no engine for such a float model"),
    ]


def _gguf_readers(config: ModelConfig, kind: str) -> list[Reader]:
    shape = architecture(config)
    llama, floats, new = shape == "llama", kind in ("f16", "f32"), kind == "q2_0"
    how = f"as a '{shape}' model" + (", in builds of 2026 or later" if new else "")
    if floats and config.linear != "float":
        how += "; it keeps activations in float, so its numbers are close to ours, not the same"
    cuda = kind not in ("tq2_0", "tq1_0")
    on_cuda = "it has kernels for this type" if cuda else "it has no kernels for TQ types; --type q2_0 has them"
    on_llama_cpp = "they are built on llama.cpp" if llama else "they run llama-shaped files only"
    if llama and new:
        on_llama_cpp = "their llama.cpp may be too old"
    no_vllm = "their GGUF readers have no such type" if llama else "they have no bitnet among their GGUF architectures"
    if llama and floats:
        no_vllm = "their support for float GGUF files of Llama is experimental, and not tested here"
    return [
        Reader("llama.cpp", True, how),
        Reader("llama.cpp on CUDA", cuda, on_cuda),
        Reader("Ollama, LM Studio", llama and not new, on_llama_cpp),
        Reader("vLLM, SGLang", False, no_vllm),
        Reader("bitnet.cpp", False, "its own I2_S files only"),
    ]
