// AVX2: byte shuffles look up the nine sums of two weights; for many tokens, precomputed sums of four weights are added.
//
// FEW TOKENS (`rows`): a byte holds two indices of four bits, 32 rows make a register. `vpshufb` has 16 entries of one
//   byte: the low and the high bytes of the nine int16 sums are looked up separately and then interleaved.
//
// MANY TOKENS (`block`): tokens in lanes, as in avx512.cpp; here the 81 sums of four weights for 32 tokens are 81 cache
//   lines, and a row of weights adds one of them: two load-and-adds do the work of 128 multiply-accumulates.

#include <immintrin.h>
#include <string.h>

#include "isa.h"

namespace bitnet {
namespace avx2 {

#define W 8
#define FMA(a, b, c) ((F)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define FROM_U16(p) ((I)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p))))
#define FROM_U8(p) ((I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p))))
#define FROM_I8(p) ((I)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p))))
#define TO_I8(p, v) to_i8(p, (__m256i)(v))

static inline void to_i8(int8_t* p, __m256i v) {
    const __m128i s = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(s, s));
}

#define NIBBLE(codes) (__builtin_convertvector(((codes) & 15) - 8, F))
#include "elementwise.inl"
#include "columns.inl"

constexpr int64_t kWordsRows = 63;  // 126 pairs of at most 2 * 128 make 32,256: the most an int16 can take
constexpr int64_t kPair = 32;       // bytes of a pair's table: 16 low bytes, 16 high bytes

static int signed_by(int digit, int x) { return digit == 0 ? -x : digit == 2 ? x : 0; }

static void tables(const int8_t* q, int64_t words, uint8_t* out) {
    for (int64_t g = 0; g < 2 * words; g++, q += 2, out += kPair) {
        memset(out, 0, kPair);
        for (int e = 0; e < 9; e++) {
            const int sum = signed_by(e % 3, q[0]) + signed_by(e / 3, q[1]);
            out[e] = (uint8_t)sum, out[16 + e] = (uint8_t)(sum >> 8);
        }
    }
}

static inline __m256i both(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)p)); }

static inline void add_int16(int32_t* sums, __m128i s) {
    __m256i* to = (__m256i*)sums;
    _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm256_cvtepi16_epi32(s)));
}

// P tiles, `stride` bytes from word to word, one token; added to sums [P * 32].
template <int P>
__attribute__((noinline)) void product_rows(const uint8_t* w, int64_t stride, int64_t words, const uint8_t* table,
                                            int32_t* sums) {
    const __m256i nibble = _mm256_set1_epi8(15);
    while (words > 0) {
        const int64_t run = words < kWordsRows ? words : kWordsRows;
        words -= run;
        __m256i s[P][2];  // rows 0-7, 16-23 and rows 8-15, 24-31, as the byte unpacks give them
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) s[p][0] = s[p][1] = _mm256_setzero_si256();
        for (int64_t i = 0; i < run; i++, w += stride, table += 2 * kPair) {
            asm("" : "+r"(w));  // increment the pointer: gcc would replace this by a multiplication
            const __m256i low0 = both(table), high0 = both(table + 16), low1 = both(table + 32), high1 = both(table + 48);
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) {
                const __m256i word = _mm256_load_si256((const __m256i*)(w + 32 * p));
                _mm_prefetch((const char*)w + 32 * p + 8192, _MM_HINT_T1);
                _mm_prefetch((const char*)w + 32 * p + 1024, _MM_HINT_T0);
                __m256i index = _mm256_and_si256(word, nibble);
                __m256i low = _mm256_shuffle_epi8(low0, index), high = _mm256_shuffle_epi8(high0, index);
                s[p][0] = _mm256_add_epi16(s[p][0], _mm256_unpacklo_epi8(low, high));
                s[p][1] = _mm256_add_epi16(s[p][1], _mm256_unpackhi_epi8(low, high));
                index = _mm256_and_si256(_mm256_srli_epi16(word, 4), nibble);
                low = _mm256_shuffle_epi8(low1, index), high = _mm256_shuffle_epi8(high1, index);
                s[p][0] = _mm256_add_epi16(s[p][0], _mm256_unpacklo_epi8(low, high));
                s[p][1] = _mm256_add_epi16(s[p][1], _mm256_unpackhi_epi8(low, high));
            }
        }
