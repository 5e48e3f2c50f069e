"""The rules of the house: imports, the top level, the frozen command line, words that stay out.

    kernels  <--  bitnet  <--  train  <--  benchmarks, tests        an arrow is "is imported by"

bitnet/cli/ alone may reach up to bitnet.train and across to bitnet.formats, bitnet.serve; in functions.
Every rule is a function from source text to complaints, so that the tests at the end can show it a violation.
"""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("bitnet", "kernels", "train", "tests", "benchmarks")
TOP_FOLDERS = {*ROOMS, ".ci", ".github", "docs"}

SOURCES = sorted(path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py"))
NATIVE = sorted(
    path.relative_to(ROOT).as_posix()
    for room in ("kernels", "tests")
    for path in (ROOT / room).rglob("*")
    if path.suffix in {".cpp", ".h", ".inl"}
)
PLAIN = ["Makefile", "CMakeLists.txt", ".ci/run", "pyproject.toml", "README.md", "CONTRIBUTING.md"]
OTHER_TEXT = [name for name in PLAIN if (ROOT / name).is_file()]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ---- imports -----------------------------------------------------------------------------------------------


class Import(NamedTuple):
    line: int
    name: str  # dotted; for `from a import b` both `a` and `a.b`, since b may be a module
    lazy: bool  # inside a function


def last_name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def imports(source: str) -> Iterator[Import]:
    """Every import in the source, `importlib.import_module("literal")` among them."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield Import(node.lineno, base, lazy)
            yield from (Import(node.lineno, f"{base}.{alias.name}", lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and last_name(node.func) in {"import_module", "__import__"}:
            literals = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            yield from (Import(node.lineno, name, lazy) for name in literals if isinstance(name, str))
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    return visit(ast.parse(source), False)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def import_complaints(path: str, source: str) -> Iterator[str]:
    room = path.partition("/")[0]
    for line, name, lazy in imports(source):
        where = f"{path}:{line}: imports {name}"
        if name.startswith("."):
            yield f"{where}: relative; write the absolute name"
        if within(name, "kernels", "train"):
            yield f"{where}: these folders are imported as bitnet.kernels and bitnet.train"
        if within(name, "tests", "benchmarks", "conftest") and room != "benchmarks":
            yield f"{where}: nothing imports tests or benchmarks"
        if room == "kernels" and not within(name, "bitnet.kernels", "torch", "triton", "numpy"):
            own = name == "bitnet" and f"{name}.kernels" in {other.name for other in imports(source)}
            if name.split(".")[0] not in sys.stdlib_module_names and not own:
                yield f"{where}: kernels may import torch, triton, numpy and the standard library only"
        if room == "train" and within(name, "bitnet.kernels"):
            yield f"{where}: train reaches kernels through bitnet only"
        if room == "bitnet":
            verbs = path.startswith("bitnet/cli/")
            if within(name, "bitnet.train") and not (verbs and lazy):
                yield f"{where}: only bitnet/cli/ may, inside a function"
            for door in ("formats", "serve"):
                allowed = verbs or path.startswith(f"bitnet/{door}/")
                if within(name, f"bitnet.{door}") and not allowed:
                    yield f"{where}: only bitnet/cli/ opens that door"


def pickle_complaints(path: str, source: str) -> Iterator[str]:
    """torch.load ran code from files even with weights_only (CVE-2025-32434): safetensors instead."""
    banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    banned_names = {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package"}
    for line, name, _ in imports(source):
        if name.split(".")[0] in banned or name in banned_names:
            yield f"{path}:{line}: imports {name}: no pickle, use safetensors or JSON"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in banned_names:
            yield f"{path}:{node.lineno}: {ast.unparse(node)}: no pickle, use safetensors or JSON"
        if isinstance(node, ast.keyword) and ast.unparse(node).replace(" ", "") == "allow_pickle=True":
            yield f"{path}:{node.lineno}: allow_pickle: no pickle, use safetensors or JSON"


@pytest.mark.parametrize("path", SOURCES)
def test_imports_go_one_way(path: str) -> None:
    assert not list(import_complaints(path, text(path)))


@pytest.mark.parametrize("path", [path for path in SOURCES if not path.startswith("tests/")])
def test_no_pickle(path: str) -> None:
    assert not list(pickle_complaints(path, text(path)))


# ---- rooms and packaging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["kernels", "train"])
def test_mapped_folders_stay_namespaces(folder: str) -> None:
    """With an __init__.py it would shadow an installed package of its name, Hugging Face's `kernels` for one."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_top_level_is_fixed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: cannot tell the project's folders from the user's")
    git = ["git", "ls-files", "-z"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {name.partition("/")[0] for name in listed.split("\0") if "/" in name}
    assert folders <= TOP_FOLDERS, f"unknown at the top level: {sorted(folders - TOP_FOLDERS)}"


def project() -> dict[str, object]:
    return tomllib.loads(text("pyproject.toml"))["project"]


def requirement_names(requirements: list[str]) -> set[str]:
    """Import names; for every dependency so far they equal the distribution's, `-` read as `_`."""
    found = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}
    return {name.lower().replace("-", "_") for name in found}


def imported_roots(*rooms: str) -> set[str]:
    paths = [path for path in SOURCES if path.partition("/")[0] in rooms]
    return {name.partition(".")[0] for path in paths for _, name, _ in imports(text(path))}


def test_no_dead_dependency() -> None:
    excused: set[str] = set()
    core = requirement_names(project()["dependencies"])
    unused = core - excused - imported_roots("bitnet", "kernels", "train")
    assert not unused, f"in pyproject.toml but never imported: {sorted(unused)}"


def test_no_undeclared_dependency() -> None:
    declared = requirement_names(project()["dependencies"])
    for extra in project()["optional-dependencies"].values():
        declared |= requirement_names(extra)
    siblings = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}  # scripts that share code by file name
    # measured against, in a Python of its own: never needed to run
    contenders = imported_roots("bitnet", "benchmarks", "train") & {"llama_cpp", "gguf"}
    unknown = imported_roots(*ROOMS) - declared - set(sys.stdlib_module_names) - {"bitnet"} - siblings - contenders
    assert not unknown, f"imported but not in pyproject.toml: {sorted(unknown)}"


