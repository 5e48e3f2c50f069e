// What every instruction set provides: the exact products with ternary weights, and the float work around them.
//
// One file per instruction set (scalar.cpp, avx2.cpp, avx512.cpp, vnni.cpp), each compiled with its own flags and
// defining one Isa. Those files include no C++ library headers: the linker would merge an inline function that two of
// them share, and the portable build would run AVX code.
//
// HOW A PRODUCT WITHOUT MULTIPLICATIONS WORKS.  Three weights in {-1, 0, +1} have 27 combinations; for given activations
// (x0, x1, x2) the 27 partial sums are computed once, by additions, and every row of weights only looks up its own sum
// and adds it:
//
//     table[a + 3 b + 9 c] = (a - 1) x0 + (b - 1) x1 + (c - 1) x2        a, b, c in {0, 1, 2}
//     y[n] = sum over groups g of table_g[index of row n in group g]
//
// Partial sums are int16: |sum| <= 3 * 128 per group, so 84 groups of three (or 126 groups of two) stay below 32,767 and
// are then widened to int32 (docs/numerics.md). An int32 sum is exact up to K = 16.9 million.
//
// Dimensions: M tokens, N out-features, K in-features. Rows of weights lie in tiles of 32, tiles in panels of up to 4.

#pragma once

#include <stddef.h>
#include <stdint.h>

namespace bitnet {

constexpr int kTile = 32;        // rows whose words lie side by side: 32 int16 lanes of AVX-512, 32 bytes of AVX2
constexpr int kPanel = 4;        // tiles that share the tables while they are in registers
constexpr int kTokens = 4;       // most tokens a `rows` call takes
constexpr int kBlock = 64;       // most tokens side by side in `block`
constexpr int64_t kMaxK = int64_t{1} << 24;  // 127 * K has to stay below 2^31

// How K is cut: a word holds `fields` indices of `bits` bits, an index stands for `group` weights in base 3, the first
// one lowest. Weights after K are 0. Words are stored in the order in which `rows` reads them, so that a thread
// reads memory contiguously: K in chunks whose tables fit the L1 cache, and for each chunk every panel,
//
//     data[chunk][panel][word in chunk][tile in panel][row in tile]
struct Layout {
    int fields, group, bits, word_bytes, chunk;  // chunk: words

    constexpr int weights() const { return fields * group; }  // per word and row
    constexpr int64_t words(int64_t k) const { return (k + weights() - 1) / weights(); }
};

constexpr Layout kTriples{3, 3, 5, 2, 108};  // 16 bits for 9 weights: 1.78 bits per weight; 21 KB of tables
constexpr Layout kPairs{2, 2, 4, 1, 320};    // 8 bits for 4 weights: 2 bits per weight, indices of a byte shuffle; 20 KB
constexpr Layout kCodes{16, 1, 2, 4, 256};   // plain two-bit codes (weight + 1), for the VNNI comparison: see vnni.cpp

// Where a word of a tile lies, and how far it is to the next word of that tile within the chunk.
struct Place {
    const uint8_t* data;
    int64_t stride;
};
static inline Place place(const Layout& layout, const uint8_t* data, int64_t tiles, int64_t words, int64_t tile,
                          int64_t word) {
    const int64_t bytes = kTile * layout.word_bytes, chunk = word / layout.chunk * layout.chunk;
    const int64_t depth = words - chunk < layout.chunk ? words - chunk : layout.chunk;
    const int64_t panel = tile / kPanel * kPanel, width = tiles - panel < kPanel ? tiles - panel : kPanel;
    return {data + (chunk * tiles + panel * depth + (word - chunk) * width + tile - panel) * bytes, width * bytes};
}

// Storage of keys, values and embeddings. i4 is for heads only: groups of 32 weights in 18 bytes, a bf16 scale and 16
// bytes whose low halves are codes 0 to 15 and whose high halves are codes 16 to 31, each weight / scale + 8.
enum class Store : int { f32, bf16, i8, i4 };
constexpr int64_t kGroup = 32, kGroupBytes = 18;

// Bytes of a row of k values.
static inline int64_t row_bytes(Store store, int64_t k) {
    return store == Store::f32 ? 4 * k : store == Store::bf16 ? 2 * k
         : store == Store::i8 ? k : (k + kGroup - 1) / kGroup * kGroupBytes;
}

// Attention of `queries` rows that share one key/value head, over positions [start, end) of it.
struct AttentionTask {
    const float* q;          // [queries][width], scaled by 1 / sqrt(width)
    const int64_t* visible;  // [queries] number of positions each may see
    int queries, width;      // queries <= kQueries
    Store store;
    const uint8_t* keys;         // [position / 16][width][16]
    const uint8_t* values;       // [position][padded width]
    const float* key_scales;     // [position], for i8
    const float* value_scales;   // [position], for i8
    int64_t start, end;          // start is a multiple of 16; end - start <= kSpan
    float* out;                  // [queries][padded width], unnormalised sum of exp(score - max) * v
    float* highest;              // [queries] max of the scores, -inf where nothing is visible
    float* total;                // [queries] sum of exp(score - max)
};
constexpr int kLanes = 16;    // positions side by side in a block of keys; values are padded to a multiple of it
constexpr int kQueries = 16;  // queries of one AttentionTask: amortises the conversion of keys
constexpr int64_t kSpan = 256;  // positions of one AttentionTask: its scores stay in the L1 cache

struct Isa {
    const char* name;
    const char* summary;
    bool multiplies;  // by weights: the VNNI comparison only
    Layout layout;
    int64_t table_bytes;  // of one word and one token

