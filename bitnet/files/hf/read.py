"""Reading a Hugging Face folder: masters, both packed conventions, and float models; one file or shards.

Dimensions: N out-features, K in-features.
"""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.files import ternary
from bitnet.files.hf.config import OLD_NAMES, Kind, from_config, kind_of
from bitnet.files.hf.tokenizer import read_tokenizer
from bitnet.files.json_file import read_json
from bitnet.files.safetensors_file import TensorFiles
from bitnet.files.source import no_masters
from bitnet.files.tensors import dense_shapes, projection_shape, projections
from bitnet.kernels import reference
from bitnet.kernels.reference import WeightCodes
from bitnet.text.tokenizer import Tokenizer

CONVENTIONS = ("multiply", "divide")
# mean |W| of trained models is 0.01 to 3. The other reading of a scale is its inverse: far above this, it is wrong.
_LARGEST_MEAN = 10.0
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_IGNORED = ("rotary_emb.inv_freq",)  # a table, computed anew


class HfSource:
    """A model in a Hugging Face folder, checked before the first weight is read."""

    def __init__(self, path: Path, convention: str | None = None) -> None:
        """convention: "multiply" or "divide" instead of what config.json says of weight_scale.

        Raises BitNetError for a folder that is damaged, incomplete, or holds a model we cannot run.
        """
        self.path = path
        values = read_json(path / "config.json")
        self._files = TensorFiles(path)
        self.mode = kind_of(path / "config.json", values)
        if convention is not None:
            self.mode = self._forced(convention)
        self.config = from_config(path / "config.json", values, self.mode, self._files.entries)
        self.kind = f"Hugging Face, {values['model_type']}, {self.mode}"
        self.info: Mapping[str, Any] = {}
        self.notes: list[str] = []
        self._values = values
        self._check_tensors()
        if self.mode in (Kind.MULTIPLY, Kind.DIVIDE):
            self._check_convention("set linear_class right, or" if convention is None else "leave it away, or give")
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_read = False

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The folder's tokenizer, None where it has none. Raises BitNetError for one that we cannot use."""
        if not self._tokenizer_read:
            self._tokenizer = read_tokenizer(self.path, self._values, self.config.vocab_size)
            self._tokenizer_read = True
        return self._tokenizer

    def codes(self, name: str) -> WeightCodes:
        n, k = projection_shape(self.config, name)
        if self.mode is Kind.MASTER:
            return reference.ternary_weights(self.master(name).float())
        where = f"{self.path}: tensor '{name}.weight'"
        weight = self._files.read(f"{name}.weight")
        if weight.shape == (n, k):  # unpacked by transformers and saved again
            codes = weight.to(torch.int8)
            if not bool((codes == weight).all()) or int(codes.abs().max()) > 1:
                raise BitNetError(f"{where}: got weights that are not packed, expected -1, 0 and 1")
        else:
            codes = ternary.unpack_hf(weight, where)
        return WeightCodes(codes, self._scale(name))

    def _scale(self, name: str) -> Tensor:
        """mean |W|, [] fp32, whichever way it is stored."""
        stored = self._files.read(f"{name}.weight_scale").float().reshape(())
        scale = stored.reciprocal() if self.mode is Kind.DIVIDE else stored
        if not bool(torch.isfinite(scale)) or not float(scale) > 0:
            raise BitNetError(
                f"{self.path}: tensor '{name}.weight_scale': got {float(stored)}, expected a finite number above 0"
            )
        return scale

    def dense(self, name: str) -> Tensor:
        return self._files.read(self._name(name))

    def master(self, name: str) -> Tensor:
        if self.mode in (Kind.MULTIPLY, Kind.DIVIDE):
            raise no_masters(str(self.path))
        return self._files.read(f"{name}.weight")

    def _name(self, name: str) -> str:
        """A parameter's name in the files, which in 1bitLLM's is another for the sub-norms."""
        if name in self._files.entries:
            return name
        for ours, theirs in OLD_NAMES.items():
            if ours in name and name.replace(ours, theirs) in self._files.entries:
                return name.replace(ours, theirs)
        return name

    def _forced(self, convention: str) -> Kind:
        if convention not in CONVENTIONS:
            raise BitNetError(f"import: got weight scale '{convention}', expected one of {', '.join(CONVENTIONS)}")
        if self.mode not in (Kind.MULTIPLY, Kind.DIVIDE):
            raise BitNetError(f"import: got --weight-scale {convention} for {self.path}, which holds no packed weights")
        return Kind(convention)

    def _check_tensors(self) -> None:
        entries, config = self._files.entries, self.config
        if config.num_hidden_layers > len(entries):
            raise BitNetError(f"{self.path}: got {len(entries)} tensors for {config.num_hidden_layers} layers: damaged")
        expected = {self._name(name) for name in dense_shapes(config)}
        for name, shape in dense_shapes(config).items():
            self._expect(self._name(name), {shape: _FLOATS})
        for name in projections(config):
            n, k = projection_shape(config, name)
            expected.add(f"{name}.weight")
            if self.mode in (Kind.MULTIPLY, Kind.DIVIDE):
                expected.add(f"{name}.weight_scale")
                self._expect(f"{name}.weight", self._packed_forms(n, k))
                self._expect(f"{name}.weight_scale", {(1,): _FLOATS, (): _FLOATS})
            else:
                self._expect(f"{name}.weight", {(n, k): _FLOATS})
        expected.add("lm_head.weight")  # some files repeat the embedding there
        for name in entries:
            if name not in expected and not name.endswith(_IGNORED):
                raise BitNetError(f"{self.path}: got the tensor '{name}', which no such model of ours has")

    def _packed_forms(self, n: int, k: int) -> dict[tuple[int, ...], tuple[torch.dtype, ...]]:
        forms: dict[tuple[int, ...], tuple[torch.dtype, ...]] = {(n // 4, k): (torch.uint8,)} if n % 4 == 0 else {}
        if self.mode is Kind.MULTIPLY:
            forms[n, k] = _FLOATS
        return forms

    def _expect(self, name: str, forms: dict[tuple[int, ...], tuple[torch.dtype, ...]]) -> None:
        """Refuse a tensor that is missing or has none of the shapes and dtypes in `forms`."""
        spelt = " or ".join(f"{'/'.join(_short(dtype) for dtype in forms[shape])} {list(shape)}" for shape in forms)
        if name not in self._files.entries:
            raise BitNetError(f"{self.path}: got no tensor '{name}', expected {spelt}: not a whole model")
        entry = self._files.entries[name][1]
        if entry.dtype not in forms.get(entry.shape, ()):
            got = f"{_short(entry.dtype)} {list(entry.shape)}"
            raise BitNetError(f"{self.path}: tensor '{name}': got {got}, expected {spelt or 'rows in multiples of 4'}")

    def _check_convention(self, way_out: str) -> None:
        """Refuse scales that make sense only the other way round; read as they stand they would give noise."""
        claimed = self._files.metadata.get("weight_scale")
        other = "divide" if self.mode is Kind.MULTIPLY else "multiply"
        median = statistics.median(float(self._scale(name)) for name in projections(self.config))
        if claimed == other or (median > _LARGEST_MEAN and 1 / median < _LARGEST_MEAN):
            raise BitNetError(
                f"{self.path}: got weight scales of the other sense: read as '{self.mode}', mean |W| is "
                f"{median:.3g}, expected below {_LARGEST_MEAN:g}; {way_out} --weight-scale {other}"
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