#pragma GCC unroll 8
        for (int p = 0; p < P; p++)
#pragma GCC unroll 8
            for (int half = 0; half < 2; half++) {
                add_int16(sums + p * kTile + 8 * half, _mm256_castsi256_si128(s[p][half]));
                add_int16(sums + p * kTile + 8 * half + 16, _mm256_extracti128_si256(s[p][half], 1));
            }
    }
}

static void rows(const uint8_t* panel, int tiles, int64_t words, const uint8_t* tables, int64_t token_bytes, int tokens,
                 int32_t* sums) {
    const int64_t stride = 32 * tiles;
    for (int t = 0; t < tokens; t++, tables += token_bytes, sums += tiles * kTile) {
        if (tiles >= 2) product_rows<2>(panel, stride, words, tables, sums);
        if (tiles == 4) product_rows<2>(panel + 64, stride, words, tables, sums + 64);
        if (tiles & 1) product_rows<1>(panel + 32 * (tiles - 1), stride, words, tables, sums + (tiles - 1) * kTile);
    }
}

// ---- block: 32 tokens, G words (of four weights) at a time

constexpr int G = 5;            // tables of 26 KB
constexpr int kLine = 64;       // bytes of one sum for 32 tokens
constexpr int64_t kRun = 60;    // words until the int16 sums are full: 60 * 512 = 30,720

// Sums of all 81 combinations of four activations: x [4][32] -> out [81][32].
__attribute__((noinline)) void product_tables(const int16_t* x, int words, int16_t* out) {
    for (; words > 0; words--, x += 4 * 32, out += 81 * 32)
        for (int v = 0; v < 32; v += 16) {
            __m256i d[4][3];
            for (int i = 0; i < 4; i++) {
                const __m256i a = _mm256_load_si256((const __m256i*)(x + i * 32 + v));
                d[i][0] = _mm256_sub_epi16(_mm256_setzero_si256(), a), d[i][1] = _mm256_setzero_si256(), d[i][2] = a;
            }
            int16_t* to = out + v;
            for (int l = 0; l < 3; l++)
                for (int k = 0; k < 3; k++) {
                    const __m256i lk = _mm256_add_epi16(d[3][l], d[2][k]);
                    for (int j = 0; j < 3; j++) {
                        const __m256i lkj = _mm256_add_epi16(lk, d[1][j]);
                        for (int i = 0; i < 3; i++, to += 32) _mm256_store_si256((__m256i*)to, _mm256_add_epi16(lkj, d[0][i]));
                    }
                }
        }
}

// Byte offsets of a tile's indices, (low + 9 high) * 64: words `stride` bytes apart -> out [words][32].
static inline void offsets(const uint8_t* w, int64_t stride, int words, uint16_t* out) {
    const __m256i nibble = _mm256_set1_epi16(15);
    for (; words > 0; words--, w += stride)
        for (int r = 0; r < kTile; r += 16, out += 16) {
            const __m256i x = _mm256_cvtepu8_epi16(_mm_load_si128((const __m128i*)(w + r)));
            const __m256i low = _mm256_and_si256(x, nibble), high = _mm256_srli_epi16(x, 4);
            const __m256i index = _mm256_add_epi16(low, _mm256_add_epi16(high, _mm256_slli_epi16(high, 3)));
            _mm256_store_si256((__m256i*)out, _mm256_slli_epi16(index, 6));
        }
}

