// How each format's panel becomes vectors of unsigned codes and their scales.
//
// A panel is 32 rows cut into strips of kStrip columns (the last may be shorter, in whole groups).
// A strip of n blocks of 32 columns is a header with the scales of all its groups, then n x kBlockBytes of codes.
//   header  [fields][groups][32 rows], row beside row
//   codes   spans of 128 bytes: byte 4r+j of a span belongs to row r and has, of columns that it begins with at c,
//           four bits   columns c+j (low nibble) and c+4+j (high nibble); four spans to a block
//           eight bits  column c+j; eight spans
//           two bits    column c+4i+j in bits 2i and 2i+1; two spans
//           one bit     column c+4i+j in bit i; one span
//           others      the spans of their lower bits, then those of their higher ones
// So a vector is some rows times four columns, each row in its own 32-bit lane: sums never cross lanes, and
// a panel is read strictly in sequence. `row` below is the first row of a vector, `b` the block in the strip.
//
// A code counts as the unsigned number group(...) less an offset (offset_of in kernels.hpp), times unit(...).
namespace {

// How far ahead of its reads a panel asks for memory: what comes meanwhile covers the wait for the first of it. Less
// leaves the rest to the processor, which foresees panels badly whose scales are read beside their codes.
constexpr int64_t kPanelAhead = 8192;  // bytes

struct FourBit {
    static constexpr int64_t kAhead = kPanelAhead;
    static constexpr int kLargest = 15;  // unsigned code
    static constexpr int kDigits = 1;    // numbers, of descending weight, that a code stands for
    static constexpr int kStrip = 128, kBlockBytes = 512;
    static constexpr int kParts = 1;          // scales to a block
    static constexpr int kPrefixBytes = 0;    // before the first strip: a factor of each row, float32
    static constexpr bool kCorrects = true;   // sums begin with a correction for the offset
    static constexpr bool kConstant = false;  // something is added that depends on the sum of the activations
    static constexpr float unit(int) { return 1; }
    ALWAYS_INLINE Bytes group(const uint8_t* codes, int g, int) const {
        const Bytes v = load_bytes(codes + (g >> 1) * 128);
        return mask(g & 1 ? shift_right(v, 4) : v, 15);
    }
    // y + what is added; `sum` of the activations of a part
    ALWAYS_INLINE F32 constant(const uint8_t*, int, int, int, int, float, F32 y) const { return y; }
};

// 2 * e2m1 + 12, so that codes are unsigned; the unit undoes the 2.
alignas(16) const uint8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct Mxfp4 : FourBit {
    static constexpr int kLargest = 24;
    const Table table = load_table(kE2m1);
    explicit Mxfp4(PanelScales) {}
    static constexpr float unit(int) { return 0.5f; }
    static int header_bytes(int blocks) { return blocks * 32; }
    ALWAYS_INLINE Bytes group(const uint8_t* codes, int g, int) const {
        const Bytes v = load_bytes(codes + (g >> 1) * 128);
        return g & 1 ? lookup_high(table, v) : lookup_low(table, v);
    }
    ALWAYS_INLINE F32 scale(const uint8_t* header, int b, int, int row) const {
        return load_ue8m0(header + b * 32 + row);
    }
};

// The levels of NF4 plus one, as three digits of base 128, the first counting 1/64: (level + 1) * 64 * 128 * 128,
// rounded.
struct Nf4Digits {
    alignas(16) uint8_t digit[3][16];
};
constexpr Nf4Digits nf4_digits() {
    // clang-format off: four to a line
    constexpr double kLevels[16] = {
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0};
    // clang-format on
    Nf4Digits digits{};
    for (int i = 0; i < 16; ++i) {
        const int fixed = static_cast<int>((kLevels[i] + 1) * (1 << 20) + 0.5);
        for (int d = 0; d < 3; ++d)
            digits.digit[d][i] = static_cast<uint8_t>(d ? fixed >> (14 - 7 * d) & 127 : fixed >> 14);
    }
    return digits;
}
constexpr Nf4Digits kNf4Digits = nf4_digits();

struct Nf4 : FourBit {
    static constexpr int kLargest = 128, kDigits = 3;
    Table tables[3];
    explicit Nf4(PanelScales) {
        for (int d = 0; d < 3; ++d) tables[d] = load_table(kNf4Digits.digit[d]);
    }
    static constexpr float unit(int digits) { return digits == 1 ? 1.0f / (64 * 128) : 1.0f / 64; }
    static int header_bytes(int blocks) { return blocks / 2 * 128; }
    ALWAYS_INLINE Bytes group(const uint8_t* codes, int g, int digit) const {
        const Bytes v = load_bytes(codes + (g >> 1) * 128);
        return g & 1 ? lookup_high(tables[digit], v) : lookup_low(tables[digit], v);
    }
    ALWAYS_INLINE F32 scale(const uint8_t* header, int b, int, int row) const {
        return load_float(reinterpret_cast<const float*>(header + (b >> 1) * 128) + row);
    }
};

// How scales are stored.
struct Bf16 {
    static constexpr int kBytes = 2;
    ALWAYS_INLINE static F32 load(const uint8_t* p) { return load_bf16(p); }
};
struct Half {
    static constexpr int kBytes = 2;
    ALWAYS_INLINE static F32 load(const uint8_t* p) { return load_half(p); }
};
struct Single {
    static constexpr int kBytes = 4;
    ALWAYS_INLINE static F32 load(const uint8_t* p) { return load_float(reinterpret_cast<const float*>(p)); }
};

// (q - 8) * scale [+ offset] per group of 32, 64 or 128 columns
template <class Scale, bool HasOffset>
struct Int4 : FourBit {
    static constexpr bool kConstant = HasOffset;
    static constexpr int kFieldBytes = 32 * Scale::kBytes;
    const int shift;  // log2 of a group's blocks
    explicit Int4(PanelScales scales) : shift(scales.tile_cols == 32 ? 0 : scales.tile_cols == 64 ? 1 : 2) {}
    int header_bytes(int blocks) const { return (blocks >> shift) * (HasOffset ? 2 : 1) * kFieldBytes; }
    ALWAYS_INLINE F32 scale(const uint8_t* header, int b, int, int row) const {
        return Scale::load(header + (b >> shift) * kFieldBytes + Scale::kBytes * row);
    }
    ALWAYS_INLINE F32 constant(const uint8_t* header, int blocks, int b, int, int row, float sum, F32 y) const {
        const int field = (blocks >> shift) + (b >> shift);
        return fma(Scale::load(header + field * kFieldBytes + Scale::kBytes * row), splat(sum), y);
    }
};

// e2m1 * e4m3 per 16 columns * a float per row
struct Nvfp4 : Mxfp4 {
    static constexpr int kParts = 2, kPrefixBytes = 128;
    explicit Nvfp4(PanelScales scales) : Mxfp4(scales) {}
    static int header_bytes(int blocks) { return blocks * 64; }
    ALWAYS_INLINE F32 scale(const uint8_t* header, int b, int part, int row) const {
        return load_e4m3(header + (2 * b + part) * 32 + row);
    }
};

}  // namespace
