"""Everything a run is decided by: four frozen sections, read from TOML and flags, written back with the run."""

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
    """`kind` "sentencepiece" (BPE with byte fallback) or "char"; the vocabulary size is the model's."""

    kind: str = "sentencepiece"

    def __post_init__(self) -> None:
        schema.check_types(self, "tokenizer")
        schema.check_choice(self, "tokenizer", "kind", ("sentencepiece", "char"))


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. A step is one optimiser update on batch_size * accumulate * processes sequences."""

    steps: int = 240  # about three minutes of nano on two CPU cores
    batch_size: int = 16  # sequences a process and micro-batch
    accumulate: int = 1  # micro-batches a step
    global_batch: int = 0  # sequences a step over all processes, however many; 0: batch_size * accumulate * processes
    parallel: str = "ddp"  # with several processes: the whole model on each, or "fsdp": a share of its state on each
    recompute: bool = False  # the inside of blocks in the backward pass: less memory, a third more products
    loss_chunk: int = 0  # tokens whose logits are held at a time; 0: all
    # Write saves while training goes on: each counts from the next one on at the latest, so that a kill loses up to two
    # intervals (save_every) instead of one.
    async_save: bool = False
    context: int = 0  # tokens a sequence; 0 is the model's context
    optimizer: str = "muon"  # for the matrices of the blocks; "adamw" for everything
    lr: float = 0.006  # of the matrices; with "adamw" 3e-3 is a good start
    embedding_lr: float = 0.006  # of embedding, head and gains
    schedule: str = "linear"
    warmup: float = 0.05  # share of the steps
    decay: float = 0.2  # share of the steps of the final descent ("wsd")
    second_stage_lr: float = 0.667  # learning rate after the drop, as a share ("two-stage")
    min_lr: float = 0.0  # learning rate at the end, as a share
    weight_decay: float = 0.1  # switched off in the second half by "two-stage"
    momentum: float = 0.9  # of Muon; ternary weights want it low: 0.98 costs 0.03 nats on tiny-shakespeare
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # largest gradient norm
    # On a GPU, with all quantisers in: those of inputs ("dx"), and of weights ("all"), from int8 gradients; faster.
    int8_gradients: str = "none"
    dtype: str = "auto"  # bf16 where the hardware multiplies bf16, else fp32; masters are fp32 always
    compile: bool = False
    seed: int = 0
    init: str = ""  # model to start from: a run, a checkpoint of Hugging Face's, a float GGUF; "": random weights
    teacher: str = ""  # model whose logits are learnt from, over the same tokenizer: a run or what import reads
    distill: float = 0.5  # weight of the teacher's word in the loss, against the text's
    temperature: float = 1.0  # at which both are compared
    z_loss: float = 0.0  # weight of mean(logsumexp^2), which keeps logits near zero; PaLM's 1e-4
    zero_init: bool = False  # o_proj and down_proj begin at zero: every block begins as the identity
    float_share: float = 0.0  # share of the steps before the quantisers are switched on
    # Share of the steps behind those over which the quantisers come in: less makes a worse model of the same tokens
    # (benchmarks/specs/7-quant-warmup.toml). A run that starts from another model has 0 unless told otherwise.
    quant_warmup: float = 0.8
    eval_every: int = 100  # 0: only at the end
    eval_tokens: int = 65_536  # of the validation split, at the intervals; the end takes all of it
    sample_every: int = 0  # 0: with the last step only
    sample_prompt: str = ""
    save_every: int = 100
    keep: int = 2  # saves
    report_every: int = 50  # telemetry, plain lines
    skip_limit: int = 5  # steps in a row without a finite gradient before the run stops
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
                "them: a global batch is cut into micro-batches of batch_size by itself"
            )
        self._check_used()

    def _check_used(self) -> None:
        """Refuse what would do nothing without a word."""
        if self.zero_init and self.init:
            raise BitNetError(
                "train.zero_init: got it with train.init, whose weights the run begins with; use one of them"
            )
        for name in ("distill", "temperature"):
            if not self.teacher and getattr(self, name) != getattr(TrainConfig, name):
                raise BitNetError(
                    f"train.{name}: got {getattr(self, name)} without a teacher, expected train.teacher with it; name "
                    "one or leave it away"
                )


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

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
        """(key, own value, other value) of everything in which two configs differ."""
        mine, theirs = self._flat(), other._flat()
        return [(key, value, theirs[key]) for key, value in mine.items() if value != theirs[key]]

    def _flat(self) -> dict[str, Any]:
        return {f"{name}.{key}": value for name in _SECTIONS for key, value in asdict(getattr(self, name)).items()}


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
    """A configuration from a TOML file; what it leaves out is its preset's, or nano's."""
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
