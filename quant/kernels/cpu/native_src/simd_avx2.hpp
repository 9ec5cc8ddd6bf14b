// AVX2 with FMA and F16C: eight rows in a register, a quarter of a panel.
namespace {

constexpr int kLanes = 8;
constexpr int kSumRegisters = 12;  // that can hold sums
constexpr int kMostSums = 8;       // of a row, in one kernel: digits x tokens
constexpr int kMostFp8Tokens = 4;
constexpr int kDenseRows = 4, kDenseTokens = 2;  // plain rows and tokens, multiplied together
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
// Into the second-level cache: the first level can wait for few lines at once, and its own reads need those places.
ALWAYS_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

// Sixteen bytes of each of eight rows: out[j] has of every row, lane by lane, the bytes from 4j on.
ALWAYS_INLINE void load_dwords(const uint8_t* const* rows, int64_t at, Bytes (&out)[4]) {
    const auto four = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + at)); };
    __m256i z[4];
    for (int i = 0; i < 4; ++i) z[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(four(i)), four(4 + i), 1);
    const __m256i a = _mm256_unpacklo_epi32(z[0], z[1]), b = _mm256_unpacklo_epi32(z[2], z[3]);
    const __m256i c = _mm256_unpackhi_epi32(z[0], z[1]), d = _mm256_unpackhi_epi32(z[2], z[3]);
    out[0] = _mm256_unpacklo_epi64(a, b), out[1] = _mm256_unpackhi_epi64(a, b);
    out[2] = _mm256_unpacklo_epi64(c, d), out[3] = _mm256_unpackhi_epi64(c, d);
}
// Codes of keys as factors of index scores: twice an e2m1 value, shifted by what is a lane's own, and kIndexOffset.
struct KeyCodes {
    // twice the value, and 12: the shift raises by 12 << shift
    alignas(16) static constexpr uint8_t kRaised[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    struct Shift {
        I32 by, raise;
        ALWAYS_INLINE explicit Shift(const int32_t* of_lanes)
            : by(load_bytes(reinterpret_cast<const uint8_t*>(of_lanes))) {
            const I32 raised = _mm256_sllv_epi32(_mm256_set1_epi32(12), by);
            raise = _mm256_mullo_epi32(_mm256_sub_epi32(_mm256_set1_epi32(kIndexOffset), raised),
                                       _mm256_set1_epi32(0x01010101));
        }
    };
    Table table;
    ALWAYS_INLINE KeyCodes() : table(load_table(kRaised)) {}
    ALWAYS_INLINE Bytes low(Bytes v, const Shift& shift) const { return raised(lookup_low(table, v), shift); }
    ALWAYS_INLINE Bytes high(Bytes v, const Shift& shift) const { return raised(lookup_high(table, v), shift); }

  private:
    ALWAYS_INLINE static Bytes raised(Bytes v, const Shift& shift) {
        return _mm256_add_epi8(_mm256_sllv_epi32(v, shift.by), shift.raise);
    }
};
ALWAYS_INLINE void store_codes(uint8_t* p, Bytes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

// Four digits in every lane.
ALWAYS_INLINE I32 four_digits(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

// A sum that stays where it is. The compiler would compute many products first and add them later; there are as many
// sums as registers hold, so that all those products would go through memory.
ALWAYS_INLINE I32 in_order(I32 sum) {
    asm volatile("" : "+x"(sum));
    return sum;
}

// Sums of code x digit over the groups of four columns of a block, from a start value. Products are gathered in 16 bits
// for as many groups as cannot overflow them, then widened; where not even four groups fit, each product is widened at
// once. Where all eight fit, so does the start value, one half in each half of a lane: an offset is at most the largest
// code, and even.
template <int LargestCode, int LargestDigit>
struct Dot {
    static constexpr int kFitting = 32767 / (2 * LargestCode * LargestDigit);
    static constexpr int kEvery = kFitting >= 8 ? 8 : kFitting >= 4 ? 4 : 1;
    static_assert(kFitting >= 1);
    I32 sum, pairs;
    static constexpr bool kPrepares = kEvery == 8;
    ALWAYS_INLINE static int32_t prepare(int32_t start) {
        return static_cast<int32_t>(0x10001u * static_cast<uint16_t>(start / 2));
    }
    ALWAYS_INLINE void begin(int32_t prepared) {
        (kEvery < 8 ? sum : pairs) = _mm256_set1_epi32(prepared);
        if (kEvery < 8) pairs = _mm256_setzero_si256();
    }
    ALWAYS_INLINE void add(Bytes codes, I32 digits) {
        const I32 products = _mm256_maddubs_epi16(codes, digits);
        if (kEvery == 1) {
            sum = in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1))));
        } else {
            pairs = in_order(_mm256_add_epi16(pairs, products));
        }
    }
    ALWAYS_INLINE void after(int group) {
        if (kEvery != 4 || (group + 1) % kEvery) return;
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        pairs = _mm256_setzero_si256();
    }
    // the sum times 1 or 128
    ALWAYS_INLINE I32 end(int weight) const {
        if (kEvery == 8) return _mm256_madd_epi16(pairs, _mm256_set1_epi16(static_cast<short>(weight)));
        return weight == 128 ? _mm256_slli_epi32(sum, 7) : sum;
    }
};

