"""Any source into our packed file, tensor by tensor: the memory needed is that of the largest one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.files.packed import Report, check_target, packed_tensors, write_file
from bitnet.files.packed_layout import check_tokenizer
from bitnet.files.source import Source
from bitnet.files.tensors import is_embedding
from bitnet.kernels.reference import WeightCodes
from bitnet.text.tokenizer import Tokenizer

_NO_TOKENIZER = "no tokenizer is inside: generate and eval need one (--tokenizer FOLDER), bitnet.load() takes ids"


def import_model(source: Source, path: Path, tokenizer: Tokenizer | None, report: Report | None = None) -> list[str]:
    """Write a source's model into a packed file. Returns notes for the user, such as what was rounded.

    tokenizer: the one to store in the file, the source's or another. report: called with the bytes written and the
    bytes in all. Raises BitNetError for a damaged source, for a tokenizer of another size, and for a target that is
    not a packed file; the target is then as it was.
    """
    check_tokenizer(source.config, tokenizer)
    check_target(path, "import")
    checked = _CheckedSource(source)
    info = {"imported_from": source.kind, **source.info}
    write_file(path, source.config, packed_tensors(checked), tokenizer, info=info, report=report)
    missing = [_NO_TOKENIZER] if tokenizer is None else []
    return [*source.notes, *checked.rounding_notes(), *missing]


class _CheckedSource:
    """A source whose values are checked, and rounded to the bf16 of a packed file, as they are read."""

    def __init__(self, source: Source) -> None:
        self._source, self._largest_change = source, 0.0
        self.kind, self.config, self.notes = source.kind, source.config, source.notes
        self.info: Mapping[str, Any] = source.info

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._source.tokenizer

    def codes(self, name: str) -> WeightCodes:
        weights = self._source.codes(name)
        _check_finite(f"{name}: scale", weights.scale)
        return weights

    def dense(self, name: str) -> Tensor:
        value = self._source.dense(name)
        _check_finite(name, value)
        return self._round(value) if is_embedding(name) else value

    def master(self, name: str) -> Tensor:
        value = self._source.master(name)
        _check_finite(name, value)
        return self._round(value)

    def rounding_notes(self) -> list[str]:
        """What rounding changed, for the user; nothing where all values were bf16 ones."""
        if not self._largest_change:
            return []
        change = f"{self._largest_change:.2%} of the largest value"
        return [f"embeddings and float weights were rounded to bf16, by at most {change}"]

    def _round(self, value: Tensor) -> Tensor:
        rounded = value.to(torch.bfloat16)
        if value.dtype != torch.bfloat16:
            for part, exact in zip(rounded.split(4096), value.split(4096), strict=True):  # rows: no second copy
                exact = exact.float()
                change = (part.float() - exact).abs().amax() / exact.abs().amax().clamp(min=1e-30)
                self._largest_change = max(self._largest_change, float(change))
        return rounded


def _check_finite(name: str, value: Tensor) -> None:
    if not all(bool(torch.isfinite(part).all()) for part in value.reshape(-1).split(1 << 22)):  # no second copy
        raise BitNetError(f"{name}: got values that are not finite, expected numbers: the source is damaged")
