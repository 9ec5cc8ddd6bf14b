// From a format's own layout to panels and back. The layout of a panel is described in formats.hpp; FP8
// panels are column after column of 16 bytes. Rows that a last panel lacks are zero.
#include <cstring>

#include "kernels.hpp"

namespace loci {
namespace {

// A row in file layout: GGUF blocks keep their scales among the codes.
struct FileRow {
    uint8_t* codes;
    uint8_t* scales;
};

struct Shape {
    int strip_blocks;  // blocks in a strip
    int header;        // bytes of scales per block and row; Q6_K counts per strip
    int file_block;    // bytes of a block (Q6_K: of a strip) in the file's row
    int bits;
};

Shape shape_of(int64_t format) {
    switch (format) {
        case kMxfp4: return {4, 1, 16, 4};
        case kQ4_0: return {4, 2, 18, 4};
        case kQ4_1: return {4, 4, 20, 4};
        case kQ8_0: return {4, 2, 34, 8};
        default: return {8, 18, 210, 6};  // kQ6_K
    }
}

int64_t row_bytes(const Matrix& m) {  // codes and scales of one row
    if (m.format == kFp8) return m.cols;
    const Shape s = shape_of(m.format);
    if (m.format == kMxfp4) return m.cols / 2 + m.cols / kBlock;
    return m.format == kQ6_K ? m.cols / 256 * s.file_block : m.cols / kBlock * s.file_block;
}

FileRow file_row(const Matrix& m, int64_t row) {
    uint8_t* codes = const_cast<uint8_t*>(m.codes);
    if (m.format == kMxfp4) {
        uint8_t* scales = static_cast<uint8_t*>(const_cast<void*>(m.scales));
        return {codes + row * (m.cols / 2), scales + row * (m.cols / kBlock)};
    }
    return {codes + row * row_bytes(m), nullptr};
}

// The 32 codes of a block in the order of their columns.
void read_codes(int64_t format, FileRow row, int64_t block, uint8_t* q) {
    const Shape s = shape_of(format);
    if (format == kMxfp4) {
        const uint8_t* p = row.codes + block * 16;
        for (int i = 0; i < 16; ++i) {
            q[2 * i] = p[i] & 15;
            q[2 * i + 1] = p[i] >> 4;
        }
    } else if (format == kQ8_0) {
        std::memcpy(q, row.codes + block * s.file_block + 2, kBlock);
    } else if (format == kQ6_K) {
        const int64_t part = block % 8;  // within 256 columns: half, then quarter of the half
        const uint8_t* p = row.codes + block / 8 * s.file_block;
        const uint8_t* low = p + part / 4 * 64 + part % 2 * 32;
        const uint8_t* high = p + 128 + part / 4 * 32;
        const int nibble = part % 4 < 2 ? 0 : 4, shift = static_cast<int>(part % 4 * 2);
        for (int i = 0; i < kBlock; ++i)
            q[i] = static_cast<uint8_t>(((low[i] >> nibble) & 15) | ((high[i] >> shift) & 3) << 4);
    } else {
        const uint8_t* p = row.codes + block * s.file_block + s.header;
        for (int i = 0; i < 16; ++i) {
            q[i] = p[i] & 15;
            q[i + 16] = p[i] >> 4;
        }
    }
}

void write_codes(int64_t format, FileRow row, int64_t block, const uint8_t* q) {
    const Shape s = shape_of(format);
    if (format == kMxfp4) {
        uint8_t* p = row.codes + block * 16;
        for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(q[2 * i] | q[2 * i + 1] << 4);
    } else if (format == kQ8_0) {
        std::memcpy(row.codes + block * s.file_block + 2, q, kBlock);
    } else if (format == kQ6_K) {
        const int64_t part = block % 8;
        uint8_t* p = row.codes + block / 8 * s.file_block;
        uint8_t* low = p + part / 4 * 64 + part % 2 * 32;
        uint8_t* high = p + 128 + part / 4 * 32;
        const int nibble = part % 4 < 2 ? 0 : 4, shift = static_cast<int>(part % 4 * 2);
        for (int i = 0; i < kBlock; ++i) {
            low[i] = static_cast<uint8_t>((low[i] & ~(15 << nibble)) | (q[i] & 15) << nibble);
            high[i] = static_cast<uint8_t>((high[i] & ~(3 << shift)) | (q[i] >> 4) << shift);
        }
    } else {
        uint8_t* p = row.codes + block * s.file_block + s.header;
        for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(q[i] | q[i + 16] << 4);
    }
}

void put_codes(int bits, const uint8_t* q, int r, uint8_t* codes) {
    if (bits == 8) {
        for (int g = 0; g < 8; ++g) std::memcpy(codes + g * 64 + 4 * r, q + 4 * g, 4);
        return;
    }
    uint8_t nibbles[16];
    for (int k = 0; k < 4; ++k)
        for (int j = 0; j < 4; ++j)
            nibbles[4 * k + j] = static_cast<uint8_t>((q[8 * k + j] & 15) | (q[8 * k + 4 + j] & 15) << 4);
    for (int k = 0; k < 4; ++k) std::memcpy(codes + k * 64 + 4 * r, nibbles + 4 * k, 4);
    if (bits == 6) {
        for (int k = 0; k < 2; ++k)
            for (int j = 0; j < 4; ++j) {
                int top = 0;
                for (int i = 0; i < 4; ++i) top |= (q[16 * k + 4 * i + j] >> 4) << (2 * i);
                codes[256 + k * 64 + 4 * r + j] = static_cast<uint8_t>(top);
            }
    }
}

void take_codes(int bits, const uint8_t* codes, int r, uint8_t* q) {
    for (int g = 0; g < 8; ++g)
        for (int j = 0; j < 4; ++j) {
            uint8_t& code = q[4 * g + j];
            if (bits == 8) {
                code = codes[g * 64 + 4 * r + j];
                continue;
            }
            code = static_cast<uint8_t>((codes[(g >> 1) * 64 + 4 * r + j] >> (g & 1 ? 4 : 0)) & 15);
            if (bits == 6) {
                const int top = codes[256 + (g >> 2) * 64 + 4 * r + j] >> (2 * (g & 3));
                code = static_cast<uint8_t>(code | (top & 3) << 4);
            }
        }
}

// Calls copy(file bytes, header bytes, n) for every scale of row r of a strip.
template <class Copy>
void each_scale(int64_t format, FileRow row, int64_t block, int blocks, int r, uint8_t* header, const Copy& copy) {
    const int size = shape_of(format).file_block;
    if (format == kQ6_K) {
        uint8_t* p = row.codes + block / 8 * size;
        copy(p + 208, header + 2 * r, 2);
        for (int i = 0; i < 16; ++i) copy(p + 192 + i, header + 32 + 16 * i + r, 1);
        return;
    }
    for (int b = 0; b < blocks; ++b) {
        if (format == kMxfp4) {
            copy(row.scales + block + b, header + 16 * b + r, 1);
            continue;
        }
        uint8_t* p = row.codes + (block + b) * size;
        copy(p, header + 32 * b + 2 * r, 2);
        if (format == kQ4_1) copy(p + 2, header + 32 * (blocks + b) + 2 * r, 2);
    }
}

// Calls strip(first block, blocks, header, codes) for every strip of a panel.
template <class Visit>
void each_strip(const Matrix& m, uint8_t* panel, const Visit& visit) {
    const Shape s = shape_of(m.format);
    const int block_bytes = 2 * s.bits * kBlock;
    for (int64_t block = 0; block < m.cols / kBlock; block += s.strip_blocks) {
        const int64_t left = m.cols / kBlock - block;
        const int blocks = static_cast<int>(left < s.strip_blocks ? left : s.strip_blocks);
        uint8_t* codes = panel + 16 * s.header * (m.format == kQ6_K ? 1 : blocks);
        visit(block, blocks, panel, codes);
        panel = codes + blocks * block_bytes;
    }
}

}  // namespace

int64_t panel_bytes(const Matrix& m) { return kPanelRows * row_bytes(m); }

void tile_panel(const Matrix& m, int64_t panel, uint8_t* out) {
    const int64_t first = panel * kPanelRows;
    const int rows = static_cast<int>(m.rows - first < kPanelRows ? m.rows - first : kPanelRows);
    if (rows < kPanelRows) std::memset(out, 0, static_cast<size_t>(panel_bytes(m)));
    if (m.format == kFp8) {
        for (int64_t c = 0; c < m.cols; c += 64)
            for (int r = 0; r < rows; ++r)
                for (int64_t k = c; k < c + 64 && k < m.cols; ++k)
                    out[k * kPanelRows + r] = m.codes[(first + r) * m.cols + k];
        return;
    }
    const Shape s = shape_of(m.format);
    each_strip(m, out, [&](int64_t block, int blocks, uint8_t* header, uint8_t* codes) {
        for (int r = 0; r < rows; ++r) {
            const FileRow row = file_row(m, first + r);
            each_scale(m.format, row, block, blocks, r, header,
                       [](uint8_t* file, uint8_t* tile, size_t n) { std::memcpy(tile, file, n); });
            for (int b = 0; b < blocks; ++b) {
                uint8_t q[kBlock];
                read_codes(m.format, row, block + b, q);
                put_codes(s.bits, q, r, codes + b * 2 * s.bits * kBlock);
            }
        }
    });
}

void untile_row(const Matrix& tiled, int64_t row, uint8_t* codes, uint8_t* scales) {
    uint8_t* panel = const_cast<uint8_t*>(tiled.codes) + row / kPanelRows * panel_bytes(tiled);
    const int r = static_cast<int>(row % kPanelRows);
    if (tiled.format == kFp8) {
        for (int64_t c = 0; c < tiled.cols; ++c) codes[c] = panel[c * kPanelRows + r];
        return;
    }
    const Shape s = shape_of(tiled.format);
    const FileRow file{codes, scales};
    each_strip(tiled, panel, [&](int64_t block, int blocks, uint8_t* header, uint8_t* tile_codes) {
        each_scale(tiled.format, file, block, blocks, r, header,
                   [](uint8_t* to, uint8_t* tile, size_t n) { std::memcpy(to, tile, n); });
        for (int b = 0; b < blocks; ++b) {
            uint8_t q[kBlock];
            take_codes(s.bits, tile_codes + b * 2 * s.bits * kBlock, r, q);
            write_codes(tiled.format, file, block + b, q);
        }
    });
}

}  // namespace loci
