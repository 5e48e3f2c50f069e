// The forward pass of a ternary transformer on a CPU, run by one team of threads.
//
//     x = x + o_proj(attn_sub_norm(attention(q, k, v of input_layernorm(x))))
//     x = x + down_proj(ffn_sub_norm(act(gate_proj(h)) * up_proj(h))),   h = post_attention_layernorm(x)
//
// Everything between two products is done row by row: norm, absmax and int8 in one pass while the row is in the L1 cache.
// q/k/v are one product, gate and up another; the output scale and the residual are added in the product's epilogue.
// A row's arithmetic does not depend on the number of threads: 1 and 2 threads give the same bits.
//
// Dimensions: B sequences, T tokens, M rows of a pass (tokens of all its sequences), D model, F ffn, H heads,
// G key/value heads, E head width, S positions, V vocabulary.

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

// Embedding or head [V][D], in memory that the caller keeps alive or in `own`.
struct Embedding {
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

    // Quantise an embedding in parallel (hold `busy`): to i8, scale = max |row| / 127, or to i4, scale = the value of
    // largest magnitude / -8.
    void quantize(const Embedding& from, Store store, Embedding& to);

    const Shape shape;
    const Isa& isa;
    Pool pool;
    std::vector<Layer> layers;
    std::vector<float> final_norm;
    Embedding embedding, head;
    std::mutex busy;  // held during a forward pass or a change of weights: the team is shared

  private:
    friend class Session;
    std::vector<float> cos_, sin_;
    std::atomic<int64_t> positions_{0};
};

// Ids to append to one sequence.
struct Entry {
    int64_t sequence;
    const int64_t* ids;
    int64_t tokens;  // >= 1
    bool every;      // logits of each token, or of the last
};

// Keys and values of B sequences, each with a position of its own, and the buffers of a forward pass.
class Session {
  public:
    Session(Engine& engine, int64_t batch, int64_t limit, Store cache);

    // One pass over all entries. Writes logits [R][V], the rows of the first entry first.
    // The caller has checked that sequences differ, position + tokens <= limit, and ids are in range.
    void forward(const Entry* entries, int64_t count, float* logits);

    int64_t position(int64_t sequence) const { return position_[(size_t)sequence]; }
    // Keep the first `length` <= position tokens.
    void truncate(int64_t sequence, int64_t length) { position_[(size_t)sequence] = length; }

    const int64_t batch, limit;

  private:
    struct Row {  // of a pass: one token
        int64_t id, sequence, position;
        int64_t chunk;
    };
    struct Chunk {                     // of an entry, in this pass
        int64_t sequence, start, tokens;  // position of the first token
        int64_t first;                 // row
        int64_t spans;                 // of attention
    };
    struct Item {  // of attention: up to 16 queries of one key/value head
        int64_t chunk, head, query;
        int64_t partial;  // number of its first span among the partial results of all items
    };
    struct Task {  // and one span of its positions
        int64_t item, span;
    };
    // The work of one pass; made before the team starts, because nothing may throw inside it.
    struct Pass {
        std::vector<Row> rows;
        std::vector<Chunk> chunks;
        std::vector<int64_t> wanted;  // rows that end in logits
        std::vector<Item> items;
        bool split_spans;         // the spans of an item are tasks of their own, for any thread
        std::vector<Task> tasks;  // empty unless split_spans
        float* logits;
    };

    void add(Entry& entry, int64_t tokens);
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
    const int64_t width_, padded_width_, bytes_, positions_;  // of a head, padded to 16; bytes of a cached value; positions kept
    int64_t rows_;                                            // most rows of a pass
    std::vector<std::atomic<int64_t>> position_;              // read by other threads during a pass
    Pass pass_;
    Buffer keys_, values_, key_scales_, value_scales_;
    Buffer x_, y_, q_, attention_out_, states_, partial_, tops_, visible_;
    Activations activations_;
    struct Scratch {
        Product product;
        Buffer row, partial, tops;
    };
    std::vector<Scratch> scratch_;
};

}  // namespace bitnet
