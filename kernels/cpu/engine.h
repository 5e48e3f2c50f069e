// The whole forward step of a ternary transformer on a CPU: one team of threads goes through it together.
//
//     x = x + o_proj(attn_sub_norm(attention(q, k, v of input_layernorm(x))))
//     x = x + down_proj(ffn_sub_norm(act(gate_proj(h)) * up_proj(h))),   h = post_attention_layernorm(x)
//
// Everything between two products is done row by row: norm, absmax and int8 in one pass while the row is in the first
// cache; q/k/v are one product, gate and up another; the output scale and the residual go into the product's epilogue.
// A row's arithmetic never depends on the number of threads, so that 1 and 2 threads give the same bits.
//
// Dimensions: B sequences, T tokens, M rows of a pass (tokens of all its sequences), D model, F ffn, H heads, G key/value heads, E head width,
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

// Ids appended to one sequence.
struct Part {
    int64_t sequence;
    const int64_t* ids;
    int64_t tokens;  // >= 1
    bool every;      // logits of each token, or of the last
};

// Keys and values of B sequences, each with a position of its own, and the buffers of a forward pass.
class Session {
  public:
    Session(Engine& engine, int64_t batch, int64_t limit, Store cache);

    // One pass over all parts. Writes logits [R][V], the rows of the first part first.
    // The caller has checked: sequences differ, position + tokens <= limit, ids in range.
    void forward(const Part* parts, int64_t count, float* logits);

    int64_t position(int64_t sequence) const { return position_[(size_t)sequence]; }
    // Forget what lies behind the first `length` <= position tokens.
    void truncate(int64_t sequence, int64_t length) { position_[(size_t)sequence] = length; }

    const int64_t batch, limit;

  private:
    struct Row {  // of a pass: one token
        int64_t id, sequence, position;
        int64_t piece;
    };
    struct Piece {                     // of a part, in this pass
        int64_t sequence, start, tokens;  // position of the first token
        int64_t first;                 // row
        int64_t spans;                 // of attention
    };
    struct Item {  // of attention: up to 16 queries of one key/value head
        int64_t piece, head, query, slot;
    };
    struct Task {  // and one span of its positions
        int64_t item, span;
    };
    // What one pass works on; made before the team starts, for nothing may throw inside it.
    struct Pass {
        std::vector<Row> rows;
        std::vector<Piece> pieces;
        std::vector<int64_t> wanted;  // rows that end in logits
        std::vector<Item> items;
        std::vector<Task> tasks;  // only where `apart`
        bool apart;
        float* logits;
    };

    void add(Part& part, int64_t tokens);
    void plan();

    void run(Team& team);
    void block(Team& team, int64_t layer);
    void normed(Team& team, const std::vector<float>& gain);
    void rotate(Team& team, const Layer& layer, int64_t index);
    void attention(Team& team, int64_t index);
    void logits(Team& team);
    void multiply(Team& team, const Matrix& matrix, const std::vector<float>& scale, float* y, int64_t stride, bool add);

    int64_t rows() const { return (int64_t)pass_.rows.size(); }
    uint8_t* key(int64_t layer, int64_t sequence, int64_t head) const;
    uint8_t* value(int64_t layer, int64_t sequence, int64_t head) const;
    float* cache_scale(bool values, int64_t layer, int64_t sequence, int64_t head) const;

    Engine& engine_;
    const Store cache_;
    const int64_t width_, padded_width_, bytes_, positions_;  // of a head, padded to 16; of a cached value; slots
    int64_t rows_;                                            // most rows of a pass
    std::vector<std::atomic<int64_t>> position_;              // read by others while a pass goes on
    Pass pass_;
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
