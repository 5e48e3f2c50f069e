"""Reading GGUF files as models; which tensor is which: names.py.

Dimensions: N out-features, K in-features.
"""

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
from bitnet.files.gguf.names import BLOCKS, FLOATS, gguf_name, restore
from bitnet.files.gguf.tokenizer import read_tokenizer
from bitnet.files.source import no_masters
from bitnet.files.tensors import dense_shapes, projection_shape, projections
from bitnet.kernels.reference import WeightCodes
from bitnet.text.tokenizer import Tokenizer

_ACTIVATIONS = {"llama": "silu", "bitnet": "silu", "bitnet-b1.58": "relu2", "bitnet-25": "relu2"}


class GgufSource:
    """A model in a GGUF file, checked before the first tensor is read."""

    def __init__(self, path: Path) -> None:
        """Raises BitNetError for a damaged file and for a model that we cannot run."""
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
            raise BitNetError(f"{self.path}: got no matrix 'token_embd.weight', expected one: the model is incomplete")
        if keys.integer(f"{arch}.expert_count", 0) or keys.text(f"{arch}.rope.scaling.type", "none") != "none":
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
                    f"{self.path}: got no tensor '{name}', expected one of {list(shape)}: the model is incomplete"
                )
            if tensors[name].shape != shape:
                raise BitNetError(
                    f"{self.path}: tensor '{name}': got shape {list(tensors[name].shape)}, expected {list(shape)}"
                )
            if name in dense and tensors[name].type not in FLOATS:
                raise BitNetError(f"{self.path}: tensor '{name}': got {tensors[name].type}, expected F32, F16 or BF16")
        scales = {name.removesuffix("weight") + "scale" for name in set(expected) - dense}
        for name, entry in tensors.items():
            is_scale = name in scales
            if name not in expected and not (is_scale and entry.type == "F32" and entry.shape == (1,)):
                raise BitNetError(f"{self.path}: got the tensor '{name}', which is not part of a {self._arch} model")

    def _linear(self) -> str:
        """ "ternary", or "float" for a file of floats that are not ternary."""
        names = projections(self.config)
        kinds = {self._file.tensors[f"{gguf_name(name)}.weight"].type for name in names}
        if kinds & set(FLOATS) and kinds - set(FLOATS):
            raise BitNetError(
                f"{self.path}: got projections in {', '.join(sorted(kinds))}, expected all ternary or all float"
            )
        if kinds - set(FLOATS) or _ternary_values(self._float_projection(names[0])) is not None:
            return "ternary"
        self.notes.append("the weights are floats: the model is kept as it is, and is not ternary")
        return "float"

    def codes(self, name: str) -> WeightCodes:
        stored = f"{gguf_name(name)}.weight"
        entry, where = self._file.tensors[stored], f"{self.path}: tensor '{stored}'"
        n, k = projection_shape(self.config, name)
        if entry.type in BLOCKS:
            found = BLOCKS[entry.type].decode(self._file.read(stored), n, k, where)
        elif entry.type == "I2_S":
            found = ternary.decode_i2_s(self._file.read(stored), n, k, where)
        else:
            values = _ternary_values(self._float_projection(name))
            if values is None:
                raise BitNetError(f"{where}: got float weights, expected -s, 0 and s as in the first tensor")
            found = values
        scale = found.scale * self._extra_scale(stored)
        return WeightCodes(restore(found.codes, name, self.config), scale)

    def _extra_scale(self, stored: str) -> float:
        """The scale that newer converters store as a separate tensor, or 1."""
        name = stored.removesuffix("weight") + "scale"
        if name not in self._file.tensors:
            return 1.0
        scale = float(self._file.read(name).view(np.float32)[0])
        if not (np.isfinite(scale) and scale > 0):
            raise BitNetError(f"{self.path}: tensor '{name}': got {scale}, expected a finite scale above 0")
        return scale

    def _float_projection(self, name: str) -> Tensor:
        return self._read_floats(f"{gguf_name(name)}.weight")

    def _read_floats(self, stored: str) -> Tensor:
        entry = self._file.tensors[stored]
        return torch.from_numpy(self._file.read(stored)).view(FLOATS[entry.type]).view(entry.shape)

    def dense(self, name: str) -> Tensor:
        return self._read_floats(gguf_name(name))

    def master(self, name: str) -> Tensor:
        if self.config.linear != "float":
            raise no_masters(str(self.path))
        return restore(self._float_projection(name), name, self.config)


def _ternary_values(weight: Tensor) -> WeightCodes | None:
    """Codes and scale of a float tensor whose values are all -s, 0 or s; None for any other tensor."""
    scale = weight.abs().amax()
    codes = weight.sign()
    if not bool(torch.isfinite(scale)) or not bool((weight == codes * scale).all()) or not float(scale) > 0:
        return None
    return WeightCodes(codes.to(torch.int8), scale.float())


class _Keys:
    """The keys of a file, checked for their types: each method raises BitNetError for another one."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self._path, self._values = path, values

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._values.get(key, default)
        if not isinstance(value, str):
            raise BitNetError(f"{self._path}: {key}: got {value!r:.60}, expected a string")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
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
