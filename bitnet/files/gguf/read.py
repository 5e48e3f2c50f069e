"""Models in GGUF files: which tensor is which, and reading them; gguf_export.py writes them.

    our model                      architecture       in llama.cpp
    no sub-norms, SiLU             llama              rotates neighbours: rows of q and k are reordered
    sub-norms, SiLU, tied head     bitnet             rotates halves, as we do
    sub-norms, ReLU^2              bitnet-b1.58       bitnet.cpp only; read, never written

Mainline llama.cpp computes SiLU for every `bitnet` file and no key changes that: a ReLU^2 model would run without a
word and be wrong, so it is refused here.

Dimensions: V vocabulary, D model, F ffn, N out-features, K in-features.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.files import ternary
from bitnet.files.gguf.file import GgufFile
from bitnet.files.gguf.tokenizer import read_tokenizer
from bitnet.files.source import no_masters
from bitnet.files.tensors import dense_shapes, projection_shape, projections
from bitnet.kernels.reference import WeightCodes
from bitnet.text.tokenizer import Tokenizer

BLOCKS = {blocks.name: blocks for blocks in (ternary.TQ2_0, ternary.TQ1_0, ternary.Q2_0)}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ACTIVATIONS = {"llama": "silu", "bitnet": "silu", "bitnet-b1.58": "relu2", "bitnet-25": "relu2"}
_PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}


def gguf_name(name: str) -> str:
    """ "model.layers.3.mlp.up_proj" as "blk.3.ffn_up"; a ".weight" behind it stays."""
    stem = name.removesuffix(".weight")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    there = f"blk.{layer[1]}.{_PARTS[layer[2]]}" if layer else _PARTS[stem]
    return there + name[len(stem) :]


def architecture(config: ModelConfig) -> str:
    """The name under which llama.cpp knows a model of this shape."""
    return "bitnet" if config.sub_norms else "llama"


def _heads(name: str, config: ModelConfig) -> int | None:
    """Heads of a projection whose rows `llama` files order differently, else None."""
    if config.sub_norms:
        return None
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])


def reorder(weight: Tensor, name: str, config: ModelConfig) -> Tensor:
    """Rows of q and k from halves to neighbours, [N, K], for files that rotate neighbours."""
    heads = _heads(name, config)
    return weight if heads is None else weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def restore(weight: Tensor, name: str, config: ModelConfig) -> Tensor:
    """The inverse of `reorder`."""
    heads = _heads(name, config)
    return weight if heads is None else weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


class GgufSource:
    """A model in a GGUF file, checked before the first tensor is read."""

    def __init__(self, path: Path) -> None:
        """Raises BitNetError for a file that is damaged, or that holds a model we cannot run."""
        self.path = path
        self._file = GgufFile(path)
        keys = _Keys(path, self._file.keys)
        self._arch = keys.text("general.architecture")
        if self._arch not in _ACTIVATIONS:
            raise BitNetError(
                f"{path}: got architecture '{self._arch}', expected one of {', '.join(_ACTIVATIONS)}; "
                "other architectures have other blocks"
            )
        self.info: Mapping[str, Any] = {}
        self.notes: list[str] = []
        self.config = self._config(keys)
        self._check_tensors()
        self.config = self.config.replace(linear=self._linear())
        stored = {self._file.tensors[f"{gguf_name(name)}.weight"].type for name in projections(self.config)}
        self.kind = f"GGUF, {self._arch}, {'/'.join(sorted(stored))}"
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_read = False

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The file's tokenizer. Raises BitNetError for one that we cannot use."""
        if not self._tokenizer_read:
            self._tokenizer = read_tokenizer(self.path, self._file.keys, self.config.vocab_size)
            self._tokenizer_read = True
        return self._tokenizer

    def _config(self, keys: "_Keys") -> ModelConfig:
        arch = self._arch
        embedding = self._file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise BitNetError(f"{self.path}: got no matrix 'token_embd.weight', expected one: not a whole model")
        if keys.whole(f"{arch}.expert_count", 0) or keys.text(f"{arch}.rope.scaling.type", "none") != "none":
            raise BitNetError(f"{self.path}: got experts or scaled rotary positions, expected a model without them")
        heads = keys.count(f"{arch}.attention.head_count")
        config = ModelConfig(
            vocab_size=embedding.shape[0],
            hidden_size=keys.count(f"{arch}.embedding_length"),
            intermediate_size=keys.count(f"{arch}.feed_forward_length"),
            num_hidden_layers=keys.count(f"{arch}.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=keys.count(f"{arch}.attention.head_count_kv", heads),
            max_position_embeddings=keys.count(f"{arch}.context_length"),
            hidden_act=_ACTIVATIONS[arch],
            sub_norms=arch != "llama",
            qk_norm=False,
            tie_word_embeddings="output.weight" not in self._file.tensors,
            rope_theta=keys.float(f"{arch}.rope.freq_base", 10_000.0),
            rms_norm_eps=keys.float(f"{arch}.attention.layer_norm_rms_epsilon"),
        )
        for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
            if keys.count(f"{arch}.{key}", config.head_dim) != config.head_dim:
                raise BitNetError(
                    f"{self.path}: {arch}.{key}: got {keys.get(f'{arch}.{key}')}, expected {config.head_dim}, which is "
                    "width by heads; other head sizes are not supported"
                )
        return config

    def _check_tensors(self) -> None:
        tensors, config = self._file.tensors, self.config
        if config.num_hidden_layers > len(tensors):
            raise BitNetError(f"{self.path}: got {len(tensors)} tensors for {config.num_hidden_layers} layers: damaged")
        expected = {gguf_name(name): shape for name, shape in dense_shapes(config).items()}
        dense = set(expected)
        for name in projections(config):
            expected[f"{gguf_name(name)}.weight"] = projection_shape(config, name)
        for name, shape in expected.items():
            if name not in tensors:
                raise BitNetError(
                    f"{self.path}: got no tensor '{name}', expected one of {list(shape)}: not a whole model"
                )
            if tensors[name].shape != shape:
                raise BitNetError(
                    f"{self.path}: tensor '{name}': got shape {list(tensors[name].shape)}, expected {list(shape)}"
                )
            if name in dense and tensors[name].type not in FLOATS:
                raise BitNetError(f"{self.path}: tensor '{name}': got {tensors[name].type}, expected F32, F16 or BF16")
        scales = {name.removesuffix("weight") + "scale" for name in set(expected) - dense}
        for name, place in tensors.items():
            is_scale = name in scales
            if name not in expected and not (is_scale and place.type == "F32" and place.shape == (1,)):
                raise BitNetError(f"{self.path}: got the tensor '{name}', which no {self._arch} model of ours has")

    def _linear(self) -> str:
        """ "ternary", or "float" for a file of floats that are not ternary."""
        names = projections(self.config)
        kinds = {self._file.tensors[f"{gguf_name(name)}.weight"].type for name in names}
        if kinds & set(FLOATS) and kinds - set(FLOATS):
            raise BitNetError(
                f"{self.path}: got projections in {', '.join(sorted(kinds))}, expected all ternary or all float"
            )
        if kinds - set(FLOATS) or _ternary_values(self._read_floats(names[0])) is not None:
            return "ternary"
        self.notes.append("the weights are plain floats: the model stays as it is and is not ternary")
        return "float"

    def codes(self, name: str) -> WeightCodes:
        there = f"{gguf_name(name)}.weight"
        place, where = self._file.tensors[there], f"{self.path}: tensor '{there}'"
        n, k = projection_shape(self.config, name)
        if place.type in BLOCKS:
            found = BLOCKS[place.type].decode(self._file.read(there), n, k, where)
        elif place.type == "I2_S":
            found = ternary.decode_i2_s(self._file.read(there), n, k, where)
        else:
            values = _ternary_values(self._read_floats(name))
            if values is None:
                raise BitNetError(f"{where}: got float weights, expected -s, 0 and s as in the first tensor")
            found = values
        scale = found.scale * self._extra_scale(there)
        return WeightCodes(restore(found.codes, name, self.config), scale)

    def _extra_scale(self, there: str) -> float:
        """The scale that newer converters keep beside the tensor, or 1."""
        name = there.removesuffix("weight") + "scale"
        if name not in self._file.tensors:
            return 1.0
        scale = float(self._file.read(name).view(np.float32)[0])
        if not (np.isfinite(scale) and scale > 0):
            raise BitNetError(f"{self.path}: tensor '{name}': got {scale}, expected a finite scale above 0")
        return scale

    def _read_floats(self, name: str) -> Tensor:
        return self._dense(f"{gguf_name(name)}.weight")

    def _dense(self, there: str) -> Tensor:
        place = self._file.tensors[there]
        return torch.from_numpy(self._file.read(there)).view(FLOATS[place.type]).view(place.shape)

    def dense(self, name: str) -> Tensor:
        return self._dense(gguf_name(name))

    def master(self, name: str) -> Tensor:
        if self.config.linear != "float":
            raise no_masters(str(self.path))
        return restore(self._read_floats(name), name, self.config)


def _ternary_values(weight: Tensor) -> WeightCodes | None:
    """Codes of a float tensor that holds nothing but -s, 0 and s; None for any other."""
    scale = weight.abs().amax()
    codes = weight.sign()
    if not bool(torch.isfinite(scale)) or not bool((weight == codes * scale).all()) or not float(scale) > 0:
        return None
    return WeightCodes(codes.to(torch.int8), scale.float())


class _Keys:
    """The keys of a file, by type."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self._path, self._values = path, values

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._values.get(key, default)
        if not isinstance(value, str):
            raise BitNetError(f"{self._path}: {key}: got {value!r:.60}, expected a text")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise BitNetError(f"{self._path}: {key}: got {value!r:.60}, expected a whole number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise BitNetError(f"{self._path}: {key}: got {value!r:.60}, expected a whole number above 0")
        return value

    def float(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key, default)
        if not isinstance(value, float):
            raise BitNetError(f"{self._path}: {key}: got {value!r:.60}, expected a number")
        return float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06
