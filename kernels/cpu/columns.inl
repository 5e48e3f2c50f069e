// Transposing activations for `block`, 16 tokens x 16 weights at a time; for the x86 files.

// 16 rows of 16 bytes -> 16 columns, by four rounds of interleaving.
static inline void transpose16(__m128i* r) {
    for (int round = 0; round < 4; round++) {
        __m128i t[16];
        for (int i = 0; i < 8; i++) {
            t[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]);
            t[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
        }
        for (int i = 0; i < 16; i++) r[i] = t[i];
    }
}

static void columns(const int8_t* q, int64_t q_bytes, int tokens, int size, int64_t begin, int64_t end, int16_t* out) {
    for (int t0 = 0; t0 < size; t0 += 16) {
        const int real = tokens - t0 < 0 ? 0 : tokens - t0 < 16 ? tokens - t0 : 16;
        int64_t k = begin;
        for (; k + 16 <= end; k += 16) {
            __m128i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = i < real ? _mm_loadu_si128((const __m128i*)(q + (t0 + i) * q_bytes + k)) : _mm_setzero_si128();
            transpose16(r);
            for (int i = 0; i < 16; i++)
                _mm256_storeu_si256((__m256i*)(out + (k + i) * size + t0), _mm256_cvtepi8_epi16(r[i]));
        }
        for (; k < end; k++)
            for (int i = 0; i < 16; i++) out[k * size + t0 + i] = i < real ? q[(t0 + i) * q_bytes + k] : (int16_t)0;
    }
}