# ---- the command line --------------------------------------------------------------------------------------

VERBS = {
    "train": {"--preset", "--data", "--out", "--steps", "--seed", "--linear", "--init"},
    "sweep": {"--out", "--plan", "--json"},
    "pack": {"-o"},
    "generate": {
        *("-m", "-p", "-n", "-c", "-t", "-s", "--temp", "--top-k", "--top-p", "--min-p", "--chat", "--json"),
        *("-i", "--engine", "--head", "--cache"),
    },
    "serve": {
        *("-m", "--host", "--port", "--api-key", "-t", "--slots", "-c", "--queue"),
        *("--engine", "--head", "--cache"),
    },
    "eval": {"-m", "--data", "--json", "--engine", "--head", "--cache"},
    "compare": {
        *("--twin", "--binary", "--data", "--methods", "-o", "--plot", "--max-tokens", "--kl-tokens", "--qat-steps"),
        *("--rounds", "--llama", "--keep", "-t", "--json"),
    },
    "bench": {
        *(
            "-m",
            "--preset",
            "-p",
            "-n",
            "--pg",
            "-d",
            "-b",
            "-t",
            "-r",
            "-o",
            "--backend",
            "--isa",
            "--head",
            "--cache",
        ),
        *("--against", "--llama", "--price", "--plot", "--device"),
    },
    "inspect": {"--json", "--plot", "-p"},
    "export": {"-o", "--to", "--type", "--json"},
    "import": {"-o", "--tokenizer", "--weight-scale", "--json"},
    "doctor": {"--json"},
}


@pytest.fixture(scope="module")
def verbs() -> dict[str, list]:
    import typer

    from bitnet.cli import app

    return {name: command.params for name, command in typer.main.get_command(app).commands.items()}


def test_verbs_are_frozen(verbs: dict[str, list]) -> None:
    assert set(verbs) == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_frozen(verb: str, verbs: dict[str, list]) -> None:
    """More options may come, these stay."""
    options = {option for param in verbs[verb] for option in (*param.opts, *param.secondary_opts)}
    assert not VERBS[verb] - options, f"bitnet {verb}: missing"


def test_pack_takes_an_argument(verbs: dict[str, list]) -> None:
    assert [param.name for param in verbs["pack"] if param.param_type_name == "argument"]


