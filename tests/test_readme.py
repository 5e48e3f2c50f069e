"""The README tells the truth: its table of presets, its verbs, its Python."""

import ast
import re
from pathlib import Path

from bitnet.config import PRESETS
from bitnet.files.packed_layout import packed_bytes
from bitnet.files.tensors import float16_bytes, linear_parameters, parameters

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def test_table_of_presets() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", README, re.MULTILINE)
    expected = []
    for name, c in PRESETS.items():
        counts = [f"{parameters(c) / 1e6:.1f}M", f"{linear_parameters(c) / 1e6:.1f}M", str(c.num_hidden_layers)]
        widths = [str(c.hidden_size), str(c.intermediate_size), f"{c.vocab_size:,}", f"{c.context:,}"]
        expected.append((name, " | ".join([*counts, *widths, size(packed_bytes(c)), size(float16_bytes(c))])))
    assert rows == expected


def test_verbs_are_shown() -> None:
    from bitnet.cli import app

    shown = set(re.findall(r"^    bitnet (\w+)", README, re.MULTILINE))
    assert shown == {command.name or command.callback.__name__ for command in app.registered_commands}


def test_python_parses_and_names_exist() -> None:
    import bitnet

    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        tree = ast.parse(block)
        names = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bitnet"
        }
        assert all(hasattr(bitnet, name) for name in names)


def test_files_that_are_linked_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / target).exists(), target
