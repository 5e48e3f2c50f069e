"""Sweep specs of tiny runs."""

from pathlib import Path

SHAPE = """
model.hidden_size = 32
model.intermediate_size = 44
model.num_hidden_layers = 1
model.num_attention_heads = 2
model.num_key_value_heads = 1
model.max_position_embeddings = 16
train.steps = 4
train.batch_size = 2
train.eval_every = 0
train.dtype = "fp32"
tokenizer.kind = "char"
"""

GRID = """seeds = [1, 2]
linears = ["ternary", "float"]
[grid]
train.lr = [0.001, 0.01]"""


def write_spec(text: Path, content: str, base: str = "") -> Path:
    file = text.parent / "spec.toml"
    top, _, rest = content.partition("\n[")
    file.write_text(f"{top}\n[base]\ndata.paths = ['{text}']\n{base}{SHAPE}" + (f"\n[{rest}" if rest else ""))
    return file
