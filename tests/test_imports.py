"""Imports go one way, and there is no circle: read off the real import graph, lazy and type-checking imports included.

    kernels  <-  bitnet  <-  train  <-  benchmarks  <-  the command line        an arrow is "is imported by"

Nothing imports what people start (bitnet/cli, bitnet/serve) but the command line itself. Every rule is a function from
a graph or from source text to complaints, so that the tests at the end can show it a violation.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"bitnet": "bitnet", "kernels": "bitnet.kernels", "train": "bitnet.train", "benchmarks": "bitnet.benchmarks"}

# From the bottom up; a module may import from its own line and from those above it. The longest prefix counts.
LAYERS = (
    ("bitnet.kernels",),
    (
        "bitnet.errors",
        "bitnet.machine",
        "bitnet.device",
        "bitnet.threads",
        "bitnet.memory",
        "bitnet.schema",
        "bitnet.config",
    ),
    ("bitnet.quant", "bitnet.layers", "bitnet.model", "bitnet.conversion"),
    ("bitnet.text",),
    ("bitnet.files",),
    ("bitnet.engine", "bitnet.included"),
    ("bitnet",),  # generation, inspection, doctor, memory, plotting, tables, and the package's public names
    ("bitnet.train",),
    ("bitnet.benchmarks",),
    ("bitnet.serve",),
    ("bitnet.cli",),
)
STARTED = ("bitnet.cli", "bitnet.serve")  # what people start


class Import(NamedTuple):
    line: int
    name: str  # dotted; for `from a import b` both `a` and `a.b`, since b may be a module
    lazy: bool  # inside a function
    plain: bool = False  # `import a.b` or import_module("a.b"), not `from a import b`


def imports(source: str) -> Iterator[Import]:
    """Every import in the source, `importlib.import_module("literal")` among them."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, lazy, True) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield Import(node.lineno, base, lazy)
            yield from (Import(node.lineno, f"{base}.{alias.name}", lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {
            "import_module",
            "__import__",
        }:
            literals = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            yield from (Import(node.lineno, name, lazy, True) for name in literals if isinstance(name, str))
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    return visit(ast.parse(source), False)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def modules() -> dict[str, Path]:
    """Import name -> file, of everything that is installed, and of the scripts in benchmarks/."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> the modules among `sources` that it imports; of `from a import b`, b where that is one, else a."""

    def targets(source: str) -> Iterator[str]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name if name in sources else node.module for name in inner)
        yield from (one.name for one in imports(source) if one.plain)

    return {
        module: {name for name in targets(source) if name in sources} - {module} for module, source in sources.items()
    }


def layer(module: str) -> int:
    """The line of LAYERS that a module is on."""
    ranks = {prefix: rank for rank, prefixes in enumerate(LAYERS) for prefix in prefixes}
    return ranks[max((prefix for prefix in ranks if within(module, prefix)), key=len)]


def is_script(module: str) -> bool:
    """A file in benchmarks/ itself is a program of its own: it is started, not imported."""
    return module.startswith("bitnet.benchmarks.") and module.count(".") == 2


def direction_complaints(graph: Mapping[str, set[str]]) -> Iterator[str]:
    for module, targets in graph.items():
        for target in sorted(targets):
            if is_script(module):
                if within(target, "bitnet.serve"):
                    yield f"{module} imports {target}: only the command line does"
                continue
            if is_script(target):
                yield f"{module} imports {target}, a script"
            if layer(target) > layer(module):
                yield f"{module} imports {target}, which lies above it"
            own = any(within(module, one) and within(target, one) for one in STARTED)
            if within(target, *STARTED) and not own and not within(module, "bitnet.cli"):
                yield f"{module} imports {target}: only the command line does"
            if within(module, "bitnet.train") and within(target, "bitnet.kernels"):
                yield f"{module} imports {target}: train reaches kernels through bitnet only"


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in graph[module]:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            group = [stack.pop()]
            while group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def import_complaints(path: str, source: str) -> Iterator[str]:
    """What a single file may not import, whatever the rest looks like."""
    room = path.partition("/")[0]
    for line, name, lazy, _ in imports(source):
        where = f"{path}:{line}: imports {name}"
        if name.startswith("."):
            yield f"{where}: relative; write the absolute name"
        if within(name, "kernels", "train"):
            yield f"{where}: these folders are imported as bitnet.kernels and bitnet.train"
        if within(name, "tests", "benchmarks", "conftest") and room != "benchmarks":
            yield f"{where}: tests are not imported, and benchmarks as bitnet.benchmarks"
        if room == "kernels" and not within(name, "bitnet.kernels", "torch", "triton", "numpy"):
            own = name == "bitnet" and f"{name}.kernels" in {other.name for other in imports(source)}
            if name.split(".")[0] not in sys.stdlib_module_names and not own:
                yield f"{where}: kernels may import torch, triton, numpy and the standard library only"
        verb = path.startswith("bitnet/cli/") and path != "bitnet/cli/demo.py"
        if verb and not lazy and within(name, "bitnet.train", "bitnet.benchmarks", "bitnet.serve"):
            yield f"{where}: at the top of a file; the command line imports what a verb needs when it runs"


SOURCES = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
GRAPH = import_graph(SOURCES)
FILES = sorted(
    path.relative_to(ROOT).as_posix() for folder in (*FOLDERS, "tests") for path in (ROOT / folder).rglob("*.py")
)


def test_imports_go_one_way() -> None:
    assert not list(direction_complaints(GRAPH))


def test_no_circle() -> None:
    assert not circles(GRAPH)


def test_every_module_is_on_a_layer_and_the_graph_is_not_empty() -> None:
    assert all(layer(module) >= 0 for module in GRAPH)
    assert "bitnet.kernels.packing" in GRAPH["bitnet.files.packed"]
    assert "bitnet.files.packed" in GRAPH["bitnet.engine.load"]
    assert sum(map(len, GRAPH.values())) > 400


@pytest.mark.parametrize("path", FILES)
def test_imports_of_a_file(path: str) -> None:
    assert not list(import_complaints(path, (ROOT / path).read_text(encoding="utf-8")))


# ---- no pickle, no undeclared package ----------------------------------------------------------------------


def pickle_complaints(path: str, source: str) -> Iterator[str]:
    """torch.load ran code from files even with weights_only (CVE-2025-32434): safetensors instead."""
    banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    banned_names = {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package"}
    for line, name, _, _ in imports(source):
        if name.split(".")[0] in banned or name in banned_names:
            yield f"{path}:{line}: imports {name}: no pickle, use safetensors or JSON"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in banned_names:
            yield f"{path}:{node.lineno}: {ast.unparse(node)}: no pickle, use safetensors or JSON"
        if isinstance(node, ast.keyword) and ast.unparse(node).replace(" ", "") == "allow_pickle=True":
            yield f"{path}:{node.lineno}: allow_pickle: no pickle, use safetensors or JSON"


@pytest.mark.parametrize("path", [path for path in FILES if not path.startswith("tests/")])
def test_no_pickle(path: str) -> None:
    assert not list(pickle_complaints(path, (ROOT / path).read_text(encoding="utf-8")))


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirement_names(requirements: list[str]) -> set[str]:
    """Import names; for every dependency so far they equal the distribution's, `-` read as `_`."""
    found = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}
    return {name.lower().replace("-", "_") for name in found}


def imported_roots(*rooms: str) -> set[str]:
    paths = [path for path in FILES if path.partition("/")[0] in rooms]
    return {
        name.partition(".")[0] for path in paths for _, name, _, _ in imports((ROOT / path).read_text(encoding="utf-8"))
    }


def test_no_dead_dependency() -> None:
    excused: set[str] = set()
    core = requirement_names(project()["dependencies"])
    unused = core - excused - imported_roots("bitnet", "kernels", "train")
    assert not unused, f"in pyproject.toml but never imported: {sorted(unused)}"


def test_no_undeclared_dependency() -> None:
    declared = requirement_names(project()["dependencies"])
    for extra in project()["optional-dependencies"].values():
        declared |= requirement_names(extra)
    # Scripts and helpers that are imported by file name.
    siblings = {
        path.stem
        for folder in ("benchmarks", "tests/support", "tests/fake_cuda")
        for path in (ROOT / folder).glob("*.py")
    }
    # measured against, in a Python of its own: never needed to run
    contenders = imported_roots("bitnet", "benchmarks", "train") & {"llama_cpp", "gguf"}
    unknown = (
        imported_roots(*FOLDERS, "tests") - declared - set(sys.stdlib_module_names) - {"bitnet"} - siblings - contenders
    )
    assert not unknown, f"imported but not in pyproject.toml: {sorted(unknown)}"


# ---- the rules themselves ----------------------------------------------------------------------------------

BAD_EDGES = [
    ("bitnet.kernels.ops", "from bitnet.quant import absmean"),
    ("bitnet.kernels.ops", "from bitnet import quant"),
    ("bitnet.kernels.ops", "import bitnet.errors"),
    ("bitnet.model", "def f():\n    from bitnet.train import pretrain"),
    ("bitnet.model", "import importlib\nimportlib.import_module('bitnet.train.pretrain')"),
    ("bitnet.model", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bitnet.files.packed import x"),
    ("bitnet.text.load", "from bitnet.engine.base import Engine"),
    ("bitnet.files.packed", "def f():\n    from bitnet.engine.load import load"),
    ("bitnet.files.packed", "import bitnet.serve"),
    ("bitnet.generation", "from bitnet.cli import terminal"),
    ("bitnet.serve.app", "from bitnet.cli import terminal"),
    ("bitnet.train.run", "from bitnet.kernels import packing"),
    ("bitnet.train.run", "from bitnet.benchmarks.bench import machine"),
    ("bitnet.benchmarks.bench.command", "from bitnet.cli import main"),
    ("bitnet.benchmarks.bench.command", "from bitnet.benchmarks import report"),
]
GOOD_EDGES = [
    ("bitnet.kernels.ops", "from bitnet.kernels import packing"),
    ("bitnet.layers", "from bitnet.kernels.ops import linear\nfrom bitnet.quant import absmean"),
    ("bitnet.engine.load", "from bitnet.files.packed import read_packed\nfrom bitnet.text.load import load_tokenizer"),
    ("bitnet.train.run", "from bitnet.config import ModelConfig\nfrom bitnet.train import pretrain"),
    ("bitnet.benchmarks.report", "from bitnet.benchmarks.bench import machine"),
    ("bitnet.cli.serve", "def serve():\n    from bitnet.serve import app\n    from bitnet.train import pretrain"),
    ("bitnet.serve.app", "from bitnet.serve import server\nfrom bitnet.generation import x"),
]
KNOWN = dict.fromkeys(
    (
        *("bitnet.errors", "bitnet.quant", "bitnet.config", "bitnet.model", "bitnet.layers", "bitnet.generation"),
        *("bitnet.kernels.ops", "bitnet.kernels.packing", "bitnet.text.load", "bitnet.files.packed", "bitnet.serve"),
        *("bitnet.engine.base", "bitnet.engine.load", "bitnet.serve.app", "bitnet.serve.server", "bitnet.cli"),
        *("bitnet.cli.terminal", "bitnet.cli.serve", "bitnet.train.pretrain", "bitnet.train.run"),
        *("bitnet.benchmarks.bench.command", "bitnet.benchmarks.bench.machine", "bitnet.benchmarks.report"),
    ),
    "",
)


@pytest.mark.parametrize(("module", "source"), BAD_EDGES)
def test_rule_sees_an_import_upwards(module: str, source: str) -> None:
    assert list(direction_complaints(import_graph(KNOWN | {module: source})))


@pytest.mark.parametrize(("module", "source"), GOOD_EDGES)
def test_rule_allows_an_import_downwards(module: str, source: str) -> None:
    assert not list(direction_complaints(import_graph(KNOWN | {module: source})))


def test_rule_sees_a_circle() -> None:
    lazy = "def f():\n    from bitnet.layers import x"
    sources = KNOWN | {"bitnet.layers": "from bitnet.model import x", "bitnet.model": lazy}
    assert circles(import_graph(sources)) == [["bitnet.layers", "bitnet.model"]]
    assert not circles(import_graph(KNOWN | {"bitnet.layers": "from bitnet.model import x"}))


BAD_FILES = [
    ("kernels/ops.py", "def f():\n    import einops"),
    ("kernels/ops.py", "from kernels.packing import pack"),
    ("kernels/ops.py", "from . import packing"),
    ("bitnet/cli/train.py", "from bitnet.train import pretrain"),
    ("bitnet/cli/train.py", "if True:\n    import bitnet.train.pretrain"),
    ("train/data/prepare.py", "from train.optim import muon"),
    ("train/data/prepare.py", "def f():\n    import benchmarks.speed"),
    ("tests/test_x.py", "from tests.conftest import seed"),
]
GOOD_FILES = [
    ("kernels/ops.py", "import math, torch\nimport triton.language\nfrom bitnet.kernels import packing"),
    ("kernels/ops.py", "from bitnet import kernels"),
    ("bitnet/cli/train.py", "def train():\n    from bitnet.train import pretrain\n    from bitnet.files import hf"),
    ("tests/test_x.py", "from bitnet.kernels import packing\nfrom bitnet.train import data"),
]


@pytest.mark.parametrize(("path", "source"), BAD_FILES)
def test_rule_sees_bad_import(path: str, source: str) -> None:
    assert list(import_complaints(path, source))


@pytest.mark.parametrize(("path", "source"), GOOD_FILES)
def test_rule_allows_good_import(path: str, source: str) -> None:
    assert not list(import_complaints(path, source))


BAD_PICKLES = [
    "import pickle",
    "from torch import load",
    "torch.load('x', weights_only=True)",
    "torch.save(1, f)",
    "np.load(f, allow_pickle=True)",
]


@pytest.mark.parametrize("source", BAD_PICKLES)
def test_rule_sees_pickle(source: str) -> None:
    assert list(pickle_complaints("train/data/prepare.py", source))
