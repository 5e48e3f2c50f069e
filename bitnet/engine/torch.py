"""The model as PyTorch modules, on any device: the readable truth that other engines are held against."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitnet.engine.sampling import Sampling
from bitnet.layers import PackedLinear, keep_codes
from bitnet.model import Transformer

if TYPE_CHECKING:
    from bitnet.text.tokenizer import Tokenizer
from bitnet.engine.base import SessionBatch, check_ids, check_length, check_prefill, check_room
from bitnet.engine.cache import KVCache
from bitnet.engine.stream import stream


class TorchEngine:
    """The model as PyTorch modules: packed (`bitnet.load`) or a training model in fp32."""

    name = "torch"

    def __init__(self, model: Transformer) -> None:
        self.tokenizer: Tokenizer | None = None  # carried for the caller; an engine sees ids only
        self.model = model.eval()
        self.config = model.config
        self.device = model.model.norm.weight.device
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.prepare(keep_packed=False)

    def session(self, batch: int = 1, limit: int | None = None) -> "TorchSession":
        """Start `batch` sequences of at most `limit` tokens (default: the model's context)."""
        return TorchSession(self, batch, self.config.context if limit is None else limit)

    def slots(self, count: int, limit: int | None = None) -> "SessionBatch":
        """`count` empty slots of `limit` tokens each (default: the model's context)."""
        return SessionBatch(self, count, self.config.context if limit is None else limit)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """ids: [T] or [B, T] int64. Returns [T, V] or [B, T, V] fp32 on the CPU."""
        ids = check_ids(torch.as_tensor(ids), self.config)
        with keep_codes(self.model):
            scores: Tensor = self.model(torch.atleast_2d(ids).to(self.device)).float().cpu()
        return scores if ids.dim() == 2 else scores[0]

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Collection[int] = (),
        limit: int | None = None,
    ) -> list[int]:
        """Continue `ids`; see `stream`. Returns the new ids only."""
        return list(stream(self, ids, max_new_tokens, sampling, stop, limit))


class TorchSession:
    """A KV cache and the model that fills it."""

    def __init__(self, engine: TorchEngine, batch: int, limit: int) -> None:
        check_room(batch, limit)
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
        """Append one id a sequence, [B] int64. Returns logits [B, V] fp32."""
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
