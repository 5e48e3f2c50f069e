"""The transformer: blocks of BitNet b1.58 2B4T, embedding and head.

    x = x + attention(input_layernorm(x))              attention(h) = o_proj(attn_sub_norm(attend(q, k, v of h)))
    x = x + mlp(post_attention_layernorm(x))           mlp(h) = down_proj(ffn_sub_norm(act(gate_proj(h)) * up_proj(h)))

Parameter names are those of transformers' BitNetForCausalLM, so that checkpoints map one to one.
Dimensions: B batch, T time, D model, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitnet.config import ModelConfig
from bitnet.layers import Attention, Embedding, FeedForward, LayerCache, PreNorm, RMSNorm, rotary_table
from bitnet.quant import QUANTISED, Precision


class Block(nn.Module):
    """One layer: attention and feed-forward network, each added to the residual stream.

    recompute: run the forward pass again in the backward pass, instead of keeping its intermediate results.
    """

    def __init__(self, config: ModelConfig, *, recompute: bool = False) -> None:
        super().__init__()
        self.input_layernorm = PreNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = PreNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.recompute = recompute

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | None = None,
        precision: Precision = QUANTISED,
    ) -> Tensor:
        """x: [B, T, D] float, rotary: cosines and sines [T, E]. Returns [B, T, D]."""
        if self.recompute and torch.is_grad_enabled():
            result: Tensor = checkpoint(self._forward, x, rotary, cache, precision, use_reentrant=False)
            return result
        return self._forward(x, rotary, cache, precision)

    def _forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerCache | None, precision: Precision
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, precision)
        return x + self.mlp(self.post_attention_layernorm(x), precision)


class Decoder(nn.Module):
    """Embedding, blocks and final norm; a separate module, so that parameters are named as in transformers."""

    def __init__(self, config: ModelConfig, *, exact_embeddings: bool = False, recompute: bool = False) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, exact=exact_embeddings)
        self.layers = nn.ModuleList(Block(config, recompute=recompute) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A causal language model: token ids [B, T] in, logits [B, T, V] out.

    exact_embeddings: see `Embedding`. recompute: see `Block`.
    """

    def __init__(self, config: ModelConfig, *, exact_embeddings: bool = False, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, exact_embeddings=exact_embeddings, recompute=recompute)
        head = None if config.tie_word_embeddings else (config.vocab_size, config.hidden_size)
        self.lm_head = None if head is None else Embedding(*head, exact=exact_embeddings)
        self._rotary: tuple[Tensor, Tensor] | None = None

    def blocks(self) -> list[Block]:
        """The layers, first to last."""
        return [block for block in self.model.layers if isinstance(block, Block)]

    def init_weights(self, seed: int) -> None:
        """Write the values of `fresh_weights` into the parameters."""
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name, value in self.fresh_weights(seed):
                parameters[name].copy_(value)

    def fresh_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Names and first values: normal(0, initializer_range), outputs of blocks scaled by 1 / sqrt(2 layers).

        The scale of the residual branches is GPT-2's; in a ternary layer it survives only as the stored scale s_w.
        Yields one parameter at a time: the parameters of a sharded model never need to fit on one device.
        """
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                yield name, torch.ones(parameter.shape)
                continue
            width = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else std
            # Drawn on the CPU: a seed gives the same model on every device.
            yield name, torch.empty(parameter.shape).normal_(0.0, width, generator=generator)

    def rotary(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [length, E] fp32 of positions start .. start + length - 1."""
        if self._rotary is None or self._rotary[0].device != device or self._rotary[0].shape[0] < start + length:
            # In powers of two, so that decoding past the context does not build tables for every token.
            size = max(self.config.context, 1 << (start + length - 1).bit_length())
            self._rotary = rotary_table(self.config, size, device)
        cos, sin = self._rotary
        return cos[start : start + length], sin[start : start + length]

    def hidden(
        self,
        ids: Tensor,
        start: int = 0,
        caches: Sequence[LayerCache] | None = None,
        precision: Precision = QUANTISED,
    ) -> Tensor:
        """States [B, T, D] fp32 after the final norm. ids: [B, T] int64 at positions start, start + 1, ..."""
        x = F.embedding(ids, self.model.embed_tokens.values())
        rotary = self.rotary(start, ids.shape[1], ids.device)
        for i, block in enumerate(self.model.layers):
            x = block(x, rotary, caches[i] if caches else None, precision)
        normed: Tensor = self.model.norm(x)
        return normed

    @property
    def head(self) -> Embedding:
        """The matrix that turns states into logits: `lm_head`, or the embedding where the two are tied."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [..., D] float. Returns [..., V]."""
        return F.linear(hidden, self.head.values())

    def forward(self, ids: Tensor, precision: Precision = QUANTISED) -> Tensor:
        """ids: [B, T] int64. Returns logits [B, T, V]."""
        return self.logits(self.hidden(ids, precision=precision))
