// The whole forward step of a ternary transformer on a CPU: one team of threads goes through it together.
//
//     x = x + o_proj(attn_sub_norm(attention(q, k, v of input_layernorm(x))))
//     x = x + down_proj(ffn_sub_norm(act(gate_proj(h)) * up_proj(h))),   h = post_attention_layernorm(x)
//
// Everything between two products is done row by row: norm, absmax and int8 in one pass while the row is in the first
// cache; q/k/v are one product, gate and up another; the output scale and the residual go into the product's epilogue.
// A row's arithmetic never depends on the number of threads, so that 1 and 2 threads give the same bits.
//
// Dimensions: B sequences, T tokens of each, M = B T rows, D model, F ffn, H heads, G key/value heads, E head width,
// S positions, V vocabulary.

#pragma once

#include <stdint.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "isa.h"
#include "linear.h"
#include "pool.h"

namespace bitnet {

struct Shape {
    int64_t vocab, width, ffn, layers, heads, kv_heads;
    bool squared_relu, sub_norms, qk_norm;
    float eps;

    int64_t head_width() const { return width / heads; }
    int64_t kv_width() const { return kv_heads * head_width(); }
};

// A table [V][D] of embeddings, in memory that somebody else keeps or in `own`.
struct Table {
    const uint8_t* data = nullptr;
    Store store = Store::bf16;
    const float* scales = nullptr;  // [V], for i8
    Buffer own, own_scales;
};

struct Layer {
    Matrix qkv, output, gate_up, down;
    std::vector<float> qkv_scale, output_scale, gate_up_scale, down_scale;              // a scale a row
    std::vector<float> input_norm, post_norm, sub_norm, ffn_sub_norm, q_norm, k_norm;  // gains; empty where there is none
};

class Engine {
  public:
    Engine(const Shape& shape, const Isa& isa, int threads);

    // cos, sin [positions][E / 2]; waits for a forward pass to end.
    void rotary(const float* cos, const float* sin, int64_t positions);
    int64_t positions() const { return positions_; }

    // Quantise a table in parallel (hold `busy`): to i8, scale = max |row| / 127, or to i4, scale = the value of largest magnitude / -8.
    void quantize(const Table& from, Store store, Table& to);

    const Shape shape;
    const Isa& isa;
    Pool pool;
    std::vector<Layer> layers;
    std::vector<float> final_norm;
    Table embedding, head;
    std::mutex busy;  // one forward pass or change of weights at a time: the team is shared

  private:
    friend class Session;
    std::vector<float> cos_, sin_;
    std::atomic<int64_t> positions_{0};
};

// Keys and values of B sequences, and the buffers of a forward pass.
class Session {
  public:
    Session(Engine& engine, int64_t batch, int64_t limit, Store cache);

    // Append ids [B][T]. Writes logits [B][V] of the last position, or [B][T][V] of all.
    // The caller has checked: 1 <= T, position + T <= limit, ids in range.
    void forward(const int64_t* ids, int64_t tokens, bool all, float* logits);

    std::atomic<int64_t> position{0};  // read by others while a pass goes on
    const int64_t batch, limit;

  private:
    struct Slice;  // of the tokens: as many as the buffers take
    struct Plan;   // how attention is cut

    Plan plan(const Slice& s) const;
    void reserve(const Plan& plan);

    void run(Team& team, const Slice& s);
    void block(Team& team, const Slice& s, int64_t layer);
    void normed(Team& team, const Slice& s, const std::vector<float>& gain);
    void rotate(Team& team, const Slice& s, const Layer& layer, int64_t index);
    void attention(Team& team, const Slice& s, int64_t index);
    void logits(Team& team, const Slice& s);
    void multiply(Team& team, const Matrix& matrix, const std::vector<float>& scale, float* y, int64_t stride, bool add);

    uint8_t* key(int64_t layer, int64_t sequence, int64_t head) const;
    uint8_t* value(int64_t layer, int64_t sequence, int64_t head) const;
    float* cache_scale(bool values, int64_t layer, int64_t sequence, int64_t head) const;

    Engine& engine_;
    const Store cache_;
    const int64_t width_, padded_width_, bytes_, positions_;  // of a head, padded to 16; of a cached value; slots
    int64_t rows_;                                            // most rows of a slice
    Buffer keys_, values_, key_scales_, value_scales_;
    Buffer x_, y_, q_, mixed_, states_, partial_, tops_, visible_;
    Activations activations_;
    struct Scratch {
        Product product;
        Buffer row, partial, tops;
    };
    std::vector<Scratch> scratch_;
};

}  // namespace bitnet
