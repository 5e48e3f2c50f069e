// AVX-512 (F, BW, DQ, VL): two ways to look partial sums up, both without a multiplication by a weight.
//
// FEW TOKENS (`rows`): the 27 sums of a triple are one register of int16; `vpermw` looks 32 rows up at a time.
//   A word brings 32 x 9 weights for 3 lookups, 2 shifts and 3 additions. vpermw reads the low 5 bits of each lane only,
//   so that the fields above need no mask. One core of a Xeon at 3.7 GHz could do 200 G weights/s, memory gives 65.
//
// MANY TOKENS (`block`): the other way round, tokens in lanes. The 27 sums of a triple for 32 tokens are 27 cache lines;
//   a row of weights adds one of them: one load-and-add does the work of 96 multiply-accumulates (Vec-LUT). Faster
//   than vpermw from 16 tokens, because loads have two ports where lookups have one, and because the sums need not
//   be gathered into registers. Tables of a few words stay in the L1 cache; sums stream through the second.
//
// Measured on one core (GMAC/s, 2560 x 6912, 256 tokens): see benchmarks/results. 64 tokens and 3 words at once win: twice
// the tokens share each index, and 31 KB of tables leave room for sums in the L1 cache (48 KB, 32 KB on Zen 4).

#include <immintrin.h>
#include <string.h>

#include "isa.h"

namespace bitnet {
namespace avx512 {

#define W 16
#define FMA(a, b, c) ((F)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define FROM_U16(p) ((I)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(p))))
#define FROM_U8(p) ((I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p))))
#define FROM_I8(p) ((I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p))))
#define TO_I8(p, v) _mm_storeu_si128((__m128i*)(p), _mm512_cvtepi32_epi8((__m512i)(v)))
#define NIBBLE(codes) ((F)_mm512_permutexvar_ps((__m512i)(codes), kNibbles))
#define kNibbles _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)
#include "elementwise.inl"
#include "columns.inl"

// Keeps an addition in its place: otherwise gcc does all lookups first and spills them (twice the time for 4 tokens).
#define KEEP(v) asm("" : "+v"(v))

constexpr int64_t kWordsInt16 = 28;  // 84 triples of at most 3 * 128 make 32,256: the most an int16 can take
constexpr int64_t kTable = 64;       // bytes of a triple's 27 (32) sums of one token

// Entries of a table whose digit d is +1 or -1: masks over the 32 entries.
constexpr uint32_t digits(int power, int digit) {
    uint32_t mask = 0;
    for (int e = 0, p = power; e < 27; e++)
        if (e / p % 3 == digit) mask |= uint32_t{1} << e;
    return mask;
}

static void tables(const int8_t* q, int64_t words, uint8_t* out) {
    for (int64_t g = 0; g < 3 * words; g++, q += 3, out += kTable) {
        const __m512i zero = _mm512_setzero_si512();
        const __m512i a = _mm512_set1_epi16(q[0]), b = _mm512_set1_epi16(q[1]), c = _mm512_set1_epi16(q[2]);
        __m512i t = _mm512_maskz_mov_epi16(digits(1, 2), a);
        t = _mm512_mask_sub_epi16(t, digits(1, 0), zero, a);
        t = _mm512_mask_add_epi16(t, digits(3, 2), t, b);
        t = _mm512_mask_sub_epi16(t, digits(3, 0), t, b);
        t = _mm512_mask_add_epi16(t, digits(9, 2), t, c);
        t = _mm512_mask_sub_epi16(t, digits(9, 0), t, c);
        _mm512_store_si512(out, t);
    }
}

static inline void add_int16(int32_t* sums, __m512i s) {
    const __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(s));
    const __m512i high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(s, 1));
    _mm512_storeu_si512(sums, _mm512_add_epi32(low, _mm512_loadu_si512(sums)));
    _mm512_storeu_si512(sums + 16, _mm512_add_epi32(high, _mm512_loadu_si512(sums + 16)));
}

