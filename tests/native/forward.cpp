// The whole forward pass on small random models: however the work is cut, the same bits. Pieces against the whole, batches
// against single sequences, 1, 2 and 3 threads, every cache and head, contexts beyond a span of attention; each instruction
// set. Built with sanitizers by `make sanitize`. Prints what it ran; exits 1 at the first difference.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "engine.h"
#include "isa.h"
#include "linear.h"
#include "pool.h"

using namespace bitnet;

namespace {

std::mt19937_64 rng;

int64_t draw(int64_t low, int64_t high) { return low + (int64_t)(rng() % (uint64_t)(high - low + 1)); }
float draw_float(float low, float high) { return low + (high - low) * (float)draw(0, 1 << 20) / (float)(1 << 20); }

std::vector<float> gains(int64_t n) {
    std::vector<float> out((size_t)n);
    for (auto& v : out) v = draw_float(0.5f, 1.5f);
    return out;
}

// Weights, tables and gains of a model, made once; every engine of it borrows or rearranges them.
struct Model {
    Shape shape;
    Store table_store;
    bool tied;
    int64_t positions;
    struct Parts {
        std::vector<std::unique_ptr<uint8_t[]>> packed;  // exact allocations: a read past the end is seen
        std::vector<float> scales, input_norm, post_norm, sub_norm, ffn_sub_norm, q_norm, k_norm;
    };
    std::vector<Parts> layers;
    std::vector<float> final_norm, cos, sin;
    struct Rows {
        std::vector<uint8_t> data;
        std::vector<float> scales;
    } embedding, head;

    Model(const Shape& shape, Store table_store, bool tied, int64_t positions)
        : shape(shape), table_store(table_store), tied(tied), positions(positions) {
        const int64_t sizes[7][2] = {{shape.width, shape.width}, {shape.kv_width(), shape.width},
                                     {shape.kv_width(), shape.width}, {shape.width, shape.width},
                                     {shape.ffn, shape.width}, {shape.ffn, shape.width}, {shape.width, shape.ffn}};
        for (int64_t i = 0; i < shape.layers; i++) {
            Parts p;
            for (const auto& [n, k] : sizes) p.packed.push_back(pack(n, k)), p.scales.push_back(draw_float(0.05f, 0.5f));
            p.input_norm = gains(shape.width), p.post_norm = gains(shape.width);
            if (shape.sub_norms) p.sub_norm = gains(shape.width), p.ffn_sub_norm = gains(shape.ffn);
            if (shape.qk_norm) p.q_norm = gains(shape.head_width()), p.k_norm = gains(shape.head_width());
            layers.push_back(std::move(p));
        }
        final_norm = gains(shape.width);
        const int64_t half = shape.head_width() / 2;
        for (int64_t t = 0; t < positions; t++)
            for (int64_t i = 0; i < half; i++) {
                const double angle = (double)t * pow(10000.0, -2.0 * (double)i / (double)shape.head_width());
                cos.push_back((float)::cos(angle)), sin.push_back((float)::sin(angle));
            }
        embedding = rows();
        if (!tied) head = rows();
    }

    static std::unique_ptr<uint8_t[]> pack(int64_t n, int64_t k) {
        const int64_t width = (k + 3) / 4;
        std::unique_ptr<uint8_t[]> out(new uint8_t[(size_t)(n * width)]);
        for (int64_t i = 0; i < n * width; i++) {
            out[(size_t)i] = 0;
            for (int64_t j = 0; j < 4; j++) {
                const int64_t at = i % width * 4 + j;
                out[(size_t)i] |= (uint8_t)((at < k ? draw(0, 2) : 1) << 2 * j);
            }
        }
        return out;
    }

    Rows rows() const {
        Rows out;
        const int64_t n = shape.vocab * shape.width;
        for (int64_t i = 0; i < n; i++) {
            if (table_store == Store::i8) {
                out.data.push_back((uint8_t)draw(-127, 127));
                continue;
            }
            const float v = draw_float(-1, 1);
            uint8_t bytes[4];
            memcpy(bytes, &v, 4);
            const int first = table_store == Store::bf16 ? 2 : 0;  // bf16 is the upper half
            out.data.insert(out.data.end(), bytes + first, bytes + 4);
        }
        if (table_store == Store::i8)
            for (int64_t i = 0; i < shape.vocab; i++) out.scales.push_back(draw_float(0.001f, 0.01f));
        return out;
    }

    void fill(Embedding& to, const Rows& from) const {
        to.data = from.data.data();
        to.store = table_store;
        to.scales = from.scales.empty() ? nullptr : from.scales.data();
    }

