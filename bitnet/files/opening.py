"""What lies at a path, and who will run what was exported."""

from pathlib import Path

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.gguf.file import MAGIC
from bitnet.files.gguf.read import GgufSource, architecture
from bitnet.files.hf.hub import download
from bitnet.files.hf.read import HfSource
from bitnet.files.hf.tokenizer import FILES, read_tokenizer
from bitnet.files.json_file import read_json
from bitnet.files.packed import PackedModel, PackedSource, build, read_packed
from bitnet.files.safetensors_file import INDEX
from bitnet.files.source import Source, TrainedSource
from bitnet.files.tensors import dense_shapes, projections
from bitnet.kernels import packing
from bitnet.model import Transformer
from bitnet.text.tokenizer import Tokenizer

_ACCEPTED = "a packed file, a GGUF file, a Hugging Face folder, or a hub name such as owner/model"
_PARTS_OF_A_FOLDER = ("config.json", "generation_config.json", INDEX, *FILES)


def open_source(name: str, convention: str | None = None) -> Source:
    """The model at a path or of a hub name: a packed file, a GGUF file, or a Hugging Face folder.

    convention: see `HfSource`. Raises BitNetError for anything else.
    """
    path = Path(name)
    if not path.exists():
        if looks_like_path(name):
            raise BitNetError(f"got nothing at '{name}', expected {_ACCEPTED}; check the path")
        path = download(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "config.toml").is_file():
                raise BitNetError(
                    f"got '{path}', a training run, expected another tool's model; bitnet pack makes a file of it"
                )
            raise BitNetError(f"'{path}': got a folder without config.json, expected one of Hugging Face's; check it")
        return HfSource(path, convention)
    if convention is not None:
        raise BitNetError(f"import: got --weight-scale for the file '{path}', expected a Hugging Face folder")
    if path.name in _PARTS_OF_A_FOLDER or (path.suffix == ".safetensors" and (path.parent / "config.json").is_file()):
        raise BitNetError(f"got '{path}', a file of a Hugging Face folder, expected that folder: give '{path.parent}'")
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == MAGIC:
        return GgufSource(path)
    if path.suffix != ".safetensors" and start[8:] != b"{":  # where the header of safetensors begins
        raise BitNetError(f"got '{path}', which is none of the kinds that are read, expected {_ACCEPTED}")
    return PackedSource(read_packed(path))


def as_model(source: Source) -> Transformer:
    """The model of a source as modules that run and are not trained; of a run, the one it already has in memory."""
    if isinstance(source, TrainedSource):
        return source.model.requires_grad_(False).eval()
    # Not `packed_tensors`, which rounds embeddings and float weights to bf16.
    tensors = {name: source.dense(name) for name in dense_shapes(source.config)}
    for name in projections(source.config):
        if source.config.linear == "float":
            tensors[f"{name}.weight"] = source.master(name)
            continue
        codes, scale = source.codes(name)
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = packing.pack(codes), scale.reshape(1)
    return build(PackedModel(source.config, tensors, source.tokenizer, dict(source.info))).eval()


def looks_like_path(name: str) -> bool:
    """Whether a name of nothing that is there means a file or folder rather than a model on the hub."""
    first = name.replace("\\", "/").partition("/")[0]
    return (
        first in ("", ".", "..", "~")
        or "\\" in name
        or name.count("/") != 1
        or name.endswith(("/", ".gguf", ".safetensors", ".json"))
        or Path(first).is_dir()
    )


def choose_tokenizer(source: Source, choice: str | None) -> Tokenizer | None:
    """The tokenizer for an import: the source's own (None), nobody's ("none"), or that of another folder or file."""
    if choice is None:
        return source.tokenizer
    if choice == "none":
        return None
    path = Path(choice)
    folder = path.parent if path.name in FILES else path
    if folder.is_dir() and (folder == path or path.is_file()):
        beside = folder / "config.json"  # a tokenizer may come without a model
        values = read_json(beside) if beside.is_file() else {}
        found = read_tokenizer(folder, values, source.config.vocab_size, FILES if folder == path else (path.name,))
    else:
        found = open_source(choice).tokenizer
    if found is None:
        raise BitNetError(f"import: got no tokenizer in '{choice}', expected a folder or model with one (--tokenizer)")
    return found


def readers(config: ModelConfig, target: str) -> list[tuple[str, bool, str]]:
    """(tool, does it run the export, why) for a target "hf", "hf-packed", "gguf" or one of its types."""
    if target in ("hf", "hf-packed"):
        relu2 = config.hidden_act == "relu2" and config.sub_norms
        if config.linear == "float" and not config.sub_norms and config.hidden_act == "silu":
            return [
                ("transformers 5", True, "an ordinary Llama checkpoint"),
                ("vLLM, SGLang, mlx-lm", True, "likewise"),
                ("Ollama, LM Studio", False, "they take GGUF files: export --to gguf"),
            ]
        if config.linear == "float":
            return [
                ("transformers 5", True, "as a float model, without quantisers"),
                ("vLLM, SGLang, mlx-lm, Ollama, LM Studio", False, "they have no engine for a float model like it"),
            ]
        return [
            ("transformers 5", True, "with accelerate; on a CPU it wants a C++ compiler or TORCHDYNAMO_DISABLE=1"),
            ("mlx-lm", relu2 and target == "hf-packed", "its bitnet model is packed and computes ReLU^2 only"),
            ("vLLM, SGLang", False, "they have no BitNet engine"),
            ("Ollama, LM Studio", False, "they run llama-shaped GGUF files: --set model.sub_norms=false, --to gguf"),
        ]
    shape = architecture(config)
    tq = target in ("tq2_0", "tq1_0")
    llama, new, floats = shape == "llama", target == "q2_0", target in ("f16", "f32")
    how = f"as a '{shape}' model" + (", builds of 2026 on" if new else "")
    if floats and config.linear != "float":
        how += "; its activations stay float there, so its numbers are close to ours, not the same"
    on_llama_cpp = "they are built on llama.cpp" if llama else "they run llama-shaped files only"
    no_vllm = "their GGUF readers have no such type" if llama else "they have no bitnet among their GGUF architectures"
    if llama and floats:
        no_vllm = "float GGUF files of Llama are an experiment of theirs, not tried here"
    return [
        ("llama.cpp", True, how),
        (
            "llama.cpp on CUDA",
            not tq,
            "it has no kernels for TQ types; --type q2_0 has them" if tq else "it has kernels for this type",
        ),
        ("Ollama, LM Studio", llama and not new, "their llama.cpp may be too old" if llama and new else on_llama_cpp),
        ("vLLM, SGLang", False, no_vllm),
        ("bitnet.cpp", False, "its own I2_S files only"),
    ]
