"""The packed layout, held against plain Python: byte by byte, both ways, and what it refuses."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitnet.kernels import packing

CASES = 10_000  # pack -> unpack -> pack round trips drawn by hypothesis
CASES_PER_EXAMPLE = 100


def pack_by_hand(rows: list[list[int]]) -> list[list[int]]:
    """The drawing in kernels/packing.py in plain Python: weight k of a row is digit k % 4 of byte k // 4, base 4."""
    packed = []
    for row in rows:
        filled = row + [0] * (-len(row) % 4)
        packed.append([sum((w + 1) * 4**i for i, w in enumerate(filled[j : j + 4])) for j in range(0, len(filled), 4)])
    return packed


def random_codes(n: int, k: int, seed: int) -> Tensor:
    return torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def test_layout_is_the_drawing() -> None:
    codes = torch.tensor([[-1, 0, 1, -1, 1], [1, 1, 1, 1, -1], [-1, -1, -1, -1, 0]], dtype=torch.int8)
    # Row 0: codes 0 1 2 0 | 2 and a fill of 1 1 1, the first one in the lowest bits.
    expected = [[0b00_10_01_00, 0b01_01_01_10], [0b10_10_10_10, 0b01_01_01_00], [0b00_00_00_00, 0b01_01_01_01]]
    packed = packing.pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected
    assert packing.LAYOUT_ID == "k4-lsb"  # files say this name: another layout must not keep it


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 3), (3, 2), (7, 63), (5, 100), (31, 129)], ids=str)
def test_layout_is_base_four(n: int, k: int, seed: int) -> None:
    codes = random_codes(n, k, seed)
    packed = packing.pack(codes)
    assert packed.tolist() == pack_by_hand(codes.tolist())
    assert packed.shape == (n, packing.packed_width(k))
    assert packing.unpack(packed, k).tolist() == codes.tolist()


@pytest.mark.slow
@settings(max_examples=CASES // CASES_PER_EXAMPLE, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, 999), min_size=CASES_PER_EXAMPLE, max_size=CASES_PER_EXAMPLE), st.integers(0, 2**31))
def test_there_and_back(sizes: list[int], seed: int) -> None:
    for size in sizes:
        n, k = 1 + size // 80, 1 + size % 80
        seed += 1
        codes = random_codes(n, k, seed)
        packed = packing.pack(codes)
        back = packing.unpack(packed, k)
        assert back.dtype == torch.int8
        assert torch.equal(back, codes), (n, k, seed)
        assert torch.equal(packing.pack(back), packed), (n, k, seed)


def test_every_byte_either_unpacks_or_is_refused() -> None:
    for byte in range(256):
        fields = [byte >> shift & 3 for shift in (0, 2, 4, 6)]
        packed = torch.tensor([[byte]], dtype=torch.uint8)
        if 3 in fields:
            with pytest.raises(ValueError, match="code 3"):
                packing.unpack(packed, 4)
        else:
            assert packing.unpack(packed, 4).tolist() == [[field - 1 for field in fields]]


def test_unpack_writes_all_of_its_result(seed: int, monkeypatch: pytest.MonkeyPatch, poison) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    codes = random_codes(17, 101, seed)
    assert torch.equal(packing.unpack(packing.pack(codes), 101), codes)


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_non_contiguous_codes(view: str, seed: int) -> None:
    codes = random_codes(30, 42, seed)
    codes = {"transposed": codes.T, "strided": codes[::3, 1::2], "expanded": codes[:1].expand(5, -1)}[view]
    assert not codes.is_contiguous()
    packed = packing.pack(codes)
    assert packed.tolist() == pack_by_hand(codes.tolist())
    assert torch.equal(packing.unpack(packed, codes.shape[1]), codes)
    wide = torch.zeros(packed.shape[0], 2 * packed.shape[1], dtype=torch.uint8)
    wide[:, ::2] = packed
    assert torch.equal(packing.unpack(wide[:, ::2], codes.shape[1]), codes)


def test_packing_leaves_its_input_alone(seed: int) -> None:
    codes = random_codes(5, 9, seed)
    copy = codes.clone()
    packed = packing.pack(codes)
    packing.unpack(packed, 9)
    assert torch.equal(codes, copy)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 63, 64, 100])
def test_code_3_is_refused_with_its_place(k: int, seed: int) -> None:
    packed = packing.pack(random_codes(11, k, seed))
    row, column = seed % 11, (seed >> 4) % k
    packed[row, column // 4] |= 3 << 2 * (column % 4)
    with pytest.raises(ValueError, match=rf"code 3 in row {row}, byte {column // 4}\b"):
        packing.unpack(packed, k)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 63, 97])
@pytest.mark.parametrize("code", [0, 2])
def test_a_fill_that_is_not_zero_is_refused(k: int, code: int, seed: int) -> None:
    """Else two files would hold the same model, and a kernel that reads whole bytes would add something."""
    if k % 4 == 0:
        pytest.skip("nothing to fill")
    packed = packing.pack(random_codes(6, k, seed))
    for place in range(k % 4, 4):
        damaged = packed.clone()
        damaged[seed % 6, -1] = damaged[seed % 6, -1] & ~(3 << 2 * place) & 0xFF | code << 2 * place
        with pytest.raises(ValueError, match="fill"):
            packing.unpack(damaged, k)


@pytest.mark.parametrize("value", [-128, -2, 2, 3, 127])
def test_other_values_are_refused(value: int, seed: int) -> None:
    codes = random_codes(9, 31, seed)
    codes[seed % 9, seed % 31] = value
    with pytest.raises(ValueError, match=r"expected -1, 0 or \+1"):
        packing.pack(codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int32, torch.int64, torch.bool])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"expected torch\.int8"):
        packing.pack(torch.zeros(2, 4, dtype=dtype))
    if dtype != torch.uint8:
        with pytest.raises(TypeError, match=r"expected torch\.uint8"):
            packing.unpack(torch.zeros(2, 1, dtype=dtype), 4)


@pytest.mark.parametrize("shape", [(4,), (), (2, 2, 4)])
def test_other_ranks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        packing.pack(torch.zeros(shape, dtype=torch.int8))
    with pytest.raises(ValueError, match="expected"):
        packing.unpack(torch.zeros(shape, dtype=torch.uint8), 4)


@pytest.mark.parametrize(("width", "k"), [(2, 4), (2, 9), (1, 0), (1, -3), (0, 1), (3, 8)])
def test_a_width_that_is_not_of_k_is_refused(width: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        packing.unpack(torch.full((3, width), 0b01010101, dtype=torch.uint8), k)


def test_packed_width_counts_bytes() -> None:
    assert [packing.packed_width(k) for k in (1, 3, 4, 5, 63, 64, 65, 100)] == [1, 1, 1, 2, 16, 16, 17, 25]
