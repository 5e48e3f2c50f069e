"""`make fuzz` works, in small; the counts of a full run are in benchmarks/results/LOG.md."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_readers_hold_out_against_mutated_files(seed: int, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--inputs", "4000", "--seed", str(seed)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])["counts"]
    assert sum(counts.values()) == 4000
    # Files that pass and files that do not, of both kinds: the mutations reach past the first check.
    assert min(counts.get(f"{kind} {what}", 0) for kind in ("gguf", "safetensors") for what in ("read", "refused")) > 5
