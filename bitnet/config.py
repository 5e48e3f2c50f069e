"""What a model is: one frozen dataclass, its checks, and the named presets."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from bitnet import schema
from bitnet.errors import BitNetError

LINEARS = ("ternary", "binary", "float")
ACTIVATIONS = ("relu2", "silu")


@dataclass(frozen=True)
class ModelConfig:
    """Shape and variant of a transformer; field names follow transformers' BitNetConfig where it has them.

    `linear` is the kind of the seven projections of every block: "ternary" (b1.58, weights in {-1, 0, +1}), "binary"
    (1-bit BitNet, {-1, +1}) or "float" (nn.Linear: the float baseline). Embedding and head are never ternary; their
    values are rounded to bf16 in every forward pass, so that a packed file holds them exactly.
    Raises BitNetError for a combination that cannot be built.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 256  # the context, in tokens
    linear: str = "ternary"
    hidden_act: str = "relu2"  # gate of the GLU: ReLU^2 as in 2B4T, or SiLU
    sub_norms: bool = True  # RMSNorm before o_proj and down_proj, as in 2B4T
    qk_norm: bool = True  # RMSNorm of each query and key head: 0.05 nats on tiny-shakespeare for ternary
    tie_word_embeddings: bool = True
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        schema.check_types(self, "model")
        schema.check_range(self, "model", _COUNTS, 1, 2**31 - 1)
        schema.check_range(self, "model", ("rope_theta",), 1.0, 1e12)
        schema.check_range(self, "model", ("rms_norm_eps", "initializer_range"), 1e-12, 1.0)
        schema.check_choice(self, "model", "linear", LINEARS)
        schema.check_choice(self, "model", "hidden_act", ACTIVATIONS)
        if self.hidden_size % self.num_attention_heads:
            raise BitNetError(
                f"model: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; change one of them"
            )
        if self.head_dim % 2:
            raise BitNetError(
                f"model: {self.hidden_size} / {self.num_attention_heads} gives heads of {self.head_dim}; "
                "rotary embeddings need an even size: change hidden_size or num_attention_heads"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise BitNetError(
                f"model: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; change one of them"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def context(self) -> int:
        """The longest sequence the model is trained for, in tokens."""
        return self.max_position_embeddings

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or TOML; the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Build from plain values. Raises BitNetError for unknown keys and wrong types."""
        return schema.from_values(cls, values, "model")

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed. Raises BitNetError as the constructor does."""
        return replace(self, **changes)


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def _preset(vocab: int, width: int, ffn: int, layers: int, heads: int, kv_heads: int, context: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
    )


def _lean(shape: ModelConfig) -> ModelConfig:
    """The same shape with the variant that trained best up to 10M parameters (benchmarks/results/LOG.md)."""
    return shape.replace(hidden_act="silu", sub_norms=False)


def _portable(shape: ModelConfig) -> ModelConfig:
    """The same shape without what llama.cpp (ReLU^2, QK norm) and transformers (QK norm) do not support."""
    return shape.replace(hidden_act="silu", qk_norm=False)


# Widths are multiples of 256 (the block of GGUF's ternary types) and heads are 64 or 128 wide. Blocks are those of 2B4T
# plus QK norm, unless a line says otherwise.
PRESETS: dict[str, ModelConfig] = {
    "nano": _lean(_preset(4096, 256, 768, 4, 4, 2, 256)),  # a laptop, minutes
    "micro": _lean(_preset(8192, 512, 1536, 4, 8, 4, 512)),  # a laptop, an hour
    "mini": _lean(_preset(8192, 512, 1536, 8, 8, 4, 512)),  # a laptop, a night
    "small": _preset(16384, 768, 2048, 12, 12, 4, 1024),  # one GPU, an hour
    "medium": _preset(32768, 1024, 2816, 24, 16, 4, 2048),  # one GPU, a day
    "large": _preset(32768, 1536, 4096, 24, 12, 4, 2048),  # the 700M of the b1.58 paper
    "xl": _preset(32768, 2048, 5632, 24, 16, 4, 2048),  # its 1.3B
    # Three of these shapes in a variant that other tools run too: SiLU, no QK norm.
    "nano-portable": _portable(_preset(4096, 256, 768, 4, 4, 2, 256)),
    "mini-portable": _portable(_preset(8192, 512, 1536, 8, 8, 4, 512)),
    "small-portable": _portable(_preset(16384, 768, 2048, 12, 12, 4, 1024)),
    # microsoft/bitnet-b1.58-2B-4T, exactly: no QK norm, LLaMA-3's vocabulary and rotary base.
    "2b4t": _preset(128256, 2560, 6912, 30, 20, 5, 4096).replace(qk_norm=False, rope_theta=500_000.0),
}


def preset(name: str) -> ModelConfig:
    """The preset with this name. Raises BitNetError for an unknown name."""
    if name not in PRESETS:
        raise BitNetError(f"preset: got '{name}', expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
