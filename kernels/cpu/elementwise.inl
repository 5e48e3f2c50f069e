// The float work around the products, in vectors of W floats. Each instruction set's file includes this after defining W,
// FMA(a, b, c), the conversions FROM_U16(p), FROM_U8(p) and FROM_I8(p) to int32, and TO_I8(p, v) from it. (gcc's own
// conversions of bytes take ten times as long as the one or two instructions that exist for them.)
// Compiled with -ffp-contract=off: a sum that is fused on one machine and not on another would differ.
// Only `attend` and `dots` fuse, with FMA(a, b, c): nothing after them is compared bit by bit.

typedef float F __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(4 * W), aligned(4), may_alias));

constexpr int H = W / 2;  // doubles in a register
typedef double D __attribute__((vector_size(8 * H), aligned(8), may_alias));
typedef float HF __attribute__((vector_size(4 * H), aligned(4), may_alias));

static inline F splat(float x) { return F{} + x; }
static inline F load(const float* p) { return *(const F*)p; }
static inline void store(float* p, F v) { *(F*)p = v; }

static inline F maximum(F a, F b) { return a > b ? a : b; }
static inline F absolute(F v) { return (F)((I)v & 0x7fffffff); }

static inline float sum_of(F v) {
    float s = 0;
    for (int i = 0; i < W; i++) s += v[i];
    return s;
}
static inline float max_of(F v) {
    float m = v[0];
    for (int i = 1; i < W; i++) m = v[i] > m ? v[i] : m;
    return m;
}

// Adding and subtracting 1.5 * 2^23 rounds half to even, for |v| < 2^22.
static inline F round_even(F v) { return (v + 12582912.0f) - 12582912.0f; }

template <Store S> static inline F widen(const uint8_t* p, int64_t i) {
    if (S == Store::f32) return load((const float*)p + i);
    if (S == Store::bf16) return (F)(FROM_U16(p + 2 * i) << 16);
    return __builtin_convertvector(FROM_I8(p + i), F);
}
template <Store S> static inline float widen_one(const uint8_t* p, int64_t i) {
    if (S == Store::f32) return ((const float*)p)[i];
    if (S == Store::bf16) {
        union { uint32_t bits; float value; } u = {(uint32_t)((const uint16_t*)p)[i] << 16};
        return u.value;
    }
    return (float)((const int8_t*)p)[i];
}

// e^v for v <= 0 (softmax, sigmoid): 2^n * p(f), v = (n + f) ln 2, |f| <= 1/2; relative error below 2e-7.
static inline F exponential(F v) {
    v = maximum(v, splat(-87.0f));
    F n = round_even(v * 1.44269504f);
    F r = (v - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts (Cody and Waite)
    F p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (F)((I)p + (__builtin_convertvector(n, I) << 23));
}

// The mean of squares is summed in fp64. The last bit of an fp32 sum depends on the order of its terms, and would
// occasionally flip the rounding of an activation from one engine to another.
static void rms_norm(const float* x, const float* gain, int64_t n, float eps, float* y) {
    D s0 = {}, s1 = {};
    int64_t i = 0;
    for (; i + 2 * H <= n; i += 2 * H) {
        D a = __builtin_convertvector(*(const HF*)(x + i), D), b = __builtin_convertvector(*(const HF*)(x + i + H), D);
        s0 += a * a, s1 += b * b;
    }
    s0 += s1;
    double total = 0;
    for (int j = 0; j < H; j++) total += s0[j];
    for (; i < n; i++) total += (double)x[i] * x[i];
    const float r = 1.0f / __builtin_sqrtf((float)(total / (double)n) + eps);
    for (i = 0; i + W <= n; i += W) store(y + i, load(x + i) * r * load(gain + i));
    for (; i < n; i++) y[i] = x[i] * r * gain[i];
}

static float quantize(const float* x, int64_t n, int8_t* q) {
    F m = splat(1e-5f);
    int64_t i = 0;
    for (; i + W <= n; i += W) m = maximum(absolute(load(x + i)), m);
    float top = max_of(m);
    for (; i < n; i++) {
        float a = __builtin_fabsf(x[i]);
        top = a > top ? a : top;
    }
    float inv = (1.0f / top) * 127.0f;
    for (i = 0; i + W <= n; i += W)
        TO_I8(q + i, __builtin_convertvector(round_even(load(x + i) * inv), I));
    for (; i < n; i++) q[i] = (int8_t)((x[i] * inv + 12582912.0f) - 12582912.0f);
    return inv;
}

static void gate(const float* g, const float* up, int64_t n, bool squared_relu, float* y) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        F v = load(g + i), u = load(up + i);
        if (squared_relu) {
            F r = maximum(v, F{});
            store(y + i, r * r * u);
        } else {  // v * sigmoid(v), from e^-|v| so that nothing overflows
            F e = exponential(-absolute(v)), s = 1.0f / (1.0f + e);
            store(y + i, v * (v < 0.0f ? e * s : s) * u);
        }
    }
    if (i == n) return;
    float tail[3 * W] = {};
    for (int64_t j = i; j < n; j++) tail[j - i] = g[j], tail[W + j - i] = up[j];
    gate(tail, tail + W, W, squared_relu, tail + 2 * W);
    for (int64_t j = i; j < n; j++) y[j] = tail[2 * W + j - i];
}

