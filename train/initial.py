"""Other models that a run needs: one to start from, one to learn from; what they have to be."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files.tensors import is_projection
from bitnet.model import Transformer
from bitnet.text.tokenizer import Tokenizer
from bitnet.train.config import RunConfig, TokenizerConfig


class Initial(Protocol):
    """A model to start from instead of random weights, read tensor by tensor (bitnet/files/source.py)."""

    config: ModelConfig

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer it was trained with."""

    def dense(self, name: str) -> Tensor:
        """A parameter by its name."""

    def master(self, name: str) -> Tensor:
        """The float weight [N, K] of a projection."""


@dataclass(frozen=True)
class Teacher:
    """A model whose logits are learnt from, with the tokenizer it speaks."""

    model: Transformer
    tokenizer: Tokenizer | None


def teacher_tokenizer(config: RunConfig, teacher: Teacher) -> Tokenizer:
    """The tokenizer of a teacher, which the text is to be tokenised with. Raises BitNetError where that cannot be."""
    tokenizer, kind = teacher.tokenizer, config.tokenizer.kind
    if tokenizer is None:
        raise BitNetError(f"train: got no tokenizer in '{config.train.teacher}', expected the one it was trained with")
    if kind not in (TokenizerConfig().kind, tokenizer.kind):
        raise BitNetError(
            f"train: got --tokenizer {kind} and the teacher '{config.train.teacher}', which brings its own "
            f"({tokenizer.kind}); leave --tokenizer away"
        )
    return tokenizer


def check_teacher(config: RunConfig, tokenizer: Tokenizer, teacher: Teacher) -> None:
    """Raise BitNetError for a teacher of another vocabulary or with a shorter context than the run's."""
    theirs = teacher_tokenizer(config, teacher)
    if (theirs.kind, theirs.to_bytes()) != (tokenizer.kind, tokenizer.to_bytes()):
        raise BitNetError(
            f"train: the teacher '{config.train.teacher}' has another tokenizer than the run's data, expected the same "
            "one: its logits are over other tokens; choose another teacher, or a new folder without --init"
        )
    if config.context > teacher.model.config.context:
        raise BitNetError(
            f"train: got a context of {config.context} and the teacher '{config.train.teacher}' with "
            f"{teacher.model.config.context}, expected at most that; shorten it (-c)"
        )


def teacher_digest(model: Transformer) -> str:
    """SHA-256 over a teacher's shape and weights: what a student has learnt from, wherever it lies."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict()).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


_INITIAL_MAY_CHANGE = ("linear", "max_position_embeddings", "initializer_range")  # none of them is in the weights


def check_initial(config: RunConfig, initial: Initial) -> None:
    """Raise BitNetError for a model to start from that holds codes only, or settings that compute another one.

    Before the text is tokenised, which takes hours where there is much of it.
    """
    theirs = initial.config.to_dict()
    for key, value in config.model.to_dict().items():
        if key not in _INITIAL_MAY_CHANGE and value != theirs[key]:
            raise BitNetError(
                f"train: model.{key}: got {value!r}, expected {theirs[key]!r} as in '{config.train.init}': "
                "a model that is trained on keeps its shape; leave the setting away"
            )
    initial.master("model.layers.0.self_attn.q_proj")  # refused here; every model has one


def initial_weights(model: Transformer, initial: Initial) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a model's weights. Raises BitNetError where it holds codes only, or is of another shape."""
    for name, parameter in model.named_parameters():
        projection = name.removesuffix(".weight")
        weight = initial.master(projection) if is_projection(name) else initial.dense(name)
        if weight.shape != parameter.shape:
            raise BitNetError(
                f"train: {name}: got shape {list(weight.shape)}, expected {list(parameter.shape)}; a model that is "
                "trained on keeps its shape"
            )
        yield name, weight