// P tiles x T tokens; added to sums [T][P * 32].
template <int P, int T>
__attribute__((noinline)) void product_rows(const uint8_t* w, int64_t words, const uint8_t* tables, int64_t token_bytes,
                                            int32_t* sums) {
    const uint8_t* table[T];
    table[0] = tables;
#pragma GCC unroll 8
    for (int t = 1; t < T; t++) table[t] = table[t - 1] + token_bytes;
    while (words > 0) {
        const int64_t run = words < kWordsInt16 ? words : kWordsInt16;
        words -= run;
        __m512i s[T][P];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) s[t][p] = _mm512_setzero_si512();
        for (int64_t i = 0; i < run; i++) {
            __m512i index[P];
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) {
                index[p] = _mm512_load_si512(w + 64 * p);
                // Prefetch far ahead into L2, across the page boundary where the hardware stops, and near into L1:
                // 93 % of the memory's bandwidth on two cores; 80 % with the far one only.
                _mm_prefetch((const char*)w + 64 * p + 8192, _MM_HINT_T1);
                _mm_prefetch((const char*)w + 64 * p + 1024, _MM_HINT_T0);
            }
            w += 64 * P;
#pragma GCC unroll 8
            for (int f = 0; f < 3; f++) {
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    const __m512i sum = _mm512_load_si512(table[t] + kTable * f);
#pragma GCC unroll 8
                    for (int p = 0; p < P; p++) {
                        s[t][p] = _mm512_add_epi16(s[t][p], _mm512_permutexvar_epi16(index[p], sum));
                        KEEP(s[t][p]);
                    }
                }
                if (f < 2)
#pragma GCC unroll 8
                    for (int p = 0; p < P; p++) index[p] = _mm512_srli_epi16(index[p], 5);
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) table[t] += 3 * kTable;
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) add_int16(sums + (t * P + p) * kTile, s[t][p]);
    }
}

template <int P>
static void rows_of(const uint8_t* w, int64_t words, const uint8_t* tables, int64_t token_bytes, int tokens,
                    int32_t* sums) {
    if (tokens == 1) product_rows<P, 1>(w, words, tables, token_bytes, sums);
    if (tokens == 2) product_rows<P, 2>(w, words, tables, token_bytes, sums);
    if (tokens == 3) product_rows<P, 3>(w, words, tables, token_bytes, sums);
    if (tokens == 4) product_rows<P, 4>(w, words, tables, token_bytes, sums);
}

static void rows(const uint8_t* panel, int tiles, int64_t words, const uint8_t* tables, int64_t token_bytes, int tokens,
                 int32_t* sums) {
    if (tiles == 1) rows_of<1>(panel, words, tables, token_bytes, tokens, sums);
    if (tiles == 2) rows_of<2>(panel, words, tables, token_bytes, tokens, sums);
    if (tiles == 3) rows_of<3>(panel, words, tables, token_bytes, tokens, sums);
    if (tiles == 4) rows_of<4>(panel, words, tables, token_bytes, tokens, sums);
}

// ---- block: V vectors of 32 tokens, G words at a time

template <int V> constexpr int kWords = V == 2 ? 3 : 4;  // tables of 31 KB and 21 KB

// Sums of all 27 combinations of three activations, for 32 V tokens: x [3][32 V] -> out [27][32 V].
template <int V> __attribute__((noinline)) void product_tables(const int16_t* x, int triples, int16_t* out) {
    for (; triples > 0; triples--, x += 3 * 32 * V, out += 27 * 32 * V)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            const __m512i zero = _mm512_setzero_si512();
            const __m512i a = _mm512_load_si512(x + v * 32);
            const __m512i b = _mm512_load_si512(x + (V + v) * 32);
            const __m512i c = _mm512_load_si512(x + (2 * V + v) * 32);
            const __m512i as[3] = {_mm512_sub_epi16(zero, a), zero, a};
            const __m512i bs[3] = {_mm512_sub_epi16(zero, b), zero, b};
            const __m512i cs[3] = {_mm512_sub_epi16(zero, c), zero, c};
            for (int k = 0; k < 3; k++)
                for (int j = 0; j < 3; j++) {
                    const __m512i s = _mm512_add_epi16(cs[k], bs[j]);
                    for (int i = 0; i < 3; i++)
                        _mm512_store_si512(out + ((9 * k + 3 * j + i) * V + v) * 32, _mm512_add_epi16(s, as[i]));
                }
        }
}

// Byte offsets into the tables for a tile: words `stride` bytes apart -> out [3 words][32], index * 64 V.
template <int V> static inline void offsets(const uint8_t* w, int64_t stride, int words, uint16_t* out) {
    const __m512i mask = _mm512_set1_epi16((short)(31 << (5 + V)));
    for (; words > 0; words--, w += stride, out += 3 * kTile) {
        const __m512i x = _mm512_load_si512(w);
        _mm512_store_si512(out, _mm512_and_si512(_mm512_slli_epi16(x, 5 + V), mask));
        _mm512_store_si512(out + kTile, _mm512_and_si512(_mm512_slli_epi16(x, V), mask));
        _mm512_store_si512(out + 2 * kTile, _mm512_and_si512(_mm512_srli_epi16(x, 5 - V), mask));
    }
}