def test_command_line_imports_little() -> None:
    """`bitnet generate` should not pay for the trainer, for plots or for another tool's format."""
    code = "import bitnet.cli, json, sys; print(json.dumps(sorted(sys.modules)))"
    python = [sys.executable, "-c", code]
    loaded = json.loads(subprocess.run(python, capture_output=True, text=True, check=True).stdout)
    heavy = ("bitnet.train", "bitnet.formats", "bitnet.serve", "matplotlib", "tensorboard", "wandb")
    assert not [name for name in loaded if within(name, *heavy)]


# ---- the C++ ----------------------------------------------------------------------------------------------

CORE = [path for path in NATIVE if path.startswith("kernels/cpu/")]
# Compiled once for each instruction set: what they include must bring no inline function of its own, or the linker
# merges the copies and a portable build runs AVX code.
PER_SET = [path for path in CORE if Path(path).name in {"scalar.cpp", "avx2.cpp", "avx512.cpp", "vnni.cpp", "isa.h"}]
PER_SET += [path for path in CORE if path.endswith(".inl")]
PLAIN_HEADERS = {"<immintrin.h>", "<string.h>", "<stddef.h>", "<stdint.h>"}


def native_complaints(path: str, source: str) -> Iterator[str]:
    for number, line in enumerate(source.splitlines(), 1):
        code = line.partition("//")[0]
        if words := re.search(r"\b(?:printf|puts|cout|cerr|abort|exit|assert|rand)\b", code):
            yield f"{path}:{number}: {words[0]}: the core does not print or end the process; the binding raises"
        if not line.isascii():
            yield f"{path}:{number}: not ASCII"
        include = re.match(r"\s*#\s*include\s+(\S+)", code) if path in PER_SET else None
        if include and include[1] not in PLAIN_HEADERS and not re.fullmatch(r'"(?:isa\.h|\w+\.inl)"', include[1]):
            yield f"{path}:{number}: includes {include[1]}: only plain C headers in a file of one instruction set"


@pytest.mark.parametrize("path", CORE)
def test_the_core_keeps_its_rules(path: str) -> None:
    assert not list(native_complaints(path, text(path)))


def test_every_instruction_set_has_its_file() -> None:
    names = {Path(path).name for path in PER_SET}
    assert {"scalar.cpp", "avx2.cpp", "avx512.cpp", "vnni.cpp", "isa.h", "elementwise.inl"} <= names


# ---- words that stay out -----------------------------------------------------------------------------------

MACHINE_PATH = re.compile(r"(?<![\w.~$})>])/(?:home|Users|root|work|tmp|opt|mnt|scratch)/|\b[A-Z]:\\\\?Users")
LEFT_FOR_LATER = re.compile(r"\b(?:TOD[O]|FIXM[E]|XX[X])\b")


FUZZERS = ("benchmarks/fuzz.py", "benchmarks/fuzz_memory.py")


def word_complaints(path: str, source: str) -> Iterator[str]:
    for number, line in enumerate(source.splitlines(), 1):
        if MACHINE_PATH.search(line):
            yield f"{path}:{number}: a path of one machine: {line.strip()}"
        if LEFT_FOR_LATER.search(line) and not path.endswith(".md"):
            yield f"{path}:{number}: a note left for later: {line.strip()}"


