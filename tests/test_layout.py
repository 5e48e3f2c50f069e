"""The top level, the frozen command line, the rules of the C++ core, and what no source may contain.

Every rule is a function from source text to complaints, so that the tests at the end can check it on a violation.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import child_process
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bitnet", "kernels", "train", "tests", "benchmarks")
TOP_LEVEL = {*FOLDERS, ".ci", ".github", "docs"}

SOURCES = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
NATIVE = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("kernels", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".cpp", ".h", ".inl"}
)
PLAIN = ["Makefile", "CMakeLists.txt", ".ci/run", "pyproject.toml", "README.md", "CONTRIBUTING.md"]
OTHER_TEXT = [name for name in PLAIN if (ROOT / name).is_file()]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ---- folders and packaging ---------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["kernels", "train"])
def test_mapped_folders_stay_namespaces(folder: str) -> None:
    """With an __init__.py it would shadow an installed package of its name, such as Hugging Face's `kernels`."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_top_level_is_fixed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the project's folders cannot be told from the user's")
    git = ["git", "ls-files", "-z"]
    listed = child_process.run(git, cwd=ROOT).stdout
    folders = {name.partition("/")[0] for name in listed.split("\0") if "/" in name}
    assert folders <= TOP_LEVEL, f"unknown at the top level: {sorted(folders - TOP_LEVEL)}"


# ---- the command line --------------------------------------------------------------------------------------

VERBS = {
    verb: set(options.split())
    for verb, options in {
        "train": "--preset --data --out --steps --seed --linear --init",
        "sweep": "--out --plan --json",
        "pack": "-o",
        "generate": "-m -p -n -c -t -s --temp --top-k --top-p --min-p --chat --json -i --engine --head --cache",
        "serve": "-m --host --port --api-key -t --sequences -c --queue --engine --head --cache",
        "eval": "-m --data --json --engine --head --cache",
        "compare": "--baseline --binary --data --methods -o --plot --max-tokens --kl-tokens --qat-steps --rounds "
        "--llama --keep --budget -t --json",
        "bench": "-m --preset -p -n --pg -d -b -t -r -o --backend --isa --head --cache --against --llama --price "
        "--plot --device --budget",
        "inspect": "--json --plot -p",
        "export": "-o --to --type --json",
        "import": "-o --tokenizer --weight-scale --json",
        "doctor": "--json",
    }.items()
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
    """Options may be added; these must stay."""
    options = {option for param in verbs[verb] for option in (*param.opts, *param.secondary_opts)}
    assert not VERBS[verb] - options, f"bitnet {verb}: missing"


def test_pack_takes_an_argument(verbs: dict[str, list]) -> None:
    assert [param.name for param in verbs["pack"] if param.param_type_name == "argument"]


def test_command_line_imports_little() -> None:
    """`bitnet generate` should not load the trainer, plotting or other tools' formats."""
    code = "import bitnet.cli, json, sys; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(child_process.run([sys.executable, "-c", code]).stdout)
    heavy = ("bitnet.train", "bitnet.files", "bitnet.benchmarks", "bitnet.serve.", "matplotlib", "tensorboard", "wandb")
    assert not [name for name in loaded if name.startswith(heavy)]


# ---- the C++ -----------------------------------------------------------------------------------------------

CORE = [path for path in NATIVE if path.startswith("kernels/cpu/")]
# Compiled once per instruction set. What they include must define no inline functions: the linker would merge the
# copies, and a portable build would run AVX code.
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
            yield f"{path}:{number}: includes {include[1]}: only C headers where a file is compiled per instruction set"


@pytest.mark.parametrize("path", CORE)
def test_the_core_follows_its_rules(path: str) -> None:
    assert not list(native_complaints(path, text(path)))


def test_every_instruction_set_has_its_file() -> None:
    names = {Path(path).name for path in PER_SET}
    assert {"scalar.cpp", "avx2.cpp", "avx512.cpp", "vnni.cpp", "isa.h", "elementwise.inl"} <= names


# ---- what no source may contain ----------------------------------------------------------------------------

MACHINE_PATH = re.compile(r"(?<![\w.~$})>])/(?:home|Users|root|work|tmp|opt|mnt|scratch)/|\b[A-Z]:\\\\?Users")
LEFT_FOR_LATER = re.compile(r"\b(?:TOD[O]|FIXM[E]|XX[X])\b")


FUZZERS = ("benchmarks/fuzz.py", "benchmarks/fuzz_memory.py")


def word_complaints(path: str, source: str) -> Iterator[str]:
    for number, line in enumerate(source.splitlines(), 1):
        if MACHINE_PATH.search(line):
            yield f"{path}:{number}: a path of one machine: {line.strip()}"
        if LEFT_FOR_LATER.search(line) and not path.endswith(".md"):
            yield f"{path}:{number}: a note left for later: {line.strip()}"


def last_name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def except_complaints(path: str, source: str) -> Iterator[str]:
    """A handler for everything hides bugs, unless it cleans up and raises again; fuzzers report what they catch."""
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
def test_no_machine_paths_and_no_notes(path: str) -> None:
    assert not list(word_complaints(path, text(path)))


@pytest.mark.parametrize("path", SOURCES)
def test_no_catch_all(path: str) -> None:
    assert not list(except_complaints(path, text(path)))


def process_complaints(path: str, source: str) -> Iterator[str]:
    """A process without a time limit may hang the test run, or outlive it."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("subprocess."):
            continue
        limited = any(keyword.arg == "timeout" for keyword in node.keywords)
        if last_name(node.func) == "Popen" or not limited:
            yield f"{path}:{node.lineno}: {ast.unparse(node.func)}: no limit; use child_process (tests/support)"


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.startswith("tests/") and path != "tests/support/child_process.py"]
)
def test_processes_have_a_limit(path: str) -> None:
    assert not list(process_complaints(path, text(path)))


# ---- the rules themselves ----------------------------------------------------------------------------------

BAD_HANDLERS = ["Exception", "BaseException as e", "(ValueError, Exception)", ""]


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
    assert list(word_complaints("train/data/prepare.py", f'open("/{folder}/me/data.txt")'))
    assert not list(word_complaints("train/data/prepare.py", f"../{folder}/me https://example.org/{folder}/x"))


def test_rule_sees_notes_left_for_later() -> None:
    assert list(word_complaints("train/data/prepare.py", "# TO" + "DO: later"))


@pytest.mark.parametrize("call", ["run(x)", "run(x, check=True)", "check_output(x)", "Popen(x)"])
def test_rule_sees_a_process_without_limit(call: str) -> None:
    assert list(process_complaints("tests/test_x.py", f"subprocess.{call}"))
    assert not list(process_complaints("tests/test_x.py", "subprocess.run(x, timeout=9)\nchild_process.run(x)"))