// One tile through the tables of G words: partial [32][32 V] int16 gathers, and flows into sums int32 with the last ones.
template <int V, int G, bool First, bool Last>
__attribute__((noinline)) void product_tile(const uint8_t* tables, const uint16_t* offsets, int16_t* partial,
                                            int32_t* sums) {
    for (int r = 0; r < kTile; r++, offsets++, partial += 32 * V, sums += 32 * V) {
        __m512i s[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) s[v] = First ? _mm512_setzero_si512() : _mm512_load_si512(partial + v * 32);
#pragma GCC unroll 64
        for (int g = 0; g < 3 * G; g++) {
            const uint8_t* line = tables + g * 27 * 64 * V + offsets[g * kTile];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) s[v] = _mm512_add_epi16(s[v], _mm512_load_si512(line + 64 * v));
        }
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            if (Last)
                add_int16(sums + v * 32, s[v]);
            else
                _mm512_store_si512(partial + v * 32, s[v]);
        }
    }
}

template <int V, int G>
static void tile_of(bool first, bool last, const uint8_t* tables, const uint16_t* offsets, int16_t* partial,
                    int32_t* sums) {
    if (first && last) return product_tile<V, G, true, true>(tables, offsets, partial, sums);
    if (first) return product_tile<V, G, true, false>(tables, offsets, partial, sums);
    if (last) return product_tile<V, G, false, true>(tables, offsets, partial, sums);
    product_tile<V, G, false, false>(tables, offsets, partial, sums);
}

template <int V>
static void tile(int words, bool first, bool last, const uint8_t* tables, const uint16_t* offsets, int16_t* partial,
                 int32_t* sums) {
    if (words == 1) tile_of<V, 1>(first, last, tables, offsets, partial, sums);
    if (words == 2) tile_of<V, 2>(first, last, tables, offsets, partial, sums);
    if (words == 3) tile_of<V, 3>(first, last, tables, offsets, partial, sums);
    if (V == 1 && words == 4) tile_of<1, 4>(first, last, tables, offsets, partial, sums);
}

template <int V>
static void block_of(const uint8_t* data, int64_t all, int64_t first, int tiles, int64_t words, const int16_t* x,
                     uint8_t* scratch) {
    constexpr int G = kWords<V>, kSums = kTile * 32 * V;
    int32_t* sums = (int32_t*)scratch;
    int16_t* partial = (int16_t*)(sums + (int64_t)tiles * kSums);
    uint8_t* tables = (uint8_t*)(partial + (int64_t)tiles * kSums);
    uint16_t* offset = (uint16_t*)(tables + G * 3 * 27 * 64 * V);
    memset(sums, 0, (size_t)tiles * kSums * sizeof(int32_t));
    constexpr int64_t run = kWordsInt16 / G * G, chunk = kTriples.chunk;
    static_assert(chunk % G == 0, "a step stays in one chunk");
    for (int64_t i = 0; i < words; i += G) {
        const int64_t in = i % chunk, at = in % run, left = words - i;
        const int n = (int)(left < G ? left : G);
        const bool begins = at == 0, ends = at + n == run || in + n == chunk || n == left;  // int16 sums, of `run` words
        product_tables<V>(x + i * 9 * 32 * V, 3 * n, (int16_t*)tables);
        for (int t = 0; t < tiles; t++) {
            const Place w = place(kTriples, data, all, words, first + t, i);
            offsets<V>(w.data, w.stride, n, offset);
            tile<V>(n, begins, ends, tables, offset, partial + t * kSums, sums + t * kSums);
        }
    }
}

static int64_t block_scratch(int tiles, int tokens) {
    const int64_t tables = tokens == 64 ? kWords<2> * 3 * 27 * 128 : kWords<1> * 3 * 27 * 64;
    return (int64_t)tiles * kTile * tokens * 6 + tables + 4 * 3 * kTile * 2;
}

static void block(const uint8_t* data, int64_t all, int64_t first, int tiles, int64_t words, const int16_t* x,
                  const int8_t*, int64_t, int tokens, uint8_t* scratch) {
    if (tokens == 64)
        block_of<2>(data, all, first, tiles, words, x, scratch);
    else
        block_of<1>(data, all, first, tiles, words, x, scratch);
}

}  // namespace avx512

const Isa kAvx512 = {
    "avx512", "AVX-512: vpermw looks up 32 rows at a time; many tokens add cache lines of ready sums", false, kTriples,
    3 * avx512::kTable, avx512::tables, avx512::rows, 64, 16, avx512::columns, avx512::block_scratch, avx512::block,
    avx512::rms_norm, avx512::quantize, avx512::gate, avx512::scale, avx512::attend, avx512::dots,
};

}  // namespace bitnet