static void scale(const int32_t* sums, int64_t stride, int64_t n, const float* row_scale, float inv_scale, bool add,
                  float* y) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        I sum;
        if (stride == 1) {
            sum = *(const I*)(sums + i);
        } else {
            for (int j = 0; j < W; j++) sum[j] = sums[(i + j) * stride];
        }
        F v = __builtin_convertvector(sum, F) * (load(row_scale + i) / inv_scale);
        store(y + i, add ? load(y + i) + v : v);
    }
    for (; i < n; i++) {
        float v = (float)sums[i * stride] * (row_scale[i] / inv_scale);
        y[i] = add ? y[i] + v : v;
    }
}

// ---- attention: scores of 16 positions at a time, four queries on each converted key and value

template <Store S> static void attend_as(const AttentionTask& t) {
    constexpr int J = kLanes / W;  // vectors in a block of keys
    const int64_t padded = (t.width + kLanes - 1) / kLanes * kLanes;
    const int64_t bytes = S == Store::f32 ? 4 : S == Store::bf16 ? 2 : 1;
    alignas(64) float scores[4][kSpan];
    for (int q0 = 0; q0 < t.queries; q0 += 4) {
        const int count = t.queries - q0 < 4 ? t.queries - q0 : 4;
        const float* q[4];
        int64_t last = t.start;  // no query of this group attends further
        for (int j = 0; j < 4; j++) {
            int k = q0 + (j < count ? j : 0);
            q[j] = t.q + (int64_t)k * t.width;
            if (t.visible[k] > last) last = t.visible[k];
        }
        last = last < t.end ? last : t.end;
        const int64_t n = last - t.start, blocks = (n + kLanes - 1) / kLanes;
        for (int64_t b = 0; b < blocks; b++) {
            const uint8_t* keys = t.keys + (t.start / kLanes + b) * t.width * kLanes * bytes;
            for (int v = 0; v < J; v++) {
                F s0 = {}, s1 = {}, s2 = {}, s3 = {};
                for (int e = 0; e < t.width; e++) {
                    F k = widen<S>(keys, e * kLanes + v * W);
                    s0 = FMA(k, splat(q[0][e]), s0), s1 = FMA(k, splat(q[1][e]), s1);
                    s2 = FMA(k, splat(q[2][e]), s2), s3 = FMA(k, splat(q[3][e]), s3);
                }
                if (S == Store::i8) {
                    F f = load(t.key_scales + t.start + b * kLanes + v * W);
                    s0 *= f, s1 *= f, s2 *= f, s3 *= f;
                }
                const int64_t at = b * kLanes + v * W;
                store(scores[0] + at, s0), store(scores[1] + at, s1);
                store(scores[2] + at, s2), store(scores[3] + at, s3);
            }
        }
        for (int j = 0; j < 4; j++) {  // softmax over what each query sees; 0 after it
            int64_t seen = j < count ? t.visible[q0 + j] - t.start : 0;
            seen = seen < 0 ? 0 : seen < n ? seen : n;
            for (int64_t i = seen; i < blocks * kLanes; i++) scores[j][i] = -__builtin_inff();
            if (j >= count) {
                for (int64_t i = 0; i < blocks * kLanes; i++) scores[j][i] = 0;
                continue;
            }
            F m = splat(-__builtin_inff()), total = {};
            for (int64_t i = 0; i < blocks * kLanes; i += W) m = maximum(load(scores[j] + i), m);
            const float top = max_of(m);
            t.highest[q0 + j] = top;
            for (int64_t i = 0; i < blocks * kLanes; i += W) {
                F s = load(scores[j] + i);
                F p = seen ? exponential(s - top) : F{};
                p = s == -__builtin_inff() ? F{} : p;
                store(scores[j] + i, p);
                total += p;
            }
            t.total[q0 + j] = sum_of(total);
            if (S == Store::i8)
                for (int64_t i = 0; i < n; i++) scores[j][i] *= t.value_scales[t.start + i];
        }
        const uint8_t* values = t.values + t.start * padded * bytes;
        float* out = t.out + q0 * padded;
        for (int64_t e = 0; e < padded; e += 2 * W) {  // two vectors of four queries: eight sums in registers
            const int64_t f = e + W < padded ? e + W : e;
            F a0 = {}, a1 = {}, a2 = {}, a3 = {}, b0 = {}, b1 = {}, b2 = {}, b3 = {};
            for (int64_t i = 0; i < n; i++) {
                F a = widen<S>(values, i * padded + e), b = widen<S>(values, i * padded + f);
                F p0 = splat(scores[0][i]), p1 = splat(scores[1][i]), p2 = splat(scores[2][i]), p3 = splat(scores[3][i]);
                a0 = FMA(a, p0, a0), a1 = FMA(a, p1, a1), a2 = FMA(a, p2, a2), a3 = FMA(a, p3, a3);
                b0 = FMA(b, p0, b0), b1 = FMA(b, p1, b1), b2 = FMA(b, p2, b2), b3 = FMA(b, p3, b3);
            }
            const F a[4] = {a0, a1, a2, a3}, b[4] = {b0, b1, b2, b3};
            for (int j = 0; j < count; j++) store(out + j * padded + e, a[j]), store(out + j * padded + f, b[j]);
        }
    }
}

