"""The model as PyTorch modules, on any device: the readable reference that the other engines are tested against."""

import torch
from torch import Tensor

from bitnet.engine.base import Engine, SessionBatch, check_length, check_prefill
from bitnet.engine.cache import KVCache
from bitnet.layers import PackedLinear, keep_codes
from bitnet.model import Transformer


class TorchEngine(Engine):
    """The model as PyTorch modules: one built from a packed file, or a training model in fp32."""

    name = "torch"

    def __init__(self, model: Transformer) -> None:
        self.model = model.eval()
        self.config = model.config
        self.device = model.model.norm.weight.device
        for layer in self._packed_layers():
            layer.prepare(keep_packed=False)

    def _packed_layers(self) -> list[PackedLinear]:
        return [module for module in self.model.modules() if isinstance(module, PackedLinear)]

    @property
    def weight_bytes(self) -> int:
        """See `Engine.weight_bytes`."""
        total = sum(parameter.nbytes for parameter in self.model.parameters())
        if self.model.lm_head is not None:
            total -= self.model.model.embed_tokens.weight.nbytes  # of which a token reads one row
        return total + sum(layer.prepare().nbytes for layer in self._packed_layers())

    def _session(self, batch: int, limit: int) -> "TorchSession":
        return TorchSession(self, batch, limit)

    def _sequence_batch(self, count: int, limit: int) -> SessionBatch:
        return SessionBatch(self, count, limit)

    @torch.inference_mode()
    def _logits(self, ids: Tensor) -> Tensor:
        with keep_codes(self.model):
            scores: Tensor = self.model(ids.to(self.device))
        return scores


class TorchSession:
    """A KV cache and the model that fills it; see `bitnet.engine.base.Session`."""

    def __init__(self, engine: TorchEngine, batch: int, limit: int) -> None:
        self._model, self._device, self._limit = engine.model, engine.device, limit
        self._cache = KVCache(engine.config, batch, limit, engine.device)
        self._batch, self._config = batch, engine.config

    @property
    def position(self) -> int:
        """Tokens held so far."""
        return self._cache.position

    @property
    def limit(self) -> int:
        """Tokens that fit."""
        return self._limit

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Append ids [B, T] int64, T >= 1. Returns the logits of the last position, [B, V] fp32."""
        return self._model.logits(self._append(ids)[:, -1]).float()

    def decode(self, ids: Tensor) -> Tensor:
        """Append one id to each sequence, [B] int64. Returns logits [B, V] fp32."""
        return self.prefill(ids[:, None])

    @torch.inference_mode()
    def score(self, ids: Tensor) -> Tensor:
        """Append ids [B, T] int64, T >= 1. Returns the logits of every position, [B, T, V] fp32."""
        return self._model.logits(self._append(ids)).float()

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of every sequence. Raises BitNetError for more than there are."""
        check_length(length, self.position)
        self._cache.position = length

    def _append(self, ids: Tensor) -> Tensor:
        ids = check_prefill(ids, self._config, self._batch, self.position, self.limit)
        hidden = self._model.hidden(ids.to(self._device), self.position, self._cache.layers)
        self._cache.position += ids.shape[1]
        return hidden
