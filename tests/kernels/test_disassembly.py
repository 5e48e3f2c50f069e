"""The built library, disassembled: no multiplication in the products of the default kernels.

What is looked at is what runs: the installed file, by the names of its functions. The VNNI kernel, which does multiply,
shows that a multiplication would be seen. Addresses are computed by the functions around (`rows`, `block`), once for
many thousand weights: those may multiply whole numbers, and no vectors.
"""

import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import child_process
import pytest

from bitnet.kernels import native

# imul, mul, mulx, mulss, mulps; pmul*, pmadd*, and with v: vmul*, vpmul*, vpmadd*; vpdp* of VNNI, vdpbf16ps; every
# fused multiply-add; AMX tiles; dot products of SSE4.1. Shifts and lea are additions of a number to itself.
MULTIPLY = re.compile(
    r"i?mulx?[bwlq]?|v?f?mul[sp][sdh]|v?pmul\w*|v?pmadd\w*|v?pdp\w*|v?dp(?:pd|ps|bf16ps)|vf(?:n?m|c)\w+|td[pc]\w+|fi?mulp?|v?pclmul\w*"
)
KERNELS = ("avx512", "avx2", "scalar")  # those that may be chosen by default
SETS = {one.name: one for one in native.instruction_sets()}


class Instruction(NamedTuple):
    name: str
    operands: str


def disassembly(text: str) -> dict[str, list[Instruction]]:
    """The functions of `objdump -d -C --no-show-raw-insn`, name -> instructions, without the linker's stubs (@plt)."""
    functions: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            body = functions.setdefault(header[1], [])  # two clones may share a name: their bodies are one here
            continue
        fields = line.split("\t")
        if len(fields) < 2:
            continue
        words = fields[1].split()
        while words and words[0] in {
            "bnd",
            "notrack",
            "rep",
            "repz",
            "repnz",
            "lock",
            "data16",
            "cs",
            "{evex}",
            "{vex}",
        }:
            words = words[1:]
        if words:
            body.append(Instruction(words[0], " ".join(words[1:])))
    return {name: body for name, body in functions.items() if not name.endswith("@plt")}


def base(name: str) -> str:
    """Namespace and name alone: `void bitnet::avx2::f<1>(int) [clone .isra.0]` -> bitnet::avx2::f."""
    name = re.sub(r" \[clone .*|@plt|\+0x[0-9a-f]+$", "", name)
    while "<" in name and (shorter := re.sub(r"<[^<>]*>", "", name)) != name:
        name = shorter
    return name.partition("(")[0].rpartition(" ")[2]


def leaving(name: str, body: list[Instruction]) -> Iterator[str]:
    """Where a function goes by call, or by a jump out of itself; indirect ones as they are written."""
    for instruction in body:
        target = re.search(r"<(.+)>", instruction.operands)
        stays = target is not None and base(target[1]) == base(name)
        if instruction.name.startswith("call") or (instruction.name.startswith("j") and not stays):
            yield base(target[1]) if target else instruction.operands


def multiplications(body: list[Instruction]) -> list[str]:
    return [f"{name} {operands}" for name, operands in body if MULTIPLY.fullmatch(name)]


