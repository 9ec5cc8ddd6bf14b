// From a format's own layout to panels and back. The layout of a panel is described in formats.hpp; FP8
// panels are pairs of columns, 64 bytes each (fp8_place). Rows that a last panel lacks are zero.
#include <cstring>

#include "file_rows_k.hpp"

namespace loci {
namespace {

constexpr int64_t kSpan = 4 * kPanelRows;  // four bytes of each row

// Calls visit with the rows of four-bit formats that have groups of 32, 64 or 128 columns.
template <int kFieldBytes, int kFields, class Visit>
auto with_groups(int64_t columns, const Visit& visit) {
    switch (columns) {
        case 32: return visit(ApartRows<32, kFieldBytes, kFields, false>());
        case 64: return visit(ApartRows<64, kFieldBytes, kFields, false>());
        default: return visit(ApartRows<128, kFieldBytes, kFields, false>());
    }
}

// Calls visit with what reads and writes rows of a packed format's file layout.
template <class Visit>
auto with_rows(const Matrix& m, const Visit& visit) {
    switch (m.format) {
        case kMxfp4: return visit(ApartRows<32, 1, 1, false>());
        case kNvfp4: return visit(NvRows());
        case kNf4: return visit(ApartRows<64, 4, 1, true>());
        case kInt4:
        case kInt4Half: return with_groups<2, 1>(m.tile_cols, visit);
        case kInt4Offset: return with_groups<2, 2>(m.tile_cols, visit);
        case kInt4OffsetFloat: return with_groups<4, 2>(m.tile_cols, visit);
        case kMxfp4Blocks: return visit(BlockRows<4, 1, 1>());
        case kQ4_0:
        case kIq4Nl: return visit(BlockRows<4, 2, 1>());
        case kQ4_1: return visit(BlockRows<4, 2, 2>());
        case kQ5_0: return visit(BlockRows<5, 2, 1>());
        case kQ5_1: return visit(BlockRows<5, 2, 2>());
        case kQ8_0: return visit(BlockRows<8, 2, 1>());
        case kQ2_K: return visit(Q2Rows());
        case kQ3_K: return visit(Q3Rows());
        case kQ4_K: return visit(Q4Rows());
        case kQ5_K: return visit(Q5Rows());
        case kIq4Xs: return visit(Iq4XsRows());
        default: return visit(Q6Rows());
    }
}

// Bytes that a row has at the beginning of its panel: the factor of NVFP4.
int64_t prefix_bytes(const Matrix& m) { return m.format == kNvfp4 ? 4 : 0; }

template <class Rows>
FileRow file_row(const Matrix& m, int64_t row) {
    uint8_t* scales = static_cast<uint8_t*>(const_cast<void*>(m.scales));
    return {const_cast<uint8_t*>(m.codes) + row * Rows::code_bytes(m),
            scales == nullptr ? nullptr : scales + row * Rows::scale_bytes(m)};
}

// Calls visit(first block, blocks, bytes of a row before the strip) for every strip; returns a row's bytes in a panel.
template <class Rows, class Visit>
int64_t each_strip(const Matrix& m, const Visit& visit) {
    const int64_t all = m.cols / kBlock;
    int64_t at = prefix_bytes(m);
    for (int64_t block = 0; block < all; block += Rows::kStripBlocks) {
        const int blocks = static_cast<int>(all - block < Rows::kStripBlocks ? all - block : Rows::kStripBlocks);
        visit(block, blocks, at);
        at += Rows::header(blocks).bytes() + 4 * Rows::kBits * blocks;
    }
    return at;
}

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

// Fields of four rows, from the first of them on, to row beside row.
template <int kBytes>
void put_fields(const RowStrip* strips, int from, int count, int row, uint8_t* to) {
    for (int f = 0; f < count; ++f)
        for (int i = 0; i < 4; ++i)
            std::memcpy(to + (f * kPanelRows + row + i) * kBytes, strips[i].fields + from + f * kBytes, kBytes);
}

inline void put_header(const RowStrip* strips, Header header, int row, uint8_t* to) {
    switch (header.wide_bytes) {
        case 1: put_fields<1>(strips, 0, header.wide, row, to); break;
        case 2: put_fields<2>(strips, 0, header.wide, row, to); break;
        default: put_fields<4>(strips, 0, header.wide, row, to);
    }
    const int wide = header.wide * header.wide_bytes;
    put_fields<1>(strips, wide, header.narrow, row, to + wide * kPanelRows);
}

void put_words(const RowStrip* strips, int count, int row, uint8_t* to) {
    to += 4 * row;
    int k = 0;
    for (; k + 4 <= count; k += 4) {
        Words words[4];
        for (int i = 0; i < 4; ++i) words[i] = load_words(strips[i].words + k);
        transpose(words);
        for (int i = 0; i < 4; ++i) store_words(to + (k + i) * kSpan, words[i]);
    }
    for (; k < count; ++k)
        for (int i = 0; i < 4; ++i) std::memcpy(to + k * kSpan + 4 * i, strips[i].words + k, 4);
}

// A whole strip of four rows: a transposition of words that stays in registers.
template <class Rows>
void put_blocks(const FileRow* rows, int64_t block, uint8_t* to) {
    for (int b = 0; b < Rows::kStripBlocks; ++b) {
        Words words[4];
        for (int i = 0; i < 4; ++i) words[i] = Rows::read_block(rows[i], block + b);
        transpose(words);
        for (int k = 0; k < 4; ++k) store_words(to + (4 * b + k) * kSpan, words[k]);
    }
}

template <class Rows>
void tile_rows(const Matrix& m, int64_t first, int rows, uint8_t* out) {
    if (const int64_t bytes = prefix_bytes(m))
        for (int r = 0; r < rows; ++r) {
            const uint8_t* end = static_cast<const uint8_t*>(m.scales) + (first + r + 1) * Rows::scale_bytes(m);
            std::memcpy(out + r * bytes, end - bytes, static_cast<size_t>(bytes));
        }
    FileRow row[kPanelRows];
    for (int r = 0; r < kPanelRows; ++r) row[r] = file_row<Rows>(m, first + (r < rows ? r : 0));
    RowStrip strips[4] = {};
    each_strip<Rows>(m, [&](int64_t block, int blocks, int64_t at) {
        uint8_t* strip = out + at * kPanelRows;
        const Header header = Rows::header(blocks);
        uint8_t* codes = strip + header.bytes() * kPanelRows;
        for (int r = 0; r < rows; r += 4) {
            if constexpr (Rows::kByBlock) {
                if (r + 4 <= rows && blocks == Rows::kStripBlocks) {
                    for (int i = 0; i < 4; ++i) {
                        __builtin_prefetch(row[r + i].codes + block * 16 + kFileAhead);
                        Rows::read_fields(row[r + i], block, Rows::kStripBlocks, strips[i].fields);
                    }
                    put_header(strips, Rows::header(Rows::kStripBlocks), r, strip);
                    put_blocks<Rows>(row + r, block, codes + 4 * r);
                    continue;
                }
            }
            for (int i = 0; i < 4; ++i)
                if (r + i < rows) Rows::read(row[r + i], block, blocks, strips[i]);
                else strips[i] = {};
            put_header(strips, header, r, strip);
            put_words(strips, Rows::kBits * blocks, r, codes);
        }
    });
}

typedef uint16_t ColumnPairs __attribute__((vector_size(16)));  // eight of a row's

// Eight rows of eight pairs of columns to eight columns of eight rows.
void transpose(ColumnPairs v[8]) {
    ColumnPairs t[8];
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = __builtin_shufflevector(v[i], v[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        t[2 * i + 1] = __builtin_shufflevector(v[i], v[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; ++i) v[i] = t[i];
}

// FP8: the rows of a panel that lie beside each other there, 16 columns at a time; returns how many columns are done.
int64_t tile_fp8_columns(const uint8_t* codes, int64_t cols, uint8_t* out) {
    constexpr int64_t kColumns = 16;
    int64_t c = 0;
    for (; c + kColumns <= cols; c += kColumns)
        for (int q = 0; q < 4; ++q) {
            ColumnPairs v[8];
            for (int i = 0; i < 8; ++i) {
                const uint8_t* from = codes + (i / 4 * 16 + 4 * q + i % 4) * cols + c;
                __builtin_prefetch(from + kFileAhead);
                std::memcpy(&v[i], from, sizeof v[i]);
            }
            for (int k = 0; k < 3; ++k) transpose(v);
            for (int k = 0; k < 8; ++k) std::memcpy(out + (c + 2 * k) * kPanelRows + 16 * q, &v[k], sizeof v[k]);
        }
    return c;
}

template <class Rows>
void untile_packed_row(const Matrix& m, const uint8_t* panel, int r, FileRow to) {
    if (const int64_t bytes = prefix_bytes(m))
        std::memcpy(to.scales + Rows::scale_bytes(m) - bytes, panel + r * bytes, static_cast<size_t>(bytes));
    each_strip<Rows>(m, [&](int64_t block, int blocks, int64_t at) {
        const uint8_t* from = panel + at * kPanelRows;
        const Header header = Rows::header(blocks);
        RowStrip strip;
        uint8_t* field = strip.fields;
        for (int f = 0; f < header.wide; ++f, field += header.wide_bytes, from += kPanelRows * header.wide_bytes)
            std::memcpy(field, from + r * header.wide_bytes, static_cast<size_t>(header.wide_bytes));
        for (int f = 0; f < header.narrow; ++f, from += kPanelRows) *field++ = from[r];
        for (int k = 0; k < Rows::kBits * blocks; ++k) std::memcpy(strip.words + k, from + k * kSpan + 4 * r, 4);
        Rows::write(to, block, blocks, strip);
    });
}

}  // namespace

int64_t panel_bytes(const Matrix& m) {
    if (m.format == kFp8) return kPanelRows * ((m.cols + 1) / 2 * 2);
    return kPanelRows *
           with_rows(m, [&](auto rows) { return each_strip<decltype(rows)>(m, [](int64_t, int, int64_t) {}); });
}

void tile_panel(const Matrix& m, int64_t panel, uint8_t* out) {
    const int64_t first = panel * kPanelRows;
    const int rows = static_cast<int>(m.rows - first < kPanelRows ? m.rows - first : kPanelRows);
    if (rows < kPanelRows || m.cols % 2) std::memset(out, 0, static_cast<size_t>(panel_bytes(m)));
    if (m.format != kFp8) {
        with_rows(m, [&](auto layout) { tile_rows<decltype(layout)>(m, first, rows, out); });
        return;
    }
    const int64_t done = rows == kPanelRows ? tile_fp8_columns(m.codes + first * m.cols, m.cols, out) : 0;
    for (int r = 0; r < rows; ++r) {
        const uint8_t* codes = m.codes + (first + r) * m.cols;
        uint8_t* to = out + fp8_place(r);
        for (int64_t c = done; c + 1 < m.cols; c += 2) std::memcpy(to + c * kPanelRows, codes + c, 2);
        if (m.cols % 2) to[(m.cols - 1) * kPanelRows] = codes[m.cols - 1];
    }
}

void untile_row(const Matrix& tiled, int64_t row, uint8_t* codes, uint8_t* scales) {
    const uint8_t* panel = tiled.codes + row / kPanelRows * panel_bytes(tiled);
    const int r = static_cast<int>(row % kPanelRows);
    if (tiled.format != kFp8) {
        const FileRow to{codes, scales};
        with_rows(tiled, [&](auto rows) { untile_packed_row<decltype(rows)>(tiled, panel, r, to); });
        return;
    }
    for (int64_t c = 0; c < tiled.cols; ++c) codes[c] = panel[c / 2 * 2 * kPanelRows + fp8_place(r) + c % 2];
}

void file_row_bytes(const Matrix& m, int64_t* codes, int64_t* scales) {
    *scales = 0;
    *codes = m.cols;
    if (m.format != kFp8)
        with_rows(m, [&](auto rows) {
            *codes = decltype(rows)::code_bytes(m);
            *scales = decltype(rows)::scale_bytes(m);
        });
}

}  // namespace loci
