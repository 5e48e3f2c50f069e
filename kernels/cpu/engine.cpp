#include "engine.h"

#include <float.h>
#include <string.h>

#include <algorithm>
#include <cmath>

namespace bitnet {

namespace {

// Rows of one pass: enough to make the products compute-bound, few enough to keep the buffers small.
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

void read_row(const Embedding& from, int64_t row, int64_t n, float* out) {
    const uint8_t* data = from.data + row * n * size_of(from.store);
    if (from.store == Store::f32) memcpy(out, data, (size_t)n * 4);
    if (from.store == Store::bf16)
        for (int64_t i = 0; i < n; i++) out[i] = from_bf16(reinterpret_cast<const uint16_t*>(data)[i]);
    if (from.store == Store::i8)
        for (int64_t i = 0; i < n; i++) out[i] = (float)reinterpret_cast<const int8_t*>(data)[i] * from.scales[row];
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

// One row to groups of 32; `row` is padded with zeros. The scale has the sign that gives the largest value code 0.
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

void Engine::quantize(const Embedding& from, Store store, Embedding& to) {
    const int64_t n = shape.width, bytes = row_bytes(store, n);
    to = Embedding();
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

Session::Session(Engine& engine, int64_t batch, int64_t limit, Store cache)
    : batch(batch),
      limit(limit),
      engine_(engine),
      cache_(cache),
      width_(engine.shape.head_width()),
      padded_width_(round_up(width_, kLanes)),
      bytes_(size_of(cache)),
      positions_(round_up(limit, kLanes)),
      position_((size_t)batch) {
    const Shape& s = engine.shape;
    rows_ = std::max(batch, std::min(kRows, batch * limit));
    const int64_t heads = s.layers * batch * s.kv_heads;
    // On small pages: heads lie megabytes from each other, and on huge pages the first token would make all of the cache
    // resident.
    keys_ = Buffer(heads * positions_ * width_ * bytes_, Pages::small);
    values_ = Buffer(heads * positions_ * padded_width_ * bytes_, Pages::small);
    if (cache == Store::i8) {
        key_scales_ = Buffer(heads * positions_ * 4);
        value_scales_ = Buffer(heads * positions_ * 4);
    }
    x_ = Buffer(rows_ * s.width * 4);
    y_ = Buffer(rows_ * std::max(s.width + 2 * s.kv_width(), 2 * s.ffn) * 4);
    q_ = Buffer(rows_ * s.width * 4);
    attention_out_ = Buffer(rows_ * s.width * 4);
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

void Session::forward(const Entry* entries, int64_t count, float* logits) {
    const std::lock_guard<std::mutex> lock(engine_.busy);
    Entry entry{};
    for (int64_t next = 0; next < count || entry.tokens;) {
        pass_.rows.clear(), pass_.chunks.clear(), pass_.wanted.clear();
        while (rows() < rows_ && (entry.tokens || next < count)) {
            if (!entry.tokens) entry = entries[next++];
            add(entry, std::min(entry.tokens, rows_ - rows()));
        }
        pass_.logits = logits;
        plan();
        engine_.pool.run([&](Team& team) { run(team); });
        for (const Chunk& chunk : pass_.chunks) position_[(size_t)chunk.sequence] += chunk.tokens;
        logits += (int64_t)pass_.wanted.size() * engine_.shape.vocab;
    }
}

// Move the first `tokens` of `entry` into the pass.
void Session::add(Entry& entry, int64_t tokens) {
    const int64_t start = position(entry.sequence), index = (int64_t)pass_.chunks.size();
    pass_.chunks.push_back({entry.sequence, start, tokens, rows(), (start + tokens + kSpan - 1) / kSpan});
    for (int64_t t = 0; t < tokens; t++) {
        if (entry.every || t + 1 == entry.tokens) pass_.wanted.push_back(rows());
        pass_.rows.push_back({entry.ids[t], entry.sequence, start + t, index});
    }
    entry.ids += tokens, entry.tokens -= tokens;
}

void Session::run(Team& team) {
    const Shape& shape = engine_.shape;
    const int64_t group = shape.heads / shape.kv_heads;
    for (int64_t m = team.begin(rows()); m < team.end(rows()); m++) {
        const Row& row = pass_.rows[(size_t)m];
        read_row(engine_.embedding, row.id, shape.width, x_.as<float>() + m * shape.width);
        for (int64_t i = 0; i < group; i++) visible_.as<int64_t>()[m * group + i] = row.position + 1;
    }
    for (int64_t layer = 0; layer < shape.layers; layer++) block(team, layer);
    if (!pass_.wanted.empty()) logits(team);
}

// Activations of the next product from rows of x: norm, absmax, int8.
void Session::normed(Team& team, const std::vector<float>& gain) {
    const Isa& isa = engine_.isa;
    const int64_t n = engine_.shape.width;
    float* row = scratch_[team.thread].row.as<float>();
    if (team.thread == 0) activations_.shape(rows(), n);
    team.barrier();
    for (int64_t m = team.begin(rows()); m < team.end(rows()); m++) {
        isa.rms_norm(x_.as<float>() + m * n, gain.data(), n, engine_.shape.eps, row);
        activations_.inv_scale()[m] = isa.quantize(row, n, activations_.row(m));
        activations_.clear_tail(m);
    }
    team.barrier();
}

void Session::multiply(Team& team, const Matrix& matrix, const std::vector<float>& scale, float* y, int64_t stride,
                       bool add) {
    activations_.ready(team);
    team.barrier();
    scratch_[team.thread].product.run(team, matrix, activations_,
                                      {.y = y, .stride = stride, .row_scale = scale.data(), .add = add});
    team.barrier();
}

void Session::block(Team& team, int64_t index) {
    const Shape& shape = engine_.shape;
    const Isa& isa = engine_.isa;
    const Layer& layer = engine_.layers[index];
    float* row = scratch_[team.thread].row.as<float>();

    normed(team, layer.input_norm);
    multiply(team, layer.qkv, layer.qkv_scale, y_.as<float>(), layer.qkv.n, false);
    rotate(team, layer, index);
    team.barrier();
    attention(team, index);

    if (team.thread == 0) activations_.shape(rows(), shape.width);
    team.barrier();
    for (int64_t m = team.begin(rows()); m < team.end(rows()); m++) {
        const float* from = attention_out_.as<float>() + m * shape.width;
        if (!layer.sub_norm.empty()) {
            isa.rms_norm(from, layer.sub_norm.data(), shape.width, shape.eps, row);
            from = row;
        }
        activations_.inv_scale()[m] = isa.quantize(from, shape.width, activations_.row(m));
        activations_.clear_tail(m);
    }
    team.barrier();
    multiply(team, layer.output, layer.output_scale, x_.as<float>(), shape.width, true);

    normed(team, layer.post_norm);
    multiply(team, layer.gate_up, layer.gate_up_scale, y_.as<float>(), 2 * shape.ffn, false);

    if (team.thread == 0) activations_.shape(rows(), shape.ffn);
    team.barrier();
    for (int64_t m = team.begin(rows()); m < team.end(rows()); m++) {
        const float* gate = y_.as<float>() + m * 2 * shape.ffn;
        isa.gate(gate, gate + shape.ffn, shape.ffn, shape.squared_relu, row);
        if (!layer.ffn_sub_norm.empty()) isa.rms_norm(row, layer.ffn_sub_norm.data(), shape.ffn, shape.eps, row);
        activations_.inv_scale()[m] = isa.quantize(row, shape.ffn, activations_.row(m));
        activations_.clear_tail(m);
    }
    team.barrier();
    multiply(team, layer.down, layer.down_scale, x_.as<float>(), shape.width, true);
}

// Queries, normed, rotated and scaled, go to q_ [chunk][kv head][token][head of the group][E]; keys and values go into
// the cache: keys in blocks of 16 positions [E][16], values in rows.
void Session::rotate(Team& team, const Layer& layer, int64_t index) {
    const Shape& shape = engine_.shape;
    const Isa& isa = engine_.isa;
    const int64_t E = width_, half = E / 2, group = shape.heads / shape.kv_heads, heads = shape.heads + 2 * shape.kv_heads;
    const float scale = 1.0f / std::sqrt((float)E);
    float* head = scratch_[team.thread].row.as<float>();
    int8_t* codes = reinterpret_cast<int8_t*>(head + E);
    // Head by head, so that a thread writes neighbouring positions of a block of keys, which share cache lines.
    const int64_t items = rows() * heads;
    for (int64_t item = team.begin(items); item < team.end(items); item++) {
        const int64_t h = item / rows(), m = item % rows();
        const Row& place = pass_.rows[(size_t)m];
        const int64_t sequence = place.sequence, at = place.position;
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
            const Chunk& chunk = pass_.chunks[(size_t)place.chunk];
            const int64_t query = (h / group * chunk.tokens + m - chunk.first) * group + h % group;
            float* to = q_.as<float>() + chunk.first * shape.width + query * E;
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

// Merge the partial softmax sums of `spans` spans: out[e] = sum_c w_c part_c[e] / sum_c w_c total_c,
// w_c = exp(highest_c - max). Partial sums are `stride` floats apart, their maxima and totals `tops` floats apart.
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

// A task is (sequence, key/value head, up to 16 queries, span of 256 positions). With enough queries, a thread takes all
// spans of some of them; otherwise threads share the spans of a query, and merge them after a barrier. The spans and the
// order in which they are merged are the same either way.
void Session::plan() {
    const Shape& shape = engine_.shape;
    const int64_t group = shape.heads / shape.kv_heads, part = kQueries * padded_width_ * 4, top = 2 * kQueries * 4;
    pass_.items.clear(), pass_.tasks.clear();
    int64_t most = 0, total = 0;
    for (size_t p = 0; p < pass_.chunks.size(); p++) {
        const Chunk& chunk = pass_.chunks[p];
        for (int64_t head = 0; head < shape.kv_heads; head++)
            for (int64_t query = 0; query < chunk.tokens * group; query += kQueries) {
                pass_.items.push_back({(int64_t)p, head, query, total});
                total += chunk.spans;
            }
        most = std::max(most, chunk.spans);
    }
    pass_.split_spans = most > 1 && (int64_t)pass_.items.size() < 8 * engine_.pool.threads();
    if (!pass_.split_spans) {
        for (auto& scratch : scratch_) scratch.partial.reserve(most * part), scratch.tops.reserve(most * top);
        return;
    }
    partial_.reserve(total * part), tops_.reserve(total * top);
    for (size_t i = 0; i < pass_.items.size(); i++)
        for (int64_t span = 0; span < pass_.chunks[(size_t)pass_.items[i].chunk].spans; span++)
            pass_.tasks.push_back({(int64_t)i, span});
}

void Session::attention(Team& team, int64_t index) {
    const Shape& shape = engine_.shape;
    const int64_t group = shape.heads / shape.kv_heads, part = kQueries * padded_width_;
    const int64_t items = (int64_t)pass_.items.size(), tasks = (int64_t)pass_.tasks.size();
    Scratch& scratch = scratch_[team.thread];
    const Buffer& partial = pass_.split_spans ? partial_ : scratch.partial;
    const Buffer& tops = pass_.split_spans ? tops_ : scratch.tops;

    const auto compute = [&](const Item& item, int64_t span, int64_t place) {
        const Chunk& chunk = pass_.chunks[(size_t)item.chunk];
        const int64_t queries = chunk.tokens * group;
        AttentionTask task{};
        task.q = q_.as<float>() + chunk.first * shape.width + (item.head * queries + item.query) * width_;
        task.visible = visible_.as<int64_t>() + chunk.first * group + item.query;
        task.queries = (int)std::min<int64_t>(kQueries, queries - item.query);
        task.width = (int)width_;
        task.store = cache_;
        task.keys = key(index, chunk.sequence, item.head), task.values = value(index, chunk.sequence, item.head);
        task.key_scales = cache_scale(false, index, chunk.sequence, item.head);
        task.value_scales = cache_scale(true, index, chunk.sequence, item.head);
        task.start = span * kSpan;
        task.end = std::min((span + 1) * kSpan, chunk.start + chunk.tokens);
        task.out = partial.as<float>() + place * part;
        task.highest = tops.as<float>() + place * 2 * kQueries;
        task.total = task.highest + kQueries;
        engine_.isa.attend(task);
    };
    const auto collect = [&](const Item& item, int64_t place) {
        const Chunk& chunk = pass_.chunks[(size_t)item.chunk];
        for (int64_t j = item.query; j < std::min(item.query + kQueries, chunk.tokens * group); j++) {
            const int64_t i = j - item.query, m = chunk.first + j / group;
            const float* top = tops.as<float>() + place * 2 * kQueries + i;
            merge(partial.as<float>() + place * part + i * padded_width_, part, top, top + kQueries, 2 * kQueries,
                  chunk.spans, width_, attention_out_.as<float>() + m * shape.width + (item.head * group + j % group) * width_);
        }
    };
    if (pass_.split_spans) {
        for (int64_t i = team.begin(tasks); i < team.end(tasks); i++) {
            const Task& task = pass_.tasks[(size_t)i];
            compute(pass_.items[(size_t)task.item], task.span, i);
        }
        team.barrier();
        for (int64_t i = team.begin(items); i < team.end(items); i++)
            collect(pass_.items[(size_t)i], pass_.items[(size_t)i].partial);
    } else {
        // Causal work grows with the position: interleave items, so that no thread gets all the late ones.
        for (int64_t i = team.thread; i < items; i += team.threads) {
            const Item& item = pass_.items[(size_t)i];
            for (int64_t c = 0; c < pass_.chunks[(size_t)item.chunk].spans; c++) compute(item, c, c);
            collect(item, 0);
        }
    }
    team.barrier();
}

void Session::logits(Team& team) {
    const Shape& shape = engine_.shape;
    const Isa& isa = engine_.isa;
    const int64_t n = shape.width, stride = round_up(n, kGroup), tokens = (int64_t)pass_.wanted.size();
    float* states = states_.as<float>();  // the padding is zero, as allocated
    for (int64_t i = team.begin(tokens); i < team.end(tokens); i++)
        isa.rms_norm(x_.as<float>() + pass_.wanted[(size_t)i] * n, engine_.final_norm.data(), n, shape.eps,
                     states + i * stride);
    team.barrier();
    // 64 rows of the head stay in the L2 cache while all tokens are multiplied by them.
    constexpr int64_t kStep = 64;
    const int64_t bytes = row_bytes(engine_.head.store, n);
    for (int64_t v = team.begin(shape.vocab); v < team.end(shape.vocab); v += kStep) {
        const int64_t count = std::min(kStep, team.end(shape.vocab) - v);
        const float* scales = engine_.head.scales ? engine_.head.scales + v : nullptr;
        for (int64_t t = 0; t < tokens; t += 4)
            isa.dots(engine_.head.data + v * bytes, engine_.head.store, scales, count, n, states + t * stride, stride,
                     (int)std::min<int64_t>(4, tokens - t), pass_.logits + t * shape.vocab + v, shape.vocab);
    }
    team.barrier();
}

}  // namespace bitnet
