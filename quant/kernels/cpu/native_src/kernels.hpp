// What the parts of the native back end share: weight formats, the activation records, the kernel
// table that each instruction-set level fills.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace loci {

// Weight formats by number; quant/kernels/cpu/panels.py holds the same numbers.
enum Format : int64_t {
    kMxfp4,
    kFp8,
    kQ4_0,
    kQ4_1,
    kQ8_0,
    kQ6_K,
    kNf4,
    kInt4,
    kInt4Offset,
    kQ5_0,
    kQ5_1,
    kQ2_K,
    kQ3_K,
    kQ4_K,
    kQ5_K,
    kIq4Nl,
    kIq4Xs,
    kMxfp4Blocks,
    kInt4Half,
    kInt4OffsetFloat,
    kNvfp4,
    kFormats,  // above: in panels; below: plain rows, which need none
    kBf16 = kFormats,
    kF16,
    kF32
};

inline bool is_plain(int64_t format) { return format >= kBf16; }
// What plain rows are to dense_rows (Level).
inline int kind_of(int64_t format) { return static_cast<int>(format - kBf16); }
inline int64_t plain_bytes(int kind) { return kind == 2 ? 4 : 2; }
// Whether a format is multiplied with activations as floats, not as digits.
inline bool takes_floats(int64_t format) { return format == kFp8 || is_plain(format); }

// One weight matrix. In file layout `codes` and `scales` are as its Python format documents them. Tiled,
// `codes` is a sequence of panels of 32 rows (tiles.cpp), which hold the scales too, except for FP8:
// its scales are few (one per tile of tile_rows x tile_cols values) and stay where they were.
struct Matrix {
    const uint8_t* codes;
    const void* scales;
    int64_t format;
    int64_t tiled;  // 0: file layout, 1: panels
    int64_t rows, cols;
    int64_t tile_rows, tile_cols;  // values that share a scale (FP8; INT4: columns)
    int64_t float_scales;          // FP8: scales are float32, not ue8m0
};

// How rows of a cache are encoded; quant/formats/rows.py says what it means and has the numbers in the same order.
enum RowCode : int64_t { kRowBf16, kRowE4m3, kRowE2m1, kRowInt8 };
enum RowScale : int64_t { kScaleUe8m0, kScaleE4m3, kScaleFloat };
struct RowFormat {
    int64_t dim, code, scale, group, tail, is_turned, row_bytes;
};

constexpr int64_t kPanelRows = 32;  // rows interleaved in a panel
constexpr int64_t kBlock = 32;      // columns that share an activation scale
constexpr int64_t kMaxTokens = 8;   // tokens a panel kernel takes at most

// Activations of one token and 32 columns as fixed-point digits: x = scale * sum_d digit_d * 128^(2-d)
// (three digits of -64..64, 21 bits) or x = scale * digit (one digit of -127..127).
// `correction` undoes the offset that makes weight codes unsigned: -offset * (sum of the digits), for
// the first and second 16 columns, or for all 32 in the first entry (see digits.hpp). Q2_K, whose codes need none,
// has the sums themselves there.
template <int D>
struct alignas(16) Block;
template <>
struct alignas(128) Block<3> {
    float scale;
    float sum;  // of x, as the digits hold it
    int32_t correction[2][3];
    int8_t digits[3][kBlock];
};
template <>
struct alignas(16) Block<1> {
    float scale;
    float sum;
    int32_t correction[2][1];
    int8_t digits[1][kBlock];
};
static_assert(sizeof(Block<3>) == 128 && sizeof(Block<1>) == 48);

// The columns that share a scale, and where FP8 has a panel's scales: a row of them, one per tile_cols columns.
struct PanelScales {
    const void* row = nullptr;
    int64_t tile_cols = 0;
    bool is_float = false;
};

// A panel to be multiplied, and where its thread goes on reading: memory is asked for so far ahead that the beginning
// of the next panel is on its way while this one is computed.
struct Panel {
    int64_t rows, cols, bytes;
    const uint8_t* codes;
    const uint8_t* next;
    PanelScales scales;
};

constexpr int64_t kKeyBlock = 128;  // keys that are weighted together; the next ones are added to their sums
constexpr int kMostRows = 16;       // rows of queries that share a pass over keys

