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
from bitnet.files.hf.config import OLD_NAMES, WeightForm, from_config, read_form
from bitnet.files.hf.tokenizer import read_tokenizer
from bitnet.files.json_file import read_json
from bitnet.files.safetensors_file import TensorFiles
from bitnet.files.source import no_masters
from bitnet.files.tensors import dense_shapes, projection_shape, projections
from bitnet.kernels import reference
from bitnet.kernels.reference import WeightCodes
from bitnet.text.tokenizer import Tokenizer

CONVENTIONS = ("multiply", "divide")
# mean |W| of trained models is 0.01 to 3. Read the wrong way, a scale is the inverse of that and far above this limit.
_LARGEST_MEAN = 10.0
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_IGNORED = ("rotary_emb.inv_freq",)  # computed from the config instead


class HfSource:
    """A model in a Hugging Face folder, checked before the first weight is read."""

    def __init__(self, path: Path, convention: str | None = None) -> None:
        """convention: "multiply" or "divide", to override what config.json implies for weight_scale.

        Raises BitNetError for a folder that is damaged, incomplete, or holds a model we cannot run.
        """
        self.path = path
        values = read_json(path / "config.json")
        self._files = TensorFiles(path)
        self.form = read_form(path / "config.json", values)
        if convention is not None:
            self.form = self._forced_form(convention)
        self.config = from_config(path / "config.json", values, self.form, self._files.entries)
        self.kind = f"Hugging Face, {values['model_type']}, {self.form}"
        self.info: Mapping[str, Any] = {}
        self.notes: list[str] = []
        self._values = values
        self._check_tensors()
        if self.form in (WeightForm.MULTIPLY, WeightForm.DIVIDE):
            self._check_convention("correct linear_class, or give" if convention is None else "omit it, or give")
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
        if self.form is WeightForm.MASTER:
            return reference.ternary_weights(self.master(name).float())
        where = f"{self.path}: tensor '{name}.weight'"
        weight = self._files.read(f"{name}.weight")
        if weight.shape == (n, k):  # unpacked by transformers and saved again
            codes = weight.to(torch.int8)
            if not bool((codes == weight).all()) or int(codes.abs().max()) > 1:
                raise BitNetError(f"{where}: got weights that are not packed, expected -1, 0 and 1")
        else:
            codes = ternary.unpack_hf(weight, where)
        return WeightCodes(codes, self._read_scale(name))

    def _read_scale(self, name: str) -> Tensor:
        """mean |W|, [] fp32, in either convention."""
        stored = self._files.read(f"{name}.weight_scale").float().reshape(())
        scale = stored.reciprocal() if self.form is WeightForm.DIVIDE else stored
        if not bool(torch.isfinite(scale)) or not float(scale) > 0:
            raise BitNetError(
                f"{self.path}: tensor '{name}.weight_scale': got {float(stored)}, expected a finite number above 0"
            )
        return scale

    def dense(self, name: str) -> Tensor:
        return self._files.read(self._stored_name(name))

    def master(self, name: str) -> Tensor:
        if self.form in (WeightForm.MULTIPLY, WeightForm.DIVIDE):
            raise no_masters(str(self.path))
        return self._files.read(f"{name}.weight")

    def _stored_name(self, name: str) -> str:
        """A parameter's name in the files: 1bitLLM's have other names for the sub-norms."""
        if name in self._files.entries:
            return name
        for ours, theirs in OLD_NAMES.items():
            if ours in name and name.replace(ours, theirs) in self._files.entries:
                return name.replace(ours, theirs)
        return name

    def _forced_form(self, convention: str) -> WeightForm:
        if convention not in CONVENTIONS:
            raise BitNetError(f"import: got weight scale '{convention}', expected one of {', '.join(CONVENTIONS)}")
        if self.form not in (WeightForm.MULTIPLY, WeightForm.DIVIDE):
            raise BitNetError(f"import: got --weight-scale {convention} for {self.path}, which holds no packed weights")
        return WeightForm(convention)

    def _check_tensors(self) -> None:
        entries, config = self._files.entries, self.config
        if config.num_hidden_layers > len(entries):
            raise BitNetError(f"{self.path}: got {len(entries)} tensors for {config.num_hidden_layers} layers: damaged")
        expected = {self._stored_name(name) for name in dense_shapes(config)}
        for name, shape in dense_shapes(config).items():
            self._expect(self._stored_name(name), {shape: _FLOATS})
        for name in projections(config):
            n, k = projection_shape(config, name)
            expected.add(f"{name}.weight")
            if self.form in (WeightForm.MULTIPLY, WeightForm.DIVIDE):
                expected.add(f"{name}.weight_scale")
                self._expect(f"{name}.weight", self._packed_forms(n, k))
                self._expect(f"{name}.weight_scale", {(1,): _FLOATS, (): _FLOATS})
            else:
                self._expect(f"{name}.weight", {(n, k): _FLOATS})
        expected.add("lm_head.weight")  # some files repeat the embedding there
        for name in entries:
            if name not in expected and not name.endswith(_IGNORED):
                raise BitNetError(f"{self.path}: got the tensor '{name}', which is not part of such a model")

    def _packed_forms(self, n: int, k: int) -> dict[tuple[int, ...], tuple[torch.dtype, ...]]:
        forms: dict[tuple[int, ...], tuple[torch.dtype, ...]] = {(n // 4, k): (torch.uint8,)} if n % 4 == 0 else {}
        if self.form is WeightForm.MULTIPLY:
            forms[n, k] = _FLOATS
        return forms

    def _expect(self, name: str, forms: dict[tuple[int, ...], tuple[torch.dtype, ...]]) -> None:
        """Raise BitNetError for a tensor that is missing or has none of the shapes and dtypes in `forms`."""
        spelt = " or ".join(f"{'/'.join(_short(dtype) for dtype in forms[shape])} {list(shape)}" for shape in forms)
        if name not in self._files.entries:
            raise BitNetError(f"{self.path}: got no tensor '{name}', expected {spelt}: the model is incomplete")
        entry = self._files.entries[name][1]
        if entry.dtype not in forms.get(entry.shape, ()):
            got = f"{_short(entry.dtype)} {list(entry.shape)}"
            raise BitNetError(f"{self.path}: tensor '{name}': got {got}, expected {spelt or 'rows in multiples of 4'}")

    def _check_convention(self, remedy: str) -> None:
        """Raise BitNetError for scales that are plausible only in the other convention: the model would write noise."""
        claimed = self._files.metadata.get("weight_scale")
        other = "divide" if self.form is WeightForm.MULTIPLY else "multiply"
        median = statistics.median(float(self._read_scale(name)) for name in projections(self.config))
        if claimed == other or (median > _LARGEST_MEAN and 1 / median < _LARGEST_MEAN):
            raise BitNetError(
                f"{self.path}: got weight scales of the other convention: read as '{self.form}', mean |W| is "
                f"{median:.3g}, expected below {_LARGEST_MEAN:g}; {remedy} --weight-scale {other}"
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
