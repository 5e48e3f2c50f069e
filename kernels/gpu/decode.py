"""The work between two products of a block, one kernel each: a layer of decode is nine launches.

    enter / add     x += sums * scale;  RMSNorm;  int8                          1 (the first one reads the embedding)
    product         q/k/v                                                       2
    attend          scale, QK norm, RoPE, new key and value into the cache,     3
                    attention over a part of the positions
    merge           parts of the positions, sub-norm, int8                      4
    product         o                                                           5
    add             x += sums * scale;  RMSNorm;  int8                          6
    product         gate/up                                                     7
    gate            act(gate) * up, sub-norm, int8                              8
    product         down                                                        9, its sums read by the next `add`

Why so few: a dependent kernel in a CUDA graph costs about 1 us on Hopper before it does anything, while a token of 2B4T
has 30 layers and a floor of 121 us for all ternary weights (521 MB, 4.3 TB/s): launches, not bytes, dominate batch-1
decode. So products write raw int32 sums, split along K or not, and the kernel after them adds the splits, applies the
scales, and ends with the codes of the next product: no kernel only scales, adds, normalises or quantises.

    floor of a 2B4T token:  body 121 us + head 153 us (bf16) or 76 us (int8) + 270 launches * ~1 us = 540 / 470 us
    target of 1,500 tokens/s: 667 us

With programmatic dependent launch (PDL, Hopper and later) a kernel starts while the one before it still runs, loads
what does not depend on it, above all weights, and only then waits: that hides most of the launch and of the first
load's latency. Every kernel waits explicitly before it writes anything, so that the chain stays ordered however early
the launches are.

A program handles a row: B of them in decode, B * T in prefill, which uses the same kernels around GEMMs and torch's
attention.

Positions are read from device memory, so that one captured graph serves every step. An id outside the vocabulary cannot
be refused on the device: it becomes a row of NaN, which no sampler takes for logits.

Dimensions: M rows, B sequences, D model, F ffn, H heads, G key/value heads, E width of a head, S cached positions,
P parts of the positions, V vocabulary.
"""

import triton
import triton.language as tl

from bitnet.kernels.gpu.common import INTERPRETED, narrow
from bitnet.kernels.gpu.quantize import quantize_row, rms


