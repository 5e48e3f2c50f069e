// Ternary matrices in the layout of an instruction set, and their product with int8 activations over a team.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>
#include <vector>

#include "isa.h"
#include "pool.h"

namespace bitnet {

// Memory for the engine: 64-byte aligned and zeroed. Pages cost nothing before they are touched; `huge` ones, where the
// system gives them, are 2 MB each.
enum class Pages { huge, small };

class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(int64_t bytes, Pages pages = Pages::huge);
    Buffer(Buffer&&) noexcept;
    Buffer& operator=(Buffer&&) noexcept;
    ~Buffer();

    uint8_t* data() const { return data_; }
    template <typename T> T* as() const { return reinterpret_cast<T*>(data_); }
    int64_t bytes() const { return bytes_; }
    // Grow to at least so many bytes; the content is lost when it grows.
    void reserve(int64_t bytes);

  private:
    uint8_t* data_ = nullptr;
    int64_t bytes_ = 0;
};

// Bytes a second at which a team reads `bytes` of memory once: what limits decoding.
double read_bandwidth(Pool& pool, const Buffer& memory);

// Rows of packed weights as in the file: [n][ceil(k / 4)] bytes, code = weight + 1, first weight in the lowest bits.
struct PackedRows {
    const uint8_t* data;
    int64_t n;
};

// A ternary matrix [n][k] in the layout of an instruction set, in its own memory or the caller's.
class Matrix {
  public:
    Matrix() = default;
    // Rearrange the rows of one or more packed matrices, one below the other. k in 1..kMaxK - 1.
    Matrix(const Isa& isa, const std::vector<PackedRows>& parts, int64_t k, Pool& pool);
    // Look at what `rearrange` has written.
    Matrix(const Isa& isa, int64_t n, int64_t k, const uint8_t* data);

    // Bytes of the layout, and the rearranging itself, in parallel; `out` is 64-byte aligned. False if there is a code 3.
    static int64_t bytes(const Isa& isa, int64_t n, int64_t k);
    static bool rearrange(const Isa& isa, const std::vector<PackedRows>& parts, int64_t k, Pool& pool, uint8_t* out);

    int64_t bytes() const { return bytes(*isa, n, k); }
    int64_t padded_k() const { return words * isa->layout.weights(); }

    const Isa* isa = nullptr;
    int64_t n = 0, k = 0, words = 0, tiles = 0;
    bool valid = true;  // there is no code 3
    const uint8_t* data = nullptr;

  private:
    Buffer own_;
};

// int8 activations of up to `capacity` tokens, the input of products with matrices of `k` in-features or fewer.
// Filled row by row (`row`, `inv_scale`), then `ready` by the whole team, then any number of products.
class Activations {
  public:
    Activations() = default;
    Activations(const Isa& isa, int64_t capacity, int64_t k);

    void shape(int64_t tokens, int64_t k);  // before rows are written, by one thread, with a barrier after it
    int8_t* row(int64_t token) const { return q_.as<int8_t>() + token * padded_; }  // [padded k], zeros after k
    float* inv_scale() const { return inv_scale_.as<float>(); }

    // Zero the end of one row after k (a longer row may have been there).
    void clear_tail(int64_t token) const;

    // Make the lookup tables or the transposed copy; every row has to be written (a barrier before it and after it).
    void ready(Team& team);

    int64_t tokens = 0, k = 0;

  private:
    friend class Product;
    const Isa* isa_ = nullptr;
    int64_t words_ = 0, padded_ = 0, table_bytes_ = 0;
    int64_t in_blocks_ = 0;  // tokens that go through Isa::block, the rest through Isa::rows
    Buffer q_, inv_scale_, columns_, tables_;

    int block_size(int64_t start) const;  // tokens (with filling) of the block that starts here
};

// Where sums go: int32 [token][n], or floats scaled and maybe added.
struct Target {
    int32_t* sums = nullptr;
    float* y = nullptr;
    int64_t stride = 0;              // elements from token to token, of either
    const float* row_scale = nullptr;  // [n], for y
    bool add = false;
};

// Scratch of one thread for products.
class Product {
  public:
    // Room for products of so many tokens with any matrix; `run` allocates nothing.
    void reserve(const Isa& isa, int64_t tokens);

    // This thread's rows of matrix x activations. The activations are `ready`; a barrier is needed before the target is read.
    void run(const Team& team, const Matrix& matrix, const Activations& x, const Target& to);

  private:
    void rows(const Team& team, const Matrix& matrix, const Activations& x, const Target& to);
    void blocks(const Team& team, const Matrix& matrix, const Activations& x, const Target& to);
    Buffer scratch_, sums_;
};

}  // namespace bitnet
