#include "linear.h"

#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <utility>

namespace bitnet {

// ---- memory

namespace {

constexpr int64_t kHuge = 2 << 20;

}  // namespace

Buffer::Buffer(int64_t bytes, Pages pages) : bytes_((bytes + 63) / 64 * 64) {
    if (bytes_ == 0) return;
    // mmap for large buffers: pages are allocated when first written, 2 MB each if the kernel offers such, which saves a
    // stream of weights a page-table walk every 4 KB.
    if (bytes_ >= kHuge) {
        bytes_ = (bytes_ + kHuge - 1) / kHuge * kHuge;
        void* p = mmap(nullptr, (size_t)bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        if (pages == Pages::huge) madvise(p, (size_t)bytes_, MADV_HUGEPAGE);
#endif
        data_ = static_cast<uint8_t*>(p);
        return;
    }
    void* p = nullptr;
    if (posix_memalign(&p, 64, (size_t)bytes_) != 0) throw std::bad_alloc();
    memset(p, 0, (size_t)bytes_);
    data_ = static_cast<uint8_t*>(p);
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
}

Buffer::~Buffer() {
    if (!data_) return;
    if (bytes_ >= kHuge)
        munmap(data_, (size_t)bytes_);
    else
        free(data_);
}

void Buffer::reserve(int64_t bytes) {
    if (bytes > bytes_) *this = Buffer(bytes);
}

double read_bandwidth(Pool& pool, const Buffer& memory) {
    std::atomic<uint64_t> total{0};
    const auto started = std::chrono::steady_clock::now();
    pool.run([&](Team& team) {
        const int64_t lines = memory.bytes() / 64;
        const uint64_t* p = memory.as<uint64_t>() + team.begin(lines) * 8;
        const uint64_t* end = memory.as<uint64_t>() + team.end(lines) * 8;
        uint64_t sums[8] = {};
        for (; p < end; p += 8) {
            __builtin_prefetch(p + 512);  // 4 KB ahead, across the page, as the products do
            for (int i = 0; i < 8; i++) sums[i] += p[i];
        }
        for (const uint64_t sum : sums) total += sum;
    });
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - started;
    return total == 1 ? 0 : (double)memory.bytes() / taken.count();  // uses the sum, so that the loop is not optimised away
}

// ---- rearranging

namespace {

constexpr uint8_t kZeros = 0x55;  // four codes of weight 0
constexpr uint8_t kBad = 0xff;

// `count` two-bit codes -> their index in base 3, kBad where one of them is 3.
template <int Count> std::array<uint8_t, 1 << 2 * Count> indices() {
    std::array<uint8_t, 1 << 2 * Count> out{};
    for (int bits = 0; bits < 1 << 2 * Count; bits++) {
        int index = 0, power = 1;
        bool bad = false;
        for (int i = 0; i < Count; i++, power *= 3) {
            const int code = bits >> 2 * i & 3;
            bad |= code == 3;
            index += code * power;
        }
        out[bits] = bad ? kBad : (uint8_t)index;
    }
    return out;
}

// Words [w, end) of a row, `stride` bytes apart; 8 bytes after `row` must be readable. False for a code 3.
bool triples(const uint8_t* row, int64_t w, int64_t end, uint8_t* out, int64_t stride) {
    static const auto table = indices<3>();
    unsigned bad = 0;
    for (int64_t bit = 18 * w; w < end; w++, bit += 18, out += stride) {
        uint32_t bits;
        memcpy(&bits, row + bit / 8, 4);
        bits >>= bit % 8;
        const unsigned a = table[bits & 63], b = table[bits >> 6 & 63], c = table[bits >> 12 & 63];
        bad |= (a | b | c) & 0x80;
        const uint16_t word = (uint16_t)(a | b << 5 | c << 10);
        memcpy(out, &word, 2);
    }
    return !bad;
}

bool pairs(const uint8_t* row, int64_t w, int64_t end, uint8_t* out, int64_t stride) {
    static const auto table = indices<2>();
    unsigned bad = 0;
    for (; w < end; w++, out += stride) {
        const unsigned a = table[row[w] & 15], b = table[row[w] >> 4];
        bad |= (a | b) & 0x80;
        *out = (uint8_t)(a | b << 4);
    }
    return !bad;
}

bool codes(const uint8_t* row, int64_t w, int64_t end, uint8_t* out, int64_t stride) {
    uint32_t bad = 0;
    for (; w < end; w++, out += stride) {
        uint32_t in, word = 0;
        memcpy(&in, row + 4 * w, 4);
        bad |= in & in >> 1 & 0x55555555;
        for (int i = 0; i < 16; i++) word |= (in >> 2 * i & 3) << (8 * (i % 4) + 2 * (i / 4));
        memcpy(out, &word, 4);
    }
    return !bad;
}

}  // namespace

Matrix::Matrix(const Isa& isa, int64_t n, int64_t k, const uint8_t* data)
    : isa(&isa), n(n), k(k), words(isa.layout.words(k)), tiles((n + kTile - 1) / kTile), data(data) {}

namespace {

int64_t rows_of(const std::vector<PackedRows>& parts) {
    int64_t n = 0;
    for (const auto& part : parts) n += part.n;
    return n;
}

}  // namespace

Matrix::Matrix(const Isa& isa, const std::vector<PackedRows>& parts, int64_t k, Pool& pool)
    : Matrix(isa, rows_of(parts), k, nullptr) {
    own_ = Buffer(bytes());
    valid = rearrange(isa, parts, k, pool, own_.data());
    data = own_.data();
}

int64_t Matrix::bytes(const Isa& isa, int64_t n, int64_t k) {
    return (n + kTile - 1) / kTile * kTile * isa.layout.words(k) * isa.layout.word_bytes;
}

bool Matrix::rearrange(const Isa& isa, const std::vector<PackedRows>& parts, int64_t k, Pool& pool, uint8_t* out) {
    const Layout& layout = isa.layout;
    const int64_t n = rows_of(parts), words = layout.words(k), tiles = (n + kTile - 1) / kTile, packed = (k + 3) / 4;
    const auto convert = layout.group == 3 ? triples : layout.group == 2 ? pairs : codes;
    std::atomic<bool> good{true};
    // A row for each thread, padded with zeros: words extend past K, and reads past the words. Allocated here: nothing
    // may throw inside the team.
    std::vector<Buffer> copies((size_t)pool.threads());
    for (auto& copy : copies) copy = Buffer(words * layout.weights() / 4 + 64);
    pool.run([&](Team& team) {
        const Buffer& copy = copies[team.thread];
        const int64_t panels = (tiles + kPanel - 1) / kPanel;
        const int64_t end = std::min(team.end(panels) * kPanel, tiles) * kTile;
        for (int64_t row = team.begin(panels) * kPanel * kTile; row < end; row++) {
            memset(copy.data(), kZeros, (size_t)copy.bytes());
            int64_t r = row;
            for (const auto& part : parts) {
                if (r < part.n) {
                    memcpy(copy.data(), part.data + r * packed, (size_t)packed);
                    break;
                }
                r -= part.n;
            }
            for (int64_t w = 0; w < words; w += layout.chunk) {
                const Place to = place(layout, out, tiles, words, row / kTile, w);
                uint8_t* first = const_cast<uint8_t*>(to.data) + row % kTile * layout.word_bytes;
                if (!convert(copy.data(), w, std::min(w + layout.chunk, words), first, to.stride)) good = false;
            }
        }
    });
    return good;
}

// ---- activations

Activations::Activations(const Isa& isa, int64_t capacity, int64_t k) : isa_(&isa) {
    const int64_t padded = isa.layout.words(k) * isa.layout.weights();
    // The last block is padded: make room for its rows.
    const int64_t rows = capacity + (isa.block_tokens ? isa.block_tokens : 0);
    q_ = Buffer(rows * padded);
    inv_scale_ = Buffer(rows * (int64_t)sizeof(float));
    const int64_t few = isa.block_tokens ? std::min<int64_t>(capacity, isa.block_from) : capacity;
    tables_ = Buffer(few * isa.layout.words(k) * isa.table_bytes);
    if (isa.block_tokens && capacity >= isa.block_from && !isa.multiplies) columns_ = Buffer(rows * padded * 2);
}

void Activations::shape(int64_t tokens_, int64_t k_) {
    tokens = tokens_, k = k_;
    words_ = isa_->layout.words(k);
    padded_ = words_ * isa_->layout.weights();
    table_bytes_ = words_ * isa_->table_bytes;
    in_blocks_ = 0;
    if (!isa_->block_tokens) return;
    const int64_t rest = tokens % isa_->block_tokens;
    in_blocks_ = rest >= isa_->block_from ? tokens : tokens - rest;
}

void Activations::clear_tail(int64_t token) const { memset(row(token) + k, 0, (size_t)(padded_ - k)); }

int Activations::block_size(int64_t start) const {
    return in_blocks_ - start <= 32 ? 32 : isa_->block_tokens;
}

void Activations::ready(Team& team) {
    // Few tokens: lookup tables, split by words so that even one token occupies every thread.
    for (int64_t t = in_blocks_; t < tokens; t++) {
        const int64_t from = team.begin(words_), to = team.end(words_);
        uint8_t* out = tables_.data() + (t - in_blocks_) * table_bytes_ + from * isa_->table_bytes;
        isa_->tables(row(t) + from * isa_->layout.weights(), to - from, out);
    }
    // Many: tokens side by side, [padded k][block] int16, and rows of zeros as padding.
    for (int64_t start = 0; start < in_blocks_;) {
        const int size = block_size(start);
        const int64_t real = std::min<int64_t>(size, in_blocks_ - start);
        int16_t* out = columns_.as<int16_t>() + start * padded_;
        if (team.thread == 0)
            for (int64_t t = real; t < size; t++) memset(row(start + t), 0, (size_t)padded_);
        isa_->columns(row(start), padded_, (int)real, size, team.begin(padded_), team.end(padded_), out);
        start += size;
    }
}

// ---- products

void Product::run(const Team& team, const Matrix& matrix, const Activations& x, const Target& to) {
    if (x.in_blocks_) blocks(team, matrix, x, to);
    if (x.in_blocks_ < x.tokens) rows(team, matrix, x, to);
}

namespace {

void deliver(const Isa& isa, const int32_t* sums, int64_t stride, int64_t n, int64_t row, int64_t token, float inv_scale,
             const Target& to) {
    if (to.sums) {
        int32_t* out = to.sums + token * to.stride + row;
        for (int64_t i = 0; i < n; i++) out[i] = sums[i * stride];
    } else {
        isa.scale(sums, stride, n, to.row_scale + row, inv_scale, to.add, to.y + token * to.stride + row);
    }
}

// Tiles whose sums stay in the L2 cache beside the tables: 40 x 32 rows x 64 tokens x 6 bytes = 491 KB.
constexpr int64_t kChunk = 40;

// For `rows`: sums that stay in the L2 cache.
constexpr int64_t kSumBytes = 256 << 10;

}  // namespace

void Product::reserve(const Isa& isa, int64_t tokens) {
    const int64_t few = isa.block_tokens ? std::min<int64_t>(tokens, isa.block_from) : tokens;
    sums_.reserve(std::max(kSumBytes, kPanel * kTile * few * (int64_t)sizeof(int32_t)));
    if (isa.block_tokens && tokens >= isa.block_from)
        scratch_.reserve(std::max(isa.block_scratch(kChunk, 32), isa.block_scratch(kChunk, isa.block_tokens)));
}

// K in the outer loop, panels in the inner one: the tables of a range of K stay in the L1 cache while weights stream past
// them. Read again from L2 for every panel, they would take three cache lines for every four of weights. Four tokens have
// four times the tables, hence shorter ranges.
void Product::rows(const Team& team, const Matrix& matrix, const Activations& x, const Target& to) {
    const Isa& isa = *matrix.isa;
    const Layout& layout = isa.layout;
    const int64_t panels = (matrix.tiles + kPanel - 1) / kPanel;
    const int64_t few = x.tokens - x.in_blocks_;
    const int64_t stretch = few == 1 ? layout.chunk : (layout.chunk + kTokens - 1) / kTokens;
    const int64_t group = std::max<int64_t>(1, kSumBytes / (kPanel * kTile * few * (int64_t)sizeof(int32_t)));
    for (int64_t from = team.begin(panels); from < team.end(panels); from += group) {
        const int64_t until = std::min(from + group, team.end(panels));
        memset(sums_.data(), 0, (size_t)((until - from) * kPanel * kTile * few) * sizeof(int32_t));
        for (int64_t w = 0; w < matrix.words;) {
            const int64_t words = std::min(std::min(stretch, layout.chunk - w % layout.chunk), matrix.words - w);
            for (int64_t panel = from; panel < until; panel++) {
                const int64_t width = std::min<int64_t>(kPanel, matrix.tiles - panel * kPanel);
                const Place at = place(layout, matrix.data, matrix.tiles, matrix.words, panel * kPanel, w);
                int32_t* sums = sums_.as<int32_t>() + (panel - from) * few * kPanel * kTile;
                for (int64_t t = 0; t < few; t += kTokens)
                    isa.rows(at.data, (int)width, words, x.tables_.data() + t * x.table_bytes_ + w * isa.table_bytes,
                             x.table_bytes_, (int)std::min<int64_t>(kTokens, few - t), sums + t * width * kTile);
            }
            w += words;
        }
        for (int64_t panel = from; panel < until; panel++) {
            const int64_t width = std::min<int64_t>(kPanel, matrix.tiles - panel * kPanel);
            const int64_t row = panel * kPanel * kTile, n = std::min(width * kTile, matrix.n - row);
            for (int64_t t = 0; t < few; t++) {
                const int32_t* sums = sums_.as<int32_t>() + (panel - from) * few * kPanel * kTile + t * width * kTile;
                deliver(isa, sums, 1, n, row, x.in_blocks_ + t, x.inv_scale()[x.in_blocks_ + t], to);
            }
        }
    }
}

void Product::blocks(const Team& team, const Matrix& matrix, const Activations& x, const Target& to) {
    const Isa& isa = *matrix.isa;
    const int64_t panels = (matrix.tiles + kPanel - 1) / kPanel;
    const int64_t begin = team.begin(panels) * kPanel, end = std::min(team.end(panels) * kPanel, matrix.tiles);
    for (int64_t first = begin; first < end; first += kChunk) {
        const int count = (int)std::min<int64_t>(kChunk, end - first);
        for (int64_t start = 0; start < x.in_blocks_;) {
            const int size = x.block_size(start);
            isa.block(matrix.data, matrix.tiles, first, count, matrix.words,
                      x.columns_.as<int16_t>() + start * x.padded_, x.row(start), x.padded_, size, scratch_.data());
            const int32_t* sums = scratch_.as<int32_t>();
            const int64_t real = std::min<int64_t>(size, x.in_blocks_ - start);
            for (int i = 0; i < count; i++, sums += kTile * size) {
                const int64_t row = (first + i) * kTile, n = std::min<int64_t>(kTile, matrix.n - row);
                for (int64_t t = 0; t < real; t++)
                    deliver(isa, sums + t, size, n, row, start + t, x.inv_scale()[start + t], to);
            }
            start += size;
        }
    }
}

}  // namespace bitnet
