// Portable: the same tables and the same additions, one row at a time; runs on anything and is easy to read.

#include <string.h>

#include "isa.h"

namespace bitnet {
namespace scalar {

#define W 4
#define FMA(a, b, c) ((a) * (b) + (c))
#define FROM_U16(p) (__builtin_convertvector(*(const U16*)(p), I))
#define FROM_U8(p) (I{(p)[0], (p)[1], (p)[2], (p)[3]})
#define FROM_I8(p) (I{((const int8_t*)(p))[0], ((const int8_t*)(p))[1], ((const int8_t*)(p))[2], ((const int8_t*)(p))[3]})
typedef uint16_t U16 __attribute__((vector_size(8), aligned(1), may_alias));
#define TO_I8(p, v) for (int lane = 0; lane < W; lane++) (p)[lane] = (int8_t)(v)[lane]
#define NIBBLE(codes) (__builtin_convertvector(((codes) & 15) - 8, F))
#include "elementwise.inl"

static int signed_by(int digit, int x) { return digit == 0 ? -x : digit == 2 ? x : 0; }

static void tables(const int8_t* q, int64_t words, uint8_t* out) {
    int16_t* table = (int16_t*)out;
    for (int64_t g = 0; g < 3 * words; g++, q += 3, table += 32)
        for (int e = 0, c = 0; c < 3; c++)
            for (int b = 0; b < 3; b++)
                for (int a = 0; a < 3; a++, e++)
                    table[e] = (int16_t)(signed_by(a, q[0]) + signed_by(b, q[1]) + signed_by(c, q[2]));
}

// One tile and one token: w [words], `stride` bytes apart, of 32 uint16 -> added to sums [32].
__attribute__((noinline)) void product_rows(const uint8_t* w, int64_t stride, int64_t words, const int16_t* table,
                                            int32_t* sums) {
    for (; words > 0; words--, w += stride, table += 3 * 32) {
        const uint16_t* word = (const uint16_t*)w;
        for (int r = 0; r < kTile; r++)
            sums[r] += table[word[r] & 31] + table[32 + (word[r] >> 5 & 31)] + table[64 + (word[r] >> 10 & 31)];
    }
}

static void rows(const uint8_t* panel, int tiles, int64_t words, const uint8_t* tables, int64_t token_bytes, int tokens,
                 int32_t* sums) {
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < tiles; p++)
            product_rows(panel + p * 64, tiles * 64, words, (const int16_t*)(tables + t * token_bytes),
                         sums + (t * tiles + p) * kTile);
}

}  // namespace scalar

const Isa kScalar = {
    "scalar", "portable C++: table lookups, one row at a time", false, kTriples, 3 * 64, scalar::tables, scalar::rows, 0, 0,
    nullptr, nullptr, nullptr, scalar::rms_norm, scalar::quantize, scalar::gate, scalar::scale, scalar::attend, scalar::dots,
};

}  // namespace bitnet
