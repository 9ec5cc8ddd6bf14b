// AVX-512 (F, BW, DQ, VL, VBMI, VNNI): sixteen rows in a register, half a panel.
namespace {

constexpr int kLanes = 16;
constexpr int kSumRegisters = 24;  // that can hold sums
constexpr int kMostSums = 16;      // of a row, in one kernel: digits x tokens
constexpr int kMostFp8Tokens = 4;
constexpr int kDenseRows = 4, kDenseTokens = 4;  // plain rows and tokens, multiplied together
using I32 = __m512i;
using F32 = __m512;
using Bytes = __m512i;  // four unsigned codes of each of sixteen rows
using Table = __m512i;  // 16 bytes, four times

ALWAYS_INLINE Bytes load_bytes(const uint8_t* p) {
    Bytes v = _mm512_loadu_si512(p);
    asm("" : "+v"(v));  // once: the compiler would load again for every use
    return v;
}
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
// Into the second-level cache: the first level can wait for few lines at once, and its own reads need those places.
ALWAYS_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

// Sixteen bytes of each of sixteen rows: out[j] has of every row, lane by lane, the bytes from 4j on.
ALWAYS_INLINE void load_dwords(const uint8_t* const* rows, int64_t at, Bytes (&out)[4]) {
    const auto four = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + at)); };
    __m512i z[4];
    for (int i = 0; i < 4; ++i) {
        z[i] = _mm512_castsi128_si512(four(i));
        z[i] = _mm512_mask_broadcast_i32x4(z[i], 0x00f0, four(4 + i));
        z[i] = _mm512_mask_broadcast_i32x4(z[i], 0x0f00, four(8 + i));
        z[i] = _mm512_mask_broadcast_i32x4(z[i], 0xf000, four(12 + i));
    }
    const __m512i a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpacklo_epi32(z[2], z[3]);
    const __m512i c = _mm512_unpackhi_epi32(z[0], z[1]), d = _mm512_unpackhi_epi32(z[2], z[3]);
    out[0] = _mm512_unpacklo_epi64(a, b), out[1] = _mm512_unpackhi_epi64(a, b);
    out[2] = _mm512_unpacklo_epi64(c, d), out[3] = _mm512_unpackhi_epi64(c, d);
}
// Codes of keys as factors of index scores: twice an e2m1 value, shifted by what is a lane's own, and kIndexOffset.
// vpermb chooses among 64: by a code, and by the shift above it.
struct KeyFactors {
    alignas(64) uint8_t of[64];
};

constexpr KeyFactors key_factors() {
    constexpr int kTwice[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    KeyFactors f{};
    for (int i = 0; i < 16 << kMostKeyShift; ++i) {
        const int factor = kTwice[i % 8] << i / 16;
        f.of[i] = static_cast<uint8_t>(kIndexOffset + (i % 16 < 8 ? factor : -factor));
    }
    return f;
}

constexpr KeyFactors kKeyFactors = key_factors();

struct KeyCodes {
    static_assert(kMostKeyShift <= 2);
    struct Shift {
        __m512i above;
        ALWAYS_INLINE explicit Shift(const int32_t* of_lanes)
            : above(_mm512_mullo_epi32(_mm512_loadu_si512(of_lanes), _mm512_set1_epi32(0x10101010))) {}
    };
    __m512i factors;
    ALWAYS_INLINE KeyCodes() : factors(load_bytes(kKeyFactors.of)) {}
    ALWAYS_INLINE Bytes low(Bytes v, const Shift& shift) const {
        // v & 15 | above
        return _mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(v, _mm512_set1_epi8(15), shift.above, 0xea), factors);
    }
    ALWAYS_INLINE Bytes high(Bytes v, const Shift& shift) const { return low(_mm512_srli_epi16(v, 4), shift); }
};
ALWAYS_INLINE void store_codes(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }

// Four digits in every lane.
ALWAYS_INLINE I32 four_digits(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

// Sums of code x digit over the groups of four columns of a block, from a start value.
template <int LargestCode, int LargestDigit>
struct Dot {
    I32 sum;
    static constexpr bool kPrepares = false;
    ALWAYS_INLINE static int32_t prepare(int32_t start) { return start; }
    ALWAYS_INLINE void begin(int32_t prepared) { sum = _mm512_set1_epi32(prepared); }
    ALWAYS_INLINE void add(Bytes codes, I32 digits) { sum = _mm512_dpbusd_epi32(sum, codes, digits); }
    ALWAYS_INLINE void after(int) {}
    // the sum times 1 or 128
    ALWAYS_INLINE I32 end(int weight) const { return weight == 128 ? _mm512_slli_epi32(sum, 7) : sum; }
};

ALWAYS_INLINE I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
ALWAYS_INLINE I32 sub(I32 a, I32 b) { return _mm512_sub_epi32(a, b); }
ALWAYS_INLINE I32 larger(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
ALWAYS_INLINE I32 splat_int(int32_t a) { return _mm512_set1_epi32(a); }
ALWAYS_INLINE I32 shift_left_7(I32 a) { return _mm512_slli_epi32(a, 7); }
ALWAYS_INLINE I32 shift_right_7(I32 a) { return _mm512_srai_epi32(a, 7); }
ALWAYS_INLINE int32_t reduce(I32 a) { return _mm512_reduce_add_epi32(a); }
ALWAYS_INLINE int32_t largest(I32 a) { return _mm512_reduce_max_epi32(a); }
ALWAYS_INLINE void store_bytes(int8_t* p, I32 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
ALWAYS_INLINE I32 round_to_int(F32 a) { return _mm512_cvtps_epi32(a); }
ALWAYS_INLINE I32 magnitude_bits(F32 a) {
    return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff));
}
ALWAYS_INLINE F32 to_float(I32 a) { return _mm512_cvtepi32_ps(a); }
ALWAYS_INLINE F32 zero() { return _mm512_setzero_ps(); }
ALWAYS_INLINE F32 splat(float a) { return _mm512_set1_ps(a); }
ALWAYS_INLINE F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
ALWAYS_INLINE F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
ALWAYS_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
ALWAYS_INLINE F32 load_float(const float* p) { return _mm512_loadu_ps(p); }
// Keeps the compiler from loading a value again for each use.
ALWAYS_INLINE F32 in_register(F32 a) {
    asm("" : "+v"(a));
    return a;
}
ALWAYS_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a); }
ALWAYS_INLINE float reduce(F32 a) { return _mm512_reduce_add_ps(a); }
// The sums of four vectors' lanes, each in the order of `reduce`.
ALWAYS_INLINE void reduce_four(const F32 (&v)[4], float* to) {
    const auto halves = [](F32 a, F32 b) {
        return add(_mm512_shuffle_f32x4(a, b, 0xee), _mm512_shuffle_f32x4(a, b, 0x44));
    };
    const F32 a = halves(v[0], v[1]), b = halves(v[2], v[3]);
    const F32 quarters = add(_mm512_shuffle_f32x4(a, b, 0xdd), _mm512_shuffle_f32x4(a, b, 0x88));
    const F32 pairs = add(quarters, _mm512_permute_ps(quarters, 0x4e));
    const F32 sums = add(pairs, _mm512_permute_ps(pairs, 0xb1));
    const I32 each = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(each, sums)));
}
// The sums of four vectors' lanes, side by side.
ALWAYS_INLINE void store_sums(float* to, const F32 (&v)[4]) {
    const F32 first = add(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const F32 second = add(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d a = _mm512_castps_pd(first), b = _mm512_castps_pd(second);
    const F32 sums = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
ALWAYS_INLINE F32 load_half(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ALWAYS_INLINE F32 load_bf16(const uint8_t* p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
// Twice sixteen columns: the even ones and the odd ones.
ALWAYS_INLINE void load_bf16_pairs(const uint8_t* p, F32 (&w)[2]) {
    const I32 v = _mm512_loadu_si512(p);
    w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    w[1] = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(-65536)));
}
ALWAYS_INLINE void load_pairs(const float* p, F32 (&x)[2]) {
    const I32 even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const F32 a = load_float(p), b = load_float(p + 16);
    x[0] = _mm512_permutex2var_ps(a, even, b);
    x[1] = _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
}
ALWAYS_INLINE void store_pairs(float* p, const F32 (&x)[2]) {
    const I32 low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    store(p, _mm512_permutex2var_ps(x[0], low, x[1]));
    store(p + 16, _mm512_permutex2var_ps(x[0], _mm512_add_epi32(low, _mm512_set1_epi32(8)), x[1]));
}
ALWAYS_INLINE F32 load_int8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// Nibbles of sixteen bytes as floats.
ALWAYS_INLINE F32 load_low_nibbles(const uint8_t* p) {
    const I32 v = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtepi32_ps(_mm512_and_si512(v, _mm512_set1_epi32(15)));
}
ALWAYS_INLINE F32 load_high_nibbles(const uint8_t* p) {
    const I32 v = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtepi32_ps(_mm512_srli_epi32(v, 4));
}
// Sixteen e2m1 codes of eight bytes, low nibbles first, as twice their values.
ALWAYS_INLINE void load_twice_e2m1(const uint8_t* p, F32 (&w)[1]) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i codes = _mm_unpacklo_epi8(v, _mm_srli_epi16(v, 4));
    const F32 values = _mm512_setr_ps(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
    w[0] = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), values);  // looks at four bits
}
// ue8m0 to float; code 0 is the subnormal 2^-127
ALWAYS_INLINE F32 load_ue8m0(const uint8_t* p) {
    const I32 c = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(c, 23), _mm512_set1_epi32(0x00400000)));
}
// Sixteen e4m3 bytes to float, by way of fp16, whose exponent bias is 15 instead of 7.
ALWAYS_INLINE F32 load_e4m3(const uint8_t* p) {
    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    return mul(_mm512_cvtph_ps(half), splat(256.0f));
}

