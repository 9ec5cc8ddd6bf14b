// A strip of a row between a format's own order (documented in quant/formats/) and that of panels (formats.hpp).
//
// A RowStrip holds what one row has in a strip: the fields of its header, and its codes as words of four bytes, of
// which word k of block b goes to span k of that block: `bits` words a block. Each struct below reads and writes one
// layout. Where kByBlock, the four words of a block are read by themselves, which saves their way through memory.
#pragma once
#include <cstring>

#include "kernels.hpp"

namespace loci {

struct RowStrip {
    alignas(16) uint8_t fields[48];
    alignas(16) uint32_t words[64];
};

// A row in file layout.
struct FileRow {
    uint8_t* codes;
    uint8_t* scales;
};

// Fields of a strip's header: `wide` of some bytes each, then `narrow` of one byte.
struct Header {
    int wide, wide_bytes, narrow;
    int bytes() const { return wide * wide_bytes + narrow; }
};

typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint64_t Pairs __attribute__((vector_size(16)));  // of words

inline Words load_words(const void* p) {
    Words v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store_words(void* p, Words v) { std::memcpy(p, &v, sizeof v); }
inline Words low_nibbles(Words v) { return v & 0x0f0f0f0fu; }
inline Words high_nibbles(Words v) { return v >> 4 & 0x0f0f0f0fu; }

// 32 nibbles, each in a byte of its own (columns 0..15 in a, 16..31 in b), to the four words of a block, and back.
inline Words fold(Words a, Words b) {
    Pairs x = reinterpret_cast<Pairs>(a), y = reinterpret_cast<Pairs>(b);
    x |= x >> 28;
    y |= y >> 28;
    return __builtin_shufflevector(reinterpret_cast<Words>(x), reinterpret_cast<Words>(y), 0, 2, 4, 6);
}
inline void unfold(Words v, Words* a, Words* b) {
    const Words low = low_nibbles(v), high = high_nibbles(v);
    *a = __builtin_shufflevector(low, high, 0, 4, 1, 5);
    *b = __builtin_shufflevector(low, high, 2, 6, 3, 7);
}

// Even and odd columns beside each other in a byte: eight columns 0..7 are the nibbles of a word, and the panel wants
// them as 0 4 1 5 2 6 3 7.
inline Words swap_nibbles(Words v) { return low_nibbles(v) << 4 | high_nibbles(v); }
inline Words pairs_to_panel(Words v) {
    Words t = (v >> 8 ^ v) & 0x0000ff00u;
    v ^= t ^ t << 8;
    t = (v >> 4 ^ v) & 0x00f000f0u;
    return v ^ t ^ t << 4;
}
inline Words panel_to_pairs(Words v) {
    Words t = (v >> 4 ^ v) & 0x00f000f0u;
    v ^= t ^ t << 4;
    t = (v >> 8 ^ v) & 0x0000ff00u;
    return v ^ t ^ t << 8;
}

// Field b of word i becomes field i of word b, in words `apart` from one another: undoes itself. kBits 2: four words;
// 1: eight.
template <int kBits>
void transpose_fields(uint32_t* words, int apart) {
    constexpr int kCount = 8 / kBits;
    constexpr uint32_t kMasks[] = {0x55555555u, 0x33333333u, 0x0f0f0f0fu};
    for (int step = 1, shift = kBits; step < kCount; step *= 2, shift *= 2)
        for (int i = 0; i < kCount; ++i) {
            if (i & step) continue;
            uint32_t &a = words[i * apart], &b = words[(i + step) * apart];
            const uint32_t t = (a >> shift ^ b) & kMasks[shift == 1 ? 0 : shift == 2 ? 1 : 2];
            b ^= t;
            a ^= t << shift;
        }
}

// 32 bytes that hold a field of four blocks (kBits 2) or eight (1) of each column, to the words of these blocks: for
// block b its words at out + b * apart, 2 or 1 of them. And back.
template <int kBits>
void fields_to_words(const uint8_t* bytes, uint32_t* out, int apart) {
    constexpr int kBlocks = 8 / kBits;
    uint32_t words[8];
    std::memcpy(words, bytes, 32);
    for (int k = 0; k < kBits; ++k) {
        transpose_fields<kBits>(words + k * kBlocks, 1);
        for (int b = 0; b < kBlocks; ++b) out[b * apart + k] = words[k * kBlocks + b];
    }
}
template <int kBits>
void words_to_fields(const uint32_t* in, int apart, uint8_t* bytes) {
    constexpr int kBlocks = 8 / kBits;
    uint32_t words[8];
    for (int k = 0; k < kBits; ++k) {
        for (int b = 0; b < kBlocks; ++b) words[k * kBlocks + b] = in[b * apart + k];
        transpose_fields<kBits>(words + k * kBlocks, 1);
    }
    std::memcpy(bytes, words, 32);
}

// 32 bits, one of each column, to a word whose byte j has those of columns 4i + j in bit i, and back.
inline uint32_t bits_to_word(uint32_t bits) {
    uint32_t word = 0;
    for (int i = 0; i < 8; ++i) word |= ((bits >> 4 * i & 15) * 0x00204081u & 0x01010101u) << i;
    return word;
}
inline uint32_t word_to_bits(uint32_t word) {
    uint32_t bits = 0;
    for (int i = 0; i < 8; ++i) {
        const uint32_t t = word >> i & 0x01010101u;
        bits |= ((t | t >> 7 | t >> 14 | t >> 21) & 15) << 4 * i;
    }
    return bits;
}

// How far ahead of what is read memory is asked for: rows are too many streams for the processor to foresee.
constexpr int64_t kFileAhead = 320;

// Four bits, codes apart from scales: MXFP4, NF4, INT4, NVFP4. Groups of kGroup columns have kFields values each, which
// stand side by side in the file.
template <int kGroup, int kFieldBytes, int kFields, bool kOddIsLow>
struct ApartRows {
    static constexpr int kBits = 4, kStripBlocks = 4;
    static constexpr bool kByBlock = true;
    template <class Int>
    static constexpr Int groups(Int blocks) {
        return blocks * static_cast<int>(kBlock) / kGroup;
    }
    static Header header(int blocks) { return {groups(blocks) * kFields, kFieldBytes, 0}; }
    static int64_t code_bytes(const Matrix& m) { return m.cols / 2; }
    static int64_t scale_bytes(const Matrix& m) { return m.cols / kGroup * kFields * kFieldBytes; }
    static void read_fields(FileRow row, int64_t block, int blocks, uint8_t* fields) {
        const int n = groups(blocks);
        const uint8_t* scales = row.scales + groups(block) * kFields * kFieldBytes;
        for (int g = 0; g < n; ++g)
            for (int f = 0; f < kFields; ++f)
                std::memcpy(fields + (f * n + g) * kFieldBytes, scales + (g * kFields + f) * kFieldBytes, kFieldBytes);
    }
    static Words read_block(FileRow row, int64_t block) {
        const Words v = load_words(row.codes + block * 16);
        return pairs_to_panel(kOddIsLow ? swap_nibbles(v) : v);
    }
    static void read(FileRow row, int64_t block, int blocks, RowStrip& to) {
        read_fields(row, block, blocks, to.fields);
        for (int b = 0; b < blocks; ++b) store_words(to.words + 4 * b, read_block(row, block + b));
    }
    static void write(FileRow row, int64_t block, int blocks, const RowStrip& from) {
        const int n = groups(blocks);
        uint8_t *scales = row.scales + groups(block) * kFields * kFieldBytes, *codes = row.codes + block * 16;
        for (int g = 0; g < n; ++g)
            for (int f = 0; f < kFields; ++f)
                std::memcpy(scales + (g * kFields + f) * kFieldBytes, from.fields + (f * n + g) * kFieldBytes,
                            kFieldBytes);
        for (int b = 0; b < blocks; ++b) {
            const Words v = panel_to_pairs(load_words(from.words + 4 * b));
            store_words(codes + 16 * b, kOddIsLow ? swap_nibbles(v) : v);
        }
    }
};

// NVFP4: behind a row's scales its factor, which the panel has at its beginning (tiles.cpp).
struct NvRows : ApartRows<16, 1, 1, false> {
    static int64_t scale_bytes(const Matrix& m) { return m.cols / 16 + 4; }
};

// GGUF blocks of 32 values: `kFields` of some bytes, high bits where there are five, nibbles; or 32 bytes of eight.
template <int kCodeBits, int kFieldBytes, int kFields>
struct BlockRows {
    static constexpr int kBits = kCodeBits, kStripBlocks = 4;
    static constexpr bool kByBlock = false;
    static constexpr int kHigh = kFields * kFieldBytes, kLow = kHigh + (kCodeBits == 5 ? 4 : 0);
    static constexpr int kFileBlock = kLow + (kCodeBits == 8 ? 32 : 16);
    static Header header(int blocks) { return {blocks * kFields, kFieldBytes, 0}; }
    static int64_t code_bytes(const Matrix& m) { return m.cols / kBlock * kFileBlock; }
    static int64_t scale_bytes(const Matrix&) { return 0; }
    static void read(FileRow row, int64_t block, int blocks, RowStrip& to) {
        for (int b = 0; b < blocks; ++b) {
            const uint8_t* from = row.codes + (block + b) * kFileBlock;
            uint32_t* words = to.words + kBits * b;
            __builtin_prefetch(from + kFileAhead);
            for (int f = 0; f < kFields; ++f)
                std::memcpy(to.fields + (f * blocks + b) * kFieldBytes, from + f * kFieldBytes, kFieldBytes);
            if (kCodeBits == 8) {
                std::memcpy(words, from + kLow, 32);
                continue;
            }
            const Words v = load_words(from + kLow);
            store_words(words, fold(low_nibbles(v), high_nibbles(v)));
            if (kCodeBits == 5) {
                uint32_t bits;
                std::memcpy(&bits, from + kHigh, 4);
                words[4] = bits_to_word(bits);
            }
        }
    }
    static void write(FileRow row, int64_t block, int blocks, const RowStrip& from) {
        for (int b = 0; b < blocks; ++b) {
            uint8_t* to = row.codes + (block + b) * kFileBlock;
            const uint32_t* words = from.words + kBits * b;
            for (int f = 0; f < kFields; ++f)
                std::memcpy(to + f * kFieldBytes, from.fields + (f * blocks + b) * kFieldBytes, kFieldBytes);
            if (kCodeBits == 8) {
                std::memcpy(to + kLow, words, 32);
                continue;
            }
            Words low, high;
            unfold(load_words(words), &low, &high);
            store_words(to + kLow, low | high << 4);
            if (kCodeBits == 5) {
                const uint32_t bits = word_to_bits(words[4]);
                std::memcpy(to + kHigh, &bits, 4);
            }
        }
    }
};

}  // namespace loci