    // ---- products, exact in int32

    // Lookup tables of one token. q: [words * weights()] int8, zeros after K -> tables [words][table_bytes], 64-aligned.
    void (*tables)(const int8_t* q, int64_t words, uint8_t* out);

    // `words` words of a panel of 1..4 tiles times 1..4 tokens, whose tables lie `token_bytes` apart: added to
    // sums [token][tiles * 32].
    void (*rows)(const uint8_t* panel, int tiles, int64_t words, const uint8_t* tables, int64_t token_bytes, int tokens,
                 int32_t* sums);

    // Tokens side by side (32 or 64) in `block`, a faster way for many tokens; 0 if there is only `rows`.
    int block_tokens;
    int block_from;  // number of tokens from which `block` wins (measured)

    // Transpose rows [begin, end) of k of q [tokens][q_bytes] int8 into out [k][size] int16, zeros after `tokens`.
    void (*columns)(const int8_t* q, int64_t q_bytes, int tokens, int size, int64_t begin, int64_t end, int16_t* out);

    // Bytes of scratch that `block` needs for this many tiles and tokens.
    int64_t (*block_scratch)(int tiles, int tokens);

    // `tiles` consecutive tiles (from tile `first` of a matrix with `all` tiles) times `tokens` (32 or 64) tokens.
    // Activations twice: x [words * weights()][tokens] int16 with tokens side by side, q [tokens][q_bytes] int8 in rows.
    // Sums [tile][row][tokens] int32 are set at the start of scratch (64-aligned).
    void (*block)(const uint8_t* data, int64_t all, int64_t first, int tiles, int64_t words, const int16_t* x,
                  const int8_t* q, int64_t q_bytes, int tokens, uint8_t* scratch);

    // ---- the float work around them, fp32

    void (*rms_norm)(const float* x, const float* gain, int64_t n, float eps, float* y);
    // inv_scale = (1 / max(max |x|, 1e-5)) * 127, q = round_half_even(x * inv_scale); both roundings as in the reference.
    float (*quantize)(const float* x, int64_t n, int8_t* q);
    void (*gate)(const float* gate, const float* up, int64_t n, bool squared_relu, float* y);
    // y = sums * (row_scale / inv_scale), added to y where `add`. sums of n rows, `stride` apart.
    void (*scale)(const int32_t* sums, int64_t stride, int64_t n, const float* row_scale, float inv_scale, bool add,
                  float* y);
    void (*attend)(const AttentionTask& task);
    // Dot products of `rows` rows [rows][k] of an embedding with `tokens` <= 4 vectors, `x_stride` apart -> out[token][row].
    // For i4 the vectors are padded with zeros to whole groups.
    void (*dots)(const uint8_t* embedding, Store store, const float* scales, int64_t rows, int64_t k, const float* x,
                 int64_t x_stride, int tokens, float* out, int64_t out_stride);
};

extern const Isa kScalar;
#if defined(__x86_64__)
extern const Isa kAvx2, kAvx512, kVnni;
#endif

// The instruction sets of this build, best first; `why_not` returns null if this CPU runs it, else the reason.
struct Choice {
    const Isa* isa;
    const char* (*why_not)();
};
extern const Choice kChoices[];
extern const int kChoiceCount;

}  // namespace bitnet
