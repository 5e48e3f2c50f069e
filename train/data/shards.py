"""Token shards on disk: their manifest, and reading them.

    train-00000.bin ...   token ids only, little-endian uint16 (uint32 above 65,536 ids); BOS before each document
    val-00000.bin ...     the same
    tokenizer.model       the bytes of the tokenizer
    manifest.json         dtype, counts, sizes and sha256 of all files, and digests of the settings and the sources

The files are not trusted: whatever they contain, reading returns their content or raises BitNetError.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import BitNetError
from bitnet.schema import check_choice, check_range, check_types, from_values
from bitnet.text.load import load_tokenizer
from bitnet.text.tokenizer import Tokenizer

FORMAT, VERSION = "bitnet-tokens", 2
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.model"  # file names
MANIFEST_LIMIT = 16 << 20  # bytes; larger manifests are not read
VERIFY_TOKENS = 1 << 20  # ids read at a time when all are checked


@dataclass(frozen=True)
class Shard:
    """One file of token ids."""

    name: str
    tokens: int
    size: int  # bytes
    sha256: str

    def __post_init__(self) -> None:
        check_types(self, "shard")
        check_range(self, "shard", ("tokens", "size"), 1)


@dataclass(frozen=True)
class Split:
    """The training or the validation half of a dataset."""

    documents: int
    tokens: int
    text_bytes: int  # of the text in UTF-8: the unit of bits per byte
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        check_types(self, "split")
        check_range(self, "split", ("documents", "tokens", "text_bytes"), 1)
        if sum(shard.tokens for shard in self.shards) != self.tokens:
            raise BitNetError(f"split.tokens: got {self.tokens}, expected the sum over its shards")


@dataclass(frozen=True)
class NamedSize:
    """A source of text, as the manifest lists it."""

    name: str
    size: int

    def __post_init__(self) -> None:
        check_types(self, "source")


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json, without format and version."""

    settings: str  # digest of the data and tokenizer settings
    fingerprint: str  # digest of those and of the source files
    tokenizer_kind: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    train: Split
    val: Split
    source_count: int
    source_bytes: int
    sources: tuple[NamedSize, ...]  # the first LISTED_SOURCES

    def __post_init__(self) -> None:
        check_types(self, "manifest")
        check_range(self, "manifest", ("vocab_size", "source_count"), 1)
        check_choice(self, "manifest", "dtype", (dtype_for(self.vocab_size),))
        for split in ("train", "val"):
            for i, shard in enumerate(getattr(self, split).shards):
                if shard.name != shard_name(split, i) or shard.size != shard.tokens * np.dtype(self.dtype).itemsize:
                    raise BitNetError(
                        f"shard: got {shard}, expected the name {shard_name(split, i)} and a fitting size"
                    )

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)


def _read_manifest(path: Path) -> Manifest:
    try:
        if path.stat().st_size > MANIFEST_LIMIT:
            raise BitNetError(f"got {path.stat().st_size} bytes, expected at most {MANIFEST_LIMIT}")
        values = json.loads(path.read_bytes())
        made_by = values.pop("format"), values.pop("version")
        if made_by != (FORMAT, VERSION):
            raise BitNetError(
                f"got format {made_by[0]!r} version {made_by[1]!r}, expected {FORMAT!r} version {VERSION}"
            )
        for split in ("train", "val"):
            values[split]["shards"] = [from_values(Shard, shard, "shard") for shard in values[split]["shards"]]
            values[split] = from_values(Split, values[split], split)
        values["sources"] = [from_values(NamedSize, source, "source") for source in values["sources"]]
        return from_values(Manifest, values, "manifest")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> BitNetError:
    text = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
    return BitNetError(f"{path}: {' '.join(text.split())}; restore it, or delete the folder and prepare the data again")