static void attend(const AttentionTask& task) {
    if (task.store == Store::f32) attend_as<Store::f32>(task);
    if (task.store == Store::bf16) attend_as<Store::bf16>(task);
    if (task.store == Store::i8) attend_as<Store::i8>(task);
}

// ---- head: rows of the embedding times up to four tokens

template <Store S, int R, int T>
static void dots_of(const uint8_t* embedding, const float* scales, int64_t k, const float* x, int64_t x_stride, float* out,
                    int64_t out_stride) {
    constexpr int64_t bytes = S == Store::f32 ? 4 : S == Store::bf16 ? 2 : 1;
    constexpr int kStep = 64 / bytes < W ? W : 64 / bytes;  // a cache line of the embedding
    F s[R][T] = {};
    int64_t i = 0;
    for (; i + kStep <= k; i += kStep) {
        // Prefetch the next rows: the hardware does not follow four short streams.
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(embedding + ((R + r) * k + i) * bytes, 0, 2);
            __builtin_prefetch(embedding + (r * k + i) * bytes + 512);
        }
#pragma GCC unroll 16
        for (int j = 0; j < kStep; j += W) {
            F v[T];
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) v[t] = load(x + t * x_stride + i + j);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                F w = widen<S>(embedding + r * k * bytes, i + j);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) s[r][t] = FMA(w, v[t], s[r][t]);
            }
        }
    }
    for (; i + W <= k; i += W)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            F w = widen<S>(embedding + r * k * bytes, i);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) s[r][t] = FMA(w, load(x + t * x_stride + i), s[r][t]);
        }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            float total = sum_of(s[r][t]);
            for (int64_t j = i; j < k; j++) total += widen_one<S>(embedding + r * k * bytes, j) * x[t * x_stride + j];
            out[t * out_stride + r] = S == Store::i8 ? total * scales[r] : total;
        }
}