def except_complaints(path: str, source: str) -> Iterator[str]:
    """A handler for everything hides bugs, unless it cleans up and raises again, or is a fuzzer's, which reports it."""
    if path in FUZZERS:
        return
    everything = {"Exception", "BaseException"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = {ast.unparse(part) for part in ast.walk(node.type)} if node.type else everything
            last = node.body[-1]
            if caught & everything and not (isinstance(last, ast.Raise) and last.exc is None):
                yield f"{path}:{node.lineno}: catches everything; name the error"
        if isinstance(node, ast.Call) and last_name(node.func) == "suppress":
            caught = {ast.unparse(argument) for argument in node.args}
            if caught & everything:
                yield f"{path}:{node.lineno}: suppresses everything; name the error"


@pytest.mark.parametrize("path", SOURCES + NATIVE + OTHER_TEXT)
def test_words_that_stay_out(path: str) -> None:
    assert not list(word_complaints(path, text(path)))


@pytest.mark.parametrize("path", SOURCES)
def test_no_catch_all(path: str) -> None:
    assert not list(except_complaints(path, text(path)))


# ---- the rules themselves ----------------------------------------------------------------------------------

BAD_IMPORTS = [
    ("kernels/ops.py", "from bitnet.quant import absmean"),
    ("kernels/ops.py", "from bitnet import kernels, quant"),
    ("kernels/ops.py", "import bitnet.errors"),
    ("kernels/ops.py", "def f():\n    import einops"),
    ("kernels/gpu/mm.py", "from bitnet.train.data import x"),
    ("kernels/ops.py", "from kernels.packing import pack"),
    ("kernels/ops.py", "from . import packing"),
    ("bitnet/model.py", "def f():\n    from bitnet.train import data"),
    ("bitnet/model.py", "import importlib\nimportlib.import_module('bitnet.train.data')"),
    ("bitnet/model.py", "from bitnet.formats.gguf import write"),
    ("bitnet/formats/hf.py", "import bitnet.serve"),
    ("bitnet/cli/training.py", "from bitnet.train import pretrain"),
    ("bitnet/cli/training.py", "if True:\n    import bitnet.train.data"),
    ("bitnet/client.py", "def f():\n    from bitnet.train import pretrain"),
    ("train/data.py", "from bitnet.kernels import packing"),
    ("train/data.py", "from bitnet import kernels"),
    ("train/data.py", "from train.optim import muon"),
    ("train/data.py", "def f():\n    import benchmarks.speed"),
    ("tests/test_x.py", "from tests.conftest import seed"),
]
GOOD_IMPORTS = [
    ("kernels/ops.py", "import math, torch\nimport triton.language\nfrom bitnet.kernels import packing"),
    ("kernels/ops.py", "from bitnet import kernels"),
    ("bitnet/layers.py", "from bitnet.kernels.ops import linear\nfrom bitnet.quant import absmean"),
    ("bitnet/cli/training.py", "def train():\n    from bitnet.train.data import x\n    from bitnet.formats import hf"),
    ("train/data.py", "from bitnet.config import ModelConfig\nfrom bitnet.train import optim"),
    ("tests/test_x.py", "from bitnet.kernels import packing\nfrom bitnet.train import data"),
]
BAD_PICKLES = [
    "import pickle",
    "from torch import load",
    "torch.load('x', weights_only=True)",
    "torch.save(1, f)",
    "np.load(f, allow_pickle=True)",
]
BAD_HANDLERS = ["Exception", "BaseException as e", "(ValueError, Exception)", ""]


@pytest.mark.parametrize(("path", "source"), BAD_IMPORTS)
def test_rule_sees_bad_import(path: str, source: str) -> None:
    assert list(import_complaints(path, source))


@pytest.mark.parametrize(("path", "source"), GOOD_IMPORTS)
def test_rule_allows_good_import(path: str, source: str) -> None:
    assert not list(import_complaints(path, source))


@pytest.mark.parametrize("source", BAD_PICKLES)
def test_rule_sees_pickle(source: str) -> None:
    assert list(pickle_complaints("train/data.py", source))


@pytest.mark.parametrize("caught", BAD_HANDLERS)
def test_rule_sees_catch_all(caught: str) -> None:
    handler = f"try:\n    f()\nexcept {caught}:\n    "
    assert list(except_complaints("bitnet/x.py", handler + "pass"))
    assert not list(except_complaints("bitnet/x.py", handler + "g()\n    raise"))


@pytest.mark.parametrize(
    "line", ["#include <algorithm>", '#include "pool.h"', 'printf("x");', "std::abort();", "// 3 µs", "std::cerr << 1;"]
)
def test_rule_sees_bad_core(line: str) -> None:
    assert list(native_complaints("kernels/cpu/avx2.cpp", line))
    assert not list(
        native_complaints("kernels/cpu/avx2.cpp", '#include <string.h>\n#include "isa.h"\n// abort\nint x;')
    )


@pytest.mark.parametrize("folder", ["home", "root", "tmp", "work", "Users"])
def test_rule_sees_machine_path(folder: str) -> None:
    assert list(word_complaints("train/data.py", f'open("/{folder}/me/data.txt")'))
    assert not list(word_complaints("train/data.py", f"../{folder}/me https://example.org/{folder}/x"))


def test_rule_sees_notes_left_for_later() -> None:
    assert list(word_complaints("train/data.py", "# TO" + "DO: later"))
