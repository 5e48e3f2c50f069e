"""Every kernel compiled ahead of time for GPUs that are not here, and its code looked at: tensor-core instructions,
16-byte loads, exact rounding, no spills, shared memory within the limit. Nothing runs."""

import os
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import child_process
import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from bitnet.kernels.gpu import decode, gemv, int8_gemm, packed_gemm, products, quantize  # noqa: E402
from bitnet.kernels.gpu.layout import GpuWeights  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

# Shared memory a program may have, in bytes: A100, H100 and H200, B200 (CUDA programming guide, table of limits).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TARGETS = pytest.mark.parametrize("target", SHARED)
# Sums as they stand in PTX: mma.sync (8.0), wgmma (9.0), the fifth generation's tcgen05 (10.0), on int8.
TENSOR_CORE = {
    80: r"mma\.sync\S*\.s32\.s8\.s8\.s32",
    90: r"wgmma\.mma_async\S*\.s32\.s8\.s8",
    100: r"tcgen05\.mma\S*\.kind::i8|mma\.sync\S*\.s32\.s8\.s8\.s32",
}
INTEGERS = {"M", "N", "K", "B", "G", "D", "F", "V", "size", "width", "stride", "limit", "blocks", "steps", "share"}
UNALIGNED = {"M", "B", "G", "blocks", "steps", "share", "start1", "start2"}  # the rest are multiples of 16 in practice
POINTERS = {
    "q_ptr": "*i8", "w_ptr": "*u8", "code_ptr": "*i8", "a_ptr": "*i8", "b_ptr": "*i8", "packed_ptr": "*u8",
    "acc_ptr": "*i32", "id_ptr": "*i64", "position_ptr": "*i64", "sequence_ptr": "*i64",
    "table_ptr": "*bf16", "h_ptr": "*bf16",
}  # fmt: skip


class Code(NamedTuple):
    ptx: str
    shared: int
    stack: int  # bytes of local memory a thread: spilled registers

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))


def signature(kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> tuple[dict[str, str], dict[Any, Any]]:
    kinds, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else types.get(name)
        if kind is None:
            kind = POINTERS.get(name, "*fp32") if name.endswith("_ptr") else "fp32"
            if name in INTEGERS or name.startswith("start"):
                kind = "i32"
        kinds[name] = kind
        if kind.startswith("*") or (kind == "i32" and name not in UNALIGNED):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return kinds, attributes


@cache
def built(name: str, target: int) -> Code:
    kernel, constants, types, options = CASES[name]
    constants = dict(constants)
    if "PDL" in constants:
        constants["PDL"] = target >= 90  # programmatic dependent launch came with Hopper
    kinds, attributes = signature(kernel, constants, types)
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=places, attrs=attributes)
    options = {"enable_fp_fusion": False} | options
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return Code(compiled.asm["ptx"], compiled.metadata.shared, stack_bytes(compiled.asm["cubin"]))


