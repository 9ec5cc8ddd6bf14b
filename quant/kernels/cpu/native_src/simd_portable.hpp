// Plain C++ over the compiler's vector types: any machine, sixteen rows in a vector, half a panel.
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int kLanes = 16;
constexpr int kSumRegisters = 1;  // that can hold sums
constexpr int kMostSums = 6;      // of a row, in one kernel: digits x tokens
constexpr int kMostFp8Tokens = 1;
constexpr int kDenseRows = 1, kDenseTokens = 4;  // plain rows and tokens, multiplied together

typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef int16_t I16 __attribute__((vector_size(64)));
typedef uint16_t Words __attribute__((vector_size(32)));
typedef uint8_t Octets __attribute__((vector_size(16)));
typedef int8_t SignedOctets __attribute__((vector_size(16)));
typedef float F32 __attribute__((vector_size(64)));
using Bytes = U32;  // four unsigned codes of each of sixteen rows
struct Table {
    uint8_t entries[16];
};

template <class Vector>
ALWAYS_INLINE Vector load_as(const uint8_t* p) {
    Vector v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
ALWAYS_INLINE U32 splat_bits(uint32_t v) { return U32{} + v; }
ALWAYS_INLINE Bytes load_bytes(const uint8_t* p) { return load_as<Bytes>(p); }
ALWAYS_INLINE Table load_table(const uint8_t* p) { return load_as<Table>(p); }
ALWAYS_INLINE Bytes mask(Bytes v, int m) { return v & splat_bits(0x01010101u * static_cast<uint32_t>(m)); }
ALWAYS_INLINE Bytes shift_right(Bytes v, int n) { return v >> n; }
ALWAYS_INLINE Bytes shift_left(Bytes v, int n) { return v << n; }
ALWAYS_INLINE Bytes merge(Bytes a, Bytes b) { return a | b; }
ALWAYS_INLINE Bytes flip_sign(Bytes v) { return v ^ splat_bits(0x80808080u); }
ALWAYS_INLINE Bytes lookup_low(const Table& t, Bytes v) {
    uint8_t bytes[64];
    v = mask(v, 15);
    __builtin_memcpy(bytes, &v, 64);
#if defined(__aarch64__)
    for (int i = 0; i < 64; i += 16) vst1q_u8(bytes + i, vqtbl1q_u8(vld1q_u8(t.entries), vld1q_u8(bytes + i)));
#else
    for (int i = 0; i < 64; ++i) bytes[i] = t.entries[bytes[i]];
#endif
    return load_bytes(bytes);
}
ALWAYS_INLINE Bytes lookup_high(const Table& t, Bytes v) { return lookup_low(t, shift_right(v, 4)); }
ALWAYS_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

// Sixteen bytes of each of sixteen rows: out[j] has of every row, lane by lane, the bytes from 4j on.
ALWAYS_INLINE void load_dwords(const uint8_t* const* rows, int64_t at, Bytes (&out)[4]) {
    uint32_t lanes[4][16];
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 4; ++j) __builtin_memcpy(&lanes[j][i], rows[i] + at + 4 * j, 4);
    __builtin_memcpy(out, lanes, sizeof lanes);
}
// Codes of keys as factors of index scores: twice an e2m1 value, shifted by what is a lane's own, and kIndexOffset.
struct KeyCodes {
    // twice the value, and 12: the shift raises by 12 << shift
    static constexpr Table kRaised = {{12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}};
    struct Shift {
        U32 by, raise;
        ALWAYS_INLINE explicit Shift(const int32_t* of_lanes)
            : by(load_bytes(reinterpret_cast<const uint8_t*>(of_lanes))) {
            raise = (splat_bits(kIndexOffset) - (splat_bits(12) << by)) * splat_bits(0x01010101u);
        }
    };
    ALWAYS_INLINE Bytes low(Bytes v, const Shift& shift) const { return raised(lookup_low(kRaised, v), shift); }
    ALWAYS_INLINE Bytes high(Bytes v, const Shift& shift) const { return raised(lookup_high(kRaised, v), shift); }

  private:
    // no sum is above 255
    ALWAYS_INLINE static Bytes raised(Bytes v, const Shift& shift) { return (v << shift.by) + shift.raise; }
};
ALWAYS_INLINE void store_codes(uint8_t* p, Bytes v) { __builtin_memcpy(p, &v, sizeof v); }

// Four digits as 16-bit factors of the even and the odd bytes of a lane.
struct Digits {
    I16 even, odd;
};
ALWAYS_INLINE Digits four_digits(const int8_t* p) {
    const auto both = [](int a, int b) {
        return reinterpret_cast<I16>(splat_bits(static_cast<uint32_t>(a & 0xffff) | static_cast<uint32_t>(b) << 16));
    };
    return {both(p[0], p[2]), both(p[1], p[3])};
}

