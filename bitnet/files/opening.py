"""From a path or hub name to a Source, and from a Source to a model in memory."""

from pathlib import Path

from bitnet.errors import BitNetError
from bitnet.files.gguf.file import MAGIC
from bitnet.files.gguf.read import GgufSource
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

    convention: see `HfSource`. Raises BitNetError for anything that is not such a model.
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
                    f"got '{path}', a training run, expected another tool's model; "
                    f"pack it with: bitnet pack {path} -o FILE"
                )
            raise BitNetError(
                f"'{path}': got a folder without config.json, expected a Hugging Face model; check the path"
            )
        return HfSource(path, convention)
    if convention is not None:
        raise BitNetError(f"import: got --weight-scale for the file '{path}', expected a Hugging Face folder")
    if path.name in _PARTS_OF_A_FOLDER or (path.suffix == ".safetensors" and (path.parent / "config.json").is_file()):
        raise BitNetError(f"got '{path}', a file of a Hugging Face folder, expected that folder: give '{path.parent}'")
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == MAGIC:
        return GgufSource(path)
    if path.suffix != ".safetensors" and start[8:] != b"{":  # safetensors: eight bytes of length, then JSON
        raise BitNetError(f"got the file '{path}', expected {_ACCEPTED}")
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
    """Whether a name that is not a path on disk was meant as one, rather than as a model on the hub."""
    first = name.replace("\\", "/").partition("/")[0]
    return (
        first in ("", ".", "..", "~")
        or "\\" in name
        or name.count("/") != 1
        or name.endswith(("/", ".gguf", ".safetensors", ".json"))
        or Path(first).is_dir()
    )


def choose_tokenizer(source: Source, choice: str | None) -> Tokenizer | None:
    """The tokenizer for an import: the source's (choice None), none ("none"), or that of another folder or file.

    Raises BitNetError for a folder or file without a tokenizer.
    """
    if choice is None:
        return source.tokenizer
    if choice == "none":
        return None
    path = Path(choice)
    folder = path.parent if path.name in FILES else path
    if folder.is_dir() and (folder == path or path.is_file()):
        beside = folder / "config.json"  # absent where the folder holds a tokenizer alone
        values = read_json(beside) if beside.is_file() else {}
        found = read_tokenizer(folder, values, source.config.vocab_size, FILES if folder == path else (path.name,))
    else:
        found = open_source(choice).tokenizer
    if found is None:
        raise BitNetError(f"import: got no tokenizer in '{choice}', expected a folder or model with one (--tokenizer)")
    return found
