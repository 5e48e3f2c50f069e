"""What lies at a path, and who will run what was exported."""

from pathlib import Path

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.formats.gguf import GgufSource, architecture
from bitnet.formats.gguf_file import MAGIC
from bitnet.formats.hf import HfSource
from bitnet.formats.hf_tokenizer import read_tokenizer
from bitnet.formats.hub import download
from bitnet.formats.source import PackedSource, Source
from bitnet.packed import read_packed
from bitnet.tokenizer import Tokenizer


def open_source(name: str, convention: str | None = None) -> Source:
    """The model at a path or of a hub name: a packed file, a GGUF file, or a Hugging Face folder.

    convention: see `HfSource`. Raises BitNetError for anything else.
    """
    path = Path(name)
    if not path.exists():
        path = download(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BitNetError(f"'{path}': got a folder without config.json, expected one of Hugging Face's; check it")
        return HfSource(path, convention)
    if convention is not None:
        raise BitNetError(f"import: got --weight-scale for the file '{path}', expected a Hugging Face folder")
    with path.open("rb") as file:
        start = file.read(4)
    if start == MAGIC:
        return GgufSource(path)
    return PackedSource(read_packed(path))


def choose_tokenizer(source: Source, choice: str | None) -> Tokenizer | None:
    """The tokenizer for an import: the source's own (None), nobody's ("none"), or that of another folder or file."""
    if choice is None:
        return source.tokenizer
    if choice == "none":
        return None
    path = Path(choice)
    found = read_tokenizer(path, {}, source.config.vocab_size) if path.is_dir() else open_source(choice).tokenizer
    if found is None:
        raise BitNetError(f"import: got no tokenizer in '{choice}', expected a folder or model with one (--tokenizer)")
    return found


def readers(config: ModelConfig, target: str) -> list[tuple[str, bool, str]]:
    """(tool, does it run the export, why) for a target "hf", "hf-packed", "gguf" or one of its types."""
    if target in ("hf", "hf-packed"):
        relu2 = config.hidden_act == "relu2" and config.sub_norms
        return [
            ("transformers 5", True, "with accelerate; on a CPU it wants a C++ compiler or TORCHDYNAMO_DISABLE=1"),
            ("mlx-lm", relu2 and target == "hf-packed", "its bitnet model is packed and computes ReLU^2 only"),
            ("vLLM, SGLang, Ollama, LM Studio", False, "they have no BitNet engine for these files: export a GGUF"),
        ]
    shape = architecture(config)
    new = target == "q2_0"
    return [
        ("llama.cpp", True, f"as a '{shape}' model" + (", builds of 2026 on" if new else "")),
        ("llama.cpp on CUDA", target not in ("tq2_0", "tq1_0"), "it has kernels for q2_0 and f16, none for TQ types"),
        ("Ollama, LM Studio", not new, "their llama.cpp may be too old" if new else "they are built on llama.cpp"),
        ("bitnet.cpp", False, "its own I2_S files only"),
    ]
