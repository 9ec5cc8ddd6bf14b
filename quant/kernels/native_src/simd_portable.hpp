// Plain C++ over the compiler's vector types: any machine, sixteen rows in a vector, half a panel.
namespace {

constexpr int kLanes = 16;
constexpr int kSumRegisters = 1;  // that can hold sums
constexpr int kMostSums = 6;       // of a row, in one kernel: digits or columns x tokens
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef float F32 __attribute__((vector_size(64)));
using Bytes = U32;  // four unsigned codes of each of sixteen rows
struct Table {
    uint8_t entries[16];
};

ALWAYS_INLINE U32 splat_bits(uint32_t v) { return U32{} + v; }
ALWAYS_INLINE Bytes load_bytes(const uint8_t* p) {
    Bytes v;
    __builtin_memcpy(&v, p, 64);
    return v;
}
ALWAYS_INLINE Table load_table(const uint8_t* p) {
    Table t;
    __builtin_memcpy(&t, p, 16);
    return t;
}
ALWAYS_INLINE Bytes mask(Bytes v, int m) { return v & splat_bits(0x01010101u * static_cast<uint32_t>(m)); }
ALWAYS_INLINE Bytes shift_right(Bytes v, int n) { return v >> n; }
ALWAYS_INLINE Bytes shift_left(Bytes v, int n) { return v << n; }
ALWAYS_INLINE Bytes merge(Bytes a, Bytes b) { return a | b; }
ALWAYS_INLINE Bytes flip_sign(Bytes v) { return v ^ splat_bits(0x80808080u); }
ALWAYS_INLINE Bytes lookup_low(const Table& t, Bytes v) {
    uint8_t bytes[64];
    __builtin_memcpy(bytes, &v, 64);
    for (int i = 0; i < 64; ++i) bytes[i] = t.entries[bytes[i] & 15];
    return load_bytes(bytes);
}
ALWAYS_INLINE Bytes lookup_high(const Table& t, Bytes v) { return lookup_low(t, shift_right(v, 4)); }
ALWAYS_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

struct Digits {
    const int8_t* four;
};
ALWAYS_INLINE Digits four_digits(const int8_t* p) { return {p}; }

template <int LargestCode, int LargestDigit>
struct Dot {
    I32 sum;
    ALWAYS_INLINE void begin(int32_t start) { sum = I32{} + start; }
    ALWAYS_INLINE void add(Bytes codes, Digits digits) {
        for (int j = 0; j < 4; ++j) sum += reinterpret_cast<I32>((codes >> (8 * j)) & splat_bits(255)) * digits.four[j];
    }
    ALWAYS_INLINE void after(int) {}
    ALWAYS_INLINE I32 end(int32_t, int) const { return sum; }
};

ALWAYS_INLINE I32 add(I32 a, I32 b) { return a + b; }
ALWAYS_INLINE I32 times128(I32 a) { return a * 128; }
ALWAYS_INLINE F32 to_float(I32 a) { return __builtin_convertvector(a, F32); }
ALWAYS_INLINE F32 zero() { return F32{}; }
ALWAYS_INLINE F32 splat(float a) {
    F32 v;
    for (int i = 0; i < 16; ++i) v[i] = a;
    return v;
}
ALWAYS_INLINE F32 mul(F32 a, F32 b) { return a * b; }
ALWAYS_INLINE F32 add(F32 a, F32 b) { return a + b; }
ALWAYS_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
ALWAYS_INLINE F32 load_float(const float* p) {
    F32 v;
    __builtin_memcpy(&v, p, 64);
    return v;
}
ALWAYS_INLINE void store(float* p, F32 a) { __builtin_memcpy(p, &a, 64); }
ALWAYS_INLINE float reduce(F32 a) {
    float s = 0;
    for (int i = 0; i < 16; ++i) s += a[i];
    return s;
}
// fp16 bits to float: the magnitude shifted into place is off by 2^112, which a product mends, subnormals
// included; infinities and NaN keep their exponent of all ones.
ALWAYS_INLINE F32 half_to_float(U32 h) {
    const U32 magnitude = (h & splat_bits(0x7fff)) << 13;
    const F32 value = reinterpret_cast<F32>(magnitude) * splat(0x1p112f);
    const U32 special = reinterpret_cast<U32>(magnitude >= splat_bits(0x0f800000u)) & splat_bits(0x7f800000u);
    return reinterpret_cast<F32>(reinterpret_cast<U32>(value) | special | (h & splat_bits(0x8000)) << 16);
}
ALWAYS_INLINE U32 load_words(const uint8_t* p) {
    uint16_t words[16];
    __builtin_memcpy(words, p, 32);
    U32 v;
    for (int i = 0; i < 16; ++i) v[i] = words[i];
    return v;
}
ALWAYS_INLINE F32 load_half(const uint8_t* p) { return half_to_float(load_words(p)); }
ALWAYS_INLINE F32 load_bf16(const uint8_t* p) { return reinterpret_cast<F32>(load_words(p) << 16); }
ALWAYS_INLINE F32 load_int8(const uint8_t* p) {
    F32 v;
    for (int i = 0; i < 16; ++i) v[i] = static_cast<int8_t>(p[i]);
    return v;
}
ALWAYS_INLINE F32 load_ue8m0(const uint8_t* p) {
    U32 v;
    for (int i = 0; i < 16; ++i) v[i] = p[i] ? static_cast<uint32_t>(p[i]) << 23 : 0x00400000u;
    return reinterpret_cast<F32>(v);
}
// Sixteen e4m3 bytes to float / 256, as fp16 bits with an exponent bias of 15 instead of 7.
ALWAYS_INLINE F32 load_e4m3(const uint8_t* p) {
    U32 v;
    for (int i = 0; i < 16; ++i) v[i] = p[i];
    return half_to_float((v & splat_bits(0x7f)) << 7 | (v & splat_bits(0x80)) << 8);
}
// A pair of columns (64 bytes, as fp8_place in kernels.hpp orders them) to floats / 256.
struct E4m3 {
    ALWAYS_INLINE void operator()(const uint8_t* codes, int, F32 (*w)[2]) const {
        for (int column = 0; column < 2; ++column)
            for (int r = 0; r < 2; ++r) {
                uint8_t rows[16];
                for (int i = 0; i < 16; ++i) rows[i] = codes[fp8_place(16 * r + i) + column];
                w[column][r] = load_e4m3(rows);
            }
    }
    ALWAYS_INLINE static void store_rows(float* out, int v, F32 y) { store(out + v * kLanes, mul(y, splat(256.0f))); }
};

ALWAYS_INLINE uint64_t read_bytes(const uint8_t* p, int64_t n, int64_t streams) {
    uint64_t sums[4] = {};
    const int64_t part = streams == 1 ? 8 : n / 4 / 8 * 8, step = streams == 1 ? 32 : 8;
    const int64_t end = streams == 1 ? n / 32 * 32 : part;
    for (int64_t i = 0; i < end; i += step)
        for (int k = 0; k < 4; ++k) {
            uint64_t v;
            __builtin_memcpy(&v, p + k * part + i, 8);
            sums[k] += v;
        }
    return sums[0] + sums[1] + sums[2] + sums[3];
}

}  // namespace
