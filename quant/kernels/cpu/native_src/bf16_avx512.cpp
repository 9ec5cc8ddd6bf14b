// The kernels of bf16.hpp for AVX-512 with BF16.
#include "bf16.hpp"

#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,avx2,fma,f16c")
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define UNROLL_TOKENS _Pragma("GCC unroll 12")

namespace loci {
#include "simd_avx512.hpp"
#include "formats.hpp"
#include "formats_gguf.hpp"

namespace {

constexpr int kVectors = kPanelRows / kLanes;

// Two columns of sixteen rows, rounded to nearest even, side by side in their lanes.
ALWAYS_INLINE I32 pair_of(F32 even, F32 odd) {
    alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512bh both = _mm512_cvtne2ps_pbh(odd, even);
    return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), reinterpret_cast<const __m512i&>(both));
}

ALWAYS_INLINE void store_pair(uint32_t* tile, int64_t pair, int vector, I32 value) {
    _mm512_storeu_si512(tile + pair * kPanelRows + vector * kLanes, value);
}

// Where the strip begins that has column `first`, a multiple of a strip's columns.
template <class Format>
int64_t strip_at(const Format& format, int64_t first) {
    constexpr int kBlocks = Format::kStrip / kBlock;
    return Format::kPrefixBytes +
           first / Format::kStrip * (format.header_bytes(kBlocks) + kBlocks * Format::kBlockBytes);
}

// Packed codes of any format: as numbers, less their offset, times their scale, plus what is added to them.
template <class Format, int kNumber>
void decode_codes(const Panel& panel, int64_t first, int64_t columns, uint32_t* tile) {
    const Format format(panel.scales);
    const F32 offset = splat(static_cast<float>(Format::kCorrects ? offset_of(kNumber) : 0));
    constexpr int kGroups = 8 / Format::kParts;
    F32 factors[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        factors[v] = splat(Format::unit(3));
        if constexpr (Format::kPrefixBytes != 0)
            factors[v] = mul(factors[v], load_float(reinterpret_cast<const float*>(panel.codes) + v * kLanes));
    }
    const uint8_t* header = panel.codes + strip_at(format, first);
    for (int64_t c = 0; c < columns; c += Format::kStrip) {
        const int64_t left = columns - c < Format::kStrip ? columns - c : Format::kStrip;
        const int blocks = static_cast<int>(left / kBlock);
        const uint8_t* codes = header + format.header_bytes(blocks);
        for (int b = 0; b < blocks; ++b, codes += Format::kBlockBytes, tile += kBlock / 2 * kPanelRows)
            for (int part = 0; part < Format::kParts; ++part)
                for (int v = 0; v < kVectors; ++v) {
                    const int row = v * kLanes;
                    const F32 scale = mul(format.scale(header, b, part, row), factors[v]);
                    UNROLL for (int i = 0; i < kGroups; ++i) {
                        const int g = part * kGroups + i;
                        F32 values[4];
                        UNROLL for (int digit = 0; digit < Format::kDigits; ++digit) {
                            const Bytes w = format.group(codes + 4 * row, g, digit);
                            UNROLL for (int k = 0; k < 4; ++k) {
                                const I32 code = _mm512_and_si512(_mm512_srli_epi32(w, 8 * static_cast<unsigned>(k)),
                                                                  _mm512_set1_epi32(255));
                                const F32 value = to_float(code);
                                values[k] = digit == 0 ? _mm512_sub_ps(value, offset)
                                                       : fma(value, splat(digit == 1 ? 0x1p-7f : 0x1p-14f), values[k]);
                            }
                        }
                        UNROLL for (int k = 0; k < 4; ++k) {
                            values[k] = mul(values[k], scale);
                            if constexpr (Format::kConstant)
                                values[k] = format.constant(header, blocks, b, part, row, 1.0f, values[k]);
                        }
                        store_pair(tile, 2 * g, v, pair_of(values[0], values[1]));
                        store_pair(tile, 2 * g + 1, v, pair_of(values[2], values[3]));
                    }
                }
        header = codes;
    }
}

// e2m1 with powers of two as scales, whose product bfloat16 holds: the code's number is looked up, and the scale added
// to its exponent where it is not zero. Scales beyond 2^-125 and 2^125 count as these.
struct E2m1 {
    alignas(64) uint16_t numbers[32];  // twice the sixteen
};
constexpr E2m1 e2m1_numbers() {
    constexpr uint16_t kMagnitudes[8] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0};
    E2m1 table{};
    for (int i = 0; i < 32; ++i) table.numbers[i] = static_cast<uint16_t>(kMagnitudes[i & 7] | (i & 8 ? 0x8000 : 0));
    return table;
}
constexpr E2m1 kE2m1Numbers = e2m1_numbers();

