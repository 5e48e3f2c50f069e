#include "engine.h"

#include <float.h>
#include <string.h>

#include <algorithm>
#include <cmath>

namespace bitnet {

namespace {

// Rows of one pass: enough for the products to be bound by arithmetic, few enough for the buffers to stay small.
constexpr int64_t kRows = 256;

int64_t size_of(Store store) { return row_bytes(store, 1); }  // of one value; not for i4

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

uint16_t to_bf16(float value) {  // round half to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void read_row(const Table& table, int64_t row, int64_t n, float* out) {
    const uint8_t* data = table.data + row * n * size_of(table.store);
    if (table.store == Store::f32) memcpy(out, data, (size_t)n * 4);
    if (table.store == Store::bf16)
        for (int64_t i = 0; i < n; i++) out[i] = from_bf16(reinterpret_cast<const uint16_t*>(data)[i]);
    if (table.store == Store::i8)
        for (int64_t i = 0; i < n; i++) out[i] = (float)reinterpret_cast<const int8_t*>(data)[i] * table.scales[row];
}

}  // namespace

Engine::Engine(const Shape& shape, const Isa& isa, int threads)
    : shape(shape), isa(isa), pool(threads), layers((size_t)shape.layers) {}

void Engine::rotary(const float* cos, const float* sin, int64_t positions) {
    const std::lock_guard<std::mutex> lock(busy);
    const int64_t n = positions * (shape.head_width() / 2);
    std::vector<float> c(cos, cos + n), s(sin, sin + n);
    cos_.swap(c), sin_.swap(s);
    positions_ = positions;
}

namespace {

// One row to groups of 32; `row` is filled up with zeros. The scale has the sign that gives the largest value code 0.
void to_groups(const float* row, int64_t n, uint8_t* out) {
    for (int64_t i = 0; i < n; i += kGroup, row += kGroup, out += kGroupBytes) {
        float top = 0;
        for (int j = 0; j < kGroup; j++)
            if (std::fabs(row[j]) > std::fabs(top)) top = row[j];
        const uint16_t half = to_bf16(top / -8);
        const float scale = from_bf16(half);
        const float inverse = std::fabs(scale) < FLT_MIN ? 0 : 1 / scale;  // of a subnormal it would be infinite
        memcpy(out, &half, 2);
        const auto code = [&](float v) { return (uint8_t)std::clamp(std::nearbyint(v * inverse) + 8.0f, 0.0f, 15.0f); };
        for (int j = 0; j < 16; j++) out[2 + j] = (uint8_t)(code(row[j]) | code(row[16 + j]) << 4);
    }
}

}  // namespace

void Engine::quantize(const Table& from, Store store, Table& to) {
    const int64_t n = shape.width, bytes = row_bytes(store, n);
    to = Table();
    to.store = store;
    to.own = Buffer(shape.vocab * bytes);
    to.data = to.own.data();
    if (store == Store::i8) {
        to.own_scales = Buffer(shape.vocab * 4);
        to.scales = to.own_scales.as<float>();
    }
    std::vector<Buffer> rows((size_t)pool.threads());  // made here: nothing may throw inside the team
    for (auto& row : rows) row = Buffer(round_up(n, kGroup) * 4);
    pool.run([&](Team& team) {
        float* row = rows[team.thread].as<float>();
        for (int64_t r = team.begin(shape.vocab); r < team.end(shape.vocab); r++) {
            read_row(from, r, n, row);
            if (store == Store::i8)
                to.own_scales.as<float>()[r] = 1.0f / isa.quantize(row, n, to.own.as<int8_t>() + r * n);
            else
                to_groups(row, n, to.own.data() + r * bytes);
        }
    });
}

// ---- session

struct Session::Slice {
    const int64_t* ids;  // [B], `stride` apart
    int64_t stride;
    int64_t tokens;  // of each sequence
    int64_t start;   // position of the first
    float* logits;   // of the first token, or null
    int64_t logit_tokens, logit_stride;  // how many of the last tokens, and elements from sequence to sequence
    int64_t rows;
};

// How attention is cut, see `attention`.
struct Session::Plan {
    int64_t queries, blocks, items, spans, part;  // part: floats of one task's output
    bool apart;
};

Session::Session(Engine& engine, int64_t batch, int64_t limit, Store cache)
    : batch(batch),
      limit(limit),
      engine_(engine),
      cache_(cache),
      width_(engine.shape.head_width()),
      padded_width_(round_up(width_, kLanes)),
      bytes_(size_of(cache)),
      positions_(round_up(limit, kLanes)) {
    const Shape& s = engine.shape;
    rows_ = std::max(batch, std::min(kRows, batch * limit));
    const int64_t heads = s.layers * batch * s.kv_heads;
    // On small pages: a layer's head is some megabytes apart from the next, and on huge ones the first token would make
    // the whole cache resident.
    keys_ = Buffer(heads * positions_ * width_ * bytes_, Pages::small);
    values_ = Buffer(heads * positions_ * padded_width_ * bytes_, Pages::small);
    if (cache == Store::i8) {
        key_scales_ = Buffer(heads * positions_ * 4);
        value_scales_ = Buffer(heads * positions_ * 4);
    }
    x_ = Buffer(rows_ * s.width * 4);
    y_ = Buffer(rows_ * std::max(s.width + 2 * s.kv_width(), 2 * s.ffn) * 4);
    q_ = Buffer(rows_ * s.width * 4);
    mixed_ = Buffer(rows_ * s.width * 4);
    states_ = Buffer(rows_ * round_up(s.width, kGroup) * 4);
    visible_ = Buffer(rows_ * (s.heads / s.kv_heads) * 8);
    activations_ = Activations(engine.isa, rows_, std::max(s.width, s.ffn));
    scratch_.resize((size_t)engine.pool.threads());
    for (auto& scratch : scratch_) {
        scratch.row = Buffer((std::max(s.width, s.ffn) + s.width) * 4);
        scratch.product.reserve(engine.isa, rows_);
    }
}

uint8_t* Session::key(int64_t layer, int64_t sequence, int64_t head) const {
    const int64_t index = (layer * batch + sequence) * engine_.shape.kv_heads + head;
    return keys_.data() + index * positions_ * width_ * bytes_;
}

uint8_t* Session::value(int64_t layer, int64_t sequence, int64_t head) const {
    const int64_t index = (layer * batch + sequence) * engine_.shape.kv_heads + head;
    return values_.data() + index * positions_ * padded_width_ * bytes_;
}

float* Session::cache_scale(bool values, int64_t layer, int64_t sequence, int64_t head) const {
    if (cache_ != Store::i8) return nullptr;
    const int64_t index = (layer * batch + sequence) * engine_.shape.kv_heads + head;
    return (values ? value_scales_ : key_scales_).as<float>() + index * positions_;
}

void Session::forward(const int64_t* ids, int64_t tokens, bool all, float* logits) {
    const std::lock_guard<std::mutex> lock(engine_.busy);
    const int64_t vocab = engine_.shape.vocab, step = std::max<int64_t>(1, rows_ / batch);
    for (int64_t done = 0; done < tokens; done += step) {
        Slice s{};
        s.ids = ids + done, s.stride = tokens;
        s.tokens = std::min(step, tokens - done), s.start = position;
        s.rows = batch * s.tokens;
        const bool last = done + s.tokens == tokens;
        s.logit_tokens = all ? s.tokens : last ? 1 : 0;
        s.logit_stride = all ? tokens * vocab : vocab;
        s.logits = all ? logits + done * vocab : logits;
        reserve(plan(s));  // nothing may throw inside the team
        engine_.pool.run([&](Team& team) { run(team, s); });
        position += s.tokens;
    }
}

void Session::run(Team& team, const Slice& s) {
    const Shape& shape = engine_.shape;
    for (int64_t m = team.begin(s.rows); m < team.end(s.rows); m++) {
        const int64_t id = s.ids[m / s.tokens * s.stride + m % s.tokens];
        read_row(engine_.embedding, id, shape.width, x_.as<float>() + m * shape.width);
    }
    const int64_t group = shape.heads / shape.kv_heads;
    if (team.thread == 0)
        for (int64_t i = 0; i < s.tokens * group; i++) visible_.as<int64_t>()[i] = s.start + i / group + 1;
    for (int64_t layer = 0; layer < shape.layers; layer++) block(team, s, layer);
    if (s.logit_tokens) logits(team, s);
}

// Activations of the next product from rows of x: norm, absmax, int8.
void Session::normed(Team& team, const Slice& s, const std::vector<float>& gain) {
    const Isa& isa = engine_.isa;
    const int64_t n = engine_.shape.width;
    float* row = scratch_[team.thread].row.as<float>();
    if (team.thread == 0) activations_.shape(s.rows, n);
    team.meet();
    for (int64_t m = team.begin(s.rows); m < team.end(s.rows); m++) {
        isa.rms_norm(x_.as<float>() + m * n, gain.data(), n, engine_.shape.eps, row);
        activations_.inv_scale()[m] = isa.quantize(row, n, activations_.row(m));
        activations_.clear_tail(m);
    }
    team.meet();
}

void Session::multiply(Team& team, const Matrix& matrix, const std::vector<float>& scale, float* y, int64_t stride,
                       bool add) {
    activations_.ready(team);
    team.meet();
    scratch_[team.thread].product.run(team, matrix, activations_,
                                      {.y = y, .stride = stride, .row_scale = scale.data(), .add = add});
    team.meet();
}

void Session::block(Team& team, const Slice& s, int64_t index) {
    const Shape& shape = engine_.shape;
    const Isa& isa = engine_.isa;
    const Layer& layer = engine_.layers[index];
    float* row = scratch_[team.thread].row.as<float>();

    normed(team, s, layer.input_norm);
    multiply(team, layer.qkv, layer.qkv_scale, y_.as<float>(), layer.qkv.n, false);
    rotate(team, s, layer, index);
    team.meet();
    attention(team, s, index);

    if (team.thread == 0) activations_.shape(s.rows, shape.width);
    team.meet();
    for (int64_t m = team.begin(s.rows); m < team.end(s.rows); m++) {
        const float* from = mixed_.as<float>() + m * shape.width;
        if (!layer.sub_norm.empty()) {
            isa.rms_norm(from, layer.sub_norm.data(), shape.width, shape.eps, row);
            from = row;
        }
        activations_.inv_scale()[m] = isa.quantize(from, shape.width, activations_.row(m));
        activations_.clear_tail(m);
    }
    team.meet();
    multiply(team, layer.output, layer.output_scale, x_.as<float>(), shape.width, true);

    normed(team, s, layer.post_norm);
    multiply(team, layer.gate_up, layer.gate_up_scale, y_.as<float>(), 2 * shape.ffn, false);

    if (team.thread == 0) activations_.shape(s.rows, shape.ffn);
    team.meet();
    for (int64_t m = team.begin(s.rows); m < team.end(s.rows); m++) {
        const float* gate = y_.as<float>() + m * 2 * shape.ffn;
        isa.gate(gate, gate + shape.ffn, shape.ffn, shape.squared_relu, row);
        if (!layer.ffn_sub_norm.empty()) isa.rms_norm(row, layer.ffn_sub_norm.data(), shape.ffn, shape.eps, row);
        activations_.inv_scale()[m] = isa.quantize(row, shape.ffn, activations_.row(m));
        activations_.clear_tail(m);
    }
    team.meet();
    multiply(team, layer.down, layer.down_scale, x_.as<float>(), shape.width, true);
}

// Queries, normed, turned and scaled, go to q_ [sequence][kv head][token][head of the group][E]; keys and values go into
// the cache: keys in blocks of 16 positions [E][16], values in rows.
void Session::rotate(Team& team, const Slice& s, const Layer& layer, int64_t index) {
    const Shape& shape = engine_.shape;
    const Isa& isa = engine_.isa;
    const int64_t E = width_, half = E / 2, group = shape.heads / shape.kv_heads, heads = shape.heads + 2 * shape.kv_heads;
    const float scale = 1.0f / std::sqrt((float)E);
    float* head = scratch_[team.thread].row.as<float>();
    int8_t* codes = reinterpret_cast<int8_t*>(head + E);
    // Parts by key/value head: neighbouring positions of a block of keys share cache lines.
    const int64_t items = s.rows * heads;
    for (int64_t item = team.begin(items); item < team.end(items); item++) {
        const int64_t h = item / s.rows, m = item % s.rows;
        const int64_t sequence = m / s.tokens, t = m % s.tokens, at = s.start + t;
        const float* from = y_.as<float>() + m * layer.qkv.n + h * E;
        const bool is_query = h < shape.heads, is_value = h >= shape.heads + shape.kv_heads;
        if (!is_value) {
            const auto& gain = is_query ? layer.q_norm : layer.k_norm;
            if (!gain.empty()) {
                isa.rms_norm(from, gain.data(), E, shape.eps, head);
                from = head;
            }
            const float *cos = engine_.cos_.data() + at * half, *sin = engine_.sin_.data() + at * half;
            for (int64_t i = 0; i < half; i++) {
                const float a = from[i], b = from[i + half];
                head[i] = a * cos[i] - b * sin[i];
                head[i + half] = b * cos[i] + a * sin[i];
            }
            from = head;
        }
        if (is_query) {
            float* to = q_.as<float>() + (((sequence * shape.kv_heads + h / group) * s.tokens + t) * group + h % group) * E;
            for (int64_t i = 0; i < E; i++) to[i] = from[i] * scale;
            continue;
        }
        const int64_t g = (h - shape.heads) % shape.kv_heads;
        const int64_t step = is_value ? 1 : kLanes;
        const int64_t first = is_value ? at * padded_width_ : at / kLanes * kLanes * E + at % kLanes;
        uint8_t* cache = is_value ? value(index, sequence, g) : key(index, sequence, g);
        if (cache_ == Store::f32)
            for (int64_t i = 0; i < E; i++) reinterpret_cast<float*>(cache)[first + i * step] = from[i];
        if (cache_ == Store::bf16)
            for (int64_t i = 0; i < E; i++) reinterpret_cast<uint16_t*>(cache)[first + i * step] = to_bf16(from[i]);
        if (cache_ == Store::i8) {
            cache_scale(is_value, index, sequence, g)[at] = 1.0f / isa.quantize(from, E, codes);
            for (int64_t i = 0; i < E; i++) reinterpret_cast<int8_t*>(cache)[first + i * step] = codes[i];
        }
    }
}

namespace {

// Sum of `spans` parts of a softmax: out[e] = sum_c w_c part_c[e] / sum_c w_c total_c, w_c = exp(highest_c - max).
// Parts are `stride` floats apart, their maxima and totals `tops` floats apart.
void merge(const float* parts, int64_t stride, const float* highest, const float* total, int64_t tops, int64_t spans,
           int64_t width, float* out) {
    float top = -INFINITY;
    for (int64_t c = 0; c < spans; c++) top = std::max(top, highest[c * tops]);
    float sum = 0;
    for (int64_t e = 0; e < width; e++) out[e] = 0;
    for (int64_t c = 0; c < spans; c++) {
        if (highest[c * tops] == -INFINITY) continue;
        const float w = std::exp(highest[c * tops] - top);
        sum += w * total[c * tops];
        for (int64_t e = 0; e < width; e++) out[e] += w * parts[c * stride + e];
    }
    for (int64_t e = 0; e < width; e++) out[e] /= sum;
}

}  // namespace

// Tasks are (sequence, key/value head, up to 16 queries, span of 256 positions). Where there are enough queries a thread
// takes all spans of some of them; a single long sequence is cut by spans, and merged behind a meeting. The spans and
// their order of merging are the same either way.
Session::Plan Session::plan(const Slice& s) const {
    const Shape& shape = engine_.shape;
    Plan p{};
    p.queries = s.tokens * (shape.heads / shape.kv_heads);
    p.blocks = (p.queries + kQueries - 1) / kQueries;
    p.items = batch * shape.kv_heads * p.blocks;
    p.spans = (s.start + s.tokens + kSpan - 1) / kSpan;
    p.part = kQueries * padded_width_;
    p.apart = p.spans > 1 && p.items < 8 * engine_.pool.threads();
    return p;
}

void Session::reserve(const Plan& p) {
    if (p.apart) {
        partial_.reserve(p.items * p.spans * p.part * 4);
        tops_.reserve(p.items * p.spans * 2 * kQueries * 4);
        return;
    }
    for (auto& scratch : scratch_) {
        scratch.partial.reserve(p.spans * p.part * 4);
        scratch.tops.reserve(p.spans * 2 * kQueries * 4);
    }
}

void Session::attention(Team& team, const Slice& s, int64_t index) {
    const Shape& shape = engine_.shape;
    const auto [queries, blocks, items, spans, part, apart] = plan(s);
    const int64_t group = shape.heads / shape.kv_heads;
    Scratch& scratch = scratch_[team.thread];
    const Buffer& partial = apart ? partial_ : scratch.partial;
    const Buffer& tops = apart ? tops_ : scratch.tops;

    const auto compute = [&, queries = queries, blocks = blocks, part = part](int64_t item, int64_t span, int64_t slot) {
        const int64_t block = item % blocks, head = item / blocks;  // head over sequences and key/value heads
        const int64_t sequence = head / shape.kv_heads, g = head % shape.kv_heads, first = block * kQueries;
        AttentionTask task{};
        task.q = q_.as<float>() + (head * queries + first) * width_;
        task.visible = visible_.as<int64_t>() + first;
        task.queries = (int)std::min<int64_t>(kQueries, queries - first);
        task.width = (int)width_;
        task.store = cache_;
        task.keys = key(index, sequence, g), task.values = value(index, sequence, g);
        task.key_scales = cache_scale(false, index, sequence, g), task.value_scales = cache_scale(true, index, sequence, g);
        task.start = span * kSpan;
        task.end = std::min((span + 1) * kSpan, s.start + s.tokens);
        task.out = partial.as<float>() + slot * part;
        task.highest = tops.as<float>() + slot * 2 * kQueries;
        task.total = task.highest + kQueries;
        engine_.isa.attend(task);
    };
    const auto collect = [&, queries = queries, blocks = blocks, part = part, spans = spans](int64_t item, int64_t slot) {
        const int64_t block = item % blocks, head = item / blocks;
        const int64_t sequence = head / shape.kv_heads, g = head % shape.kv_heads;
        for (int64_t j = block * kQueries; j < std::min((block + 1) * kQueries, queries); j++) {
            const int64_t i = j - block * kQueries, m = sequence * s.tokens + j / group;
            const float* top = tops.as<float>() + slot * 2 * kQueries + i;
            merge(partial.as<float>() + slot * part + i * padded_width_, part, top, top + kQueries, 2 * kQueries, spans,
                  width_, mixed_.as<float>() + m * shape.width + (g * group + j % group) * width_);
        }
    };
    if (apart) {
        for (int64_t i = team.begin(items * spans); i < team.end(items * spans); i++) compute(i / spans, i % spans, i);
        team.meet();
        for (int64_t item = team.begin(items); item < team.end(items); item++) collect(item, item * spans);
    } else {
        // Causal work grows with the position: threads take turns instead of halves.
        for (int64_t item = team.thread; item < items; item += team.threads) {
            for (int64_t c = 0; c < spans; c++) compute(item, c, c);
            collect(item, 0);
        }
    }
    team.meet();
}

void Session::logits(Team& team, const Slice& s) {
    const Shape& shape = engine_.shape;
    const Isa& isa = engine_.isa;
    const int64_t n = shape.width, stride = round_up(n, kGroup), rows = batch * s.logit_tokens;
    float* states = states_.as<float>();  // filled up with the zeros it was made with
    for (int64_t i = team.begin(rows); i < team.end(rows); i++) {
        const int64_t m = i / s.logit_tokens * s.tokens + s.tokens - s.logit_tokens + i % s.logit_tokens;
        isa.rms_norm(x_.as<float>() + m * n, engine_.final_norm.data(), n, shape.eps, states + i * stride);
    }
    team.meet();
    // 64 rows of the table stay in the second cache while every token passes.
    constexpr int64_t kStep = 64;
    const int64_t bytes = row_bytes(engine_.head.store, n);
    // Logits of all sequences lie one after the other, unless each is a piece of a longer one.
    const bool whole = s.logit_stride == s.logit_tokens * shape.vocab;
    const int64_t runs = whole ? 1 : batch, tokens = whole ? rows : s.logit_tokens;
    for (int64_t v = team.begin(shape.vocab); v < team.end(shape.vocab); v += kStep) {
        const int64_t count = std::min(kStep, team.end(shape.vocab) - v);
        const float* scales = engine_.head.scales ? engine_.head.scales + v : nullptr;
        for (int64_t b = 0; b < runs; b++)
            for (int64_t t = 0; t < tokens; t += 4)
                isa.dots(engine_.head.data + v * bytes, engine_.head.store, scales, count, n,
                         states + (b * tokens + t) * stride, stride, (int)std::min<int64_t>(4, tokens - t),
                         s.logits + b * s.logit_stride + t * shape.vocab + v, shape.vocab);
    }
    team.meet();
}

}  // namespace bitnet