// Sums of code x digit over the groups of four columns of a block, from a start value. Two products fit 16 bits
// (255 * 64 * 2).
template <int LargestCode, int LargestDigit>
struct Dot {
    static_assert(2 * LargestCode * LargestDigit <= 32767);
    I32 sum;
    static constexpr bool kPrepares = false;
    ALWAYS_INLINE static int32_t prepare(int32_t start) { return start; }
    ALWAYS_INLINE void begin(int32_t prepared) { sum = I32{} + prepared; }
    ALWAYS_INLINE void add(Bytes codes, const Digits& digits) {
        const I16 even = reinterpret_cast<I16>(codes & splat_bits(0x00ff00ffu));
        const I16 odd = reinterpret_cast<I16>(codes >> 8 & splat_bits(0x00ff00ffu));
        const I32 products = reinterpret_cast<I32>(even * digits.even + odd * digits.odd);
        sum += (products >> 16) + (products << 16 >> 16);
    }
    ALWAYS_INLINE void after(int) {}
    // the sum times 1 or 128
    ALWAYS_INLINE I32 end(int weight) const { return sum * weight; }
};

ALWAYS_INLINE I32 add(I32 a, I32 b) { return a + b; }
ALWAYS_INLINE I32 sub(I32 a, I32 b) { return a - b; }
ALWAYS_INLINE I32 larger(I32 a, I32 b) { return a > b ? a : b; }
ALWAYS_INLINE I32 splat_int(int32_t a) { return I32{} + a; }
ALWAYS_INLINE I32 shift_left_7(I32 a) { return a << 7; }
ALWAYS_INLINE I32 shift_right_7(I32 a) { return a >> 7; }
ALWAYS_INLINE int32_t reduce(I32 a) {
    int32_t s = 0;
    for (int i = 0; i < 16; ++i) s += a[i];
    return s;
}
ALWAYS_INLINE int32_t largest(I32 a) {
    int32_t s = a[0];
    for (int i = 1; i < 16; ++i) s = s > a[i] ? s : a[i];
    return s;
}
ALWAYS_INLINE void store_bytes(int8_t* p, I32 a) {
    const SignedOctets bytes = __builtin_convertvector(a, SignedOctets);
    __builtin_memcpy(p, &bytes, sizeof bytes);
}
ALWAYS_INLINE I32 round_to_int(F32 a) {  // |a| < 2^22: to the nearest, the lower bits of 1.5 * 2^23 + a
    const F32 shifted = a + 12582912.0f;
    return reinterpret_cast<I32>(shifted) - 0x4b400000;
}
ALWAYS_INLINE I32 magnitude_bits(F32 a) { return reinterpret_cast<I32>(a) & 0x7fffffff; }
ALWAYS_INLINE F32 to_float(I32 a) { return __builtin_convertvector(a, F32); }
ALWAYS_INLINE F32 zero() { return F32{}; }
ALWAYS_INLINE F32 splat(float a) {
    uint32_t bits;
    __builtin_memcpy(&bits, &a, 4);
    return reinterpret_cast<F32>(splat_bits(bits));
}
ALWAYS_INLINE F32 mul(F32 a, F32 b) { return a * b; }
ALWAYS_INLINE F32 add(F32 a, F32 b) { return a + b; }
ALWAYS_INLINE F32 fma(F32 a, F32 b, F32 c) {
#if defined(__aarch64__)  // elsewhere the instruction may be missing
    float32x4_t parts[3][4];
    __builtin_memcpy(parts[0], &a, 64);
    __builtin_memcpy(parts[1], &b, 64);
    __builtin_memcpy(parts[2], &c, 64);
    for (int i = 0; i < 4; ++i) parts[2][i] = vfmaq_f32(parts[2][i], parts[0][i], parts[1][i]);
    __builtin_memcpy(&c, parts[2], 64);
    return c;
#else
    return a * b + c;
#endif
}
ALWAYS_INLINE F32 load_float(const float* p) { return load_as<F32>(reinterpret_cast<const uint8_t*>(p)); }
ALWAYS_INLINE F32 in_register(F32 a) { return a; }
ALWAYS_INLINE void store(float* p, F32 a) { __builtin_memcpy(p, &a, 64); }
ALWAYS_INLINE float reduce(F32 a) {
    float s = 0;
    for (int i = 0; i < 16; ++i) s += a[i];
    return s;
}
ALWAYS_INLINE void reduce_four(const F32 (&v)[4], float* to) {
    for (int i = 0; i < 4; ++i) to[i] = reduce(v[i]);
}
// The sums of vectors' lanes, side by side.
template <int N>
ALWAYS_INLINE void store_sums(float* to, const F32 (&v)[N]) {
    for (int i = 0; i < N; ++i) to[i] = reduce(v[i]);
}
// fp16 bits to float: the magnitude shifted into place is off by 2^112, which a product mends, subnormals
// included; infinities and NaN keep their exponent of all ones.
ALWAYS_INLINE F32 half_to_float(U32 h) {
    const U32 magnitude = (h & splat_bits(0x7fff)) << 13;
    const F32 value = reinterpret_cast<F32>(magnitude) * splat(0x1p112f);
    const U32 special = reinterpret_cast<U32>(magnitude >= splat_bits(0x0f800000u)) & splat_bits(0x7f800000u);
    return reinterpret_cast<F32>(reinterpret_cast<U32>(value) | special | (h & splat_bits(0x8000)) << 16);
}
ALWAYS_INLINE U32 load_words(const uint8_t* p) { return __builtin_convertvector(load_as<Words>(p), U32); }
ALWAYS_INLINE U32 load_octets(const uint8_t* p) { return __builtin_convertvector(load_as<Octets>(p), U32); }
ALWAYS_INLINE F32 load_half(const uint8_t* p) { return half_to_float(load_words(p)); }
ALWAYS_INLINE F32 load_bf16(const uint8_t* p) { return reinterpret_cast<F32>(load_words(p) << 16); }
// Twice sixteen columns: the even ones and the odd ones.
ALWAYS_INLINE void load_bf16_pairs(const uint8_t* p, F32 (&w)[2]) {
    const U32 v = load_bytes(p);
    w[0] = reinterpret_cast<F32>(v << 16);
    w[1] = reinterpret_cast<F32>(v & splat_bits(0xffff0000u));
}
ALWAYS_INLINE void load_pairs(const float* p, F32 (&x)[2]) {
    const F32 a = load_float(p), b = load_float(p + 16);
    x[0] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    x[1] = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
ALWAYS_INLINE void store_pairs(float* p, const F32 (&x)[2]) {
    store(p, __builtin_shufflevector(x[0], x[1], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    store(p + 16, __builtin_shufflevector(x[0], x[1], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}
ALWAYS_INLINE F32 load_int8(const uint8_t* p) { return __builtin_convertvector(load_as<SignedOctets>(p), F32); }
// Nibbles of sixteen bytes as floats.
ALWAYS_INLINE F32 load_low_nibbles(const uint8_t* p) {
    return to_float(reinterpret_cast<I32>(load_octets(p) & splat_bits(15)));
}
ALWAYS_INLINE F32 load_high_nibbles(const uint8_t* p) { return to_float(reinterpret_cast<I32>(load_octets(p) >> 4)); }
// Sixteen e2m1 codes of eight bytes, low nibbles first, as twice their values.
ALWAYS_INLINE void load_twice_e2m1(const uint8_t* p, F32 (&w)[1]) {
    constexpr float kValues[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    for (int i = 0; i < 16; ++i) w[0][i] = kValues[p[i / 2] >> (i % 2 * 4) & 15];
}
// ue8m0 to float; code 0 is the subnormal 2^-127
ALWAYS_INLINE F32 load_ue8m0(const uint8_t* p) {
    const U32 codes = load_octets(p);
    return reinterpret_cast<F32>(codes << 23 | (reinterpret_cast<U32>(codes == U32{}) & splat_bits(0x00400000u)));
}

struct E4m3Table {
    float values[256];
};
constexpr E4m3Table e4m3_table() {
    E4m3Table table{};
    for (int c = 0; c < 256; ++c) {
        const int exponent = c >> 3 & 15, mantissa = c & 7;
        float value = static_cast<float>(exponent ? 8 + mantissa : mantissa) / 512;
        for (int e = 1; e < exponent; ++e) value *= 2;
        table.values[c] = c & 128 ? -value : value;
    }
    return table;
}
constexpr E4m3Table kE4m3 = e4m3_table();

ALWAYS_INLINE F32 load_e4m3(const uint8_t* p) {
    F32 v;
    for (int i = 0; i < 16; ++i) v[i] = kE4m3.values[p[i]];
    return v;
}

// A pair of columns (64 bytes, as fp8_place in kernels.hpp orders them) to floats.
struct E4m3 {
    template <int R>
    ALWAYS_INLINE void decode(const uint8_t* codes, int v, F32 (*w)[R]) const {
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < 16; ++i) {
                const uint8_t* both = codes + fp8_place(16 * (v + r) + i);
                w[0][r][i] = kE4m3.values[both[0]];
                w[1][r][i] = kE4m3.values[both[1]];
            }
    }
    ALWAYS_INLINE static void store_rows(float* out, int v, F32 y) { store(out + v * kLanes, y); }
};

ALWAYS_INLINE uint64_t read_bytes(const uint8_t* p, int64_t n, int64_t streams) {
    U32 sums[4] = {};
    const int64_t part = streams == 1 ? 64 : n / 256 * 64, step = streams == 1 ? 256 : 64;
    const int64_t end = streams == 1 ? n / 256 * 256 : part;
    for (int64_t i = 0; i < end; i += step)
        for (int k = 0; k < 4; ++k) sums[k] += load_bytes(p + k * part + i);
    return (sums[0] + sums[1] + sums[2] + sums[3])[0];
}

}  // namespace
