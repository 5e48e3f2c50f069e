"""`make fuzz` works, in small; the counts of a full run are in benchmarks/results/LOG.md."""

import json
import sys
from pathlib import Path

import child_process
import pytest

ROOT = Path(__file__).resolve().parents[2]
READERS = ("gguf container", "gguf model", "safetensors", "sharded index", "config.json", "tokenizer.json")
READERS += ("sentencepiece", "packed file", "folder, bitnet", "folder, llama")


@pytest.mark.slow
def test_readers_hold_out_against_mutated_files(seed: int, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers comes with the extra of that name")
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--inputs", "6000", "--seed", str(seed)]
    command += ["--workers", "1", "--large", "8388608"]
    done = child_process.run(command, cwd=tmp_path)
    report = json.loads(done.stdout.splitlines()[-1])
    counts = report["counts"]
    assert sum(counts.values()) == 6000
    assert report["large_inputs"] > 20
    # Files that pass and files that do not, of every kind: the mutations reach past the first check.
    for reader in READERS:
        assert counts.get(f"{reader} read", 0) > 0, reader
        assert counts.get(f"{reader} refused", 0) > 5, reader
