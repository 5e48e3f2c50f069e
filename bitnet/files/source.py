"""A model to be read tensor by tensor, whatever tool wrote it; names are those of `bitnet.model.Transformer`.

`config.linear` says what the projections are: "ternary" or "binary" ones are read as codes, those of a "float" model
as weights. A source that holds float masters of ternary projections gives these too, for training to go on from.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.packed import PackedModel, build
from bitnet.files.tensors import dense_shapes, projections
from bitnet.kernels import packing
from bitnet.kernels.reference import WeightCodes
from bitnet.layers import BitLinear, Embedding
from bitnet.model import Transformer, in_features
from bitnet.text.tokenizer import Tokenizer


class Source(Protocol):
    """What exporters and the importer read from."""

    kind: str  # for people: "Hugging Face, packed (multiply)"
    config: ModelConfig
    info: Mapping[str, Any]  # what the file says of its training
    notes: list[str]  # what a user should know of this source: a rounding, a guess

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None where there is none."""

    def codes(self, name: str) -> WeightCodes:
        """Codes [N, K] int8 and scale [] fp32 of a projection, such as "model.layers.0.mlp.up_proj"."""

    def dense(self, name: str) -> Tensor:
        """A parameter that is not ternary, such as "model.norm.weight", in the dtype it is stored in."""

    def master(self, name: str) -> Tensor:
        """The float master [N, K] of a projection. Raises BitNetError where there are codes only."""


class TrainedSource:
    """A model of ours with its masters: the newest save of a run."""

    kind = "a training run"

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None, info: Mapping[str, Any]) -> None:
        self.model, self.config, self.tokenizer, self.info = model, model.config, tokenizer, info
        self.notes: list[str] = []

    def codes(self, name: str) -> WeightCodes:
        layer = self.model.get_submodule(name)
        assert isinstance(layer, BitLinear), name
        return layer.quantized_weight()

    def dense(self, name: str) -> Tensor:
        module = self.model.get_submodule(name.rpartition(".")[0])
        value = module.values() if isinstance(module, Embedding) else self.model.get_parameter(name)
        return value.detach()

    def master(self, name: str) -> Tensor:
        return self.model.get_parameter(f"{name}.weight").detach()


class PackedSource:
    """A packed file of ours: codes, and no masters unless the model is plain."""

    kind = "a packed file"

    def __init__(self, packed: PackedModel) -> None:
        self._packed = packed
        self.config, self.tokenizer = packed.config, packed.tokenizer
        if not isinstance(packed.info, Mapping):
            raise BitNetError(
                f"got a packed file whose info is {packed.info!r:.40}, expected a JSON object; pack the model again"
            )
        self.info: Mapping[str, Any] = packed.info
        self.notes: list[str] = []

    def codes(self, name: str) -> WeightCodes:
        tensors = self._packed.tensors
        codes = packing.unpack(tensors[f"{name}.weight"], in_features(self.config, name))
        return WeightCodes(codes, tensors[f"{name}.weight_scale"].reshape(()))

    def dense(self, name: str) -> Tensor:
        value = self._packed.tensors[name]
        if value.dtype == torch.int8:
            return value.float() * self._packed.tensors[name.removesuffix("weight") + "scale"]
        return value

    def master(self, name: str) -> Tensor:
        if self.config.linear != "float":
            raise no_masters("a packed file")
        return self._packed.tensors[f"{name}.weight"]


def as_model(source: Source) -> Transformer:
    """The model of a source as modules that run and are not trained; of a run, the one it has in memory already."""
    if isinstance(source, TrainedSource):
        return source.model.requires_grad_(False).eval()
    tensors = {name: source.dense(name) for name in dense_shapes(source.config)}
    for name in projections(source.config):
        if source.config.linear == "float":
            tensors[f"{name}.weight"] = source.master(name)
            continue
        codes, scale = source.codes(name)
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = packing.pack(codes), scale.reshape(1)
    return build(PackedModel(source.config, tensors, source.tokenizer, dict(source.info))).eval()


def no_masters(what: str) -> BitNetError:
    """The refusal of everything that wants to train on from codes."""
    return BitNetError(
        f"got {what}, which holds ternary codes only, expected float masters to train on; give the folder of the run "
        "or a checkpoint that is not packed (for 2B4T: the one called bf16)"
    )
