"""Keys and values of a batch of sequences, allocated once."""

from copy import copy

import torch
from torch import Tensor

from bitnet.config import ModelConfig


class KVCache:
    """Keys and values of a batch of sequences, fp32, allocated once: [B, G, S, E] for each layer.

    Dimensions: B sequences, G key/value heads, S positions, E width of a head.
    """

    def __init__(self, config: ModelConfig, batch: int, limit: int, device: torch.device) -> None:
        shape = (2, config.num_hidden_layers, batch, config.num_key_value_heads, limit, config.head_dim)
        self._store = torch.empty(shape, device=device)
        self.position = 0
        self.layers = [_LayerView(self, i) for i in range(config.num_hidden_layers)]

    def sequence(self, number: int) -> "KVCache":
        """One of the sequences as a cache with its own position, in the same memory."""
        view = copy(self)
        view._store = self._store[:, :, number : number + 1]
        view.layers = [_LayerView(view, i) for i in range(len(self.layers))]
        return view

    def store(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [B, G, S, E] each, the unused end included."""
        keys, values = self._store[:, layer]
        return keys, values


class _LayerView:
    """One layer of a cache, as `bitnet.layers.LayerCache`."""

    def __init__(self, cache: KVCache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self._cache.position, self._cache.position + k.shape[2]
        keys, values = self._cache.store(self._layer)
        keys[:, :, start:end], values[:, :, start:end] = k, v
        return keys[:, :, :end], values[:, :, :end]
