// What a multiplier would gain: the same products with AVX-512 VNNI, for comparison. Never chosen by default.
//
// vpdpbusd multiplies four unsigned codes (weight + 1) by four int8 activations and adds them to an int32 lane; the sum
// of all activations is subtracted once at the end. Two-bit codes come out by shift and mask. A word of 32 bits holds
// 16 weights of a row: byte j, bits 2 s and 2 s + 1 hold weight 4 s + j, so that shift s yields four neighbours.

#include <immintrin.h>
#include <string.h>

#include "isa.h"

namespace bitnet {
namespace vnni {

#define W 16
#define FMA(a, b, c) ((F)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define FROM_U16(p) ((I)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(p))))
#define FROM_U8(p) ((I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p))))
#define FROM_I8(p) ((I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p))))
#define TO_I8(p, v) _mm_storeu_si128((__m128i*)(p), _mm512_cvtepi32_epi8((__m512i)(v)))
#define NIBBLE(codes) ((F)_mm512_permutexvar_ps((__m512i)(codes), kNibbles))
#define kNibbles _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)
#include "elementwise.inl"

// The "tables" are the activations themselves, 16 bytes per word.
static void tables(const int8_t* q, int64_t words, uint8_t* out) { memcpy(out, q, (size_t)words * 16); }

static inline __m512i four(const uint8_t* x) {
    int32_t v;
    memcpy(&v, x, 4);
    return _mm512_set1_epi32(v);
}

// Two tiles (or one) x T tokens; rows `stride` bytes from word to word; added to sums [T][token_stride].
template <int P, int T>
__attribute__((noinline)) void multiply_rows(const uint8_t* w, int64_t stride, int64_t words, const uint8_t* x,
                                             int64_t token_bytes, int32_t* sums, int64_t token_stride) {
    const __m512i mask = _mm512_set1_epi8(3), ones = _mm512_set1_epi8(1);
    __m512i s[2 * P][T], total[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        total[t] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int p = 0; p < 2 * P; p++) s[p][t] = _mm512_setzero_si512();
    }
    for (; words > 0; words--, w += stride, x += 16) {
        __m512i word[2 * P];
#pragma GCC unroll 8
        for (int p = 0; p < 2 * P; p++) {
            word[p] = _mm512_load_si512(w + 64 * p);
            _mm_prefetch((const char*)w + 64 * p + 8192, _MM_HINT_T1);
            _mm_prefetch((const char*)w + 64 * p + 1024, _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int shift = 0; shift < 4; shift++) {
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const __m512i v = four(x + t * token_bytes + 4 * shift);
                total[t] = _mm512_dpbusd_epi32(total[t], ones, v);
#pragma GCC unroll 8
                for (int p = 0; p < 2 * P; p++)
                    s[p][t] = _mm512_dpbusd_epi32(s[p][t], _mm512_and_si512(word[p], mask), v);
            }
#pragma GCC unroll 8
            for (int p = 0; p < 2 * P; p++) word[p] = _mm512_srli_epi32(word[p], 2);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 8
        for (int p = 0; p < 2 * P; p++) {
            int32_t* to = sums + t * token_stride + 16 * p;
            _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_loadu_si512(to), _mm512_sub_epi32(s[p][t], total[t])));
        }
}

template <int T>
static void rows_of(const uint8_t* panel, int tiles, int64_t words, const uint8_t* x, int64_t token_bytes, int32_t* sums) {
    const int64_t stride = 128 * tiles, row = tiles * kTile;
    if (tiles >= 2) multiply_rows<2, T>(panel, stride, words, x, token_bytes, sums, row);
    if (tiles == 4) multiply_rows<2, T>(panel + 256, stride, words, x, token_bytes, sums + 64, row);
    if (tiles & 1)
        multiply_rows<1, T>(panel + 128 * (tiles - 1), stride, words, x, token_bytes, sums + (tiles - 1) * kTile, row);
}

static void rows(const uint8_t* panel, int tiles, int64_t words, const uint8_t* tables, int64_t token_bytes, int tokens,
                 int32_t* sums) {
    if (tokens == 1) rows_of<1>(panel, tiles, words, tables, token_bytes, sums);
    if (tokens == 2) rows_of<2>(panel, tiles, words, tables, token_bytes, sums);
    if (tokens == 3) rows_of<3>(panel, tiles, words, tables, token_bytes, sums);
    if (tokens == 4) rows_of<4>(panel, tiles, words, tables, token_bytes, sums);
}

// Nothing to transpose: `block` reads each token's bytes in a row.
static void columns(const int8_t*, int64_t, int, int, int64_t, int64_t, int16_t*) {}

// ---- block: codes of two tiles and 16 words are unpacked to bytes once, then multiplied with every token

constexpr int kRun = 16;  // words: 256 weights x 64 rows are 16 KB, half of the L1 cache

// codes [4 words][2 P][64] bytes x activations of T tokens [T][4 words] of four -> sums [row of 2 P * 16][64] added.
template <int P, int T>
__attribute__((noinline)) void multiply_block(const uint8_t* codes, int quads, const uint8_t* x, int64_t token_bytes,
                                              int32_t* sums) {
    __m512i s[2 * P][T];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 8
        for (int p = 0; p < 2 * P; p++) s[p][t] = _mm512_loadu_si512(sums + t * 64 + 16 * p);
    for (; quads > 0; quads--, codes += 128 * P, x += 4) {
        __m512i code[2 * P];
#pragma GCC unroll 8
        for (int p = 0; p < 2 * P; p++) code[p] = _mm512_load_si512(codes + 64 * p);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const __m512i v = four(x + t * token_bytes);
#pragma GCC unroll 8
            for (int p = 0; p < 2 * P; p++) s[p][t] = _mm512_dpbusd_epi32(s[p][t], code[p], v);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 8
        for (int p = 0; p < 2 * P; p++) _mm512_storeu_si512(sums + t * 64 + 16 * p, s[p][t]);
}

static int64_t block_scratch(int tiles, int tokens) {
    return (int64_t)tiles * kTile * tokens * 4 + 2 * kTile * 16 * kRun + 2 * kTile * tokens * 4;
}

template <int P>
static void unpack(const uint8_t* w, int64_t stride, int words, uint8_t* out) {
    const __m512i mask = _mm512_set1_epi8(3);
    for (; words > 0; words--, w += stride)
#pragma GCC unroll 8
        for (int shift = 0; shift < 4; shift++)
#pragma GCC unroll 8
            for (int p = 0; p < 2 * P; p++, out += 64)
                _mm512_store_si512(out, _mm512_and_si512(_mm512_srli_epi32(_mm512_load_si512(w + 64 * p), 2 * shift), mask));
}

template <int P>
static void block_tiles(const uint8_t* data, int64_t all, int64_t tile, int64_t words, const int8_t* q, int64_t q_bytes,
                        int tokens, const int32_t* total, uint8_t* codes, int32_t* work, int32_t* sums) {
    memset(work, 0, (size_t)tokens * 2 * kTile * 4);
    for (int64_t i = 0; i < words; i += kRun) {
        const int n = words - i < kRun ? (int)(words - i) : kRun;
        const Place w = place(kCodes, data, all, words, tile, i);
        unpack<P>(w.data, w.stride, n, codes);
        const uint8_t* x = (const uint8_t*)q + i * 16;
        int t = 0;
        for (; t + 6 <= tokens; t += 6) multiply_block<P, 6>(codes, 4 * n, x + t * q_bytes, q_bytes, work + t * 64);
        for (; t + 2 <= tokens; t += 2) multiply_block<P, 2>(codes, 4 * n, x + t * q_bytes, q_bytes, work + t * 64);
    }
    for (int r = 0; r < P * kTile; r++)
        for (int t = 0; t < tokens; t++) sums[r * tokens + t] = work[t * 64 + r] - total[t];
}

static void block(const uint8_t* data, int64_t all, int64_t first, int tiles, int64_t words, const int16_t*,
                  const int8_t* q, int64_t q_bytes, int tokens, uint8_t* scratch) {
    static_assert(kCodes.chunk % kRun == 0, "a run stays in one chunk");
    int32_t* sums = (int32_t*)scratch;
    uint8_t* codes = scratch + (int64_t)tiles * kTile * tokens * 4;
    int32_t* work = (int32_t*)(codes + 2 * kTile * 16 * kRun);
    int32_t total[kBlock];
    for (int t = 0; t < tokens; t++) {
        __m512i s = _mm512_setzero_si512();
        for (int64_t i = 0; i < words * 16; i += 16)
            s = _mm512_add_epi32(s, _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(q + t * q_bytes + i))));
        total[t] = _mm512_reduce_add_epi32(s);
    }
    for (int t = 0; t < tiles;) {
        int32_t* to = sums + (int64_t)t * kTile * tokens;
        const bool pair = (first + t) % 2 == 0 && t + 2 <= tiles;  // panels are an even number of tiles wide, or the last
        if (pair)
            block_tiles<2>(data, all, first + t, words, q, q_bytes, tokens, total, codes, work, to);
        else
            block_tiles<1>(data, all, first + t, words, q, q_bytes, tokens, total, codes, work, to);
        t += pair ? 2 : 1;
    }
}

}  // namespace vnni

const Isa kVnni = {
    "vnni", "AVX-512 VNNI: multiplies two-bit codes by activations; a comparison, never the default", true, kCodes,
    16, vnni::tables, vnni::rows, 64, 8, vnni::columns, vnni::block_scratch, vnni::block,
    vnni::rms_norm, vnni::quantize, vnni::gate, vnni::scale, vnni::attend, vnni::dots,
};

}  // namespace bitnet
