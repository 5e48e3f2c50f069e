"""Byte layouts of ternary codes against the tools that define them: gguf's quantiser, byte for byte."""

import numpy as np
import pytest
import torch
from file_models import write_i2_s
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet.errors import BitNetError
from bitnet.files import ternary
from bitnet.kernels import packing
from bitnet.kernels.reference import WeightCodes

BLOCKS = {"TQ2_0": ternary.TQ2_0, "TQ1_0": ternary.TQ1_0, "Q2_0": ternary.Q2_0}


def random_codes(n: int, k: int, seed: int) -> torch.Tensor:
    """Codes with whole stretches of one value among them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)
    fill = int(torch.randint(-1, 3, (1,), generator=generator))
    if fill < 2:
        codes.view(-1)[: int(torch.randint(n * k + 1, (1,), generator=generator))] = fill
    return codes


@pytest.mark.slow
@settings(max_examples=10_000)
@given(st.integers(1, 9), st.integers(1, 3), st.floats(1e-4, 1e4), st.integers(0, 2**31))
def test_pack_unpack_pack(n: int, blocks: int, scale: float, seed: int) -> None:
    """Every layout, 10,000 cases: the codes come back, and the bytes with them."""
    codes = random_codes(n, 256 * blocks, seed)
    weights = WeightCodes(codes, torch.tensor(scale))
    for layout in BLOCKS.values():
        data = layout.encode(weights)
        back = layout.decode(data, n, codes.shape[1], "x")
        assert torch.equal(back.codes, codes)
        assert np.array_equal(layout.encode(back), data)
    rows = random_codes(4 * n, 7 * blocks, seed)
    packed = ternary.pack_hf(rows)
    assert torch.equal(ternary.unpack_hf(packed, "x"), rows)
    assert torch.equal(ternary.pack_hf(ternary.unpack_hf(packed, "x")), packed)
    assert torch.equal(packing.unpack(packing.pack(rows), rows.shape[1]), rows)
    i2_s = write_i2_s(codes, scale)
    back = ternary.decode_i2_s(i2_s, n, codes.shape[1], "x")
    assert torch.equal(back.codes, codes)
    assert np.array_equal(write_i2_s(back.codes, float(back.scale)), i2_s)


@pytest.mark.parametrize("name", ["TQ2_0", "TQ1_0"])
@pytest.mark.parametrize("shape", [(1, 256), (7, 512), (63, 768), (5, 2560)], ids=lambda s: f"N{s[0]}-K{s[1]}")
def test_bytes_are_those_of_gguf(name: str, shape: tuple[int, int]) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf comes with the extra `interop`")
    kind = gguf.GGMLQuantizationType[name]
    for _ in range(50):
        codes = torch.randint(-1, 2, shape, dtype=torch.int8)
        scale = torch.empty(()).uniform_(1e-3, 5)
        ours = BLOCKS[name].encode(WeightCodes(codes, scale))
        assert np.array_equal(ours, gguf.quants.quantize((codes * scale).numpy(), kind))
        dequantized = torch.from_numpy(gguf.quants.dequantize(ours, kind))
        assert torch.equal(dequantized, codes * scale.half().float())


def test_a_block_of_zeros_keeps_the_scale() -> None:
    """gguf writes 0 there, since it knows no scale but the block's; the codes are the same."""
    gguf = pytest.importorskip("gguf", reason="gguf comes with the extra `interop`")
    codes = torch.zeros(3, 512, dtype=torch.int8)
    codes[0, 300] = 1
    theirs = gguf.quants.quantize((codes * 0.5).float().numpy(), gguf.GGMLQuantizationType.TQ2_0)
    ours = ternary.TQ2_0.encode(WeightCodes(codes, torch.tensor(0.5)))
    assert np.array_equal(ours.reshape(-1, 66)[:, :64], theirs.reshape(-1, 66)[:, :64])
    for data in (ours, theirs):
        back = ternary.TQ2_0.decode(data, 3, 512, "x")
        assert torch.equal(back.codes, codes)
        assert float(back.scale) == 0.5


def test_q2_0_by_hand() -> None:
    """Four neighbours per byte, lowest bits first, after an fp16 scale: no other Python package has this type yet."""
    codes = torch.tensor([[-1, 0, 1, 1] + [0] * 60], dtype=torch.int8)
    data = ternary.Q2_0.encode(WeightCodes(codes, torch.tensor(0.25)))
    assert data.tobytes() == np.float16(0.25).tobytes() + bytes([0b10_10_01_00]) + bytes([0b01010101] * 15)


@pytest.mark.parametrize("name", BLOCKS)
def test_damaged_blocks(name: str) -> None:
    layout = BLOCKS[name]
    codes = torch.randint(-1, 2, (2, 512), dtype=torch.int8)
    codes[:, ::64] = 1
    whole = layout.encode(WeightCodes(codes, torch.tensor(0.5)))
    at = 0 if layout.scale_first else layout.bytes - 2
    for scale in (np.nan, np.inf, 0.0, -1.0):
        data = whole.copy().reshape(-1, layout.bytes)
        data[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        with pytest.raises(BitNetError, match="block scale of"):
            layout.decode(data, 2, 512, "x")
    data = whole.copy().reshape(-1, layout.bytes)
    data[1, at : at + 2] = np.frombuffer(np.float16(0.75).tobytes(), np.uint8)
    with pytest.raises(BitNetError, match=r"0\.5 to 0\.75, expected one for the whole tensor"):
        layout.decode(data, 2, 512, "x")
    data = whole.copy().reshape(-1, layout.bytes)
    data[1, 5] = 0xFF if name != "TQ1_0" else 1  # TQ1_0: no number is stored as 1
    with pytest.raises(BitNetError, match="code 3"):
        layout.decode(data, 2, 512, "x")
    for scale in (1e-6, 1e6, float("nan")):
        with pytest.raises(BitNetError, match="the range of 16 bits; export as f32"):
            layout.encode(WeightCodes(codes, torch.tensor(scale)))
