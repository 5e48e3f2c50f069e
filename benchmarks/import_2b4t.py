"""Import and run a model in the exact layout of microsoft/bitnet-b1.58-2B-4T, with random weights.

    python benchmarks/import_2b4t.py --folder build/2b4t

Writes the folder as published (packed in the multiply convention; bf16 embedding, norms and scales; a byte-level BPE
of 128,256 ids like LLaMA-3's), then runs `bitnet import`, `inspect` and `generate` (C++ engine) on it, each in a
separate process whose peak memory is measured, pages of mapped files included. Import streams: its peak should be
that of Python, torch and the largest tensor (the embedding, 657 MB). Every code and scale of the imported file is
compared with what was written. The files are deleted at the end, unless --keep is given.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bitnet.config import PRESETS
from bitnet.doctor import examine
from bitnet.files.hf.tokenizer_json import byte_level_json
from bitnet.files.safetensors_file import TensorFiles, TensorWriter
from bitnet.files.tensors import dense_shapes, projection_shape, projections
from bitnet.kernels import packing
from bitnet.text.json_tokenizer import byte_alphabet

CONFIG = PRESETS["2b4t"]
BOS, EOS, EOT = 128_000, 128_001, 128_009


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Needs 2.5 GB.")
    parser.add_argument("--keep", action="store_true", help="Leave the files there.")
    options = parser.parse_args()
    source, packed = options.folder / "published", options.folder / "2b4t.safetensors"
    if not (source / "config.json").exists():
        source.mkdir(parents=True, exist_ok=True)
        write(source)
    engine = ("-m", str(packed), "-c", "64", "--engine", "cpu", "--json")
    rows = {
        "import": measured("import", str(source), "-o", str(packed), "--json"),
        "inspect": measured("inspect", str(packed), "--json"),
        "generate": measured("generate", "-p", "Hello there", "-n", "8", *engine),
        "chat": measured("generate", "-p", "Hello", "-n", "4", "--chat", *engine),
    }
    compare(source, packed)
    report = {
        "benchmark": "import_2b4t",
        "machine": examine()["cpu"]["name"],
        "engine": "cpu (C++)",
        "source_bytes": sum(path.stat().st_size for path in source.iterdir()),
        "packed_bytes": packed.stat().st_size,
        "zero_fraction": rows["inspect"]["report"]["zero_fraction"],
        "written_tokens": rows["generate"]["report"]["tokens"],
        "rows": {
            name: {key: row[key] for key in ("seconds", "cpu_seconds", "peak_bytes")} for name, row in rows.items()
        },
    }
    print(json.dumps(report))
    if not options.keep:
        packed.unlink()
        shutil.rmtree(source)


def compare(source: Path, packed: Path) -> None:
    """End the run unless the packed file holds the codes, scales, tables and norms of the source, to the bit."""
    theirs, ours = TensorFiles(source), TensorFiles(packed)
    for name in projections(CONFIG):
        n, k = projection_shape(CONFIG, name)
        codes = theirs.read(f"{name}.weight")
        expected = torch.cat([(codes >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)])
        scale = ours.read(f"{name}.weight_scale")
        if not torch.equal(packing.unpack(ours.read(f"{name}.weight"), k), expected) or expected.shape != (n, k):
            sys.exit(f"{name}: other codes than in the source")
        if not torch.equal(scale, theirs.read(f"{name}.weight_scale").float()):
            sys.exit(f"{name}: another scale than in the source")
    for name in dense_shapes(CONFIG):
        if not torch.equal(ours.read(name).float(), theirs.read(name).float()):
            sys.exit(f"{name}: other values than in the source")


def write(folder: Path) -> None:
    """The folder as published, with random weights."""
    generator = torch.Generator().manual_seed(0)
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        name: (torch.bfloat16, shape) for name, shape in dense_shapes(CONFIG).items()
    }
    for name in projections(CONFIG):
        n, k = projection_shape(CONFIG, name)
        plan[f"{name}.weight"] = torch.uint8, (n // 4, k)
        plan[f"{name}.weight_scale"] = torch.bfloat16, (1,)
    # The 81 bytes whose four pairs of bits are 0, 1 or 2.
    valid = torch.tensor(
        [a | b << 2 | c << 4 | d << 6 for a, b, c, d in product(range(3), repeat=4)], dtype=torch.uint8
    )
    with (folder / "model.safetensors").open("wb") as file:
        writer = TensorWriter(file, plan, {"format": "pt"})
        for name, (dtype, shape) in plan.items():
            if dtype is torch.uint8:
                writer.write(name, valid[torch.randint(81, shape, generator=generator)])
            elif name.endswith("_scale"):
                writer.write(name, torch.full((1,), 0.02, dtype=dtype))
            elif len(shape) == 1:
                writer.write(name, torch.ones(shape, dtype=dtype))
            else:
                writer.write(name, torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator))
        writer.finish()
    write_tokenizer(folder)
    write_config(folder)


def write_config(folder: Path) -> None:
    """config.json and generation_config.json as published."""
    values = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.intermediate_size,
        "num_hidden_layers": CONFIG.num_hidden_layers,
        "num_attention_heads": CONFIG.num_attention_heads,
        "num_key_value_heads": CONFIG.num_key_value_heads,
        "hidden_act": "relu2",
        "max_position_embeddings": CONFIG.context,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
    }
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": [EOS, EOT]}))
    (folder / "config.json").write_text(json.dumps(values, indent=1))


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE with LLaMA-3's ids: 256 bytes, filler up to 128,000, 256 control tokens."""
    alphabet = list(byte_alphabet())
    tokens = alphabet + [f"filler{i}" for i in range(BOS - 256)]
    special = [f"<|reserved_special_token_{i}|>" for i in range(256)]
    special[0], special[1], special[9] = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
    ids = range(BOS, BOS + 256)
    text = byte_level_json([*tokens, *special], [], list(ids), set(ids), "llama-bpe", BOS)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|eot_id|>{% endfor %}Assistant: "
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def measured(*args: str) -> dict[str, Any]:
    """Run a verb; its report, seconds and peak memory."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "bitnet.cli", *args], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"bitnet {args[0]} failed with {process.returncode}")
    seconds, peak = time.perf_counter() - started, usage.ru_maxrss * 1024
    print(f"{args[0]:9} {seconds:6.1f} s   peak {peak / 1e9:.2f} GB", flush=True)
    cpu = usage.ru_utime + usage.ru_stime
    return {"report": json.loads(text), "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}


if __name__ == "__main__":
    main()
