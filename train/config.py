"""The configuration of a run: four frozen sections, read from TOML and flags, and written into the run's folder.

It exists in two states. As requested, the vocabulary is an upper bound and the context may be shorter than the model's.
Resolved (`RunConfig.resolved`, once the tokenizer is known), `model` is exactly the model that is trained.
"""

import json
import tomllib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bitnet import schema
from bitnet.config import PRESETS, ModelConfig, preset
from bitnet.errors import BitNetError
from bitnet.train.data.corpus import DataConfig

OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("linear", "cosine", "wsd", "two-stage")
DTYPES = ("auto", "fp32", "bf16")
PARALLELS = ("ddp", "fsdp")
INT8_GRADIENTS = ("none", "dx", "all")


@dataclass(frozen=True)
class TokenizerConfig:
    """`kind` "sentencepiece" (BPE with byte fallback) or "char".

    vocab_size: the number of tokens asked for; 0: model.vocab_size. A small corpus supports fewer. A run therefore
    records the request here, and what its tokenizer has in model.vocab_size.
    """

    kind: str = "sentencepiece"
    vocab_size: int = 0

    def __post_init__(self) -> None:
        schema.check_types(self, "tokenizer")
        schema.check_choice(self, "tokenizer", "kind", ("sentencepiece", "char"))
        schema.check_range(self, "tokenizer", ("vocab_size",), 0, 2**31 - 1)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. A step is one optimiser update on batch_size * accumulate * world_size sequences."""

    steps: int = 240  # about three minutes of nano on two CPU cores
    batch_size: int = 16  # sequences per micro-batch of each process
    accumulate: int = 1  # micro-batches per step
    global_batch: int = 0  # sequences per step over all processes; 0: batch_size * accumulate * world_size
    parallel: str = "ddp"  # with several processes: "ddp" keeps the full model on each, "fsdp" shards its state
    recompute: bool = False  # activations inside blocks in the backward pass: less memory, a third more products
    loss_chunk: int = 0  # tokens whose logits are held at a time; 0: all
    # Write saves in the background. Each is complete by the time of the next one, so a kill loses up to two intervals
    # (save_every) instead of one.
    async_save: bool = False
    context: int = 0  # tokens per sequence; 0: the model's context
    optimizer: str = "muon"  # for the matrices of the blocks; "adamw": AdamW for everything
    lr: float = 0.006  # of the matrices; 3e-3 is a good start for "adamw"
    embedding_lr: float = 0.006  # of embedding, head and norm weights
    schedule: str = "linear"
    warmup: float = 0.05  # of the learning rate, as a fraction of the steps
    decay: float = 0.2  # length of the final descent as a fraction of the steps ("wsd")
    second_stage_lr: float = 0.667  # factor on the learning rate in the second half ("two-stage")
    min_lr: float = 0.0  # learning rate at the end, as a fraction of the peak
    weight_decay: float = 0.1  # "two-stage" switches it off in the second half
    momentum: float = 0.9  # of Muon; ternary weights prefer it low: 0.98 costs 0.03 nats on tiny-shakespeare
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # largest gradient norm
    # On a GPU, after quantisation warm-up: int8 gradients for the inputs of projections ("dx"), or also for their
    # weights ("all"). Faster.
    int8_gradients: str = "none"
    dtype: str = "auto"  # bf16 where the hardware multiplies bf16, else fp32; masters are always fp32
    compile: bool = False
    seed: int = 0
    init: str = ""  # model to start from: a run, a Hugging Face checkpoint, a float GGUF; "": random weights
    teacher: str = ""  # model to distil from, with the same tokenizer: a run, or whatever `bitnet import` reads
    distill: float = 0.5  # weight of the teacher's logits in the loss; the text has the rest
    temperature: float = 1.0  # of both distributions when they are compared
    z_loss: float = 0.0  # weight of mean(logsumexp^2), which keeps logits small; PaLM uses 1e-4
    zero_init: bool = False  # start o_proj and down_proj at zero, so that every block starts as the identity
    float_share: float = 0.0  # fraction of the steps before quantisation warm-up begins
    # Quantisation warm-up: the fraction of the remaining steps over which operands turn from float to quantised.
    # Shorter is worse for the same tokens (benchmarks/specs/7-quant-warmup.toml). 0 by default with `init`.
    quant_warmup: float = 0.8
    eval_every: int = 100  # steps; 0: only at the end
    eval_tokens: int = 65_536  # of the validation split, during training; the end scores all of it
    sample_every: int = 0  # steps; 0: only at the end
    sample_prompt: str = ""
    save_every: int = 100  # steps
    keep: int = 2  # saves
    report_every: int = 50  # steps between telemetry, and between log lines outside a terminal
    skip_limit: int = 5  # steps in a row without a finite gradient after which the run stops
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        check = schema.check_range
        schema.check_types(self, "train")
        schema.check_choice(self, "train", "optimizer", OPTIMIZERS)
        schema.check_choice(self, "train", "schedule", SCHEDULES)
        schema.check_choice(self, "train", "dtype", DTYPES)
        schema.check_choice(self, "train", "parallel", PARALLELS)
        schema.check_choice(self, "train", "int8_gradients", INT8_GRADIENTS)
        check(self, "train", ("steps", "batch_size", "accumulate", "save_every", "report_every", "skip_limit"), 1)
        check(self, "train", ("context", "eval_every", "sample_every", "global_batch", "loss_chunk"), 0)
        check(self, "train", ("seed",), 0, 2**63 - 1)  # what torch's generators take
        check(self, "train", ("eval_tokens", "keep"), 2)
        check(
            self,
            "train",
            ("warmup", "decay", "second_stage_lr", "min_lr", "quant_warmup", "float_share", "distill"),
            0.0,
            1.0,
        )
        check(self, "train", ("temperature",), 1e-3, 1e3)
        check(self, "train", ("z_loss",), 0.0, 1e3)
        check(self, "train", ("lr", "embedding_lr", "clip"), 1e-12, 1e6)
        check(self, "train", ("weight_decay",), 0.0, 100.0)
        check(self, "train", ("momentum", "beta1", "beta2"), 0.0, 0.999999)
        if self.global_batch and self.accumulate > 1:
            raise BitNetError(
                f"train.global_batch: got {self.global_batch} with train.accumulate {self.accumulate}, expected one of "
                "them: a global batch is split into micro-batches of batch_size automatically"
            )
        self._check_used()

    def _check_used(self) -> None:
        """Refuse settings that would silently have no effect."""
        if self.zero_init and self.init:
            raise BitNetError(
                "train.zero_init: got it together with train.init, expected one of them: a run that starts from a "
                "model has its weights"
            )
        for name in ("distill", "temperature"):
            if not self.teacher and getattr(self, name) != getattr(TrainConfig, name):
                raise BitNetError(
                    f"train.{name}: got {getattr(self, name)} without train.teacher, expected both; name a teacher or "
                    "omit it"
                )


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.train.context > self.model.context:
            raise BitNetError(
                f"train.context: got {self.train.context} (-c), expected at most the model's {self.model.context}; "
                "raise model.max_position_embeddings as well"
            )

    @property
    def context(self) -> int:
        """Tokens a training sequence."""
        return self.train.context or self.model.context

    @property
    def requested_vocab_size(self) -> int:
        """The number of tokens asked for; a tokenizer may end up with fewer."""
        return self.tokenizer.vocab_size or self.model.vocab_size

    def resolved(self, vocab_size: int) -> "RunConfig":
        """The configuration with the true vocabulary; the model's context is the one it is trained with."""
        model = self.model.replace(vocab_size=vocab_size, max_position_embeddings=self.context)
        return replace(self, model=model, tokenizer=replace(self.tokenizer, vocab_size=self.requested_vocab_size))

    def requested(self) -> "RunConfig":
        """The configuration as it was before the vocabulary was known: what a new start is compared with."""
        model = self.model.replace(vocab_size=self.requested_vocab_size)
        return replace(self, model=model, tokenizer=replace(self.tokenizer, vocab_size=0))

    def to_toml(self) -> str:
        """The TOML that reads back as this config."""
        return "\n".join(_section(name, asdict(getattr(self, name))) for name in _SECTIONS)

    def override(self, values: dict[str, dict[str, Any]]) -> "RunConfig":
        """A copy with some values changed: {section: {key: value}}. Raises BitNetError for unknown ones."""
        for name in values:
            if name not in _SECTIONS:
                raise BitNetError(f"config: got unknown section [{name}], expected {', '.join(_SECTIONS)}")
        changed = {}
        for name, cls in _SECTIONS.items():
            changed[name] = schema.from_values(
                cls, {**asdict(getattr(self, name)), **schema.current(values.get(name, {}), name)}, name
            )
        return replace(self, **changed)

    def differences(self, other: "RunConfig") -> list[tuple[str, Any, Any]]:
        """(key, own value, other value) of every setting in which two requests differ, resolved or not."""
        mine, theirs = self._flat(), other._flat()
        return [(key, value, theirs[key]) for key, value in mine.items() if value != theirs[key]]

    def _flat(self) -> dict[str, Any]:
        asked = self.requested()
        flat = {f"{name}.{key}": value for name in _SECTIONS for key, value in asdict(getattr(asked, name)).items()}
        # Only the context that is trained with matters, wherever it was set.
        del flat["model.max_position_embeddings"]
        return {**flat, "train.context": self.context}


_SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "tokenizer": TokenizerConfig,
    "data": DataConfig,
    "train": TrainConfig,
}


def default_config(name: str = "nano") -> RunConfig:
    """The preset's model with the default settings of everything else. Raises BitNetError for an unknown preset."""
    return RunConfig(model=preset(name))


def read_config(path: Path) -> RunConfig:
    """A configuration from a TOML file; settings that it omits come from its preset, or from nano."""
    name, values = read_toml(path)
    return default_config(name or "nano").override(values)


def read_toml(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The preset named by a top-level `preset` key, or None, and the sections of a TOML file. Raises BitNetError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BitNetError(f"config: got no file '{path}', expected a TOML file; check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise BitNetError(f"config: '{path}' cannot be read as TOML: {error}") from error
    name = values.pop("preset", None)
    if name is not None and (not isinstance(name, str) or name not in PRESETS):
        raise BitNetError(f"config: got preset {name!r}, expected one of {', '.join(PRESETS)}")
    for section, content in values.items():
        if section not in _SECTIONS or not isinstance(content, dict):
            raise BitNetError(f"config: '{path}': got '{section}', expected sections [{'], ['.join(_SECTIONS)}] only")
    return name, values


def _section(name: str, values: dict[str, Any]) -> str:
    lines = [f"{key} = {_toml_value(value)}" for key, value in values.items()]
    return "\n".join([f"[{name}]", *lines, ""])


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(element) for element in value) + "]"
    if isinstance(value, float):
        return repr(value)
    # JSON's strings, integers and booleans are TOML's too; 0x7F is the one character only TOML escapes.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
