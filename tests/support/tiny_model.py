"""The smallest model that has everything: grouped heads, both norms, two layers, no size a multiple of a block."""

from bitnet.config import ModelConfig
from bitnet.model import Transformer

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    initializer_range=0.2,
)


def transformer(seed: int, **changes: object) -> Transformer:
    """A model with fresh weights; changes: of CONFIG."""
    model = Transformer(CONFIG.replace(**changes))
    model.init_weights(seed)
    return model
