"""Tiny runs for the tests of `bitnet compare`."""

from pathlib import Path

from bitnet.cli import main

TEXT = "".join(f"Line {i}: the quick brown fox number {i * i} jumps over the lazy dog.\n" for i in range(400))


def train(folder: Path, name: str, *args: object) -> Path:
    """One step of a model that llama.cpp takes: sizes are multiples of 256."""
    if not (folder / "toy.txt").exists():
        (folder / "toy.txt").write_text(TEXT)
    sets = "hidden_size=256 intermediate_size=256 num_hidden_layers=1 num_attention_heads=4 vocab_size=320 "
    sets += "num_key_value_heads=2 max_position_embeddings=32 hidden_act=silu qk_norm=false"
    settings = [part for one in sets.split() for part in ("--set", f"model.{one}")]
    base = ["train", "-q", "--data", folder / "toy.txt", "--batch-size", 2, *settings, "--out", folder / name]
    assert main([str(arg) for arg in [*base, "--steps", 1, *args]]) == 0
    return folder / name