@triton.jit
def split_sum(acc_ptr, place, mask, stride, SPLITS: tl.constexpr):
    """The exact sums of `SPLITS` partial sums that are `stride` apart."""
    total = tl.load(acc_ptr + place, mask=mask, other=0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(acc_ptr + split * stride + place, mask=mask, other=0)
    return total


@triton.jit
def _norm_and_quantize(y, gain_ptr, q_row, inv_ptr, sum_ptr, k, K, width, eps, NORM: tl.constexpr):
    if NORM:
        y = y * rms(y, K, eps) * tl.load(gain_ptr + k, mask=k < K, other=0.0)
    quantize_row(y, q_row, inv_ptr, sum_ptr, k, width)


@triton.jit
def enter_kernel(
    id_ptr,  # [M] int64
    embedding_ptr,  # [V, D] bf16 or int8
    embedding_scale_ptr,  # [V] fp32, if SCALED
    gain_ptr,  # [D] fp32
    x_ptr,  # [M, D] fp32, written
    q_ptr,  # [M, width] int8, written
    inv_ptr,  # [M] fp32, written
    sum_ptr,  # [M] int32, written
    V,
    D,
    width,
    eps,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.load(id_ptr + row)
    known = (token >= 0) & (token < V)
    place = tl.where(known, token, 0)  # the NaN comes from `poison`: nothing outside the embedding is read
    poison = tl.where(known, 0.0, float("nan"))
    x = tl.load(embedding_ptr + place * D + k, mask=k < D, other=0.0).to(tl.float32)
    if SCALED:
        x *= tl.load(embedding_scale_ptr + place)
    x = tl.where(k < D, x + poison, 0.0)
    tl.store(x_ptr + row * D + k, x, mask=k < D)
    _norm_and_quantize(x, gain_ptr, q_ptr + row * width, inv_ptr + row, sum_ptr + row, k, D, width, eps, True)


@triton.jit
def add_kernel(
    x_ptr,  # [M, D] fp32, read and written
    acc_ptr,  # [SPLITS, M, D] int32
    acc_inv_ptr,  # [M] fp32: inverse scale of the activations of acc
    scale_ptr,  # [1] fp32: scale of the weights of acc
    gain_ptr,  # [D] fp32
    q_ptr,  # [M, width] int8, written; if LAST [3, M, D] bf16: three terms whose sum is the normed row
    inv_ptr,  # [M] fp32, written unless LAST
    sum_ptr,  # [M] int32, written unless LAST
    M,
    D,
    width,
    eps,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    LAST: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < D
    stride = tl.full((), M, tl.int64) * D
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    factor = tl.div_rn(tl.load(scale_ptr), tl.load(acc_inv_ptr + row))
    sums = split_sum(acc_ptr, row * D + k, inside, stride, SPLITS)
    x = tl.load(x_ptr + row * D + k, mask=inside, other=0.0) + sums.to(tl.float32) * factor
    if LAST:
        y = x * rms(x, D, eps) * tl.load(gain_ptr + k, mask=inside, other=0.0)
        for term in tl.static_range(3):
            part = narrow(y, tl.bfloat16)
            tl.store(q_ptr + term * stride + row * D + k, part, mask=inside)
            y -= part.to(tl.float32)
    else:
        tl.store(x_ptr + row * D + k, x, mask=inside)
        _norm_and_quantize(x, gain_ptr, q_ptr + row * width, inv_ptr + row, sum_ptr + row, k, D, width, eps, True)


@triton.jit
def gate_kernel(
    acc_ptr,  # [SPLITS, M, 2 F] int32: gate, then up
    acc_inv_ptr,  # [M] fp32
    scale_ptr,  # [2] fp32
    gain_ptr,  # [F] fp32, if NORM
    q_ptr,  # [M, width] int8, written
    inv_ptr,  # [M] fp32, written
    sum_ptr,  # [M] int32, written
    M,
    F,
    width,
    eps,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SQUARED_RELU: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < F
    stride = tl.full((), M, tl.int64) * F * 2
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    inv = tl.load(acc_inv_ptr + row)
    gate = split_sum(acc_ptr, row * 2 * F + k, inside, stride, SPLITS).to(tl.float32)
    up = split_sum(acc_ptr, row * 2 * F + F + k, inside, stride, SPLITS).to(tl.float32)
    gate *= tl.div_rn(tl.load(scale_ptr), inv)
    up *= tl.div_rn(tl.load(scale_ptr + 1), inv)
    if SQUARED_RELU:
        positive = tl.where(gate < 0.0, 0.0, gate)  # keeps a NaN, which maximum(gate, 0) would not
        h = positive * positive * up
    else:
        h = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    _norm_and_quantize(h, gain_ptr, q_ptr + row * width, inv_ptr + row, sum_ptr + row, k, F, width, eps, NORM)


@triton.jit
def _rotate(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _heads(
    acc_ptr,
    row,
    column,
    width,
    stride,
    factor,
    gain_ptr,
    e,
    HALF: tl.constexpr,
    eps,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
):
    """Both halves [heads, HALF'] of the heads whose first columns are `column` [heads], scaled and normed."""
    inside = (e < HALF)[None, :] & (column >= 0)[:, None]
    place = row * width + column[:, None] + e[None, :]
    first = split_sum(acc_ptr, place, inside, stride, SPLITS).to(tl.float32) * factor
    second = split_sum(acc_ptr, place + HALF, inside, stride, SPLITS).to(tl.float32) * factor
    if NORM:
        squares = tl.sum(first * first + second * second, axis=1)
        r = tl.div_rn(1.0, tl.sqrt_rn(squares / (2.0 * HALF) + eps))[:, None]
        first = first * r * tl.load(gain_ptr + e, mask=e < HALF, other=0.0)[None, :]
        second = second * r * tl.load(gain_ptr + HALF + e, mask=e < HALF, other=0.0)[None, :]
    return first, second


@triton.jit
def attend_kernel(
    acc_ptr,  # [SPLITS, B, (H + 2 G) E] int32: queries, keys, values
    inv_ptr,  # [B] fp32
    scale_ptr,  # [3] fp32
    q_gain_ptr,  # [E] fp32, if QK_NORM
    k_gain_ptr,  # [E] fp32, if QK_NORM
    cos_ptr,  # [limit, E] fp32
    sin_ptr,  # [limit, E] fp32
    k_ptr,  # [N, G, limit, E]: cached keys of N sequences, the new ones written
    v_ptr,  # [N, G, limit, E]
    position_ptr,  # [B] int64: positions cached so far
    sequence_ptr,  # [B] int64: which of the N sequences a row continues
    out_ptr,  # [B, H, P, E] fp32, written: weighted sums of values
    top_ptr,  # [B, H, P] fp32, written: largest score of a part
    weight_ptr,  # [B, H, P] fp32, written: sum of weights of a part
    B,
    G,
    limit,
    eps,
    softmax_scale,
    P: tl.constexpr,
    REPEAT: tl.constexpr,  # query heads for each key head
    HEADS: tl.constexpr,  # REPEAT or the power of two above it
    HALF: tl.constexpr,  # E / 2
    HALF_BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
    QK_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    E: tl.constexpr = 2 * HALF
    b, g, part = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1)
    head = tl.arange(0, HEADS)
    e = tl.arange(0, HALF_BLOCK)
    inside = e < HALF
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    position = tl.load(position_ptr + b).to(tl.int32)
    # Equal parts in whole blocks; parts after the last position are empty, and `merge` does not read them.
    span = tl.cdiv(tl.cdiv(position + 1, P), BLOCK_S) * BLOCK_S
    start = part * span
    end = min(start + span, position + 1)
    if start <= position:
        H = G * REPEAT
        width = (H + 2 * G) * E
        stride = tl.full((), B, tl.int64) * width
        inv = tl.load(inv_ptr + b)
        cos = tl.load(cos_ptr + position * E + e, mask=inside, other=0.0)[None, :]
        sin = tl.load(sin_ptr + position * E + e, mask=inside, other=0.0)[None, :]
        column = tl.where(head < REPEAT, (g * REPEAT + head) * E, -1)
        factor = tl.div_rn(tl.load(scale_ptr), inv)
        q1, q2 = _heads(acc_ptr, b, column, width, stride, factor, q_gain_ptr, e, HALF, eps, SPLITS, QK_NORM)
        q1, q2 = _rotate(q1, q2, cos, sin)
        only = tl.arange(0, 1)
        factor = tl.div_rn(tl.load(scale_ptr + 1), inv)
        column = (H + g) * E + only
        k1, k2 = _heads(acc_ptr, b, column, width, stride, factor, k_gain_ptr, e, HALF, eps, SPLITS, QK_NORM)
        k1, k2 = _rotate(k1, k2, cos, sin)
        factor = tl.div_rn(tl.load(scale_ptr + 2), inv)
        column = (H + G + g) * E + only
        v1, v2 = _heads(acc_ptr, b, column, width, stride, factor, k_gain_ptr, e, HALF, eps, SPLITS, False)
        cached = (tl.load(sequence_ptr + b) * G + g) * limit * E
        if end == position + 1:
            place = cached + position * E + e[None, :]
            tl.store(k_ptr + place, k1, mask=inside[None, :])
            tl.store(k_ptr + place + HALF, k2, mask=inside[None, :])
            tl.store(v_ptr + place, v1, mask=inside[None, :])
            tl.store(v_ptr + place + HALF, v2, mask=inside[None, :])

        top = tl.full((HEADS,), float("-inf"), tl.float32)
        weight = tl.zeros((HEADS,), tl.float32)
        o1 = tl.zeros((HEADS, HALF_BLOCK), tl.float32)
        o2 = tl.zeros((HEADS, HALF_BLOCK), tl.float32)
        for block in range(start, end, BLOCK_S):
            s = block + tl.arange(0, BLOCK_S)
            mask = (s < position)[:, None] & inside[None, :]
            new = (s == position)[:, None]
            place = cached + s[:, None] * E + e[None, :]
            keys1 = tl.where(new, k1, tl.load(k_ptr + place, mask=mask, other=0.0))
            keys2 = tl.where(new, k2, tl.load(k_ptr + place + HALF, mask=mask, other=0.0))
            values1 = tl.where(new, v1, tl.load(v_ptr + place, mask=mask, other=0.0))
            values2 = tl.where(new, v2, tl.load(v_ptr + place + HALF, mask=mask, other=0.0))
            score = tl.sum(q1[:, None, :] * keys1[None, :, :] + q2[:, None, :] * keys2[None, :, :], axis=2)
            score = tl.where((s < end)[None, :], score * softmax_scale, float("-inf"))
            higher = tl.maximum(top, tl.max(score, axis=1))
            shrink = tl.exp(top - higher)
            share = tl.exp(score - higher[:, None])
            weight = weight * shrink + tl.sum(share, axis=1)
            o1 = o1 * shrink[:, None] + tl.sum(share[:, :, None] * values1[None, :, :], axis=1)
            o2 = o2 * shrink[:, None] + tl.sum(share[:, :, None] * values2[None, :, :], axis=1)
            top = higher
        result = (b * H + g * REPEAT + head) * P + part
        mask = (head < REPEAT)[:, None] & inside[None, :]
        tl.store(out_ptr + result[:, None] * E + e[None, :], o1, mask=mask)
        tl.store(out_ptr + result[:, None] * E + HALF + e[None, :], o2, mask=mask)
        tl.store(top_ptr + result, top, mask=head < REPEAT)
        tl.store(weight_ptr + result, weight, mask=head < REPEAT)


@triton.jit
def merge_kernel(
    out_ptr,  # [B, H, P, E] fp32
    top_ptr,  # [B, H, P] fp32
    weight_ptr,  # [B, H, P] fp32
    position_ptr,  # [B] int64
    gain_ptr,  # [H E] fp32, if NORM
    q_ptr,  # [B, width] int8, written
    inv_ptr,  # [B] fp32, written
    sum_ptr,  # [B] int32, written
    D,
    width,
    eps,
    P: tl.constexpr,
    E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < D
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    position = tl.load(position_ptr + row).to(tl.int32)
    span = tl.cdiv(tl.cdiv(position + 1, P), BLOCK_S) * BLOCK_S
    result = (row * (D // E) + k // E) * P
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    y = tl.zeros((BLOCK,), tl.float32)
    for part in range(tl.cdiv(position + 1, span)):
        here = tl.load(top_ptr + result + part, mask=inside, other=0.0)
        higher = tl.maximum(top, here)
        shrink, grow = tl.exp(top - higher), tl.exp(here - higher)
        y = y * shrink + grow * tl.load(out_ptr + (result + part) * E + k % E, mask=inside, other=0.0)
        weight = weight * shrink + grow * tl.load(weight_ptr + result + part, mask=inside, other=1.0)
        top = higher
    y = tl.where(inside, tl.div_rn(y, weight), 0.0)
    _norm_and_quantize(y, gain_ptr, q_ptr + row * width, inv_ptr + row, sum_ptr + row, k, D, width, eps, NORM)


@triton.jit
def head_kernel(
    h_ptr,  # [3, M, D] bf16: three terms whose sum is the state
    w_ptr,  # [V, D] bf16 or int8
    scale_ptr,  # [V] fp32, if SCALED
    out_ptr,  # [M, V] fp32, written
    M,
    V,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Logits: a bf16 or int8 embedding times fp32 states, on tensor cores and still as accurate as fp32.

    An fp32 number is the sum of three bf16 numbers to 24 bits, and a product of two bf16 numbers is exact in fp32:
    three products instead of one, while the time is that of reading the embedding. The embedding is the left operand:
    up to 16 tokens are a narrow right one, and int8 rows become bf16 in registers.
    """
    rows = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    embedding = w_ptr + (rows % V).to(tl.int64)[:, None] * D + d[None, :]
    states = h_ptr + (tokens % M).to(tl.int64)[:, None] * D + d[None, :]
    term = tl.full((), M, tl.int64) * D
    acc = tl.zeros((BLOCK_V, BLOCK_M), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            w = tl.load(embedding + start)
            h0, h1, h2 = tl.load(states + start), tl.load(states + start + term), tl.load(states + start + 2 * term)
        else:
            inside = (start + d < D)[None, :]
            w = tl.load(embedding + start, mask=inside, other=0)
            h0 = tl.load(states + start, mask=inside, other=0.0)
            h1 = tl.load(states + start + term, mask=inside, other=0.0)
            h2 = tl.load(states + start + 2 * term, mask=inside, other=0.0)
        if INTERPRETED:  # the interpreter's dot takes bf16 for integers; fp32 products are the same numbers
            w, h0, h1, h2 = w.to(tl.float32), h0.to(tl.float32), h1.to(tl.float32), h2.to(tl.float32)
        else:
            w = w.to(tl.bfloat16)
        acc = tl.dot(w, tl.trans(h2), acc)  # the smallest term first: what is added to it later cannot lose it
        acc = tl.dot(w, tl.trans(h1), acc)
        acc = tl.dot(w, tl.trans(h0), acc)
    if SCALED:
        acc *= tl.load(scale_ptr + rows, mask=rows < V, other=0.0)[:, None]
    place = tokens.to(tl.int64)[None, :] * V + rows[:, None]
    tl.store(out_ptr + place, acc, mask=(rows < V)[:, None] & (tokens < M)[None, :])