def dtype_for(vocab_size: int) -> str:
    """The NumPy dtype of the ids of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def shard_name(split: str, i: int) -> str:
    """The file name of the i-th shard of "train" or "val"."""
    return f"{split}-{i:05d}.bin"


class TokenStream:
    """The tokens of a split as one sequence over memory-mapped shards."""

    def __init__(self, folder: Path, split: Split, dtype: str, vocab_size: int, bos_id: int | None) -> None:
        self.text_bytes = split.text_bytes
        self.documents = split.documents
        self.bos_id = bos_id  # precedes each document; None if the tokenizer has none
        self._vocab_size = vocab_size
        kind = np.dtype(dtype).newbyteorder("<")
        self._shards = [np.memmap(folder / shard.name, kind, "r") for shard in split.shards]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        """Tokens, including BOS."""
        return int(self._ends[-1])

    def read(self, start: int, n: int) -> NDArray[np.int64]:
        """Tokens start .. start + n - 1, int64 [n]. Raises BitNetError for an id outside the vocabulary."""
        assert 0 <= start <= start + n <= len(self), (start, n, len(self))
        out = np.empty(n, dtype=np.int64)
        done = 0
        i = int(np.searchsorted(self._ends, start, side="right"))
        while done < n:
            shard = self._shards[i]
            at = start + done - (int(self._ends[i]) - len(shard))
            part = shard[at : at + n - done]
            out[done : done + len(part)] = part
            done += len(part)
            i += 1
        if n and int(out.max()) >= self._vocab_size:  # on a GPU it would be a device assertion without a location
            raise BitNetError(
                f"got the token id {int(out.max())} between tokens {start} and {start + n}, expected ids below "
                f"{self._vocab_size}; the shards are damaged, prepare the data again"
            )
        return out


@dataclass(frozen=True)
class TokenDataset:
    """A prepared folder, opened for reading."""

    path: Path
    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints mean equal tokens."""
        return self.manifest.fingerprint


def is_prepared(path: Path) -> bool:
    """Whether a folder holds what prepare() writes."""
    return (path / MANIFEST).is_file()


def work_folder(path: Path) -> Path:
    """Where prepare() writes a dataset before it renames it to `path`."""
    return path.with_name(path.name + ".tmp")


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a prepared folder, whose shards may be missing.

    Raises BitNetError when the folder has no manifest or the tokenizer is damaged.
    """
    return _open_tokenizer(path)[0]


def open_dataset(path: Path, verify: bool = False) -> TokenDataset:
    """Open what prepare() wrote and check file sizes; `verify` also checks every sha256 and token id.

    Raises BitNetError when the folder has no manifest or is damaged.
    """
    tokenizer, manifest = _open_tokenizer(path)
    try:
        for shard in manifest.train.shards + manifest.val.shards:
            _check_shard(path / shard.name, shard, verify)
        train, val = (
            TokenStream(path, split, manifest.dtype, manifest.vocab_size, tokenizer.bos_id)
            for split in (manifest.train, manifest.val)
        )
    except OSError as error:
        raise _damaged(path, error) from error
    if verify:
        for stream in (train, val):
            for start in range(0, len(stream), VERIFY_TOKENS):
                stream.read(start, min(VERIFY_TOKENS, len(stream) - start))
    return TokenDataset(path, tokenizer, train, val, manifest)


def _open_tokenizer(path: Path) -> tuple[Tokenizer, Manifest]:
    if not is_prepared(path):
        raise BitNetError(f"{path}: got no manifest.json, expected a prepared dataset; prepare one or correct the path")
    manifest = _read_manifest(path / MANIFEST)
    try:
        data = (path / TOKENIZER).read_bytes()
    except OSError as error:
        raise _damaged(path / TOKENIZER, error) from error
    if hashlib.sha256(data).hexdigest() != manifest.tokenizer_sha256:
        raise _damaged(path / TOKENIZER, "got another file than that of the manifest")
    tokenizer = load_tokenizer(manifest.tokenizer_kind, data)
    if tokenizer.vocab_size != manifest.vocab_size:
        raise _damaged(path, f"got {tokenizer.vocab_size} tokenizer ids, expected {manifest.vocab_size}")
    return tokenizer, manifest


def _check_shard(path: Path, shard: Shard, verify: bool) -> None:
    if path.stat().st_size != shard.size:
        raise _damaged(path, f"got {path.stat().st_size} bytes, expected {shard.size}")
    if verify:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise _damaged(path, "got altered bytes, expected the sha256 of the manifest")