void decode_mxfp4(const Panel& panel, int64_t first, int64_t columns, uint32_t* tile) {
    const Mxfp4 format(panel.scales);
    const __m512i numbers = _mm512_load_si512(kE2m1Numbers.numbers);
    // the first two bytes of each lane as words, and the last two
    const __m512i spread[2] = {
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1)),
        _mm512_broadcast_i32x4(_mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1))};
    const uint8_t* header = panel.codes + strip_at(format, first);
    for (int64_t c = 0; c < columns; c += Mxfp4::kStrip) {
        const int64_t left = columns - c < Mxfp4::kStrip ? columns - c : Mxfp4::kStrip;
        const int blocks = static_cast<int>(left / kBlock);
        const uint8_t* codes = header + Mxfp4::header_bytes(blocks);
        for (int b = 0; b < blocks; ++b, codes += Mxfp4::kBlockBytes, tile += kBlock / 2 * kPanelRows)
            for (int v = 0; v < kVectors; ++v) {
                const __m128i bytes =
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(header + b * kPanelRows + v * kLanes));
                I32 power = _mm512_cvtepu8_epi32(bytes);
                power = _mm512_min_epi32(_mm512_max_epi32(power, splat_int(2)), splat_int(252));
                power = _mm512_slli_epi32(sub(power, splat_int(127)), 7);
                const I32 powers = _mm512_mask_blend_epi16(0xaaaaaaaau, power, _mm512_slli_epi32(power, 16));
                UNROLL for (int span = 0; span < 4; ++span) {
                    const Bytes w = load_bytes(codes + span * 4 * kPanelRows + 4 * v * kLanes);
                    UNROLL for (int half = 0; half < 2; ++half) {
                        const __m512i low = _mm512_shuffle_epi8(w, spread[half]);
                        const __m512i nibbles[2] = {low, _mm512_srli_epi16(low, 4)};
                        UNROLL for (int k = 0; k < 2; ++k) {
                            const __m512i value = _mm512_permutexvar_epi16(nibbles[k], numbers);
                            const __mmask32 some = _mm512_test_epi16_mask(value, _mm512_set1_epi16(0x7fff));
                            store_pair(tile, 4 * span + 2 * k + half, v,
                                       _mm512_mask_add_epi16(value, some, value, powers));
                        }
                    }
                }
            }
        header = codes;
    }
}

// e4m3 times a scale for some columns of all rows.
void decode_fp8(const Panel& panel, int64_t first, int64_t columns, uint32_t* tile) {
    const E4m3 e4m3;
    const int64_t tile_cols = panel.scales.tile_cols;
    for (int64_t c = first; c < first + columns; c += 2, tile += kPanelRows) {
        const int64_t at = c / tile_cols;
        float scale;
        if (panel.scales.is_float) {
            scale = static_cast<const float*>(panel.scales.row)[at];
        } else {
            const uint32_t code = static_cast<const uint8_t*>(panel.scales.row)[at];
            const uint32_t bits = code ? code << 23 : 0x00400000u;
            __builtin_memcpy(&scale, &bits, 4);
        }
        F32 w[2][kVectors];  // even and odd column
        e4m3.decode(panel.codes + c * kPanelRows, 0, w);
        for (int v = 0; v < kVectors; ++v)
            store_pair(tile, 0, v, pair_of(mul(w[0][v], splat(scale)), mul(w[1][v], splat(scale))));
    }
}

// Plain rows of bfloat16: pairs of sixteen rows transposed, sixteen pairs at a time.
ALWAYS_INLINE void transpose(I32 (&m)[16]) {
    I32 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; ++k) {
            m[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
            m[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int k = 0; k < 4; ++k) {
            t[i + k] = _mm512_shuffle_i32x4(m[i + k], m[i + k + 4], 0x88);
            t[i + k + 4] = _mm512_shuffle_i32x4(m[i + k], m[i + k + 4], 0xdd);
        }
    for (int k = 0; k < 8; ++k) {
        m[k] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0x88);
        m[k + 8] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0xdd);
    }
}

void decode_rows(const Panel& panel, int64_t first, int64_t columns, uint32_t* tile) {
    const uint16_t* rows = reinterpret_cast<const uint16_t*>(panel.codes);
    for (int v = 0; v < kVectors; ++v)
        for (int64_t pair = 0; pair < columns / 2; pair += kLanes) {
            const int64_t left = columns / 2 - pair < kLanes ? columns / 2 - pair : kLanes;
            const __mmask16 some = static_cast<__mmask16>((1u << left) - 1);
            I32 m[16];
            for (int r = 0; r < kLanes; ++r) {
                const int64_t row = v * kLanes + r;
                m[r] = row < panel.rows ? _mm512_maskz_loadu_epi32(some, rows + row * panel.cols + first + 2 * pair)
                                        : _mm512_setzero_si512();
            }
            transpose(m);
            for (int k = 0; k < left; ++k) store_pair(tile, pair + k, v, m[k]);
        }
}

