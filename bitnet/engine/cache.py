"""Keys and values of a batch of sequences, allocated once."""

from copy import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitnet.config import ModelConfig

if TYPE_CHECKING:
    pass


class KVCache:
    """Keys and values of a batch of sequences, allocated once: per layer [B, G, S, E]."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        limit: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (2, config.num_hidden_layers, batch, config.num_key_value_heads, limit, config.head_dim)
        self._store = torch.empty(shape, device=device, dtype=dtype)
        self.position = 0
        self.layers = [_LayerView(self, i) for i in range(config.num_hidden_layers)]

    def sequence(self, number: int) -> "KVCache":
        """One of the sequences as a cache of its own, with a position of its own, in the same memory."""
        view = copy(self)
        view._store = self._store[:, :, number : number + 1]
        view.layers = [_LayerView(view, i) for i in range(len(self.layers))]
        return view

    def store(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as they are kept, [B, G, S, E] each, the unused end included."""
        keys, values = self._store[:, layer]
        return keys, values


class _LayerView:
    def __init__(self, cache: KVCache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self._cache.position, self._cache.position + k.shape[2]
        keys, values = self._cache._store[:, self._layer]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        return keys[:, :, :end], values[:, :, :end]
