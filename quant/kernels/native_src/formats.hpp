// How each format's panel becomes vectors of unsigned codes and their scales.
//
// A panel is 16 rows cut into strips of kStrip columns (the last may be shorter, in whole blocks of 32).
// A strip of n blocks is a header with the scales of all its blocks, then n x kBlockBytes of codes.
//   header  [n][16 rows] scales, row beside row
//   codes   four-bit: four vectors of 64 bytes; byte 4r+j of vector k has columns 8k+j (low nibble) and
//           8k+4+j (high nibble) of row r.  eight-bit: vector k has column 4k+j in byte 4r+j.
// So a whole vector is sixteen rows times four columns, each row in its own 32-bit lane: sums never cross
// lanes, and a panel is read strictly in sequence. `row` below is the first row of a register: 0, or 8
// where registers hold eight.
namespace {

struct FourBit {
    static constexpr bool kSmall = true;
    static constexpr int kStrip = 128, kBlockBytes = 256, kParts = 1;
    static constexpr float kUnit = 1;
    ALWAYS_INLINE Bytes group(const uint8_t* codes, int g) const {
        const Bytes v = load_bytes(codes + (g >> 1) * 64);
        return mask(g & 1 ? shift_right(v, 4) : v, 15);
    }
    ALWAYS_INLINE F32 constant(const uint8_t*, int, int, int, float, F32 y) const { return y; }
};

// 2 * e2m1 + 12, so that codes are unsigned; kUnit undoes the 2.
alignas(16) const uint8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct Mxfp4 : FourBit {
    static constexpr float kUnit = 0.5f;
    const Table table = load_table(kE2m1);
    static constexpr int header_bytes(int blocks) { return blocks * 16; }
    ALWAYS_INLINE Bytes group(const uint8_t* codes, int g) const {
        const Bytes v = load_bytes(codes + (g >> 1) * 64);
        return g & 1 ? lookup_high(table, v) : lookup_low(table, v);
    }
    ALWAYS_INLINE F32 scale(const uint8_t* header, int b, int, int row) const {
        return load_ue8m0(header + b * 16 + row);
    }
};

// d * (q - 8)
struct Q4_0 : FourBit {
    static constexpr int header_bytes(int blocks) { return blocks * 32; }
    ALWAYS_INLINE F32 scale(const uint8_t* header, int b, int, int row) const {
        return load_half(header + b * 32 + 2 * row);
    }
};

// d * q + m; the header holds all d, then all m
struct Q4_1 : FourBit {
    static constexpr int header_bytes(int blocks) { return blocks * 64; }
    ALWAYS_INLINE F32 scale(const uint8_t* header, int b, int, int row) const {
        return load_half(header + b * 32 + 2 * row);
    }
    ALWAYS_INLINE F32 constant(const uint8_t* header, int blocks, int b, int row, float sum, F32 y) const {
        return fma(load_half(header + (blocks + b) * 32 + 2 * row), splat(sum), y);
    }
};

// d * q with signed q, made unsigned by flipping the top bit (an offset of 128)
struct Q8_0 : FourBit {
    static constexpr bool kSmall = false;
    static constexpr int kBlockBytes = 512;
    static constexpr int header_bytes(int blocks) { return blocks * 32; }
    ALWAYS_INLINE Bytes group(const uint8_t* codes, int g) const { return flip_sign(load_bytes(codes + g * 64)); }
    ALWAYS_INLINE F32 scale(const uint8_t* header, int b, int, int row) const {
        return load_half(header + b * 32 + 2 * row);
    }
};

// d * s * (q - 32), s int8 per 16 columns, d per 256. The header holds d, then s as [16][16 rows]. Codes of a
// block: the low four bits as in FourBit, then two vectors of high bits: bits 2i and 2i+1 of byte 4r+j of
// vector k belong to column 16k+4i+j.
struct Q6_K : FourBit {
    static constexpr int kStrip = 256, kBlockBytes = 384, kParts = 2;
    static constexpr int header_bytes(int) { return 32 + 256; }
    ALWAYS_INLINE Bytes group(const uint8_t* codes, int g) const {
        const Bytes high = load_bytes(codes + 256 + (g >> 2) * 64);
        const int i = g & 3;
        const Bytes top = i < 2 ? shift_left(high, 4 - 2 * i) : shift_right(high, 2 * i - 4);
        return merge(FourBit::group(codes, g), mask(top, 48));
    }
    ALWAYS_INLINE F32 scale(const uint8_t* header, int b, int part, int row) const {
        return mul(load_half(header + 2 * row), load_int8(header + 32 + (2 * b + part) * 16 + row));
    }
};

}  // namespace