// One block of keys for some rows of queries: what they make of it before other blocks are added.
struct AttendBlock {
    int rows;                // at most kMostRows
    int64_t n;               // keys, at most kKeyBlock
    int64_t dim, value_dim;  // columns, multiples of 16
    float scale;
    const float* const* q;                     // [rows]
    const int64_t* seen;                       // [rows] how many of the keys, from the first on
    const float *const *keys, *const *values;  // [n]
    float* most;                               // [rows] the largest score
    float* sum;                                // [rows] of e^(score - largest)
    float* const* out;                         // [rows] values weighted with that
};

// Index queries as codes of e2m1 with a power of two per 32 columns: four bytes for each group of four columns, in the
// order of index_codes.hpp, twice what they stand for.
struct IndexQueries {
    const float* weights;    // [tokens][heads], and so on
    const uint8_t* is_wide;  // scales are too far from one another for shifts
    // where they are not: codes shifted by how far their scale is above the least one
    const int8_t* shifted;          // [tokens][heads / 8, rounded up][columns / 4][8][4]
    const int32_t* shifted_starts;  // -kIndexOffset * their sum
    const float* shifted_weights;   // weights times the least scale, by 4 for two factors that are twice as large
    const int8_t* plain;            // [columns]
    const int32_t* plain_starts;    // [blocks]
    const float* factors;           // [blocks] scales, by 4
};
constexpr int kMostKeyShift = 2, kMostQueryShift = 3;  // as far as bytes and pairs of products in 16 bits reach
constexpr int kIndexOffset = 12 << kMostKeyShift;      // makes codes of keys unsigned
constexpr int kMostIndexBlocks = 8;                    // of 32 columns
constexpr int kHeadsTogether = 8;                      // whose codes lie side by side

struct IndexCodes {
    int64_t tokens, heads;
    int blocks;
    IndexQueries queries;
    const uint8_t* const* keys;  // [n] rows
    int64_t n;
    float* out;  // [n] of the first token, others `apart`
    int64_t apart;
};

constexpr int64_t kMostKeyDim = 256;

// Some columns of a head's state in a gated delta rule, over the tokens of a sequence: S = decay * S, then
// S += k (beta * (v - S^T k))^T, then out = S^T q; q and k are brought to length `scale` and 1.
struct DeltaColumns {
    const float *q, *k, *v;  // [key_dim], [key_dim], [columns] of the first token, others `apart`
    int64_t apart;
    const float *decay, *beta;                // of the first token, others `heads` apart
    int64_t heads, tokens, key_dim, columns;  // columns: 16 to 64, key_dim at most kMostKeyDim, multiples of 16
    float scale;
    float* state;  // [key_dim][columns], rows state_apart
    int64_t state_apart;
    float* out;  // [columns] of the first token, others out_apart
    int64_t out_apart;
};

// Products of a panel and tokens over all columns. x: one pointer per token (Block<D>* or float*); out: [tokens][32].
// The result for a token never depends on what else is in the call.
using PanelKernel = void (*)(const Panel& panel, const void* const* x, float* out);

// What a feed-forward network does between its matrices: min(gate, limit) * sigmoid(alpha * the same) *
// (clamp(up, -limit, limit) + shift). SwiGLU has alpha 1 and no shift.
struct Gating {
    float limit, alpha, shift;
};

