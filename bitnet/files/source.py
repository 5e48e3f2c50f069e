"""What a reader of model files gives: a model that is read tensor by tensor, whatever tool wrote it.

Every reader (our packed file, Hugging Face folders, GGUF files, a model in memory) is a Source, and every writer takes
one, so that each goes with each. Names are those of tensors.py.

Dimensions: N out-features, K in-features.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.kernels.reference import WeightCodes
from bitnet.layers import BitLinear, Embedding
from bitnet.model import Transformer
from bitnet.text.tokenizer import Tokenizer


class Source(Protocol):
    """A model to be read.

    `config.linear` decides how the projections are read: "ternary" and "binary" ones by `codes`, "float" ones by
    `master`. A source that holds the float masters of ternary projections gives these as well, to resume training from.
    """

    kind: str  # shown to the user: "Hugging Face, bitnet, multiply"
    config: ModelConfig
    info: Mapping[str, Any]  # what the file records of its training
    notes: list[str]  # what the user should know of this source, such as a rounding

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None where there is none. Raises BitNetError for one that cannot be used."""

    def codes(self, name: str) -> WeightCodes:
        """Codes [N, K] int8 and scale [] fp32 of a projection, such as "model.layers.0.mlp.up_proj"."""

    def dense(self, name: str) -> Tensor:
        """An embedding [V, D] or norm [size], such as "model.norm.weight", in the dtype it is stored in."""

    def master(self, name: str) -> Tensor:
        """The float weight [N, K] of a projection. Raises BitNetError where there are codes only."""


class TrainedSource:
    """A model in memory with its masters, such as the newest save of a run."""

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


def no_masters(what: str) -> BitNetError:
    """The error for a source of codes, `what`, that training is to start from."""
    return BitNetError(
        f"got {what}, which holds ternary codes only, expected float masters to train on; give the folder of the run "
        "or a checkpoint that is not packed (for 2B4T: the one called bf16)"
    )
