"""Starting from another model: what it has to be, and its weights one by one."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.model import Transformer
from bitnet.tokenizer import Tokenizer
from bitnet.train.config import RunConfig


class Initial(Protocol):
    """A model to start from instead of random weights, read tensor by tensor (bitnet/formats/source.py)."""

    config: ModelConfig

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer it was trained with."""

    def dense(self, name: str) -> Tensor:
        """A parameter by its name."""

    def master(self, name: str) -> Tensor:
        """The float weight [N, K] of a projection."""


_INITIAL_MAY_CHANGE = ("linear", "max_position_embeddings", "initializer_range")  # none of them is in the weights


def check_initial(config: RunConfig, initial: Initial) -> None:
    """Raise BitNetError for a configuration that computes something else with the weights than their model did."""
    theirs = initial.config.to_dict()
    for key, value in config.model.to_dict().items():
        if key not in _INITIAL_MAY_CHANGE and value != theirs[key]:
            raise BitNetError(
                f"train: model.{key}: got {value!r}, expected {theirs[key]!r} as in '{config.train.init}': "
                "a model that is trained on keeps its shape; leave the setting away"
            )


def initial_weights(model: Transformer, initial: Initial) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a model's weights. Raises BitNetError where it holds codes only, or is of another shape."""
    for name, parameter in model.named_parameters():
        projection = name.removesuffix(".weight")
        weight = initial.master(projection) if projection.endswith("_proj") else initial.dense(name)
        if weight.shape != parameter.shape:
            raise BitNetError(
                f"train: {name}: got shape {list(weight.shape)}, expected {list(parameter.shape)}; a model that is "
                "trained on keeps its shape"
            )
        yield name, weight