def stack_bytes(cubin: bytes) -> int:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = child_process.run([tool, "-res-usage", file.name]).stdout
    found = re.search(r"REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    return int(found[1]) + int(found[2])


def gemm_case(config: dict[str, int], **constants: Any) -> Any:
    constants = {"BLOCK_M": config["block_m"], "BLOCK_N": config["block_n"], "GROUP": 8} | constants
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    return constants, {}, options


def cases() -> dict[str, Any]:
    """The kernels as an engine of the 2B4T shape and a training step launch them."""

    class Shape(NamedTuple):  # what the choice of candidates looks at
        n: int
        k: int
        blocks: int

    weights: Any = Shape(13824, 2560, 10)
    assert isinstance(weights, Shape | GpuWeights)
    found: dict[str, Any] = {}
    import torch

    for tokens in (1, 2, 8, 16, 64, 512):
        for i, c in enumerate(products.candidates(tokens, weights, torch.device("cpu"))):
            if c["gemv"]:
                kernel = gemv.gemv_one_kernel if tokens == 1 else gemv.gemv_kernel
                constants: dict[str, Any] = {"BLOCK_N": c["block_n"], "STEP": c["step"], "PDL": False}
                constants |= {} if tokens == 1 else {"TOKENS": tokens}
                types = {"q_ptr": "*i32", "w_ptr": "*i32", "out_ptr": "*i32"}
                found[f"gemv-{tokens}-{i}"] = (kernel, constants, types, {"num_warps": c["num_warps"]})
                continue
            constants, _, options = gemm_case(c, WEIGHTS_LEFT=bool(c["weights_left"]), PDL=False)
            types = {"out_ptr": "*i32", "sum_ptr": "*i32"}
            found[f"packed_gemm-{tokens}-{i}"] = (packed_gemm.packed_gemm_kernel, constants, types, options)
    for i, c in enumerate(int8_gemm.CONFIGS):
        constants, _, options = gemm_case(c, BLOCK_K=c["block_k"], EVEN_K=True, RAW=False, SEGMENTS=3, ALIGNED=True)
        found[f"int8_gemm-{i}"] = (int8_gemm.int8_gemm_kernel, constants, {"out_ptr": "*bf16"}, options)
    sums, rows = {"sum_ptr": "*i32"}, {"BLOCK": 4096, "PDL": False}
    fused = {"enable_fp_fusion": True}
    attend = {
        "P": 16, "REPEAT": 4, "HEADS": 4, "HALF": 64, "HALF_BLOCK": 64, "BLOCK_S": 32, "SPLITS": 4, "QK_NORM": True,
        "PDL": False,
    }  # fmt: skip
    head = {"BLOCK_V": 128, "BLOCK_D": 64, "EVEN_D": True, "PDL": False}
    few, many = {"num_warps": 4, "num_stages": 4}, {"num_warps": 8, "num_stages": 3}
    totals = {"sum_ptr": "*fp64"}
    return found | {
        "enter": (decode.enter_kernel, rows | {"SCALED": False}, sums, {"num_warps": 8}),
        "add": (decode.add_kernel, rows | {"SPLITS": 10, "LAST": False}, sums, {"num_warps": 8}),
        "last": (decode.add_kernel, rows | {"SPLITS": 10, "LAST": True}, sums | {"q_ptr": "*bf16"}, {"num_warps": 8}),
        "gate": (
            decode.gate_kernel,
            rows | {"BLOCK": 8192, "SPLITS": 2, "SQUARED_RELU": True, "NORM": True},
            sums,
            {"num_warps": 16},
        ),
        "attend": (decode.attend_kernel, attend, {}, fused | {"num_warps": 8}),
        "merge": (
            decode.merge_kernel,
            rows | {"P": 16, "E": 128, "BLOCK_S": 32, "NORM": True},
            sums,
            {"num_warps": 8},
        ),
        "head-bf16": (decode.head_kernel, head | {"BLOCK_M": 16, "SCALED": False}, {"w_ptr": "*bf16"}, fused | few),
        "head-int8": (decode.head_kernel, head | {"BLOCK_M": 16, "SCALED": True}, {"w_ptr": "*i8"}, fused | few),
        "head-many": (decode.head_kernel, head | {"BLOCK_M": 64, "SCALED": False}, {"w_ptr": "*bf16"}, fused | many),
        "quantize": (quantize.quantize_kernel, {"BLOCK": 1024, "NORM": True}, sums | {"x_ptr": "*bf16"}, {}),
        "norm_backward": (quantize.norm_backward_kernel, {"BLOCK": 1024}, {"dy_ptr": "*bf16"}, {}),
        "abs_sum": (quantize.abs_sum_kernel, {"TILE": 4096}, totals | {"w_ptr": "*fp32"}, {"num_warps": 8}),
        "ternary": (
            quantize.ternary_kernel,
            {"SUMS": 512, "TILE": 4096},
            totals | {"w_ptr": "*fp32"},
            {"num_warps": 8},
        ),
    }


CASES = cases()
# Four warps with 128 x 128 sums have 128 of them a thread: on 8.0 mma.sync keeps its operands in registers as well, and
# some spill. The tuner may pick it elsewhere. `gate` on 8.0 parks 8 bytes a thread outside any loop.
SPILLS = {("packed_gemm-512-2", 80), ("gate", 80)}
GEMMS = [name for name in CASES if "gemm" in name]
GEMVS = [name for name in CASES if name.startswith("gemv")]
ROUNDING = ["enter", "add", "gate", "merge", "quantize", "ternary"]


@pytest.mark.slow
@TARGETS
@pytest.mark.parametrize("name", CASES)
def test_fits_and_does_not_spill(name: str, target: int) -> None:
    code = built(name, target)
    assert code.shared <= SHARED[target]
    if (name, target) not in SPILLS:
        assert code.stack == 0, f"{code.stack} bytes of registers a thread spill into memory"


@TARGETS
@pytest.mark.parametrize("name", GEMMS)
def test_gemms_use_int8_tensor_cores(name: str, target: int) -> None:
    code = built(name, target)
    assert code.count(TENSOR_CORE[target]) >= 4
    assert code.count(r"cp\.async|cp\.async\.bulk") > 0, "no asynchronous copies: the loop is not pipelined"
    assert code.count(r"\bmad\.lo|\bmul\.lo\.s32") < 100, "products outside the tensor cores"


@pytest.mark.parametrize("name", [name for name in GEMMS if name.startswith("packed")])
def test_two_bits_are_decoded_four_at_a_time(name: str) -> None:
    """One mask for four weights: BLOCK_N * 64 bytes, four fields of a byte, over the threads of a program."""
    _, constants, _, options = CASES[name]
    code = built(name, 90)
    masks = constants["BLOCK_N"] * 64 * 4 // 4 // (32 * options["num_warps"])
    copies = 1 if constants["BLOCK_M"] > 16 else 4  # a small program may hold an operand in several warps
    assert masks <= code.count(r"and\.b32\s+\S+, \S+, (?:0x03030303|50529027)") <= copies * masks


@TARGETS
@pytest.mark.parametrize("name", GEMVS)
def test_gemv_loads_sixteen_bytes_and_multiplies_four_at_a_time(name: str, target: int) -> None:
    code = built(name, target)
    _, constants, _, options = CASES[name]
    words = constants["BLOCK_N"] * constants["STEP"] * 16 // (32 * options["num_warps"])
    wide = code.count(r"ld\.global[^;]*\.v4\.b32[^;]*")
    assert wide >= max(words // 4, 1), "the weights of a thread are not loaded 16 bytes at a time"
    # Four fields of every word and every token, and at least one more for the sum of q.
    assert code.count(r"dp4a\.u32\.s32") >= 4 * words * constants.get("TOKENS", 1)
    assert code.count(r"\bmad\.lo|\bmul\.lo\.s32") < 32, "weights are multiplied one at a time"


@pytest.mark.parametrize("name", GEMVS)
def test_gemv_weights_are_read_before_the_wait(name: str) -> None:
    """Programmatic dependent launch hides a launch only if the weights are on their way before the wait."""
    if CASES[name][0] is not gemv.gemv_one_kernel:
        pytest.skip("several tokens: waits first, its time is not the launch")
    code = built(name, 90)
    first, wait = code.ptx.find("ld.global"), code.ptx.find("griddepcontrol.wait")
    assert 0 < first < wait
    assert code.count("griddepcontrol.launch_dependents") == 1


@TARGETS
@pytest.mark.parametrize("name", ROUNDING)
def test_rounding_is_exact(name: str, target: int) -> None:
    """x * inv and the addition behind it must round apart, and a division must be correctly rounded."""
    code = built(name, target)
    assert code.count(r"\bfma\.rn(?:\.ftz)?\.f32") == 0
    assert code.count(r"mul\.(?:ftz\.)?f32 ") == 0, "a product without .rn may be fused"
    assert code.count(r"\bmul\.rn\.f32") > 0
    assert code.count(r"div\.(?:full|approx)") == 0
    assert code.count(r"div\.rn\.f32") > 0


@TARGETS
@pytest.mark.parametrize("name", ["head-bf16", "head-int8", "head-many"])
def test_the_head_is_on_tensor_cores(name: str, target: int) -> None:
    assert built(name, target).count(r"mma\S*(?:\.bf16|kind::f16)") >= 3
