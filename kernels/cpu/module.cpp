// The Python module bitnet.kernels._cpu: prepared weights, engines and sessions. Every array is checked here for type,
// order, device, alignment and size. The GIL is released while threads work, and locks are taken without it.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "engine.h"
#include "isa.h"
#include "linear.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitnet {
namespace {

template <typename T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

void expect(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

std::string shape_text(int64_t a, int64_t b) { return "[" + std::to_string(a) + ", " + std::to_string(b) + "]"; }

// numpy arrays of floats may start at an odd byte.
template <typename A> void expect_natural(const A& array) {
    expect(reinterpret_cast<uintptr_t>(array.data()) % (array.itemsize() ? array.itemsize() : 1) == 0,
           "array: got memory that is not aligned to its elements of " + std::to_string(array.itemsize()) + " bytes");
}

const Isa& isa_named(const std::string& name) {
    for (int i = 0; i < kChoiceCount; i++)
        if (name == kChoices[i].isa->name) {
            const char* reason = kChoices[i].why_not();
            expect(!reason, name + ": " + (reason ? reason : ""));
            return *kChoices[i].isa;
        }
    throw std::invalid_argument("instruction set: got '" + name + "', which this build does not have");
}

std::vector<std::tuple<std::string, std::string, bool, std::optional<std::string>>> choices() {
    std::vector<std::tuple<std::string, std::string, bool, std::optional<std::string>>> out;
    for (int i = 0; i < kChoiceCount; i++) {
        const Choice& c = kChoices[i];
        const char* reason = c.why_not();
        out.emplace_back(c.isa->name, c.isa->summary, c.isa->multiplies,
                         reason ? std::optional<std::string>(reason) : std::nullopt);
    }
    return out;
}

PackedRows packed_rows(const Array<const uint8_t, 2>& packed, int64_t k) {
    expect(k >= 1 && k < kMaxK, "K: got " + std::to_string(k) + ", expected 1 to " + std::to_string(kMaxK - 1));
    expect((int64_t)packed.shape(1) == (k + 3) / 4,
           "packed weights: got " + shape_text(packed.shape(0), packed.shape(1)) + ", expected rows of " +
               std::to_string((k + 3) / 4) + " bytes for K = " + std::to_string(k));
    return {packed.data(), (int64_t)packed.shape(0)};
}

Matrix checked(Matrix matrix) {
    expect(matrix.valid, "packed weights: got code 3; only 0, 1 and 2 exist: the data is damaged");
    return matrix;
}

// One team for all products outside engines, with as many threads as the last caller asked for.
std::mutex team_lock;
std::unique_ptr<Pool> team_of_products;

Pool& products_pool(int threads) {
    if (!team_of_products || team_of_products->threads() != threads) {
        team_of_products.reset();
        team_of_products = std::make_unique<Pool>(threads);
    }
    return *team_of_products;
}

// The buffers of those products, allocated again for another instruction set or a larger product.
struct Workspace {
    const Isa* isa = nullptr;
    int64_t tokens = 0, k = 0;
    Activations activations;
    std::vector<Product> products;
} workspace;

// Precedes the words of prepared weights: bytes alone would not say which product they are for.
struct alignas(64) Header {
    char format[16], isa[16];
    int64_t n, k;
    char unused[16];  // named, so that every byte is initialised and can be compared
};
static_assert(std::has_unique_object_representations_v<Header>);
constexpr char kFormat[16] = "bitnet ternary";

Header header_of(const Isa& isa, int64_t n, int64_t k) {
    Header header{};
    memcpy(header.format, kFormat, sizeof header.format);
    strncpy(header.isa, isa.name, sizeof header.isa - 1);
    header.n = n, header.k = k;
    return header;
}

int64_t prepared_bytes(const std::string& isa, int64_t n, int64_t k) {
    expect(n >= 1 && n <= INT32_MAX && k >= 1 && k < kMaxK,
           "weights: got " + shape_text(n, k) + ", expected 1 or more rows, and columns up to " + std::to_string(kMaxK - 1));
    return (int64_t)sizeof(Header) + Matrix::bytes(isa_named(isa), n, k);
}

void expect_aligned(const void* data) {
    expect(reinterpret_cast<uintptr_t>(data) % 64 == 0, "prepared weights: expected memory aligned to 64 bytes");
}

// Packed [N][ceil(k / 4)] -> the layout of an instruction set.
void prepare(const std::string& isa, const Array<const uint8_t, 2>& packed, int64_t k, const Array<uint8_t, 1>& out,
             int threads) {
    const Isa& chosen = isa_named(isa);
    const PackedRows rows = packed_rows(packed, k);
    const int64_t bytes = prepared_bytes(isa, rows.n, k);
    expect((int64_t)out.shape(0) == bytes, "prepared weights: got " + std::to_string(out.shape(0)) + " bytes, expected " +
                                               std::to_string(bytes));
    expect_aligned(out.data());
    nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(team_lock);
    expect(Matrix::rearrange(chosen, {rows}, k, products_pool(threads), out.data() + sizeof(Header)),
           "packed weights: got code 3; only 0, 1 and 2 exist: the data is damaged");
    const Header header = header_of(chosen, rows.n, k);
    memcpy(out.data(), &header, sizeof header);
}

// q [M][K] int8 x prepared weights [N][K] -> out [M][N] int32.
void matmul(const std::string& isa, const Array<const uint8_t, 1>& prepared, int64_t n, int64_t k,
            const Array<const int8_t, 2>& q, const Array<int32_t, 2>& out, int threads) {
    const Isa& chosen = isa_named(isa);
    const int64_t m = (int64_t)q.shape(0);
    const Header header = header_of(chosen, n, k);
    expect_aligned(prepared.data());
    expect((int64_t)prepared.shape(0) == prepared_bytes(isa, n, k) && memcmp(prepared.data(), &header, sizeof header) == 0,
           "prepared weights: got " + std::to_string(prepared.shape(0)) + " bytes that were not prepared for " + isa + " " +
               shape_text(n, k));
    expect((int64_t)q.shape(1) == k,
           "activations: got " + shape_text(m, q.shape(1)) + ", expected rows of " + std::to_string(k));
    expect((int64_t)out.shape(0) == m && (int64_t)out.shape(1) == n,
           "out: got " + shape_text(out.shape(0), out.shape(1)) + ", expected " + shape_text(m, n));
    expect_natural(out);
    const int8_t* from = q.data();
    int32_t* to = out.data();
    nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(team_lock);
    Pool& pool = products_pool(threads);
    const Matrix matrix(chosen, n, k, prepared.data() + sizeof(Header));
    // Tokens at a time: at most 512, and fewer of very long rows, so that the buffers stay below some dozen megabytes.
    const int64_t step = std::clamp<int64_t>((int64_t{8} << 20) / k, 16, 512);
    Workspace& w = workspace;
    const int64_t most = std::min(m, step);
    if (w.isa != &chosen || most > w.tokens || k > w.k || (w.tokens * w.k > most * k && w.tokens * w.k > 512 * 16384)) {
        w.isa = nullptr;  // until all is allocated: after a failure the sizes must not be believed
        w.activations = Activations();
        w.activations = Activations(chosen, most, k);
        w.isa = &chosen, w.tokens = most, w.k = k;
    }
    w.products.resize(std::max(w.products.size(), (size_t)threads));
    for (Product& product : w.products) product.reserve(chosen, most);
    for (int64_t start = 0; start < m; start += step) {
        const int64_t count = std::min(step, m - start);
        w.activations.shape(count, k);
        pool.run([&](Team& team) {
            for (int64_t i = team.begin(count); i < team.end(count); i++) {
                memcpy(w.activations.row(i), from + (start + i) * k, (size_t)k);
                w.activations.clear_tail(i);
                w.activations.inv_scale()[i] = 1;
            }
            team.barrier();
            w.activations.ready(team);
            team.barrier();
            w.products[team.thread].run(team, matrix, w.activations, {.sums = to + start * n, .stride = n});
        });
    }
}

double measure_bandwidth(int64_t bytes, int threads, int repeats) {
    expect(bytes >= 64 && repeats >= 1, "read_bandwidth: got nothing to read");
    nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(team_lock);
    Pool& pool = products_pool(threads);
    Buffer memory(bytes);
    memset(memory.data(), 1, (size_t)memory.bytes());
    std::vector<double> rates;
    for (int i = 0; i < repeats; i++) rates.push_back(read_bandwidth(pool, memory));
    std::sort(rates.begin(), rates.end());
    return rates[rates.size() / 2];
}

Store store_named(const std::string& name) {
    if (name == "fp32") return Store::f32;
    if (name == "bf16") return Store::bf16;
    expect(name == "int8", "storage: got '" + name + "', expected fp32, bf16 or int8");
    return Store::i8;
}

using Gain = std::optional<Array<const float, 1>>;

// The engine, and references to the arrays of the model file that it reads.
class PyEngine {
  public:
    PyEngine(const std::string& isa, int threads, int64_t vocab, int64_t width, int64_t ffn, int64_t layers, int64_t heads,
             int64_t kv_heads, bool squared_relu, bool sub_norms, bool qk_norm, float eps,
             const Array<const float, 2>& cos, const Array<const float, 2>& sin) {
        expect(vocab >= 1 && width >= 1 && ffn >= 1 && layers >= 1 && heads >= 1 && kv_heads >= 1 &&
                   width % heads == 0 && heads % kv_heads == 0 && width / heads % 2 == 0 && width < kMaxK && ffn < kMaxK,
               "shape: got sizes that no model has, expected 1 or more of each, whole heads of even width");
        const Shape shape{vocab, width, ffn, layers, heads, kv_heads, squared_relu, sub_norms, qk_norm, eps};
        engine = std::make_shared<Engine>(shape, isa_named(isa), threads);
        rotary(cos, sin);
    }

    // cos, sin [positions][E / 2], for as many positions as the longest session will have.
    void rotary(const Array<const float, 2>& cos, const Array<const float, 2>& sin) {
        const int64_t positions = (int64_t)cos.shape(0), half = engine->shape.head_width() / 2;
        expect_natural(cos), expect_natural(sin);
        for (const auto* table : {&cos, &sin})
            expect((int64_t)table->shape(0) == positions && (int64_t)table->shape(1) == half,
                   "rotary table: got " + shape_text(table->shape(0), table->shape(1)) + ", expected " +
                       shape_text(positions, half));
        expect(positions >= engine->positions(), "rotary table: got " + std::to_string(positions) +
                                                     " positions, expected at least the " +
                                                     std::to_string(engine->positions()) + " there are");
        const float *c = cos.data(), *s = sin.data();
        nb::gil_scoped_release release;
        engine->rotary(c, s, positions);
    }

    // projections: packed weights and scale of each, in the order q, k, v, o, gate, up, down.
    void layer(int64_t index, const std::vector<std::pair<Array<const uint8_t, 2>, float>>& projections,
               const Array<const float, 1>& input_norm, const Array<const float, 1>& post_norm, const Gain& sub_norm,
               const Gain& ffn_sub_norm, const Gain& q_norm, const Gain& k_norm) {
        const Shape& s = engine->shape;
        expect(index >= 0 && index < s.layers, "layer: got " + std::to_string(index) + ", expected 0 to " + std::to_string(s.layers - 1));
        expect(projections.size() == 7, "layer: got " + std::to_string(projections.size()) + " projections, expected seven");
        const int64_t rows[7] = {s.width, s.kv_width(), s.kv_width(), s.width, s.ffn, s.ffn, s.width};
        for (int i = 0; i < 7; i++)
            expect((int64_t)projections[i].first.shape(0) == rows[i], "projection " + std::to_string(i) + ": got " +
                                                                    std::to_string(projections[i].first.shape(0)) +
                                                                    " rows, expected " + std::to_string(rows[i]));
        Layer layer;  // given to the engine when complete
        layer.input_norm = gain(input_norm, s.width), layer.post_norm = gain(post_norm, s.width);
        layer.sub_norm = gain(sub_norm, s.width, s.sub_norms), layer.ffn_sub_norm = gain(ffn_sub_norm, s.ffn, s.sub_norms);
        layer.q_norm = gain(q_norm, s.head_width(), s.qk_norm), layer.k_norm = gain(k_norm, s.head_width(), s.qk_norm);
        const auto fill = [&](Matrix& matrix, std::vector<float>& scale, int first, int last, int64_t k) {
            std::vector<PackedRows> packed;
            for (int i = first; i <= last; i++) {
                packed.push_back(packed_rows(projections[i].first, k));
                scale.insert(scale.end(), (size_t)rows[i], projections[i].second);
            }
            nb::gil_scoped_release release;
            const std::lock_guard<std::mutex> lock(engine->busy);
            matrix = checked(Matrix(engine->isa, packed, k, engine->pool));
        };
        fill(layer.qkv, layer.qkv_scale, 0, 2, s.width);
        fill(layer.output, layer.output_scale, 3, 3, s.width);
        fill(layer.gate_up, layer.gate_up_scale, 4, 5, s.width);
        fill(layer.down, layer.down_scale, 6, 6, s.ffn);
        nb::gil_scoped_release release;
        const std::lock_guard<std::mutex> lock(engine->busy);
        engine->layers[index] = std::move(layer);
    }

    // Embedding and head as the file holds them, bf16 as uint16 or int8 with one scale per row; head_bits: 0 (as in the
    // file), 8 or 4.
    void embeddings(const nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>& embedding, const Gain& embedding_scale,
                const nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>& head, const Gain& head_scale,
                const Array<const float, 1>& final_norm, int head_bits) {
        expect(head_bits == 0 || head_bits == 8 || head_bits == 4,
               "head_bits: got " + std::to_string(head_bits) + ", expected 0, 8 or 4");
        Embedding first = view(embedding, embedding_scale), last = view(head, head_scale);
        std::vector<float> norm = gain(final_norm, engine->shape.width);
        std::vector<nb::object> kept = {nb::cast(embedding), nb::cast(embedding_scale)};
        if (head_bits == 0 || (head_bits == 8 && last.store == Store::i8)) {
            kept.push_back(nb::cast(head));
            kept.push_back(nb::cast(head_scale));
        } else {
            Embedding small;
            nb::gil_scoped_release release;
            const std::lock_guard<std::mutex> lock(engine->busy);
            engine->quantize(last, head_bits == 4 ? Store::i4 : Store::i8, small);
            last = std::move(small);
        }
        {
            nb::gil_scoped_release release;
            const std::lock_guard<std::mutex> lock(engine->busy);
            engine->embedding = std::move(first), engine->head = std::move(last), engine->final_norm = std::move(norm);
        }
        kept_ = std::move(kept);
    }

    int64_t projection_bytes() const {
        int64_t total = 0;
        for (const Layer& l : engine->layers)
            for (const Matrix* m : {&l.qkv, &l.output, &l.gate_up, &l.down}) total += m->bytes();
        return total;
    }
    int64_t head_bytes() const {
        const Store store = engine->head.store;
        return engine->shape.vocab * (row_bytes(store, engine->shape.width) + (store == Store::i8 ? 4 : 0));
    }

    std::shared_ptr<Engine> engine;

  private:
    static std::vector<float> gain(const Array<const float, 1>& values, int64_t n) {
        expect_natural(values);
        expect((int64_t)values.shape(0) == n,
               "norm: got " + std::to_string(values.shape(0)) + " gains, expected " + std::to_string(n));
        return {values.data(), values.data() + n};
    }
    static std::vector<float> gain(const Gain& values, int64_t n, bool wanted) {
        expect(values.has_value() == wanted, wanted ? "norm: got none, expected one" : "norm: got one, expected none");
        return values ? gain(*values, n) : std::vector<float>();
    }
    Embedding view(const nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>& array, const Gain& scale) const {
        const Shape& s = engine->shape;
        expect((int64_t)array.shape(0) == s.vocab && (int64_t)array.shape(1) == s.width,
               "embedding: got " + shape_text(array.shape(0), array.shape(1)) + ", expected " + shape_text(s.vocab, s.width));
        expect_natural(array);
        Embedding out;
        out.data = static_cast<const uint8_t*>(array.data());
        if (array.dtype() == nb::dtype<uint16_t>()) {
            out.store = Store::bf16;
        } else if (array.dtype() == nb::dtype<float>()) {
            out.store = Store::f32;
        } else {
            expect(array.dtype() == nb::dtype<int8_t>(), "embedding: expected bf16 (as uint16), float32 or int8");
            if (scale) expect_natural(*scale);
            expect(scale && (int64_t)scale->shape(0) == s.vocab, "embedding: int8 needs one scale per row");
            out.store = Store::i8;
            out.scales = scale->data();
        }
        return out;
    }
    std::vector<nb::object> kept_;
};

class PySession {
  public:
    PySession(PyEngine& engine, int64_t batch, int64_t limit, const std::string& cache) : engine_(engine.engine) {
        expect(batch >= 1 && limit >= 1 && limit <= engine_->positions(),
               "session: got batch " + std::to_string(batch) + " and limit " + std::to_string(limit) +
                   ", expected 1 or more, and a " +
                   "limit within the " + std::to_string(engine_->positions()) + " positions of the rotary table");
        bool loaded = engine_->head.data != nullptr;
        for (const Layer& layer : engine_->layers) loaded &= layer.down.data != nullptr;
        expect(loaded, "session: the engine has no weights yet");
        session_ = std::make_unique<Session>(*engine_, batch, limit, store_named(cache));
    }

    // The same number of ids for every sequence, [B][T].
    void forward(const Array<const int64_t, 2>& ids, bool all, const Array<float, 2>& logits) {
        const int64_t batch = session_->batch, tokens = (int64_t)ids.shape(1);
        expect((int64_t)ids.shape(0) == batch && tokens >= 1,
               "ids: got " + shape_text(ids.shape(0), tokens) + ", expected [" + std::to_string(batch) + ", T]");
        expect_natural(ids);
        const std::vector<int64_t> own(ids.data(), ids.data() + batch * tokens);
        std::vector<Entry> entries;
        for (int64_t i = 0; i < batch; i++) entries.push_back({i, own.data() + i * tokens, tokens, all});
        run(entries, own, logits);
    }

    // Append the next `counts[i]` ids to sequence `sequences[i]`; logits of all of them if `every[i]`, else of the last.
    void extend(const std::vector<int64_t>& sequences, const std::vector<int64_t>& counts, const std::vector<bool>& every,
                const Array<const int64_t, 1>& ids, const Array<float, 2>& logits) {
        expect(!sequences.empty() && counts.size() == sequences.size() && every.size() == sequences.size(),
               "extend: expected a sequence, a count and a flag for each of one entry or more");
        expect_natural(ids);
        const std::vector<int64_t> own(ids.data(), ids.data() + ids.shape(0));
        std::vector<bool> seen((size_t)session_->batch);
        std::vector<Entry> entries;
        size_t used = 0;
        for (size_t i = 0; i < sequences.size(); i++) {
            known(sequences[i]);
            expect(!seen[(size_t)sequences[i]], "extend: got sequence " + std::to_string(sequences[i]) + " twice");
            seen[(size_t)sequences[i]] = true;
            expect(counts[i] >= 1 && counts[i] <= (int64_t)(own.size() - used),
                   "extend: got a count of " + std::to_string(counts[i]) + " with " + std::to_string(own.size() - used) +
                       " ids left, expected 1 or more, and as many ids as they count");
            entries.push_back({sequences[i], own.data() + used, counts[i], every[i]});
            used += (size_t)counts[i];
        }
        expect(used == own.size(), "extend: got " + std::to_string(own.size()) + " ids, expected " + std::to_string(used));
        run(entries, own, logits);
    }

    int64_t position(int64_t sequence) const {
        known(sequence);
        return session_->position(sequence);
    }

    void truncate(int64_t sequence, int64_t length) {
        known(sequence);
        nb::gil_scoped_release release;
        const std::lock_guard<std::mutex> lock(busy_);
        expect(length >= 0 && length <= session_->position(sequence),
               "truncate: got " + std::to_string(length) + ", expected 0 to " + std::to_string(session_->position(sequence)));
        session_->truncate(sequence, length);
    }

  private:
    void known(int64_t sequence) const {
        expect(sequence >= 0 && sequence < session_->batch, "sequence: got " + std::to_string(sequence) +
                                                                ", expected 0 to " + std::to_string(session_->batch - 1));
    }

    // `own`: a copy of the ids, because what was checked must not change while threads read it.
    void run(const std::vector<Entry>& entries, const std::vector<int64_t>& own, const Array<float, 2>& logits) {
        const int64_t vocab = engine_->shape.vocab;
        int64_t rows = 0;
        for (const Entry& entry : entries) rows += entry.every ? entry.tokens : 1;
        expect((int64_t)logits.shape(0) == rows && (int64_t)logits.shape(1) == vocab,
               "logits: got " + shape_text(logits.shape(0), logits.shape(1)) + ", expected " + shape_text(rows, vocab));
        expect_natural(logits);
        for (const int64_t id : own)
            expect(id >= 0 && id < vocab, "ids: got " + std::to_string(id) + ", expected 0 to " + std::to_string(vocab - 1));
        float* to = logits.data();
        nb::gil_scoped_release release;
        const std::lock_guard<std::mutex> lock(busy_);
        for (const Entry& entry : entries)
            expect(session_->position(entry.sequence) + entry.tokens <= session_->limit,
                   "context is full: got " + std::to_string(entry.tokens) + " tokens after " +
                       std::to_string(session_->position(entry.sequence)) + ", expected at most " +
                       std::to_string(session_->limit) + " in all");
        session_->forward(entries.data(), (int64_t)entries.size(), to);
    }

    std::shared_ptr<Engine> engine_;
    std::unique_ptr<Session> session_;
    std::mutex busy_;
};

}  // namespace
}  // namespace bitnet

