"""The models that a run may need besides its own: one to start from, one to distil from; and what they must be."""

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
from bitnet.train.runs.run import Run


class Initial(Protocol):
    """A model to start from instead of random weights, read tensor by tensor (see bitnet/files/source.py)."""

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
    """A model to distil from, with the tokenizer it was trained with."""

    model: Transformer
    tokenizer: Tokenizer | None


def check_opened(config: RunConfig, run: Run, initial: Initial | None, teacher: Teacher | None) -> None:
    """Raise BitNetError when a model that the configuration names was not opened or does not fit it."""
    if initial is not None:
        check_initial(config, initial)
    elif config.train.init and not run.has_saves():
        raise BitNetError(f"train: got train.init '{config.train.init}', expected that model opened (--init)")
    if config.train.teacher and teacher is None:
        raise BitNetError(f"train: got train.teacher '{config.train.teacher}', expected that model opened")


def teacher_tokenizer(config: RunConfig, teacher: Teacher) -> Tokenizer:
    """The tokenizer of a teacher, for the run to use. Raises BitNetError if it has none or the run asks for another."""
    tokenizer, kind = teacher.tokenizer, config.tokenizer.kind
    if tokenizer is None:
        raise BitNetError(f"train: got no tokenizer in '{config.train.teacher}', expected the one it was trained with")
    if kind not in (TokenizerConfig().kind, tokenizer.kind):
        raise BitNetError(
            f"train: got --tokenizer {kind} and the teacher '{config.train.teacher}', which has its own "
            f"({tokenizer.kind}); omit --tokenizer"
        )
    return tokenizer


def check_teacher(config: RunConfig, tokenizer: Tokenizer, teacher: Teacher) -> None:
    """Raise BitNetError for a teacher with another vocabulary or a shorter context than the run's."""
    theirs = teacher_tokenizer(config, teacher)
    if (theirs.kind, theirs.to_bytes()) != (tokenizer.kind, tokenizer.to_bytes()):
        raise BitNetError(
            f"train: the teacher '{config.train.teacher}' has another tokenizer than the run's data, expected the same "
            "one so that their logits compare; choose another teacher, or a new folder without --init"
        )
    if config.context > teacher.model.config.context:
        raise BitNetError(
            f"train: got a context of {config.context} and the teacher '{config.train.teacher}' with "
            f"{teacher.model.config.context}, expected at most that; shorten it (-c)"
        )


def teacher_digest(model: Transformer) -> str:
    """SHA-256 of a teacher's shape and weights, which identifies it wherever its file lies."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict()).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


_INITIAL_MAY_CHANGE = ("linear", "max_position_embeddings", "initializer_range")  # no weight depends on them


def check_initial(config: RunConfig, initial: Initial) -> None:
    """Raise BitNetError for a model to start from without float weights or with another shape than the settings.

    Called before the text is tokenised, which may take hours.
    """
    theirs = initial.config.to_dict()
    for key, value in config.model.to_dict().items():
        if key not in _INITIAL_MAY_CHANGE and value != theirs[key]:
            raise BitNetError(
                f"train: model.{key}: got {value!r}, expected {theirs[key]!r} as in '{config.train.init}': "
                "training that starts from a model keeps its shape; omit the setting"
            )
    initial.master("model.layers.0.self_attn.q_proj")  # raises if there are codes only; every model has this layer


def initial_weights(model: Transformer, initial: Initial) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of all weights of `model`, from `initial`. Raises BitNetError for codes only or other shapes."""
    for name, parameter in model.named_parameters():
        projection = name.removesuffix(".weight")
        weight = initial.master(projection) if is_projection(name) else initial.dense(name)
        if weight.shape != parameter.shape:
            raise BitNetError(
                f"train: {name}: got shape {list(weight.shape)}, expected {list(parameter.shape)}; training that "
                "starts from a model keeps its shape"
            )
        yield name, weight