// A pair of columns (64 bytes, as fp8_place in kernels.hpp orders them) to floats. A float of an e4m3 value has
// zeros in its lower half; its two upper bytes are looked up: vpermi2b knows 128 entries and ignores the sign.
struct E4m3Tables {
    alignas(64) uint8_t bytes[2][128];  // bits 16..23 and 24..30 of code c
};

constexpr E4m3Tables e4m3_tables() {
    E4m3Tables t{};
    for (int c = 0; c < 128; ++c) {
        int exponent = c >> 3, mantissa = c & 7;
        if (c == 0) {
            exponent = -120;
        } else if (exponent == 0) {  // subnormal: mantissa * 2^-9
            for (exponent = 1; mantissa < 8; --exponent) mantissa *= 2;
            mantissa -= 8;
        }
        const int bits = (exponent + 120) << 7 | mantissa << 4;
        t.bytes[0][c] = static_cast<uint8_t>(bits & 255);
        t.bytes[1][c] = static_cast<uint8_t>(bits >> 8);
    }
    return t;
}

constexpr E4m3Tables kE4m3 = e4m3_tables();

struct E4m3 {
    __m512i low[2], high[2];
    ALWAYS_INLINE E4m3() {
        for (int i = 0; i < 2; ++i) {
            low[i] = load_bytes(kE4m3.bytes[0] + 64 * i);
            high[i] = load_bytes(kE4m3.bytes[1] + 64 * i);
        }
    }
    // rows 0..15 and 16..31 of both columns
    template <int R>
    ALWAYS_INLINE void decode(const uint8_t* codes, int, F32 (*w)[R]) const {
        static_assert(R == 2);
        const __m512i v = load_bytes(codes);
        const __m512i lower = _mm512_permutex2var_epi8(low[0], v, low[1]);
        const __m512i upper = _mm512_permutex2var_epi8(high[0], v, high[1]);
        const __m512i with_sign = _mm512_ternarylogic_epi32(upper, v, _mm512_set1_epi8(-128), 0xf8);  // a | b & c
        const __m512i rows[2] = {_mm512_unpacklo_epi8(lower, with_sign), _mm512_unpackhi_epi8(lower, with_sign)};
        for (int r = 0; r < 2; ++r) {
            w[0][r] = _mm512_castsi512_ps(_mm512_slli_epi32(rows[r], 16));
            w[1][r] = _mm512_castsi512_ps(_mm512_and_si512(rows[r], _mm512_set1_epi32(-65536)));
        }
    }
    ALWAYS_INLINE static void store_rows(float* out, int v, F32 y) { store(out + v * kLanes, y); }
};

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