NB_MODULE(_cpu, m) {
    using namespace bitnet;
    m.doc() = "Products with packed ternary weights and forward passes of models on a CPU";
    m.attr("max_threads") = kMaxThreads;
    m.def("choices", &choices);
    m.def("prepared_bytes", &prepared_bytes, "isa"_a, "n"_a, "k"_a);
    m.def("prepare", &prepare, "isa"_a, "packed"_a.noconvert(), "k"_a, "out"_a.noconvert(), "threads"_a);
    m.def("matmul", &matmul, "isa"_a, "prepared"_a.noconvert(), "n"_a, "k"_a, "q"_a.noconvert(), "out"_a.noconvert(),
          "threads"_a);
    m.def("read_bandwidth", &measure_bandwidth, "bytes"_a, "threads"_a, "repeats"_a);
    nb::class_<PyEngine>(m, "Engine")
        .def(nb::init<const std::string&, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool, bool, float,
                      const Array<const float, 2>&, const Array<const float, 2>&>(),
             nb::kw_only(), "isa"_a, "threads"_a, "vocab"_a, "width"_a, "ffn"_a, "layers"_a, "heads"_a, "kv_heads"_a,
             "squared_relu"_a, "sub_norms"_a, "qk_norm"_a, "eps"_a, "cos"_a.noconvert(), "sin"_a.noconvert())
        .def("rotary", &PyEngine::rotary, "cos"_a.noconvert(), "sin"_a.noconvert())
        .def("layer", &PyEngine::layer, "index"_a, "projections"_a.noconvert(), "input_norm"_a.noconvert(),
             "post_norm"_a.noconvert(), "sub_norm"_a.noconvert().none(), "ffn_sub_norm"_a.noconvert().none(),
             "q_norm"_a.noconvert().none(), "k_norm"_a.noconvert().none())
        .def("embeddings", &PyEngine::embeddings, "embedding"_a.noconvert(), "embedding_scale"_a.noconvert().none(),
             "head"_a.noconvert(), "head_scale"_a.noconvert().none(), "final_norm"_a.noconvert(), "head_bits"_a)
        .def_prop_ro("projection_bytes", &PyEngine::projection_bytes)
        .def_prop_ro("head_bytes", &PyEngine::head_bytes);
    nb::class_<PySession>(m, "Session")
        .def(nb::init<PyEngine&, int64_t, int64_t, const std::string&>(), nb::keep_alive<1, 2>(), "engine"_a, "batch"_a,
             "limit"_a, "cache"_a)
        .def("forward", &PySession::forward, "ids"_a.noconvert(), "all"_a, "logits"_a.noconvert())
        .def("extend", &PySession::extend, "sequences"_a, "counts"_a, "every"_a, "ids"_a.noconvert(), "logits"_a.noconvert())
        .def("position", &PySession::position, "sequence"_a)
        .def("truncate", &PySession::truncate, "sequence"_a, "length"_a);
}
