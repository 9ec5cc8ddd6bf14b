// AVX2 with FMA and F16C: eight rows in a register, so a panel is computed in two halves.
namespace {

constexpr int kLanes = 8;
using I32 = __m256i;
using F32 = __m256;
using Bytes = __m256i;  // four unsigned codes of each of eight rows
using Table = __m256i;  // 16 bytes, twice

ALWAYS_INLINE Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ALWAYS_INLINE Table load_table(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
ALWAYS_INLINE Bytes mask(Bytes v, int m) { return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(m))); }
ALWAYS_INLINE Bytes shift_right(Bytes v, int n) { return _mm256_srli_epi16(v, n); }
ALWAYS_INLINE Bytes shift_left(Bytes v, int n) { return _mm256_slli_epi16(v, n); }
ALWAYS_INLINE Bytes merge(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
ALWAYS_INLINE Bytes flip_sign(Bytes v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }
ALWAYS_INLINE Bytes lookup_low(Table t, Bytes v) { return _mm256_shuffle_epi8(t, mask(v, 15)); }
ALWAYS_INLINE Bytes lookup_high(Table t, Bytes v) { return _mm256_shuffle_epi8(t, mask(shift_right(v, 4), 15)); }
ALWAYS_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

// Sums of code x digit. Small (codes below 64): products are gathered in 16 bits, which four groups
// cannot overflow (63 * 64 * 2 * 4, or 24 * 127 * 2 * 4 with one digit), then widened by flush().
// Others: one product pair fits 16 bits (255 * 64 * 2) and is widened at once.
template <bool Small>
struct Dot {
    I32 sum, pairs;
    ALWAYS_INLINE void start(int32_t value) {
        sum = _mm256_set1_epi32(value);
        pairs = _mm256_setzero_si256();
    }
    ALWAYS_INLINE void add(Bytes codes, const int8_t* digits) {
        int32_t four;
        __builtin_memcpy(&four, digits, 4);
        const I32 product = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(four));
        if (Small) {
            pairs = _mm256_add_epi16(pairs, product);
        } else {
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(product, _mm256_set1_epi16(1)));
        }
    }
    ALWAYS_INLINE void flush() {
        if (!Small) return;
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        pairs = _mm256_setzero_si256();
    }
    ALWAYS_INLINE I32 total() const { return sum; }
};

ALWAYS_INLINE I32 add(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
ALWAYS_INLINE I32 times128(I32 a) { return _mm256_slli_epi32(a, 7); }
ALWAYS_INLINE F32 to_float(I32 a) { return _mm256_cvtepi32_ps(a); }
ALWAYS_INLINE F32 zero() { return _mm256_setzero_ps(); }
ALWAYS_INLINE F32 splat(float a) { return _mm256_set1_ps(a); }
ALWAYS_INLINE F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
ALWAYS_INLINE F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
ALWAYS_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
ALWAYS_INLINE F32 load_float(const float* p) { return _mm256_loadu_ps(p); }
ALWAYS_INLINE void store(float* p, F32 a) { _mm256_storeu_ps(p, a); }
ALWAYS_INLINE float reduce(F32 a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
ALWAYS_INLINE F32 load_half(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
ALWAYS_INLINE F32 load_bf16(const uint8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
ALWAYS_INLINE F32 load_int8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// ue8m0 to float; code 0 is the subnormal 2^-127
ALWAYS_INLINE F32 load_ue8m0(const uint8_t* p) {
    const I32 c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(c, 23), _mm256_set1_epi32(0x00400000)));
}
// Eight e4m3 bytes to float / 256: the bits as fp16 have an exponent bias of 15 instead of 7.
ALWAYS_INLINE F32 load_e4m3(const uint8_t* p) {
    const __m128i words = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i half = _mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16(static_cast<short>(0xbf80)));
    return _mm256_cvtph_ps(half);
}
ALWAYS_INLINE uint64_t read_bytes(const uint8_t* p, int64_t n, int64_t streams) {
    I32 s[4] = {};
    if (streams == 1) {
        for (int64_t i = 0; i + 128 <= n; i += 128)
            for (int k = 0; k < 4; ++k) s[k] = _mm256_add_epi64(s[k], load_bytes(p + i + 32 * k));
    } else {
        const int64_t part = n / 4 / 32 * 32;
        for (int64_t i = 0; i < part; i += 32)
            for (int k = 0; k < 4; ++k) s[k] = _mm256_add_epi64(s[k], load_bytes(p + k * part + i));
    }
    const I32 sum = _mm256_add_epi64(_mm256_add_epi64(s[0], s[1]), _mm256_add_epi64(s[2], s[3]));
    uint64_t parts[4];
    __builtin_memcpy(parts, &sum, 32);
    return parts[0] + parts[1] + parts[2] + parts[3];
}

}  // namespace