ALWAYS_INLINE I32 add(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
ALWAYS_INLINE I32 sub(I32 a, I32 b) { return _mm256_sub_epi32(a, b); }
ALWAYS_INLINE I32 larger(I32 a, I32 b) { return _mm256_max_epi32(a, b); }
ALWAYS_INLINE I32 splat_int(int32_t a) { return _mm256_set1_epi32(a); }
ALWAYS_INLINE I32 shift_left_7(I32 a) { return _mm256_slli_epi32(a, 7); }
ALWAYS_INLINE I32 shift_right_7(I32 a) { return _mm256_srai_epi32(a, 7); }
ALWAYS_INLINE int32_t reduce(I32 a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
ALWAYS_INLINE int32_t largest(I32 a) {
    __m128i s = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
ALWAYS_INLINE void store_bytes(int8_t* p, I32 a) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
ALWAYS_INLINE I32 round_to_int(F32 a) { return _mm256_cvtps_epi32(a); }
ALWAYS_INLINE I32 magnitude_bits(F32 a) {
    return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff));
}
ALWAYS_INLINE F32 to_float(I32 a) { return _mm256_cvtepi32_ps(a); }
ALWAYS_INLINE F32 zero() { return _mm256_setzero_ps(); }
ALWAYS_INLINE F32 splat(float a) { return _mm256_set1_ps(a); }
ALWAYS_INLINE F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
ALWAYS_INLINE F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
ALWAYS_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
ALWAYS_INLINE F32 load_float(const float* p) { return _mm256_loadu_ps(p); }
// Keeps the compiler from loading a value again for each use.
ALWAYS_INLINE F32 in_register(F32 a) {
    asm("" : "+x"(a));
    return a;
}
ALWAYS_INLINE void store(float* p, F32 a) { _mm256_storeu_ps(p, a); }
ALWAYS_INLINE float reduce(F32 a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// The same of four vectors.
ALWAYS_INLINE void reduce_four(const F32 (&v)[4], float* to) {
    for (int i = 0; i < 4; ++i) to[i] = reduce(v[i]);
}
// The sums of four vectors' lanes, side by side.
ALWAYS_INLINE void store_sums(float* to, const F32 (&v)[4]) {
    const F32 first = add(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
    const F32 second = add(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
    const __m256d a = _mm256_castps_pd(first), b = _mm256_castps_pd(second);
    const F32 sums = add(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
ALWAYS_INLINE F32 load_half(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
ALWAYS_INLINE F32 load_bf16(const uint8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
// Twice eight columns: the even ones and the odd ones.
ALWAYS_INLINE void load_bf16_pairs(const uint8_t* p, F32 (&w)[2]) {
    const I32 v = load_bytes(p);
    w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    w[1] = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(-65536)));
}
ALWAYS_INLINE void load_pairs(const float* p, F32 (&x)[2]) {
    const F32 a = load_float(p), b = load_float(p + 8);
    const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88)),
                  odd = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
    x[0] = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
    x[1] = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
}
ALWAYS_INLINE void store_pairs(float* p, const F32 (&x)[2]) {
    const F32 low = _mm256_unpacklo_ps(x[0], x[1]), high = _mm256_unpackhi_ps(x[0], x[1]);
    store(p, _mm256_permute2f128_ps(low, high, 0x20));
    store(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
}
ALWAYS_INLINE F32 load_int8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// Nibbles of eight bytes as floats.
ALWAYS_INLINE F32 load_low_nibbles(const uint8_t* p) {
    const I32 v = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(15)));
}
ALWAYS_INLINE F32 load_high_nibbles(const uint8_t* p) {
    const I32 v = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtepi32_ps(_mm256_srli_epi32(v, 4));
}
// Sixteen e2m1 codes of eight bytes, low nibbles first, as twice their values.
ALWAYS_INLINE void load_twice_e2m1(const uint8_t* p, F32 (&w)[2]) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i codes = _mm_and_si128(_mm_unpacklo_epi8(v, _mm_srli_epi16(v, 4)), _mm_set1_epi8(15));
    const __m128i values =
        _mm_shuffle_epi8(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), codes);
    w[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values));
    w[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(values, values)));
}
// ue8m0 to float; code 0 is the subnormal 2^-127
ALWAYS_INLINE F32 load_ue8m0(const uint8_t* p) {
    const I32 c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(c, 23), _mm256_set1_epi32(0x00400000)));
}
// Eight e4m3 bytes to float, by way of fp16, whose exponent bias is 15 instead of 7.
ALWAYS_INLINE F32 load_e4m3(const uint8_t* p) {
    const __m128i words = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i half = _mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16(static_cast<short>(0xbf80)));
    return mul(_mm256_cvtph_ps(half), splat(256.0f));
}
// A pair of columns (64 bytes, as fp8_place in kernels.hpp orders them) to floats / 256.
struct E4m3 {
    // rows 4v..4v+3 and 16+4v..16+4v+3 of both columns in w[.][0], those of v+1 in w[.][1]
    template <int R>
    ALWAYS_INLINE void decode(const uint8_t* codes, int v, F32 (*w)[R]) const {
        static_assert(R == 1 || R == 2);
        // by way of fp16, as above; the second column is the upper byte of each word
        const __m256i words =
            R == 2 ? load_bytes(codes + 16 * v)
                   : _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * v)));
        const __m256i columns[2] = {_mm256_slli_epi16(words, 8), words};
        for (int k = 0; k < 2; ++k) {
            const __m256i half =
                _mm256_and_si256(_mm256_srai_epi16(columns[k], 1), _mm256_set1_epi16(static_cast<short>(0xbf80)));
            w[k][0] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
            if constexpr (R == 2) w[k][1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
        }
    }
    ALWAYS_INLINE static void store_rows(float* out, int v, F32 y) {
        y = mul(y, splat(256.0f));
        _mm_storeu_ps(out + 4 * v, _mm256_castps256_ps128(y));
        _mm_storeu_ps(out + 16 + 4 * v, _mm256_extractf128_ps(y, 1));
    }
};

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
