// AVX-512 (F, BW, DQ, VL, VBMI, VNNI): sixteen rows in a register.
namespace {

constexpr int kLanes = 16;
using I32 = __m512i;
using F32 = __m512;
using Bytes = __m512i;  // four unsigned codes of each of sixteen rows
using Table = __m512i;  // 16 bytes, four times

ALWAYS_INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
ALWAYS_INLINE Table load_table(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// vpermb looks at six bits of an index; the table repeats, so bits 4 and up need no masking
ALWAYS_INLINE Bytes lookup_low(Table t, Bytes v) { return _mm512_permutexvar_epi8(v, t); }
ALWAYS_INLINE Bytes lookup_high(Table t, Bytes v) { return _mm512_permutexvar_epi8(_mm512_srli_epi16(v, 4), t); }
ALWAYS_INLINE Bytes mask(Bytes v, int m) { return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(m))); }
ALWAYS_INLINE Bytes shift_right(Bytes v, int n) { return _mm512_srli_epi16(v, n); }
ALWAYS_INLINE Bytes shift_left(Bytes v, int n) { return _mm512_slli_epi16(v, n); }
ALWAYS_INLINE Bytes merge(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
ALWAYS_INLINE Bytes flip_sign(Bytes v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
ALWAYS_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

// Sums of code x digit over up to eight groups of four columns. Small: codes below 64.
template <bool Small>
struct Dot {
    I32 sum;
    ALWAYS_INLINE void start(int32_t value) { sum = _mm512_set1_epi32(value); }
    ALWAYS_INLINE void add(Bytes codes, const int8_t* digits) {
        int32_t four;
        __builtin_memcpy(&four, digits, 4);
        sum = _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(four));
    }
    ALWAYS_INLINE void flush() {}
    ALWAYS_INLINE I32 total() const { return sum; }
};

ALWAYS_INLINE I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
ALWAYS_INLINE I32 times128(I32 a) { return _mm512_slli_epi32(a, 7); }
ALWAYS_INLINE F32 to_float(I32 a) { return _mm512_cvtepi32_ps(a); }
ALWAYS_INLINE F32 zero() { return _mm512_setzero_ps(); }
ALWAYS_INLINE F32 splat(float a) { return _mm512_set1_ps(a); }
ALWAYS_INLINE F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
ALWAYS_INLINE F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
ALWAYS_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
ALWAYS_INLINE F32 load_float(const float* p) { return _mm512_loadu_ps(p); }
ALWAYS_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a); }
ALWAYS_INLINE float reduce(F32 a) { return _mm512_reduce_add_ps(a); }
ALWAYS_INLINE F32 load_half(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ALWAYS_INLINE F32 load_bf16(const uint8_t* p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
ALWAYS_INLINE F32 load_int8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// ue8m0 to float; code 0 is the subnormal 2^-127
ALWAYS_INLINE F32 load_ue8m0(const uint8_t* p) {
    const I32 c = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(c, 23), _mm512_set1_epi32(0x00400000)));
}
// Sixteen e4m3 bytes to float / 256: the bits as fp16 have an exponent bias of 15 instead of 7.
ALWAYS_INLINE F32 load_e4m3(const uint8_t* p) {
    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    return _mm512_cvtph_ps(half);
}
ALWAYS_INLINE uint64_t read_bytes(const uint8_t* p, int64_t n, int64_t streams) {
    I32 s[4] = {};
    if (streams == 1) {
        for (int64_t i = 0; i + 256 <= n; i += 256)
            for (int k = 0; k < 4; ++k) s[k] = _mm512_add_epi64(s[k], _mm512_loadu_si512(p + i + 64 * k));
    } else {
        const int64_t part = n / 4 / 64 * 64;
        for (int64_t i = 0; i < part; i += 64)
            for (int k = 0; k < 4; ++k) s[k] = _mm512_add_epi64(s[k], _mm512_loadu_si512(p + k * part + i));
    }
    return static_cast<uint64_t>(
        _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_add_epi64(s[0], s[1]), _mm512_add_epi64(s[2], s[3]))));
}

}  // namespace
