// Every instruction set's products against a plain loop, on random and extreme inputs; built with sanitizers by
// `make sanitize`. Prints what it ran; exits 1 at the first difference.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "isa.h"
#include "linear.h"
#include "pool.h"

using namespace bitnet;

namespace {

std::mt19937_64 rng;

int64_t draw(int64_t low, int64_t high) { return low + (int64_t)(rng() % (uint64_t)(high - low + 1)); }

struct Case {
    int64_t m, n, k;
    int weights;      // 0 random, else all of this code + 2: 1 -> -1, 2 -> 0, 3 -> +1
    int activations;  // 0 random, else all of this value
};

// Exact allocations, so that a read past the end is one the sanitizer sees.
bool check(const Isa& isa, Pool& pool, const Case& c) {
    const int64_t width = (c.k + 3) / 4;
    std::unique_ptr<uint8_t[]> packed(new uint8_t[c.n * width]);
    std::vector<int8_t> codes(c.n * c.k), q(c.m * c.k);
    memset(packed.get(), 0, c.n * width);
    for (int64_t n = 0; n < c.n; n++)
        for (int64_t j = 0; j < width * 4; j++) {
            int code = j >= c.k ? 1 : c.weights ? c.weights - 1 : (int)draw(0, 2);
            if (j < c.k) codes[n * c.k + j] = (int8_t)(code - 1);
            packed[n * width + j / 4] |= (uint8_t)(code << 2 * (j % 4));
        }
    for (auto& v : q) v = c.activations ? (int8_t)c.activations : (int8_t)draw(-127, 127);

    const int64_t cut = draw(0, c.n);  // two parts, one below the other
    Matrix matrix(isa, {{packed.get(), cut}, {packed.get() + cut * width, c.n - cut}}, c.k, pool);
    if (!matrix.valid) return false;
    Activations x(isa, c.m, c.k);
    x.shape(c.m, c.k);
    for (int64_t m = 0; m < c.m; m++) {
        memset(x.row(m), 0x55, matrix.padded_k());
        memcpy(x.row(m), q.data() + m * c.k, c.k);
        x.clear_tail(m);
        x.inv_scale()[m] = (float)draw(1, 1000) / 16;
    }
    std::vector<int32_t> got(c.m * c.n, 0x55555555);
    std::vector<float> scaled(c.m * c.n, 0.25f), row_scale(c.n);
    for (auto& s : row_scale) s = (float)draw(1, 1000) / 256;
    std::vector<Product> products(pool.threads());
    for (auto& product : products) product.reserve(isa, c.m);
    pool.run([&](Team& team) {
        x.ready(team);
        team.barrier();
        products[team.thread].run(team, matrix, x, {.sums = got.data(), .stride = c.n});
        products[team.thread].run(
            team, matrix, x, {.y = scaled.data(), .stride = c.n, .row_scale = row_scale.data(), .add = true});
    });
    for (int64_t m = 0; m < c.m; m++)
        for (int64_t n = 0; n < c.n; n++) {
            int32_t sum = 0;
            for (int64_t k = 0; k < c.k; k++) sum += codes[n * c.k + k] * q[m * c.k + k];
            const float y = 0.25f + (float)sum * (row_scale[n] / x.inv_scale()[m]);
            if (got[m * c.n + n] != sum || scaled[m * c.n + n] != y) {
                printf("%s M%ld-N%ld-K%ld, %d threads, weights %d, activations %d: at token %ld, row %ld got %d and %g, "
                       "expected %d and %g\n", isa.name, (long)c.m, (long)c.n, (long)c.k, pool.threads(), c.weights,
                       c.activations, (long)m, (long)n, got[m * c.n + n], scaled[m * c.n + n], sum, y);
                return false;
            }
        }
    return true;
}

bool refuses_code_3(const Isa& isa, Pool& pool) {
    const int64_t n = draw(1, 200), k = draw(1, 100), width = (k + 3) / 4;
    std::vector<uint8_t> packed(n * width, 0x55);
    packed[draw(0, n - 1) * width + draw(0, k - 1) / 4] |= 0x03;
    return !Matrix(isa, {{packed.data(), n}}, k, pool).valid;
}

bool refuses_threads(int threads) {
    try {
        Pool pool(threads);
    } catch (const std::invalid_argument&) {
        return true;
    }
    printf("a team of %d threads was not refused\n", threads);
    return false;
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? atoi(argv[1]) : 300;
    const uint64_t seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : std::random_device{}();
    rng.seed(seed);
    printf("seed %llu\n", (unsigned long long)seed);
    for (const int threads : {0, -1, kMaxThreads + 1, INT32_MAX})
        if (!refuses_threads(threads)) return 1;
    for (int i = 0; i < kChoiceCount; i++) {
        const Isa& isa = *kChoices[i].isa;
        if (const char* reason = kChoices[i].why_not()) {
            printf("%-8s not run: %s\n", isa.name, reason);
            continue;
        }
        int ran = 0;
        for (const int threads : {1, 2, 3, 64}) {  // 64: more than cores and panels, so that nearly all only meet
            Pool pool(threads);
            for (int round = 0; round < (threads < 64 ? rounds : 1 + rounds / 8); round++) {
                Case c{draw(1, round % 4 ? 6 : 150), draw(1, 300), draw(1, 300), 0, 0};
                if (round % 8 == 1) c.weights = (int)draw(1, 3);
                if (round % 8 == 2) c.activations = draw(0, 1) ? 127 : -127;
                if (round % 8 == 3) c.weights = draw(0, 1) ? 1 : 3, c.activations = draw(0, 1) ? 127 : -127;
                if (!check(isa, pool, c)) return 1;
                ran++;
            }
            if (threads == 64) continue;
            for (int64_t m : {1, 5, 33, 64})  // the largest sums there are, and K far beyond what int16 can hold
                if (!check(isa, pool, {m, 33, draw(20000, 30000), 3, 127})) return 1;
            if (!refuses_code_3(isa, pool)) {
                printf("%s: took a code 3\n", isa.name);
                return 1;
            }
            ran += 5;
        }
        printf("%-8s %d products equal the reference\n", isa.name, ran);
    }
    return 0;
}
