"""Models in GGUF files: which tensor is which, what llama.cpp can run, reading and writing.

    our model                      architecture       in llama.cpp
    no sub-norms, SiLU             llama              rotates neighbours: rows of q and k are reordered
    sub-norms, SiLU, tied head     bitnet             rotates halves, as we do
    sub-norms, ReLU^2              bitnet-b1.58       bitnet.cpp only; read, never written

Mainline llama.cpp computes SiLU for every `bitnet` file and no key changes that: a ReLU^2 model would run without a
word and be wrong, so it is refused here.

Dimensions: V vocabulary, D model, F ffn, N out-features, K in-features.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet.checkpoint import replacing
from bitnet.config import ModelConfig
from bitnet.errors import BitNetError
from bitnet.formats import ternary
from bitnet.formats.gguf_file import MAGIC, Float32, GgufFile, write_gguf
from bitnet.formats.gguf_tokenizer import read_tokenizer, tokenizer_keys
from bitnet.formats.source import Source, dense_shapes, no_masters, projection_shape, projections
from bitnet.kernels.reference import WeightCodes
from bitnet.tokenizer import Tokenizer

TYPES = ("tq2_0", "tq1_0", "q2_0", "f16", "f32")
_FILE_TYPES = {"f32": 0, "f16": 1, "tq1_0": 36, "tq2_0": 37, "q2_0": 41}  # general.file_type
_BLOCKS = {blocks.name: blocks for blocks in (ternary.TQ2_0, ternary.TQ1_0, ternary.Q2_0)}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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


# ---- writing -----------------------------------------------------------------------------------------------


def check_exportable(config: ModelConfig, kind: str) -> None:
    """Raise BitNetError, with the reason and the way out, for a model that llama.cpp would not run or run wrongly."""
    if kind not in TYPES:
        raise BitNetError(f"export: got type '{kind}', expected one of {', '.join(TYPES)}")
    retrain = "train one that llama.cpp runs: --preset nano-portable, or"
    if config.qk_norm:
        raise BitNetError(
            "export: got a model with QK norm, which llama.cpp has neither for bitnet nor for llama files; "
            f"{retrain} --set model.qk_norm=false"
        )
    if config.hidden_act != "silu":
        raise BitNetError(
            "export: got a model with ReLU^2; llama.cpp computes SiLU for every such file and gives wrong text without "
            f"a word; {retrain} --set model.hidden_act=silu; or export --to hf, which holds it"
        )
    if config.sub_norms and not config.tie_word_embeddings:
        raise BitNetError(
            "export: got a model with sub-norms and a head of its own, which llama.cpp's bitnet files do not have; "
            f"{retrain} --set model.tie_word_embeddings=true or --set model.sub_norms=false; or export --to hf"
        )
    if kind in ("f16", "f32"):
        return
    if config.linear == "plain":
        raise BitNetError(f"export: got a model with plain weights, which are not ternary, for {kind}; use --type f16")
    blocks = _BLOCKS[kind.upper()]
    for key in ("hidden_size", "intermediate_size"):
        size = getattr(config, key)
        if size % blocks.size:
            way_out = "--type q2_0 takes multiples of 64, " if size % 64 == 0 else ""
            raise BitNetError(
                f"export: got {key} {size}, expected a multiple of {blocks.size}, the block of {kind}; "
                f"{way_out}--type f16 takes any size"
            )


def export_gguf(source: Source, path: Path, kind: str) -> Path:
    """Write a GGUF file, its projections in `kind`. Raises BitNetError as `check_exportable` does, before it writes."""
    config = source.config
    check_exportable(config, kind)
    _check_target(path)
    table = "F32" if kind == "f32" else "F16"
    plan: list[tuple[str, tuple[int, ...], str]] = []
    dense = dense_shapes(config)
    for name, shape in dense.items():
        plan.append((gguf_name(name), shape, table if len(shape) == 2 else "F32"))
    plan += [
        (f"{gguf_name(name)}.weight", projection_shape(config, name), kind.upper()) for name in projections(config)
    ]

    def contents() -> Iterator[ternary.Bytes]:
        for name, (_, _, stored) in zip(dense, plan, strict=False):
            yield _floats(source.dense(name), stored, name)
        for name in projections(config):
            yield _projection(source, name, kind.upper())

    keys = {**_model_keys(config, path.stem, kind), **tokenizer_keys(source.tokenizer)}
    with replacing(path) as work, work.open("wb") as file:
        write_gguf(file, keys, plan, contents())
    return path


def architecture(config: ModelConfig) -> str:
    """The name under which llama.cpp knows a model of this shape."""
    return "bitnet" if config.sub_norms else "llama"


def _model_keys(config: ModelConfig, name: str, kind: str) -> dict[str, Any]:
    arch = architecture(config)
    return {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.context,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": Float32(config.rms_norm_eps),
        f"{arch}.rope.freq_base": Float32(config.rope_theta),
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.vocab_size": config.vocab_size,
    }


def _projection(source: Source, name: str, stored: str) -> ternary.Bytes:
    config = source.config
    if config.linear == "plain":
        return _floats(_reorder(source.master(name), name, config), stored, name)
    codes, scale = source.codes(name)
    codes = _reorder(codes, name, config)
    if stored in _BLOCKS:
        return _BLOCKS[stored].encode(WeightCodes(codes, scale))
    return _floats(codes * scale, stored, name)


def _floats(values: Tensor, stored: str, name: str) -> ternary.Bytes:
    converted = values.to(_FLOATS[stored]).contiguous()
    if not bool(torch.isfinite(converted).all()):
        raise BitNetError(f"export: {name} holds values that {stored} cannot hold; use --type f32")
    data: ternary.Bytes = converted.reshape(-1).view(torch.uint8).numpy()
    return data


def _heads(name: str, config: ModelConfig) -> int | None:
    """Heads of a projection whose rows `llama` files order differently, else None."""
    if config.sub_norms:
        return None
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])


def _reorder(weight: Tensor, name: str, config: ModelConfig) -> Tensor:
    """Rows of q and k from halves to neighbours, [N, K], for files that rotate neighbours."""
    heads = _heads(name, config)
    return weight if heads is None else weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _restore(weight: Tensor, name: str, config: ModelConfig) -> Tensor:
    heads = _heads(name, config)
    return weight if heads is None else weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _check_target(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise BitNetError(f"export: got '{path}', expected a file to write in a folder that is there (-o model.gguf)")
    if path.exists():
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise BitNetError(f"export: '{path}' exists and is no GGUF file; remove it or choose another name (-o)")


# ---- reading -----------------------------------------------------------------------------------------------


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
        if keys.get(f"{arch}.expert_count") or keys.get(f"{arch}.rope.scaling.type", "none") != "none":
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
            if name in dense and tensors[name].type not in _FLOATS:
                raise BitNetError(f"{self.path}: tensor '{name}': got {tensors[name].type}, expected F32, F16 or BF16")
        for name, place in tensors.items():
            is_scale = name.endswith(".scale") and name.removesuffix("scale") + "weight" in set(expected) - dense
            if name not in expected and not (is_scale and place.type == "F32" and place.shape == (1,)):
                raise BitNetError(f"{self.path}: got the tensor '{name}', which no {self._arch} model of ours has")

    def _linear(self) -> str:
        """ "ternary", or "plain" for a file of floats that are not ternary."""
        names = projections(self.config)
        kinds = {self._file.tensors[f"{gguf_name(name)}.weight"].type for name in names}
        if kinds & set(_FLOATS) and kinds - set(_FLOATS):
            raise BitNetError(
                f"{self.path}: got projections in {', '.join(sorted(kinds))}, expected all ternary or all float"
            )
        if kinds - set(_FLOATS) or _ternary_values(self._read_floats(names[0])) is not None:
            return "ternary"
        self.notes.append("the weights are plain floats: the model stays as it is and is not ternary")
        return "plain"

    def codes(self, name: str) -> WeightCodes:
        there = f"{gguf_name(name)}.weight"
        place, where = self._file.tensors[there], f"{self.path}: tensor '{there}'"
        n, k = projection_shape(self.config, name)
        if place.type in _BLOCKS:
            found = _BLOCKS[place.type].decode(self._file.read(there), n, k, where)
        elif place.type == "I2_S":
            found = ternary.decode_i2_s(self._file.read(there), n, k, where)
        else:
            values = _ternary_values(self._read_floats(name))
            if values is None:
                raise BitNetError(f"{where}: got float weights, expected -s, 0 and s as in the first tensor")
            found = values
        scale = found.scale * self._extra_scale(there)
        return WeightCodes(_restore(found.codes, name, self.config), scale)

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
        return torch.from_numpy(self._file.read(there)).view(_FLOATS[place.type]).view(place.shape)

    def dense(self, name: str) -> Tensor:
        return self._dense(gguf_name(name))

    def master(self, name: str) -> Tensor:
        if self.config.linear != "plain":
            raise no_masters(str(self.path))
        return _restore(self._read_floats(name), name, self.config)


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

    def text(self, key: str) -> str:
        value = self._values.get(key)
        if not isinstance(value, str):
            raise BitNetError(f"{self._path}: {key}: got {value!r:.60}, expected a text")
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