@pytest.fixture(scope="module")
def functions() -> dict[str, list[Instruction]]:
    if platform.machine() not in {"x86_64", "AMD64"}:
        pytest.skip(f"reads x86-64 code, this machine is {platform.machine()}")
    if native.why_not():
        pytest.skip(str(native.why_not()))
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump here; it comes with binutils")
    path = Path(native.module().__file__)
    command = [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", "--wide", str(path)]
    found = disassembly(child_process.run(command).stdout)
    assert len(found) > 300, "a stripped library: its functions have no names"
    return found


def chosen(functions: dict[str, list[Instruction]], pattern: str) -> dict[str, list[Instruction]]:
    return {name: body for name, body in functions.items() if re.fullmatch(pattern, base(name))}


@pytest.mark.parametrize("kernel", KERNELS)
def test_products_do_not_multiply(kernel: str, functions: dict[str, list[Instruction]]) -> None:
    assert kernel in SETS
    assert not SETS[kernel].multiplies
    products = chosen(functions, rf"bitnet::{kernel}::product_\w+")
    wanted = {"product_rows"} if kernel == "scalar" else {"product_rows", "product_tile", "product_tables"}
    assert {base(name).rpartition("::")[2] for name in products} == wanted
    for name, body in products.items():
        assert len(body) >= 12, f"{name}: a stub, where is the product?"
        assert not multiplications(body), name
        outside = [target for target in leaving(name, body) if target not in {base(other) for other in products}]
        assert not outside, f"{name} leaves for {outside}, which nobody looked at"


@pytest.mark.parametrize("kernel", KERNELS)
def test_products_look_up_and_add(kernel: str, functions: dict[str, list[Instruction]]) -> None:
    """The other way round: the additions are where we look, not in a function that was forgotten."""
    wanted = {"avx512": {"vpermw", "vpaddw", "vpaddd"}, "avx2": {"vpshufb", "vpaddw", "vpaddd"}, "scalar": {"add"}}
    rows = chosen(functions, rf"bitnet::{kernel}::product_rows")
    for name, body in rows.items():
        names = {instruction.name for instruction in body}
        if kernel == "scalar":  # additions of any width, as gcc sees fit
            assert {word for word in names if word.startswith(("add", "padd", "vpadd"))}, name
        else:
            assert wanted[kernel] <= names, name


@pytest.mark.parametrize("kernel", KERNELS)
def test_tables_do_not_multiply(kernel: str, functions: dict[str, list[Instruction]]) -> None:
    tables = chosen(functions, rf"bitnet::{kernel}::tables")
    assert tables
    for name, body in tables.items():
        assert not multiplications(body), name
        assert set(leaving(name, body)) <= {"memset"}, name


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_surrounds_products_multiplies_addresses_alone(
    kernel: str, functions: dict[str, list[Instruction]]
) -> None:
    around = chosen(
        functions, rf"bitnet::{kernel}::(?:rows|block|rows_of|block_of|tile|tile_of|offsets|columns|transpose16)"
    )
    assert around
    for name, body in around.items():
        vectors = [line for line in multiplications(body) if not re.match(r"i?mulx?[lq]? ", line)]
        assert not vectors, name


def test_the_detector_sees_a_multiplication(functions: dict[str, list[Instruction]]) -> None:
    """In the kernel that says it multiplies: every function that does the work."""
    assert SETS["vnni"].multiplies
    products = chosen(functions, r"bitnet::vnni::multiply_\w+")
    assert {base(name).rpartition("::")[2] for name in products} == {"multiply_rows", "multiply_block"}
    for name, body in products.items():
        assert any(line.startswith("vpdpbusd ") for line in multiplications(body)), name
    norms = chosen(functions, r"bitnet::\w+::rms_norm")
    assert len(norms) == len(SETS)
    for name, body in norms.items():
        assert multiplications(body), name  # mulps, vmulps: floating point is seen, too


def test_wide_registers_stay_in_their_files(functions: dict[str, list[Instruction]]) -> None:
    """What is compiled for AVX must not be merged into code that every machine runs."""
    own = re.compile(r"bitnet::(?:avx2|avx512|vnni)::.*")
    leaked = {
        name: [f"{word} {operands}" for word, operands in body if re.search(r"%[yz]mm|%k[0-7]", operands)][:3]
        for name, body in functions.items()
        if not own.fullmatch(base(name))
    }
    assert not {name: lines for name, lines in leaked.items() if lines}


@pytest.mark.parametrize(
    "word",
    "imul imull imulq mul mulq mulb mulx mulxq mulss mulps vmulps vmulsd vmulph pmullw vpmullw vpmulld vpmuldq "
    "vpmaddubsw pmaddwd vpmaddwd vpmadd52luq vpdpbusd vpdpwssd vdpbf16ps vdpps dppd vfmadd231ps vfnmadd132ss "
    "vfmsub213pd vfmaddsub132ps vfcmaddcph tdpbusd fmul fimul fmulp vpclmulqdq".split(),
)
def test_words_that_multiply(word: str) -> None:
    assert MULTIPLY.fullmatch(word)


@pytest.mark.parametrize(
    "word",
    "add vpaddw vpermw vpshufb lea shl vpsllw vpmovsxwd vpmovzxbw pmovsxbw vmovdqu vpminsw vextracti128 call".split(),
)
def test_words_that_do_not(word: str) -> None:
    assert not MULTIPLY.fullmatch(word)


def test_reading_a_listing() -> None:
    listing = (
        "0000000000001000 <void n::f<1, (a)2>(int*) [clone .isra.0]>:\n"
        "    1000:\timul   %rsi,%rdi\n"
        "    1004:\tbnd jmp 1000 <void n::f<1, (a)2>(int*) [clone .isra.0]>\n"
        "    1006:\tjne    1002 <void n::f<1, (a)2>(int*) [clone .isra.0]+0x2>\n"
        "    1008:\tcall   2000 <n::g(int)@plt>\n"
        "    100d:\tjmp    *%rax\n"
        "\n"
        "0000000000002000 <n::g(int)@plt>:\n"
        "    2000:\tmul    %rcx\n"
    )
    ((name, body),) = disassembly(listing).items()
    assert base(name) == "n::f"
    assert multiplications(body) == ["imul %rsi,%rdi"]
    assert list(leaving(name, body)) == ["n::g", "*%rax"]