template <int N, bool First, bool Last>
__attribute__((noinline)) void product_tile(const uint8_t* tables, const uint16_t* offsets, int16_t* partial,
                                            int32_t* sums) {
    for (int r = 0; r < kTile; r++, offsets++, partial += 32, sums += 32) {
        __m256i a = First ? _mm256_setzero_si256() : _mm256_load_si256((const __m256i*)partial);
        __m256i b = First ? _mm256_setzero_si256() : _mm256_load_si256((const __m256i*)(partial + 16));
#pragma GCC unroll 16
        for (int g = 0; g < N; g++) {
            const __m256i* line = (const __m256i*)(tables + g * 81 * kLine + offsets[g * kTile]);
            a = _mm256_add_epi16(a, _mm256_load_si256(line));
            b = _mm256_add_epi16(b, _mm256_load_si256(line + 1));
        }
        if (Last) {
            add_int16(sums, _mm256_castsi256_si128(a)), add_int16(sums + 8, _mm256_extracti128_si256(a, 1));
            add_int16(sums + 16, _mm256_castsi256_si128(b)), add_int16(sums + 24, _mm256_extracti128_si256(b, 1));
        } else {
            _mm256_store_si256((__m256i*)partial, a), _mm256_store_si256((__m256i*)(partial + 16), b);
        }
    }
}

template <int N>
static void tile_of(bool first, bool last, const uint8_t* tables, const uint16_t* offsets, int16_t* partial,
                    int32_t* sums) {
    if (first && last) return product_tile<N, true, true>(tables, offsets, partial, sums);
    if (first) return product_tile<N, true, false>(tables, offsets, partial, sums);
    if (last) return product_tile<N, false, true>(tables, offsets, partial, sums);
    product_tile<N, false, false>(tables, offsets, partial, sums);
}

static int64_t block_scratch(int tiles, int) {
    // 70 extra lines, so that indices up to 150, which only damaged bytes can have, stay inside.
    return (int64_t)tiles * kTile * 32 * 6 + G * 81 * kLine + G * kTile * 2 + 70 * kLine;
}

static void block(const uint8_t* data, int64_t all, int64_t first, int tiles, int64_t words, const int16_t* x,
                  const int8_t*, int64_t, int, uint8_t* scratch) {
    constexpr int kSums = kTile * 32;
    int32_t* sums = (int32_t*)scratch;
    int16_t* partial = (int16_t*)(sums + (int64_t)tiles * kSums);
    uint8_t* tables = (uint8_t*)(partial + (int64_t)tiles * kSums);
    uint16_t* offset = (uint16_t*)(tables + G * 81 * kLine);
    memset(sums, 0, (size_t)tiles * kSums * sizeof(int32_t));
    static_assert(kPairs.chunk % G == 0 && kRun % G == 0, "a step stays in one chunk and in one run");
    for (int64_t i = 0; i < words; i += G) {
        const int64_t at = i % kPairs.chunk % kRun, left = words - i;
        const int n = (int)(left < G ? left : G);
        const bool begins = at == 0, ends = at + n == kRun || i % kPairs.chunk + n == kPairs.chunk || n == left;
        product_tables(x + i * 4 * 32, n, (int16_t*)tables);
        for (int t = 0; t < tiles; t++) {
            const Place w = place(kPairs, data, all, words, first + t, i);
            offsets(w.data, w.stride, n, offset);
            int16_t* p = partial + t * kSums;
            int32_t* s = sums + t * kSums;
            if (n == 1) tile_of<1>(begins, ends, tables, offset, p, s);
            if (n == 2) tile_of<2>(begins, ends, tables, offset, p, s);
            if (n == 3) tile_of<3>(begins, ends, tables, offset, p, s);
            if (n == 4) tile_of<4>(begins, ends, tables, offset, p, s);
            if (n == 5) tile_of<5>(begins, ends, tables, offset, p, s);
        }
    }
}

}  // namespace avx2

const Isa kAvx2 = {
    "avx2", "AVX2: byte shuffles look up 32 rows at a time; many tokens add cache lines of ready sums", false, kPairs,
    2 * avx2::kPair, avx2::tables, avx2::rows, 32, 8, avx2::columns, avx2::block_scratch, avx2::block,
    avx2::rms_norm, avx2::quantize, avx2::gate, avx2::scale, avx2::attend, avx2::dots,
};

}  // namespace bitnet
