"""The runs that are compared: a ternary one, its float baseline, and a 1-bit one where there is one."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.errors import BitNetError
from bitnet.files.packed import write_packed
from bitnet.model import Transformer
from bitnet.text.tokenizer import Tokenizer
from bitnet.train.data.shards import open_dataset
from bitnet.train.data.windows import Sampler
from bitnet.train.runs.run import Run

# Seed of the order in which training text is read for calibration and short training: not that of any run.
_SEED = 20_241_021


@dataclass(frozen=True)
class Pair:
    """Folders of runs that were trained on the same tokens, named after their linear layers."""

    ternary: Path
    baseline: Path
    binary: Path | None = None

    def check(self) -> dict[str, Any]:
        """The facts that the runs share, as JSON values. Raises BitNetError, with the reason, where they differ."""
        facts, training = _facts(self.ternary, "ternary")
        trained = {"ternary": training}
        for path, linear in ((self.baseline, "float"), (self.binary, "binary")):
            if path is not None:
                theirs, trained[linear] = _facts(path, linear)
                _check_same(self.ternary, facts, path, theirs)
        return facts | {"training": trained}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all runs."""
        return Run(self.ternary).tokenizer()

    def baseline_model(self) -> Transformer:
        """The float baseline in fp32, its embeddings at the bf16 values that training used."""
        model, _ = Run(self.baseline).load()
        for embedding in (model.model.embed_tokens, model.lm_head):
            if embedding is not None:
                with torch.no_grad():
                    embedding.weight.copy_(embedding.values())
        return model.eval()

    def training_windows(self, count: int) -> Tensor:
        """Ids [count, T + 1] int64, spread over the ternary run's training split; the same ones each time."""
        run = Run(self.ternary)
        inputs, targets = Sampler(open_dataset(run.data).train, run.config().context, _SEED).windows(0, count)
        return torch.cat((inputs, targets[:, -1:]), dim=1)

    def pack(self, run: Path, path: Path, embedding: str) -> Path:
        """Write one of the runs as a packed file. embedding: its dtype."""
        model, _ = Run(run).load()
        return write_packed(path, model, self.tokenizer(), embedding=embedding)


def _facts(path: Path, linear: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run must have in common with the others, and how it was trained, which may differ."""
    run = Run(path)
    model, save = run.load()
    manifest = open_dataset(run.data).manifest
    if model.config.linear != linear:
        raise BitNetError(
            f"compare: got a run with {model.config.linear} linear layers at '{path}', expected {linear} ones; "
            f"train it with --linear {linear}"
        )
    if save.quantised < 1:
        raise BitNetError(
            f"compare: got the run '{path}' in its quantisation warm-up, {save.quantised:.0%} quantised at step "
            f"{save.step}, expected 100%; train it to its end"
        )
    settings = run.config().train
    names = ("optimizer", "lr", "embedding_lr", "schedule", "float_share", "quant_warmup", "seed", "dtype")
    training = {name: getattr(settings, name) for name in names} | {"seconds": round(float(save.state["seconds"]))}
    facts = {
        "tokenizer": manifest.tokenizer_sha256,
        # Of the tokens themselves; the manifest's fingerprint depends on the dates of the text files as well.
        "data": _digest(shard.sha256 for shard in manifest.train.shards),
        "steps": save.step,
        "tokens": save.state["tokens"],
        "model": {key: value for key, value in asdict(model.config).items() if key != "linear"},
    }
    return facts, training


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()


_WORDS = {
    "tokenizer": "tokenizer checksum",
    "data": "fingerprint of the training tokens",
    "steps": "steps trained",
    "tokens": "tokens trained on",
}


def _check_same(first: Path, ours: dict[str, Any], second: Path, theirs: dict[str, Any]) -> None:
    for key, words in _WORDS.items():
        if ours[key] != theirs[key]:
            got, expected = (str(value)[:12] for value in (theirs[key], ours[key]))
            raise BitNetError(
                f"compare: '{second}' cannot be compared with '{first}': got {words} {got}, expected {expected}; train "
                "both with the same data, steps and batches"
            )
    for key, value in ours["model"].items():
        if theirs["model"][key] != value:
            raise BitNetError(
                f"compare: '{second}' cannot be compared with '{first}': got model.{key} = {theirs['model'][key]!r}, "
                f"expected {value!r}; train both with the same shape"
            )


def find_baseline(run: Path) -> Path:
    """A run's baseline, by the default names of `bitnet train`. Raises BitNetError where there is none."""
    name = run.resolve().name
    guess = run.resolve().with_name(name.replace("ternary", "float"))
    if "ternary" in name and Run(guess).exists():
        return guess
    raise BitNetError(
        f"compare: got no float baseline for '{run}', expected --baseline RUN: the same command as for the run, with "
        "--linear float and another --out"
    )
