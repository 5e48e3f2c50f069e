"""Models and measures that the tests of file formats share."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.model import Transformer

# Rows of whole GGUF blocks (256 weights), in shapes that llama.cpp runs.
GGUF_BASE = ModelConfig(
    vocab_size=400,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    hidden_act="silu",
    qk_norm=False,
    initializer_range=0.05,
)
GGUF_VARIANTS: dict[str, dict[str, Any]] = {
    "bitnet": {},
    "bitnet-2": {"num_key_value_heads": 4, "rope_theta": 500_000.0, "rms_norm_eps": 1e-6},
    "llama": {"sub_norms": False},
    "llama-untied": {"sub_norms": False, "tie_word_embeddings": False, "num_key_value_heads": 1},
}


def random_model(config: ModelConfig, seed: int) -> Transformer:
    """A model with random weights and with gains away from 1."""
    model = Transformer(config)
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def kl(expected: Tensor, got: Tensor) -> float:
    """Mean Kullback-Leibler divergence of next-token distributions, from logits [..., V]."""
    p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def write_i2_s(codes: Tensor, scale: float) -> np.ndarray:
    """bitnet.cpp's x86 layout of codes [N, K], element by element as its quantiser loops."""
    flat = (codes.reshape(-1, 4, 32) + 1).numpy().astype(np.uint8)  # block, group, byte
    data = flat[:, 0] << 6 | flat[:, 1] << 4 | flat[:, 2] << 2 | flat[:, 3]
    return np.concatenate([data.reshape(-1), np.frombuffer(np.float32(scale).tobytes() + bytes(28), np.uint8)])