    // f32 as `head` leaves it as the table is.
    std::unique_ptr<Engine> engine(const Isa& isa, int threads, Store head_store) const {
        auto out = std::make_unique<Engine>(shape, isa, threads);
        out->rotary(cos.data(), sin.data(), positions);
        const int64_t d = shape.width, kv = shape.kv_width(), f = shape.ffn;
        for (int64_t i = 0; i < shape.layers; i++) {
            const Parts& p = layers[(size_t)i];
            Layer& l = out->layers[(size_t)i];
            const auto at = [&](int part) { return p.packed[(size_t)part].get(); };
            l.qkv = Matrix(isa, {{at(0), d}, {at(1), kv}, {at(2), kv}}, d, out->pool);
            l.output = Matrix(isa, {{at(3), d}}, d, out->pool);
            l.gate_up = Matrix(isa, {{at(4), f}, {at(5), f}}, d, out->pool);
            l.down = Matrix(isa, {{at(6), d}}, f, out->pool);
            const auto scale = [&](std::vector<float>& to, int part, int64_t n) {
                to.insert(to.end(), (size_t)n, p.scales[(size_t)part]);
            };
            scale(l.qkv_scale, 0, d), scale(l.qkv_scale, 1, kv), scale(l.qkv_scale, 2, kv);
            scale(l.output_scale, 3, d), scale(l.gate_up_scale, 4, f), scale(l.gate_up_scale, 5, f);
            scale(l.down_scale, 6, d);
            l.input_norm = p.input_norm, l.post_norm = p.post_norm, l.sub_norm = p.sub_norm;
            l.ffn_sub_norm = p.ffn_sub_norm, l.q_norm = p.q_norm, l.k_norm = p.k_norm;
        }
        out->final_norm = final_norm;
        fill(out->embedding, embedding);
        fill(out->head, tied ? embedding : head);
        if (head_store != Store::f32) {
            Embedding whole;
            fill(whole, tied ? embedding : head);
            out->quantize(whole, head_store, out->head);
        }
        return out;
    }
};

const char* name_of(Store store) {
    return store == Store::f32 ? "fp32" : store == Store::bf16 ? "bf16" : store == Store::i8 ? "int8" : "int4";
}

struct Case {
    const Isa* isa;
    const Model* model;
    Store cache, head;
    int threads = 1;
};

bool same(const Case& c, const char* what, const float* expected, const float* got, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (!(expected[i] == got[i])) {  // NaN differs, too
            printf("%s, %d threads, cache %s, head %s, width %ld, heads %ld/%ld: %s differ at %ld: got %.9g, expected %.9g\n",
                   c.isa->name, c.threads, name_of(c.cache), name_of(c.head), (long)c.model->shape.width,
                   (long)c.model->shape.heads, (long)c.model->shape.kv_heads, what, (long)i, got[i], expected[i]);
            return false;
        }
    return true;
}

void forward(Session& session, const int64_t* ids, int64_t tokens, bool every, float* logits) {
    std::vector<Entry> entries;
    for (int64_t i = 0; i < session.batch; i++) entries.push_back({i, ids + i * tokens, tokens, every});
    session.forward(entries.data(), (int64_t)entries.size(), logits);
}

// All logits [B][T][V] of a batch from an empty cache.
std::vector<float> scores(Engine& engine, const Case& c, const std::vector<int64_t>& ids, int64_t batch) {
    const int64_t tokens = (int64_t)ids.size() / batch;
    Session session(engine, batch, tokens, c.cache);
    std::vector<float> out(ids.size() * (size_t)engine.shape.vocab, NAN);
    forward(session, ids.data(), tokens, true, out.data());
    return out;
}

// Sequences that go on by different lengths, some of them not at all, some of them falling back, in one session.
bool ragged(const Case& c, Engine& engine, const std::vector<int64_t>& ids, int64_t batch, const std::vector<float>& truth) {
    const int64_t tokens = (int64_t)ids.size() / batch, vocab = engine.shape.vocab;
    Session session(engine, batch, tokens, c.cache);
    for (int turn = 0; turn < 8; turn++) {
        std::vector<Entry> entries;
        std::vector<int64_t> rows;  // of the truth, in the order they are wanted
        for (int64_t i = batch; i-- > 0;) {
            if (draw(0, 3) == 0) session.truncate(i, draw(0, session.position(i)));
            const int64_t start = session.position(i), room = tokens - start;
            const int64_t length = std::min(room, draw(0, 2) ? draw(0, 2) : draw(0, tokens));
            if (!length) continue;
            entries.push_back({i, ids.data() + i * tokens + start, length, draw(0, 1) > 0});
            for (int64_t t = entries.back().every ? 0 : length - 1; t < length; t++) rows.push_back(i * tokens + start + t);
        }
        std::vector<float> logits(rows.size() * (size_t)vocab, NAN);
        session.forward(entries.data(), (int64_t)entries.size(), logits.data());
        for (size_t r = 0; r < rows.size(); r++)
            if (!same(c, "ragged entries", truth.data() + rows[r] * vocab, logits.data() + r * (size_t)vocab, vocab)) return false;
    }
    return true;
}

// `truth` are the scores of one thread; everything else has to equal them.
bool check(const Case& c, const std::vector<int64_t>& ids, int64_t batch, const std::vector<float>& truth) {
    const int64_t tokens = (int64_t)ids.size() / batch, vocab = c.model->shape.vocab;
    const auto engine = c.model->engine(*c.isa, c.threads, c.head);
    if (!same(c, "scores", truth.data(), scores(*engine, c, ids, batch).data(), (int64_t)truth.size())) return false;

    // Single sequences.
    const int64_t b = draw(0, batch - 1);
    const std::vector<int64_t> row(ids.begin() + b * tokens, ids.begin() + (b + 1) * tokens);
    const float* expected = truth.data() + b * tokens * vocab;
    if (!same(c, "single scores", expected, scores(*engine, c, row, 1).data(), tokens * vocab)) return false;

    // Pieces, single tokens among them, in a session with room left over.
    Session session(*engine, 1, tokens + draw(0, 20) < c.model->positions ? tokens : c.model->positions, c.cache);
    std::vector<float> last((size_t)vocab);
    for (int64_t start = 0; start < tokens;) {
        const int64_t length = draw(0, 1) ? 1 : draw(1, tokens - start);
        for (auto& v : last) v = NAN;
        forward(session, row.data() + start, length, false, last.data());
        start += length;
        if (session.position(0) != start || !same(c, "pieces", expected + (start - 1) * vocab, last.data(), vocab)) return false;
    }

    // A batch token by token, behind a prefill.
    const int64_t prompt = draw(1, tokens), steps = tokens - prompt < 6 ? tokens - prompt : 6;
    Session together(*engine, batch, tokens, c.cache);
    std::vector<int64_t> part;
    std::vector<float> logits((size_t)(batch * vocab), NAN);
    for (int64_t i = 0; i < batch; i++) part.insert(part.end(), ids.begin() + i * tokens, ids.begin() + i * tokens + prompt);
    forward(together, part.data(), prompt, false, logits.data());
    for (int64_t step = 0;; step++) {
        for (int64_t i = 0; i < batch; i++)
            if (!same(c, "batches", truth.data() + (i * tokens + prompt + step - 1) * vocab, logits.data() + i * vocab, vocab))
                return false;
        if (step == steps) return ragged(c, *engine, ids, batch, truth);
        part.clear();
        for (int64_t i = 0; i < batch; i++) part.push_back(ids[(size_t)(i * tokens + prompt + step)]);
        forward(together, part.data(), 1, false, logits.data());
    }
}

Model random_model(int64_t positions) {
    const int64_t kv_heads = draw(1, 3), heads = kv_heads * draw(1, 4), half = draw(1, 20);
    const Shape shape{draw(2, 150),   heads * half * 2, draw(1, 150),    draw(1, 2),      heads, kv_heads,
                      draw(0, 1) > 0, draw(0, 1) > 0,   draw(0, 1) > 0, 1e-5f};
    return Model(shape, draw(0, 2) == 0 ? Store::f32 : draw(0, 1) ? Store::bf16 : Store::i8, draw(0, 1) > 0, positions);
}

bool run(const Isa& isa, const Model& model, int64_t batch, int64_t tokens, int& ran) {
    std::vector<int64_t> ids((size_t)(batch * tokens));
    for (auto& id : ids) id = draw(0, model.shape.vocab - 1);
    for (Store cache : {Store::f32, Store::bf16, Store::i8}) {
        const Store heads[] = {Store::f32, Store::i8, Store::i4};  // as the file has it, and both that are made at load
        Case c{&isa, &model, cache, heads[draw(0, 2)]};
        const auto truth = scores(*model.engine(isa, 1, c.head), c, ids, batch);
        for (float v : truth)
            if (!isfinite(v)) return same(c, "finite scores", &v, &v, 1);
        for (c.threads = 1; c.threads <= 3; c.threads++, ran++)
            if (!check(c, ids, batch, truth)) return false;
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? atoi(argv[1]) : 20;
    const uint64_t seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : std::random_device{}();
    rng.seed(seed);
    printf("seed %llu\n", (unsigned long long)seed);
    for (int i = 0; i < kChoiceCount; i++) {
        const Isa& isa = *kChoices[i].isa;
        if (const char* reason = kChoices[i].why_not()) {
            printf("%-8s not run: %s\n", isa.name, reason);
            continue;
        }
        int ran = 0;
        for (int round = 0; round < rounds; round++)
            if (!run(isa, random_model(80), draw(1, 5), draw(1, 60), ran)) return 1;
        // One head over three spans of positions, which threads share out; and so many heads that each takes its own.
        const Shape single{11, 6, 5, 1, 1, 1, true, true, true, 1e-5f}, many{11, 16, 5, 1, 8, 4, false, false, false, 1e-5f};
        if (!run(isa, Model(single, Store::bf16, true, 560), 1, draw(513, 560), ran)) return 1;
        if (!run(isa, Model(many, Store::bf16, true, 300), 9, draw(257, 300), ran)) return 1;
        printf("%-8s %d models gave the same bits in pieces, batches and threads\n", isa.name, ran);
    }
    return 0;
}