// The kernels of one instruction-set level.
struct Level {
    const char* name;
    // [format][digits == 1][tokens - 1]; null where there is no such kernel
    PanelKernel panel[kFormats][2][kMaxTokens];
    // fp8_tiles.hpp: the same for several panels of FP8 and many tokens; out: [panel][token][32]
    void (*fp8_many)(const Panel* panels, int64_t count, const float* const* x, const int64_t* at, int64_t tokens,
                     float* out);
    void (*digits3)(const float* x, int64_t cols, int offset, bool halves, Block<3>* out);
    void (*digits1)(const float* x, int64_t cols, int offset, bool halves, Block<1>* out);
    void (*swiglu)(const float* gate, const float* up, const Gating& gating, int64_t n, float* h);
    // n plain rows of bf16 (kind 0), fp16 (1) or fp32 (2): out[token * out_stride + row] = row . x[token]
    void (*dense_rows)(const void* rows, int64_t n, int kind, int64_t cols, const float* const* x, int64_t tokens,
                       float* out, int64_t out_stride);
    // out [columns] += the sum of n plain rows, `width` values apart, weighted
    void (*add_rows)(const void* rows, int kind, int64_t width, int64_t n, const float* weights, int64_t columns,
                     float* out);
    void (*fp8_row)(const uint8_t* codes, const void* scales, bool float_scales, int64_t cols, float* out);
    // attention.hpp and rows.hpp
    void (*attend_block)(const AttendBlock& block);
    void (*index_block)(const float* q, int heads, const float* weights, const float* const* keys, int64_t n,
                        int64_t dim, float* out);
    void (*index_codes)(const IndexCodes& call);
    void (*sum_parts)(const float* parts, int64_t apart, const float* weights, int64_t weight_step, int64_t n,
                      int64_t dim, const float* first, float first_weight, float* out);
    void (*normalise)(const float* x, const float* weight, int64_t cols, float eps, float* out);
    void (*sigmoid)(const float* x, int64_t n, float* out);
    void (*rotate)(const float* x, const float* turns, int64_t pairs, float* out);
    void (*pool_group)(const float* rows, const float* gates, int64_t n, int64_t dim, float* out);
    // delta_net.hpp
    void (*convolve)(const float* const* rows, const float* weights, int64_t apart, int64_t taps, int64_t n,
                     float* out);
    void (*delta_columns)(const DeltaColumns& call);
    void (*gate_sums)(const float* a, const float* b, const float* c, int64_t n, double* sums);
    float (*largest_value)(const float* x, int64_t n);
    double (*exponentials)(const float* x, int64_t n, float most, float factor, float* out);
    void (*masked)(const float* x, const uint32_t* bits, int64_t n, float* out);
    // row_codes.hpp
    void (*decode_row)(const RowFormat& format, const uint8_t* row, float* out);
    void (*encode_row)(const RowFormat& format, const float* x, uint8_t* row);
    void (*hadamard)(float* x, int64_t n, float factor);
    uint64_t (*read)(const uint8_t* bytes, int64_t n, int64_t streams);
    uint64_t (*read_rows)(const uint8_t* bytes, int64_t row_bytes, const int64_t* rows, int64_t n);
};

extern const Level kAvx512, kAvx2, kPortable;

// Offset that a format's unsigned codes carry.
inline int offset_of(int64_t format) {
    switch (format) {
        case kMxfp4:
        case kMxfp4Blocks:
        case kNvfp4: return 12;  // codes are 2 * e2m1 + 12
        case kNf4: return 64;    // the first digit is (level + 1) * 64
        case kQ4_0:
        case kInt4:
        case kInt4Half:
        case kInt4Offset:
        case kInt4OffsetFloat: return 8;
        case kQ5_0: return 16;
        case kQ8_0: return 128;
        case kQ3_K: return 4;
        case kQ6_K: return 32;
        case kIq4Nl:
        case kIq4Xs: return 127;
        case kQ2_K: return -1;  // sums of digits instead of corrections
        default: return 0;
    }
}

// Whether a format's corrections are per 16 columns.
inline bool has_halves(int64_t format) {
    return format == kQ2_K || format == kQ3_K || format == kQ6_K || format == kNvfp4;
}

// Where row r's two codes lie in the 64 bytes that a pair of columns takes in an FP8 panel: within each 16
// bytes four rows of the upper half of the panel, then four of the lower, as byte interleaving wants them.
constexpr int fp8_place(int r) { return r % 16 / 4 * 16 + r / 16 * 8 + r % 4 * 2; }

// Asks for a row's bytes, into the second-level cache. g++ takes a function that does nothing but prefetch for one that
// does nothing and drops its calls; the empty statement keeps them.
inline void prefetch_row(const void* row, int64_t bytes) {
    asm volatile("");
    const uint8_t* p = static_cast<const uint8_t*>(row);
    for (int64_t k = 0; k < bytes - 1; k += 64) __builtin_prefetch(p + k, 0, 2);
    __builtin_prefetch(p + bytes - 1, 0, 2);  // its last line, wherever it begins
}
// How many rows ahead: a row that is read at random takes as long to come as some tens of others take to decode.
constexpr int64_t kRowsAhead = 32;

// tiles.cpp
int64_t panel_bytes(const Matrix& m);
void tile_panel(const Matrix& m, int64_t panel, uint8_t* out);
void untile_row(const Matrix& tiled, int64_t row, uint8_t* codes, uint8_t* scales);
void file_row_bytes(const Matrix& m, int64_t* codes, int64_t* scales);

}  // namespace loci
