"""What a method makes: one file that holds a complete model, tokenizer included, and what loads it.

Torch models are stored as safetensors. torchao itself flattens and restores its tensors; their 4-bit values, which it
holds in a byte each, are stored two to a byte.
"""

import importlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from bitnet.config import ModelConfig
from bitnet.model import Transformer
from bitnet.text.tokenizer import Tokenizer

_TOKENIZER = "tokenizer"
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
GPTQ_BITS, GPTQ_GROUP = 4, 64  # bits per weight, weights that share a scale


@dataclass(frozen=True)
class Artifact:
    """A model that a method made. loader: "torch", "packed" (our file in our engine) or "llama"."""

    path: str
    loader: str
    library: str  # with version
    note: str = ""

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return Path(self.path).stat().st_size

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def write_model(
    path: Path, model: Transformer, tokenizer: Tokenizer, *, builder: str = "", dtype: torch.dtype = torch.float32
) -> Path:
    """Write a torch model as one safetensors file.

    builder: how `read_model` makes the modules: "" (a float model, stored and computed in `dtype`), "torchao" or "gptq"
    (quantised linear layers, embeddings in bf16, which holds them exactly).
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    metadata = {"config": json.dumps(model.config.to_dict()), "builder": builder, "autocast": ""}
    if not builder:
        state = {name: value.to(dtype) for name, value in state.items()}
        metadata["autocast"] = "" if dtype is torch.float32 else str(dtype).removeprefix("torch.")
    else:
        state |= {name: state[name].to(torch.bfloat16) for name in _EMBEDDINGS if name in state}
    if builder == "torchao":
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        halves = [name for name, value in state.items() if getattr(value, "target_dtype", None) is torch.int4]  # type: ignore[attr-defined]
        state, layout = flatten_tensor_state_dict(state)
        for name in halves:
            state[_codes(name)] = pack_nibbles(state[_codes(name)])
        metadata |= {"layout": json.dumps(layout), "nibbles": json.dumps(halves)}
    state[_TOKENIZER] = torch.frombuffer(bytearray(tokenizer.to_bytes()), dtype=torch.uint8)
    safetensors.torch.save_file({name: value.contiguous() for name, value in state.items()}, path, metadata)
    return path


def _codes(name: str) -> str:
    """The name under which torchao's flat form stores the codes of a weight."""
    return f"{name.rpartition('.')[0]}._weight_qdata"


def import_library(path: Path) -> None:
    """Import the library that `read_model` needs for this file."""
    with safetensors.safe_open(path, framework="pt") as file:
        builder = file.metadata()["builder"]
    if builder == "torchao":
        importlib.import_module("torchao.prototype.safetensors.safetensors_support")
    elif builder == "gptq":
        importlib.import_module("neural_compressor.torch.algorithms.weight_only.modules")


def read_model(path: Path) -> tuple[Transformer, torch.dtype | None]:
    """The model in a file of `write_model`, and the dtype of its autocast, None for fp32."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != _TOKENIZER}  # noqa: SIM118
    config = ModelConfig.from_dict(json.loads(metadata["config"]))
    with torch.device("meta"):
        model = Transformer(config, exact_embeddings=True)
    autocast = metadata["autocast"]
    if metadata["builder"] == "torchao":
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        for name in json.loads(metadata["nibbles"]):
            tensors[_codes(name)] = unpack_nibbles(tensors[_codes(name)])
        tensors, _ = unflatten_tensor_state_dict(tensors, json.loads(metadata["layout"]))
    elif metadata["builder"] == "gptq":
        gptq_skeleton(model)
    if not autocast:
        tensors |= {name: tensors[name].float() for name in _EMBEDDINGS if name in tensors}
    model.load_state_dict(tensors, assign=True)
    return model.eval(), getattr(torch, autocast) if autocast else None


def gptq_skeleton(model: nn.Module) -> None:
    """Replace a model's linear layers by the library's packed ones, so that weights can be loaded into them."""
    from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear

    for name, module in list(model.named_modules()):
        if is_linear(module, name):
            assert isinstance(module, nn.Linear)
            parent, _, child = name.rpartition(".")
            packed = INCWeightOnlyLinear(
                module.in_features,
                module.out_features,
                dtype="int",
                bits=GPTQ_BITS,
                group_size=GPTQ_GROUP,
                zp=False,
                bias=True,  # the library puts zeros there
                device="cpu",
            )
            setattr(model.get_submodule(parent), child, packed)


def pack_nibbles(values: Tensor) -> Tensor:
    """Values [N, K] int8 in -8 .. 7, K even, two to a byte: [N, K / 2] uint8, the even column in the low half."""
    assert values.dtype == torch.int8, values.dtype
    assert values.shape[1] % 2 == 0, values.shape
    codes = (values + 8).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).to(torch.int8) - 8


def is_linear(module: nn.Module, name: str) -> bool:
    """Whether the methods quantise a module: the seven projections of every block; embeddings are no nn.Linear."""
    return isinstance(module, nn.Linear)