// The same for i4: a group's products are summed and then scaled. NIBBLE(codes): the low four bits of each lane, minus 8.
template <int R, int T>
static void dots_of_groups(const uint8_t* embedding, int64_t k, const float* x, int64_t x_stride, float* out,
                           int64_t out_stride) {
    const int64_t bytes = row_bytes(Store::i4, k);
    F s[R][T] = {};
    for (int64_t i = 0; i < k; i += kGroup) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const uint8_t* group = embedding + r * bytes + i / kGroup * kGroupBytes;
            __builtin_prefetch(group + R * bytes, 0, 2);
            const F scale = splat(widen_one<Store::bf16>(group, 0));
            F sum[T] = {};
#pragma GCC unroll 8
            for (int j = 0; j < 16; j += W) {
                const I codes = FROM_U8(group + 2 + j);
                const F low = NIBBLE(codes), high = NIBBLE(codes >> 4);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    sum[t] = FMA(low, load(x + t * x_stride + i + j), sum[t]);
                    sum[t] = FMA(high, load(x + t * x_stride + i + 16 + j), sum[t]);
                }
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) s[r][t] = FMA(sum[t], scale, s[r][t]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) out[t * out_stride + r] = sum_of(s[r][t]);
}

template <Store S, int T>
static void dots_as(const uint8_t* embedding, const float* scales, int64_t rows, int64_t k, const float* x, int64_t x_stride,
                    float* out, int64_t out_stride) {
    const int64_t bytes = row_bytes(S, k);
    int64_t r = 0;
    if constexpr (S == Store::i4) {
        for (; r + 4 <= rows; r += 4) dots_of_groups<4, T>(embedding + r * bytes, k, x, x_stride, out + r, out_stride);
        for (; r < rows; r++) dots_of_groups<1, T>(embedding + r * bytes, k, x, x_stride, out + r, out_stride);
    } else {
        for (; r + 4 <= rows; r += 4)
            dots_of<S, 4, T>(embedding + r * bytes, scales + r, k, x, x_stride, out + r, out_stride);
        for (; r < rows; r++) dots_of<S, 1, T>(embedding + r * bytes, scales + r, k, x, x_stride, out + r, out_stride);
    }
}

template <Store S>
static void dots_for(const uint8_t* embedding, const float* scales, int64_t rows, int64_t k, const float* x, int64_t x_stride,
                     int tokens, float* out, int64_t out_stride) {
    if (tokens == 1) dots_as<S, 1>(embedding, scales, rows, k, x, x_stride, out, out_stride);
    if (tokens == 2) dots_as<S, 2>(embedding, scales, rows, k, x, x_stride, out, out_stride);
    if (tokens == 3) dots_as<S, 3>(embedding, scales, rows, k, x, x_stride, out, out_stride);
    if (tokens == 4) dots_as<S, 4>(embedding, scales, rows, k, x, x_stride, out, out_stride);
}

static void dots(const uint8_t* embedding, Store store, const float* scales, int64_t rows, int64_t k, const float* x,
                 int64_t x_stride, int tokens, float* out, int64_t out_stride) {
    if (store == Store::f32) dots_for<Store::f32>(embedding, scales, rows, k, x, x_stride, tokens, out, out_stride);
    if (store == Store::bf16) dots_for<Store::bf16>(embedding, scales, rows, k, x, x_stride, tokens, out, out_stride);
    if (store == Store::i8) dots_for<Store::i8>(embedding, scales, rows, k, x, x_stride, tokens, out, out_stride);
    if (store == Store::i4) dots_for<Store::i4>(embedding, scales, rows, k, x, x_stride, tokens, out, out_stride);
}