void pack(const float* const* rows, int64_t tokens, int64_t pairs, uint32_t* packed) {
    const __mmask16 lanes = static_cast<__mmask16>((1u << tokens) - 1);
    for (int64_t pair = 0; pair < pairs; pair += kLanes) {
        const int64_t left = pairs - pair < kLanes ? pairs - pair : kLanes;
        const uint32_t some = static_cast<uint32_t>((uint64_t{1} << 2 * left) - 1);  // columns
        I32 m[16];
        for (int t = 0; t < kLanes; ++t) {
            if (t < tokens) {
                const float* x = rows[t] + 2 * pair;
                const __m512bh both =
                    _mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(static_cast<__mmask16>(some >> 16), x + kLanes),
                                        _mm512_maskz_loadu_ps(static_cast<__mmask16>(some), x));
                m[t] = reinterpret_cast<const __m512i&>(both);
            } else {
                m[t] = _mm512_setzero_si512();
            }
        }
        transpose(m);
        for (int k = 0; k < left; ++k) _mm512_mask_storeu_epi32(packed + (pair + k) * tokens, lanes, m[k]);
    }
}

constexpr int kAskedAhead = 768;  // bytes of activations, which come from beyond the second-level cache

template <int T>
void multiply(const uint32_t* tile, int64_t pairs, const uint32_t* x, const float* sums, float* out, int64_t stride) {
    F32 y[T][kVectors];
    UNROLL_TOKENS for (int t = 0; t < T; ++t) for (int v = 0; v < kVectors; ++v) y[t][v] =
        sums == nullptr ? zero() : load_float(sums + t * kPanelRows + v * kLanes);
    for (int64_t p = 0; p < pairs; ++p, tile += kPanelRows, x += T) {
        __m512bh w[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            const __m512i bits = _mm512_loadu_si512(tile + v * kLanes);
            w[v] = reinterpret_cast<const __m512bh&>(bits);
        }
        _mm_prefetch(reinterpret_cast<const char*>(x) + kAskedAhead, _MM_HINT_T0);
        UNROLL_TOKENS for (int t = 0; t < T; ++t) {
            const __m512i bits = _mm512_set1_epi32(static_cast<int>(x[t]));
            for (int v = 0; v < kVectors; ++v)
                y[t][v] = _mm512_dpbf16_ps(y[t][v], w[v], reinterpret_cast<const __m512bh&>(bits));
        }
    }
    UNROLL_TOKENS for (int t = 0; t < T; ++t) for (int v = 0; v < kVectors; ++v)
        store(out + t * stride + v * kLanes, y[t][v]);
}

void round_to_pairs(const float* x, int64_t n, uint32_t* pairs) {
    uint16_t* out = reinterpret_cast<uint16_t*>(pairs);
    for (int64_t i = 0; i < n; i += kLanes) {
        const __mmask16 some = n - i < kLanes ? static_cast<__mmask16>((1u << (n - i)) - 1) : 0xffff;
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, x + i));
        _mm256_mask_storeu_epi16(out + i, some, reinterpret_cast<const __m256i&>(rounded));
    }
}

template <int... T>
constexpr void add_multiply(Bf16Kernels& kernels, std::integer_sequence<int, T...>) {
    ((kernels.multiply[T + 1] = multiply<T + 1>), ...);
}

constexpr Bf16Kernels make_kernels() {
    Bf16Kernels kernels{};
    kernels.decode[kMxfp4] = decode_mxfp4;
    kernels.decode[kMxfp4Blocks] = decode_mxfp4;
    kernels.decode[kFp8] = decode_fp8;
    kernels.decode[kBf16] = decode_rows;
    kernels.decode[kNvfp4] = decode_codes<Nvfp4, kNvfp4>;
    kernels.decode[kNf4] = decode_codes<Nf4, kNf4>;
    kernels.decode[kInt4] = decode_codes<Int4<Bf16, false>, kInt4>;
    kernels.decode[kInt4Half] = decode_codes<Int4<Half, false>, kInt4Half>;
    kernels.decode[kInt4Offset] = decode_codes<Int4<Bf16, true>, kInt4Offset>;
    kernels.decode[kInt4OffsetFloat] = decode_codes<Int4<Single, true>, kInt4OffsetFloat>;
    kernels.decode[kQ4_0] = decode_codes<Q4_0, kQ4_0>;
    kernels.decode[kQ4_1] = decode_codes<Q4_1, kQ4_1>;
    kernels.decode[kQ5_0] = decode_codes<Q5_0, kQ5_0>;
    kernels.decode[kQ5_1] = decode_codes<Q5_1, kQ5_1>;
    kernels.decode[kQ8_0] = decode_codes<Q8_0, kQ8_0>;
    kernels.decode[kQ2_K] = decode_codes<Q2_K, kQ2_K>;
    kernels.decode[kQ3_K] = decode_codes<Q3_K, kQ3_K>;
    kernels.decode[kQ4_K] = decode_codes<Q4_K, kQ4_K>;
    kernels.decode[kQ5_K] = decode_codes<Q5_K, kQ5_K>;
    kernels.decode[kQ6_K] = decode_codes<Q6_K, kQ6_K>;
    kernels.decode[kIq4Nl] = decode_codes<Iq4Nl, kIq4Nl>;
    kernels.decode[kIq4Xs] = decode_codes<Iq4Xs, kIq4Xs>;
    add_multiply(kernels, std::make_integer_sequence<int, kMostGrouped>());
    kernels.pack = pack;
    kernels.round = round_to_pairs;
    return kernels;
}

}  // namespace

extern const Bf16Kernels kBf16Avx512 = make_kernels();

}  // namespace loci

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
