// From a format's own layout to panels and back. The layout of a panel is described in formats.hpp; FP8
// panels are pairs of columns, 64 bytes each (fp8_place). Rows that a last panel lacks are zero.
#include <cstring>

#include "kernels.hpp"

namespace loci {
namespace {

constexpr int64_t kSpan = 4 * kPanelRows;  // four bytes of each row

struct Shape {
    int bits;          // of a code
    int strip_blocks;  // blocks of 32 columns in a strip
    int group_blocks;  // blocks that share a scale
    int fields;        // scale, and offset where there is one
    int field_bytes;
    int file_block;  // bytes of a GGUF block, which begins with its fields; 0: scales lie apart
};

Shape shape_of(const Matrix& m) {
    switch (m.format) {
        case kMxfp4: return {4, 4, 1, 1, 1, 0};
        case kNf4: return {4, 4, 2, 1, 4, 0};
        case kInt4: return {4, 4, static_cast<int>(m.tile_cols / kBlock), 1, 2, 0};
        case kInt4Offset: return {4, 4, static_cast<int>(m.tile_cols / kBlock), 2, 2, 0};
        case kQ4_0: return {4, 4, 1, 1, 2, 18};
        case kQ4_1: return {4, 4, 1, 2, 2, 20};
        case kQ8_0: return {8, 4, 1, 1, 2, 34};
        default: return {6, 8, 8, 18, 1, 210};  // kQ6_K: d and 16 scales per strip
    }
}

// A row in file layout.
struct FileRow {
    uint8_t* codes;
    uint8_t* scales;
};

int64_t scale_bytes(const Matrix& m) {  // of a row
    const Shape s = shape_of(m);
    return m.cols / kBlock / s.group_blocks * s.fields * s.field_bytes;
}

int64_t row_bytes(const Matrix& m) {  // codes and scales
    if (m.format == kFp8) return (m.cols + 1) / 2 * 2;
    return m.cols * shape_of(m).bits / 8 + scale_bytes(m);
}

// In these formats codes and scales are two arrays.
bool scales_apart(const Matrix& m) { return m.format != kFp8 && shape_of(m).file_block == 0; }

FileRow file_row(const Matrix& m, int64_t row) {
    uint8_t* codes = const_cast<uint8_t*>(m.codes);
    if (!scales_apart(m)) return {codes + row * row_bytes(m), nullptr};
    uint8_t* scales = static_cast<uint8_t*>(const_cast<void*>(m.scales));
    return {codes + row * (m.cols / 2), scales + row * scale_bytes(m)};
}

// The next functions move a block's codes between file and panel order, as words of four bytes: word k is what
// a row has in span k. Even and odd columns beside each other in a byte: eight columns 0..7 are the nibbles
// of a word, and the panel wants them as 0 4 1 5 2 6 3 7; both steps swap, so both undo themselves.
template <class Word>
Word swap_nibbles(Word v) {
    return (v & 0x0f0f0f0fu) << 4 | (v >> 4 & 0x0f0f0f0fu);
}

template <class Word>
Word pairs_to_panel(Word v) {
    Word t = (v >> 8 ^ v) & 0x0000ff00u;
    v ^= t ^ t << 8;
    t = (v >> 4 ^ v) & 0x00f000f0u;
    return v ^ t ^ t << 4;
}

uint32_t panel_to_pairs(uint32_t v) {
    uint32_t t = (v >> 4 ^ v) & 0x00f000f0u;
    v ^= t ^ t << 4;
    t = (v >> 8 ^ v) & 0x0000ff00u;
    return v ^ t ^ t << 8;
}

// GGUF: byte j has columns j and 16 + j. Takes each pair of words apart and puts it together across.
void halves_to_panel(const uint32_t* in, uint32_t* out) {
    constexpr uint32_t kLow = 0x0f0f0f0fu;
    for (int k = 0; k < 2; ++k) {
        out[k] = (in[2 * k] & kLow) | (in[2 * k + 1] & kLow) << 4;
        out[k + 2] = (in[2 * k] >> 4 & kLow) | (in[2 * k + 1] & ~kLow);
    }
}

void panel_to_halves(const uint32_t* in, uint32_t* out) {
    constexpr uint32_t kLow = 0x0f0f0f0fu;
    for (int k = 0; k < 2; ++k) {
        out[2 * k] = (in[k] & kLow) | (in[k + 2] & kLow) << 4;
        out[2 * k + 1] = (in[k] >> 4 & kLow) | (in[k + 2] & ~kLow);
    }
}

// Q6_K, where block b of a strip has its codes: low bits in a nibble of 32 bytes, high ones in two bits of 32.
struct SixBits {
    uint8_t *low, *high;
    int nibble, shift;
    SixBits(uint8_t* strip, int64_t b)
        : low(strip + b / 4 * 64 + b % 2 * 32), high(strip + 128 + b / 4 * 32), nibble(b % 4 < 2 ? 0 : 4),
          shift(static_cast<int>(b % 4 * 2)) {}
};

void six_bits_to_panel(const SixBits& in, uint8_t* out) {
    std::memset(out, 0, 24);
    for (int c = 0; c < kBlock; ++c) {
        const int low = in.low[c] >> in.nibble & 15, high = in.high[c] >> in.shift & 3;
        out[c / 8 * 4 + c % 4] = static_cast<uint8_t>(out[c / 8 * 4 + c % 4] | low << (c & 4));
        out[16 + c / 16 * 4 + c % 4] = static_cast<uint8_t>(out[16 + c / 16 * 4 + c % 4] | high << (c / 4 % 4 * 2));
    }
}

void panel_to_six_bits(const uint8_t* in, const SixBits& out) {
    for (int c = 0; c < kBlock; ++c) {
        const int low = in[c / 8 * 4 + c % 4] >> (c & 4) & 15;
        const int high = in[16 + c / 16 * 4 + c % 4] >> (c / 4 % 4 * 2) & 3;
        out.low[c] = static_cast<uint8_t>((out.low[c] & ~(15 << out.nibble)) | low << out.nibble);
        out.high[c] = static_cast<uint8_t>((out.high[c] & ~(3 << out.shift)) | high << out.shift);
    }
}

void read_block(const Matrix& m, FileRow row, int64_t block, uint32_t* words) {
    const Shape s = shape_of(m);
    uint32_t in[8];
    if (m.format == kQ6_K) {
        const SixBits six(row.codes + block / 8 * s.file_block, block % 8);
        six_bits_to_panel(six, reinterpret_cast<uint8_t*>(words));
    } else if (m.format == kQ8_0) {
        std::memcpy(words, row.codes + block * s.file_block + 2, 32);
    } else if (s.file_block) {
        std::memcpy(in, row.codes + block * s.file_block + s.fields * s.field_bytes, 16);
        halves_to_panel(in, words);
    } else {
        std::memcpy(in, row.codes + block * 16, 16);
        for (int k = 0; k < 4; ++k) words[k] = pairs_to_panel(m.format == kNf4 ? swap_nibbles(in[k]) : in[k]);
    }
}

void write_block(const Matrix& m, FileRow row, int64_t block, const uint32_t* words) {
    const Shape s = shape_of(m);
    uint32_t out[8];
    if (m.format == kQ6_K) {
        const SixBits six(row.codes + block / 8 * s.file_block, block % 8);
        panel_to_six_bits(reinterpret_cast<const uint8_t*>(words), six);
    } else if (m.format == kQ8_0) {
        std::memcpy(row.codes + block * s.file_block + 2, words, 32);
    } else if (s.file_block) {
        panel_to_halves(words, out);
        std::memcpy(row.codes + block * s.file_block + s.fields * s.field_bytes, out, 16);
    } else {
        for (int k = 0; k < 4; ++k) {
            const uint32_t v = panel_to_pairs(words[k]);
            out[k] = m.format == kNf4 ? swap_nibbles(v) : v;
        }
        std::memcpy(row.codes + block * 16, out, 16);
    }
}

// Calls copy(file bytes, header bytes, n) for every scale of row r of a strip.
template <class Copy>
void each_scale(const Matrix& m, FileRow row, int64_t block, int blocks, int r, uint8_t* header, const Copy& copy) {
    const Shape s = shape_of(m);
    if (m.format == kQ6_K) {
        uint8_t* strip = row.codes + block / 8 * s.file_block;
        copy(strip + 208, header + 2 * r, 2);
        for (int i = 0; i < 16; ++i) copy(strip + 192 + i, header + (2 + i) * kPanelRows + r, 1);
        return;
    }
    const int groups = blocks / s.group_blocks;
    for (int g = 0; g < groups; ++g)
        for (int f = 0; f < s.fields; ++f) {
            uint8_t* file = s.file_block ? row.codes + (block + g) * s.file_block + f * s.field_bytes
                                         : row.scales + ((block / s.group_blocks + g) * s.fields + f) * s.field_bytes;
            copy(file, header + ((f * groups + g) * kPanelRows + r) * s.field_bytes,
                 static_cast<size_t>(s.field_bytes));
        }
}

// Calls visit(first block, blocks, header, codes) for every strip of a panel.
template <class Visit>
void each_strip(const Matrix& m, uint8_t* panel, const Visit& visit) {
    const Shape s = shape_of(m);
    const int64_t all = m.cols / kBlock;
    for (int64_t block = 0; block < all; block += s.strip_blocks) {
        const int blocks = static_cast<int>(all - block < s.strip_blocks ? all - block : s.strip_blocks);
        uint8_t* codes = panel + kPanelRows * (blocks / s.group_blocks) * s.fields * s.field_bytes;
        visit(block, blocks, panel, codes);
        panel = codes + blocks * s.bits * kSpan;
    }
}

// The scales of a strip: from a row of file layout each, `apart` bytes apart, to row beside row.
template <class Field>
void copy_scales(const uint8_t* file, int64_t apart, int groups, uint8_t* header) {
    for (int f = 0; f < groups; ++f)
        for (int r = 0; r < kPanelRows; ++r)
            std::memcpy(header + (f * kPanelRows + r) * sizeof(Field), file + r * apart + f * sizeof(Field),
                        sizeof(Field));
}

typedef uint32_t Words __attribute__((vector_size(16)));  // four of a row's

// Rows of four words to columns.
void transpose(Words w[4]) {
    const Words a = __builtin_shufflevector(w[0], w[1], 0, 4, 1, 5),
                b = __builtin_shufflevector(w[0], w[1], 2, 6, 3, 7);
    const Words c = __builtin_shufflevector(w[2], w[3], 0, 4, 1, 5),
                d = __builtin_shufflevector(w[2], w[3], 2, 6, 3, 7);
    w[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    w[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    w[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
    w[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

// A whole strip of four-bit codes: 32 rows of 64 bytes, a transposition of words that stays in the nearest cache.
template <bool Swap>
void copy_strip(const uint8_t* codes, int64_t apart, uint8_t* to) {
    for (int r = 0; r < kPanelRows; r += 4)
        for (int b = 0; b < 4; ++b) {
            Words words[4];
            for (int i = 0; i < 4; ++i) {
                const uint8_t* from = codes + (r + i) * apart + 16 * b;
                if (b == 0) __builtin_prefetch(from + 256);  // rows are too many streams for the processor to foresee
                std::memcpy(&words[i], from, 16);
                words[i] = pairs_to_panel(Swap ? swap_nibbles(words[i]) : words[i]);
            }
            transpose(words);
            for (int k = 0; k < 4; ++k) std::memcpy(to + (4 * b + k) * kSpan + 4 * r, &words[k], 16);
        }
}

// As the general way below, for what experts are mostly made of: a full panel, one scale a group, whole strips.
bool tile_plain_four_bit(const Matrix& m, int64_t first, uint8_t* out) {
    const Shape s = shape_of(m);
    if (!scales_apart(m) || s.fields != 1 || m.rows - first < kPanelRows || m.cols % (s.strip_blocks * kBlock))
        return false;
    const FileRow row = file_row(m, first);
    const int64_t scales_apart_by = scale_bytes(m), codes_apart_by = m.cols / 2;
    const int groups = s.strip_blocks / s.group_blocks;
    each_strip(m, out, [&](int64_t block, int, uint8_t* header, uint8_t* codes) {
        const uint8_t* scales = row.scales + block / s.group_blocks * s.field_bytes;
        switch (s.field_bytes) {
            case 1: copy_scales<uint8_t>(scales, scales_apart_by, groups, header); break;
            case 2: copy_scales<uint16_t>(scales, scales_apart_by, groups, header); break;
            default: copy_scales<uint32_t>(scales, scales_apart_by, groups, header);
        }
        if (m.format == kNf4) copy_strip<true>(row.codes + block * 16, codes_apart_by, codes);
        else copy_strip<false>(row.codes + block * 16, codes_apart_by, codes);
    });
    return true;
}

}  // namespace

int64_t panel_bytes(const Matrix& m) { return kPanelRows * row_bytes(m); }

void tile_panel(const Matrix& m, int64_t panel, uint8_t* out) {
    const int64_t first = panel * kPanelRows;
    const int rows = static_cast<int>(m.rows - first < kPanelRows ? m.rows - first : kPanelRows);
    if (rows < kPanelRows || m.cols % 2) std::memset(out, 0, static_cast<size_t>(panel_bytes(m)));
    if (m.format == kFp8) {
        for (int r = 0; r < rows; ++r) {
            const uint8_t* codes = m.codes + (first + r) * m.cols;
            uint8_t* to = out + fp8_place(r);
            for (int64_t c = 0; c + 1 < m.cols; c += 2) std::memcpy(to + c * kPanelRows, codes + c, 2);
            if (m.cols % 2) to[(m.cols - 1) * kPanelRows] = codes[m.cols - 1];
        }
        return;
    }
    if (tile_plain_four_bit(m, first, out)) return;
    const int bits = shape_of(m).bits;
    each_strip(m, out, [&](int64_t block, int blocks, uint8_t* header, uint8_t* codes) {
        for (int r = 0; r < rows; ++r) {
            const FileRow row = file_row(m, first + r);
            each_scale(m, row, block, blocks, r, header,
                       [](uint8_t* file, uint8_t* tile, size_t n) { std::memcpy(tile, file, n); });
            for (int b = 0; b < blocks; ++b) {
                uint32_t words[8];
                read_block(m, row, block + b, words);
                uint8_t* to = codes + b * bits * kSpan + 4 * r;
                for (int k = 0; k < bits; ++k) std::memcpy(to + k * kSpan, words + k, 4);
            }
        }
    });
}

void untile_row(const Matrix& tiled, int64_t row, uint8_t* codes, uint8_t* scales) {
    uint8_t* panel = const_cast<uint8_t*>(tiled.codes) + row / kPanelRows * panel_bytes(tiled);
    const int r = static_cast<int>(row % kPanelRows);
    if (tiled.format == kFp8) {
        for (int64_t c = 0; c < tiled.cols; ++c) codes[c] = panel[c / 2 * 2 * kPanelRows + fp8_place(r) + c % 2];
        return;
    }
    const int bits = shape_of(tiled).bits;
    const FileRow file{codes, scales};
    each_strip(tiled, panel, [&](int64_t block, int blocks, uint8_t* header, uint8_t* tile_codes) {
        each_scale(tiled, file, block, blocks, r, header,
                   [](uint8_t* to, uint8_t* tile, size_t n) { std::memcpy(to, tile, n); });
        for (int b = 0; b < blocks; ++b) {
            uint32_t words[8];
            const uint8_t* from = tile_codes + b * bits * kSpan + 4 * r;
            for (int k = 0; k < bits; ++k) std::memcpy(words + k, from + k * kSpan, 4);
            write_block(tiled, file, block + b, words);
        }
    });
}

void file_row_bytes(const Matrix& m, int64_t* codes, int64_t* scales) {
    *scales = scales_apart(m) ? scale_bytes(m) : 0;
    *codes = m.format == kFp8 ? m.cols : row_bytes(m) - *scales;
}

}  // namespace loci
