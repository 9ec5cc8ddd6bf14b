// As file_rows.hpp, for the GGUF types of 256 values: a strip is one of their blocks.
#pragma once
#include "file_rows.hpp"

namespace loci {

template <int kCodeBits, int kFileBlock, int kWide, int kNarrow>
struct SuperRows {
    static constexpr int kBits = kCodeBits, kStripBlocks = 8;
    static constexpr bool kByBlock = false;
    static Header header(int) { return {kWide, 2, kNarrow}; }
    static int64_t code_bytes(const Matrix& m) { return m.cols / 256 * kFileBlock; }
    static int64_t scale_bytes(const Matrix&) { return 0; }
    static uint8_t* at(FileRow row, int64_t block) {
        uint8_t* p = row.codes + block / 8 * kFileBlock;
        for (int k = 0; k < kFileBlock; k += 64) __builtin_prefetch(p + kFileAhead + k);
        return p;
    }
};

// Nibbles of 64 bytes, low ones of blocks 2p, high ones of 2p + 1 (apart 1), or of blocks p and p + 2 (apart 2).
template <int kBits, int kApart>
void nibbles_to_words(const uint8_t* bytes, uint32_t* words) {
    for (int i = 0; i < 4; ++i) {
        const int low = kApart == 1 ? 2 * i : i / 2 * 4 + i % 2;
        const Words a = load_words(bytes + 32 * i), b = load_words(bytes + 32 * i + 16);
        store_words(words + kBits * low, fold(low_nibbles(a), low_nibbles(b)));
        store_words(words + kBits * (low + kApart), fold(high_nibbles(a), high_nibbles(b)));
    }
}
template <int kBits, int kApart>
void words_to_nibbles(const uint32_t* words, uint8_t* bytes) {
    for (int i = 0; i < 4; ++i) {
        const int low = kApart == 1 ? 2 * i : i / 2 * 4 + i % 2;
        Words a[2], b[2];
        for (int k = 0; k < 2; ++k) unfold(load_words(words + kBits * (low + k * kApart)), &a[k], &b[k]);
        store_words(bytes + 32 * i, a[0] | a[1] << 4);
        store_words(bytes + 32 * i + 16, b[0] | b[1] << 4);
    }
}

// Header of Q4_K and Q5_K: d, dmin, eight scales, eight minima.
inline void six_bits_to_bytes(const uint8_t* packed, uint8_t* bytes) {
    for (int k = 0; k < 4; ++k)
        for (int which = 0; which < 2; ++which) {
            const int low = packed[8 + k] >> 4 * which & 15;
            bytes[8 * which + k] = packed[4 * which + k] & 63;
            bytes[8 * which + 4 + k] = static_cast<uint8_t>(low | packed[4 * which + k] >> 6 << 4);
        }
}
inline void bytes_to_six_bits(const uint8_t* bytes, uint8_t* packed) {
    for (int k = 0; k < 4; ++k) {
        for (int which = 0; which < 2; ++which)
            packed[4 * which + k] = static_cast<uint8_t>(bytes[8 * which + k] | bytes[8 * which + 4 + k] >> 4 << 6);
        packed[8 + k] = static_cast<uint8_t>((bytes[4 + k] & 15) | bytes[12 + k] << 4);
    }
}

struct Q2Rows : SuperRows<2, 84, 2, 16> {
    static void read(FileRow row, int64_t block, int, RowStrip& to) {
        const uint8_t* from = at(row, block);
        std::memcpy(to.fields, from + 80, 4);
        std::memcpy(to.fields + 4, from, 16);
        for (int h = 0; h < 2; ++h) fields_to_words<2>(from + 16 + 32 * h, to.words + 8 * h, 2);
    }
    static void write(FileRow row, int64_t block, int, const RowStrip& from) {
        uint8_t* to = at(row, block);
        std::memcpy(to + 80, from.fields, 4);
        std::memcpy(to, from.fields + 4, 16);
        for (int h = 0; h < 2; ++h) words_to_fields<2>(from.words + 8 * h, 2, to + 16 + 32 * h);
    }
};

struct Q3Rows : SuperRows<3, 110, 1, 16> {
    static void read(FileRow row, int64_t block, int, RowStrip& to) {
        const uint8_t *from = at(row, block), *packed = from + 96;
        std::memcpy(to.fields, from + 108, 2);
        for (int k = 0; k < 16; ++k) {
            const int low = packed[k % 8] >> (k < 8 ? 0 : 4) & 15, high = packed[8 + k % 4] >> k / 4 * 2 & 3;
            to.fields[2 + k] = static_cast<uint8_t>((low | high << 4) - 32);
        }
        for (int h = 0; h < 2; ++h) fields_to_words<2>(from + 32 + 32 * h, to.words + 12 * h, 3);
        fields_to_words<1>(from, to.words + 2, 3);
    }
    static void write(FileRow row, int64_t block, int, const RowStrip& from) {
        uint8_t *to = at(row, block), *packed = to + 96;
        std::memcpy(to + 108, from.fields, 2);
        std::memset(packed, 0, 12);
        for (int k = 0; k < 16; ++k) {
            const int scale = (from.fields[2 + k] + 32) & 63;
            packed[k % 8] = static_cast<uint8_t>(packed[k % 8] | (scale & 15) << (k < 8 ? 0 : 4));
            packed[8 + k % 4] = static_cast<uint8_t>(packed[8 + k % 4] | scale >> 4 << k / 4 * 2);
        }
        for (int h = 0; h < 2; ++h) words_to_fields<2>(from.words + 12 * h, 3, to + 32 + 32 * h);
        words_to_fields<1>(from.words + 2, 3, to);
    }
};

struct Q4Rows : SuperRows<4, 144, 2, 16> {
    static void read(FileRow row, int64_t block, int, RowStrip& to) {
        const uint8_t* from = at(row, block);
        std::memcpy(to.fields, from, 4);
        six_bits_to_bytes(from + 4, to.fields + 4);
        nibbles_to_words<4, 1>(from + 16, to.words);
    }
    static void write(FileRow row, int64_t block, int, const RowStrip& from) {
        uint8_t* to = at(row, block);
        std::memcpy(to, from.fields, 4);
        bytes_to_six_bits(from.fields + 4, to + 4);
        words_to_nibbles<4, 1>(from.words, to + 16);
    }
};

struct Q5Rows : SuperRows<5, 176, 2, 16> {
    static void read(FileRow row, int64_t block, int, RowStrip& to) {
        const uint8_t* from = at(row, block);
        std::memcpy(to.fields, from, 4);
        six_bits_to_bytes(from + 4, to.fields + 4);
        nibbles_to_words<5, 1>(from + 48, to.words);
        fields_to_words<1>(from + 16, to.words + 4, 5);
    }
    static void write(FileRow row, int64_t block, int, const RowStrip& from) {
        uint8_t* to = at(row, block);
        std::memcpy(to, from.fields, 4);
        bytes_to_six_bits(from.fields + 4, to + 4);
        words_to_nibbles<5, 1>(from.words, to + 48);
        words_to_fields<1>(from.words + 4, 5, to + 16);
    }
};

struct Q6Rows : SuperRows<6, 210, 1, 16> {
    static void read(FileRow row, int64_t block, int, RowStrip& to) {
        const uint8_t* from = at(row, block);
        std::memcpy(to.fields, from + 208, 2);
        std::memcpy(to.fields + 2, from + 192, 16);
        nibbles_to_words<6, 2>(from, to.words);
        for (int h = 0; h < 2; ++h) fields_to_words<2>(from + 128 + 32 * h, to.words + 24 * h + 4, 6);
    }
    static void write(FileRow row, int64_t block, int, const RowStrip& from) {
        uint8_t* to = at(row, block);
        std::memcpy(to + 208, from.fields, 2);
        std::memcpy(to + 192, from.fields + 2, 16);
        words_to_nibbles<6, 2>(from.words, to);
        for (int h = 0; h < 2; ++h) words_to_fields<2>(from.words + 24 * h + 4, 6, to + 128 + 32 * h);
    }
};

struct Iq4XsRows : SuperRows<4, 136, 1, 8> {
    static void read(FileRow row, int64_t block, int, RowStrip& to) {
        const uint8_t* from = at(row, block);
        std::memcpy(to.fields, from, 2);
        for (int k = 0; k < 8; ++k) {
            const int low = from[4 + k / 2] >> k % 2 * 4 & 15, high = from[2 + k / 4] >> k % 4 * 2 & 3;
            to.fields[2 + k] = static_cast<uint8_t>((low | high << 4) - 32);
            const Words v = load_words(from + 8 + 16 * k);
            store_words(to.words + 4 * k, fold(low_nibbles(v), high_nibbles(v)));
        }
    }
    static void write(FileRow row, int64_t block, int, const RowStrip& from) {
        uint8_t* to = at(row, block);
        std::memcpy(to, from.fields, 2);
        std::memset(to + 2, 0, 6);
        for (int k = 0; k < 8; ++k) {
            const int scale = (from.fields[2 + k] + 32) & 63;
            to[4 + k / 2] = static_cast<uint8_t>(to[4 + k / 2] | (scale & 15) << k % 2 * 4);
            to[2 + k / 4] = static_cast<uint8_t>(to[2 + k / 4] | scale >> 4 << k % 4 * 2);
            Words low, high;
            unfold(load_words(from.words + 4 * k), &low, &high);
            store_words(to + 8 + 16 * k, low | high << 4);
        }
    }
};

}  // namespace loci
