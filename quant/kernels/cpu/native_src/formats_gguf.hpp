// As formats.hpp, for the types of GGUF files.
namespace {

// d * (q - 8)
struct Q4_0 : FourBit {
    explicit Q4_0(PanelScales) {}
    static int header_bytes(int blocks) { return blocks * 64; }
    ALWAYS_INLINE F32 scale(const uint8_t* header, int b, int, int row) const {
        return load_half(header + b * 64 + 2 * row);
    }
};

// d * q + m
struct Q4_1 : Q4_0 {
    static constexpr bool kCorrects = false, kConstant = true;
    using Q4_0::Q4_0;
    static int header_bytes(int blocks) { return blocks * 128; }
    ALWAYS_INLINE F32 constant(const uint8_t* header, int blocks, int b, int, int row, float sum, F32 y) const {
        return fma(load_half(header + (blocks + b) * 64 + 2 * row), splat(sum), y);
    }
};

// The codes of a block as of four bits, then a span of a further bit of each.
template <class Base>
struct FiveBit : Base {
    static constexpr int kLargest = 31, kBlockBytes = 640;
    using Base::Base;
    ALWAYS_INLINE Bytes group(const uint8_t* codes, int g, int) const {
        const Bytes high = load_bytes(codes + 512);
        const Bytes top = g < 4 ? shift_left(high, 4 - g) : shift_right(high, g - 4);
        return merge(FourBit::group(codes, g, 0), mask(top, 16));
    }
};

using Q5_0 = FiveBit<Q4_0>;  // d * (q - 16)
using Q5_1 = FiveBit<Q4_1>;  // d * q + m

// d * level[q]; levels plus 127, so that they are unsigned
alignas(16) const uint8_t kIq4[16] = {0, 23, 44, 62, 78, 92, 105, 117, 128, 140, 152, 165, 180, 196, 216, 240};

struct Iq4Nl : Q4_0 {
    static constexpr int kLargest = 240;
    const Table table = load_table(kIq4);
    explicit Iq4Nl(PanelScales scales) : Q4_0(scales) {}
    ALWAYS_INLINE Bytes group(const uint8_t* codes, int g, int) const {
        const Bytes v = load_bytes(codes + (g >> 1) * 128);
        return g & 1 ? lookup_high(table, v) : lookup_low(table, v);
    }
};

// d * s * level[q], s int8 per 32 columns, d per 256. The header holds d, then s as [8][32 rows].
struct Iq4Xs : Iq4Nl {
    static constexpr int kStrip = 256;
    explicit Iq4Xs(PanelScales scales) : Iq4Nl(scales) {}
    static int header_bytes(int) { return 64 + 256; }
    ALWAYS_INLINE F32 scale(const uint8_t* header, int b, int, int row) const {
        return mul(load_half(header + 2 * row), load_int8(header + 64 + b * 32 + row));
    }
};

// d * q with signed q, made unsigned by flipping the top bit (an offset of 128)
struct Q8_0 : Q4_0 {
    static constexpr int kLargest = 255, kBlockBytes = 1024;
    static constexpr int64_t kAhead = 1024;  // mostly codes, and quick to multiply: the processor is ahead by itself
    using Q4_0::Q4_0;
    ALWAYS_INLINE Bytes group(const uint8_t* codes, int g, int) const { return flip_sign(load_bytes(codes + g * 128)); }
};

// d * s * q - dmin * m, s and m per 32 columns, d and dmin per 256. The header holds d and dmin, then s and m as
// [8][32 rows] each.
struct Q4_K : FourBit {
    static constexpr int kStrip = 256;
    static constexpr bool kCorrects = false, kConstant = true;
    explicit Q4_K(PanelScales) {}
    static int header_bytes(int) { return 128 + 512; }
    ALWAYS_INLINE F32 scale(const uint8_t* header, int b, int, int row) const {
        return mul(load_half(header + 2 * row), load_int8(header + 128 + b * 32 + row));
    }
    ALWAYS_INLINE F32 constant(const uint8_t* header, int, int b, int, int row, float sum, F32 y) const {
        const F32 least = mul(load_half(header + 64 + 2 * row), load_int8(header + 384 + b * 32 + row));
        return fma(least, splat(-sum), y);
    }
};

using Q5_K = FiveBit<Q4_K>;

// Fields of two bits: of group g of four columns, in the span that it belongs to.
ALWAYS_INLINE Bytes two_bits(const uint8_t* span, int g, int to_bit) {
    const Bytes v = load_bytes(span);
    const int from = 2 * (g & 3);
    return mask(from < to_bit ? shift_left(v, to_bit - from) : shift_right(v, from - to_bit), 3 << to_bit);
}

// d * s * (q - 32), s int8 per 16 columns, d per 256. The header holds d, then s as [16][32 rows].
struct Q6_K : FourBit {
    static constexpr int kLargest = 63, kStrip = 256, kBlockBytes = 768, kParts = 2;
    explicit Q6_K(PanelScales) {}
    static int header_bytes(int) { return 64 + 512; }
    ALWAYS_INLINE Bytes group(const uint8_t* codes, int g, int) const {
        return merge(FourBit::group(codes, g, 0), two_bits(codes + 512 + (g >> 2) * 128, g, 4));
    }
    ALWAYS_INLINE F32 scale(const uint8_t* header, int b, int part, int row) const {
        return mul(load_half(header + 2 * row), load_int8(header + 64 + (2 * b + part) * 32 + row));
    }
};

// d * s * (q - 4): a header as of Q6_K
struct Q3_K : Q6_K {
    static constexpr int kLargest = 7, kBlockBytes = 384;
    using Q6_K::Q6_K;
    ALWAYS_INLINE Bytes group(const uint8_t* codes, int g, int) const {
        const Bytes high = load_bytes(codes + 256);
        const Bytes top = mask(g < 2 ? shift_left(high, 2 - g) : shift_right(high, g - 2), 4);
        return merge(two_bits(codes + (g >> 2) * 128, g, 0), top);
    }
};

// d * s * q - dmin * m, s and m per 16 columns. The header holds d and dmin, then bytes [16][32 rows] with s in the
// low nibble and m in the high one.
struct Q2_K : FourBit {
    static constexpr int kLargest = 3, kStrip = 256, kBlockBytes = 256, kParts = 2;
    static constexpr bool kCorrects = false, kConstant = true;
    explicit Q2_K(PanelScales) {}
    static int header_bytes(int) { return 128 + 512; }
    ALWAYS_INLINE Bytes group(const uint8_t* codes, int g, int) const { return two_bits(codes + (g >> 2) * 128, g, 0); }
    ALWAYS_INLINE F32 scale(const uint8_t* header, int b, int part, int row) const {
        return mul(load_half(header + 2 * row), load_low_nibbles(header + 128 + (2 * b + part) * 32 + row));
    }
    ALWAYS_INLINE F32 constant(const uint8_t* header, int, int b, int part, int row, float sum, F32 y) const {
        const F32 m = load_high_nibbles(header + 128 + (2 * b + part) * 32 + row);
        return fma(mul(load_half(header + 64 + 2 * row), m), splat(-sum), y);
    }
};

}  // namespace
