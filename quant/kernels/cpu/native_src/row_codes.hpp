// Rows of a cache as quant/formats/rows.py says they lie: to floats and back. Every step is exact or rounds once, so
// all levels give the same bits.
namespace {

constexpr int64_t kRowStep = 16;  // columns that are decoded at a time

ALWAYS_INLINE float float_of_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
ALWAYS_INLINE uint32_t bits_of_float(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}
ALWAYS_INLINE float from_ue8m0(uint8_t code) {
    return float_of_bits(code == 0 ? 0x00400000u : static_cast<uint32_t>(code) << 23);
}
ALWAYS_INLINE float from_e4m3(uint8_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const uint32_t sign = static_cast<uint32_t>(code & 128) << 24;
    if (exponent == 0) return float_of_bits(bits_of_float(static_cast<float>(mantissa) * 0x1p-9f) | sign);
    return float_of_bits(sign | static_cast<uint32_t>(exponent + 120) << 23 | static_cast<uint32_t>(mantissa) << 20);
}
// To the nearest, ties to even, of at most 448.
ALWAYS_INLINE uint8_t to_e4m3(float value) {
    const uint32_t bits = bits_of_float(value), sign = bits >> 24 & 128;
    uint32_t magnitude = bits & 0x7fffffffu;
    magnitude = magnitude < 0x43e00000u ? magnitude : 0x43e00000u;  // 448
    const uint32_t normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
    const float shifted = float_of_bits(magnitude) + 0x1p14f;  // its last bits count 2^-9
    const uint32_t small = bits_of_float(shifted) & 15;
    return static_cast<uint8_t>(sign | (magnitude < 0x3c800000u ? small : normal));  // 2^-6
}
// Steps of a half up to 2, of 1 up to 4, then of 2; a code is a sign and the number of a step.
ALWAYS_INLINE uint32_t to_e2m1(float value) {
    const float magnitude = float_of_bits(bits_of_float(value) & 0x7fffffffu);
    constexpr float kRound = 0x1.8p23f;  // added and taken away again it rounds, ties to even
    const float scale = magnitude < 2 ? 2.0f : magnitude < 4 ? 1.0f : 0.5f;
    const float first = magnitude < 2 ? 0.0f : magnitude < 4 ? 2.0f : 4.0f;
    float code = (magnitude * scale + kRound) - kRound + first;
    code = code < 7 ? code : 7.0f;
    const auto number = static_cast<uint32_t>(code);
    return number | (number > 0 && value < 0 ? 8u : 0u);
}
ALWAYS_INLINE uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of_float(value);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
// The code of the smallest power of two that times `limit` is at least `largest`.
ALWAYS_INLINE uint8_t covering_code(float largest, float limit) {
    int of_limit, of_largest;
    const float limit_mantissa = __builtin_frexpf(limit, &of_limit);
    const float mantissa = __builtin_frexpf(largest, &of_largest);
    int code = of_largest - of_limit + (mantissa > limit_mantissa) + 127;
    const int most = 128 - of_limit + 127;
    code = code < 0 ? 0 : code > most ? most : code;
    return static_cast<uint8_t>(code);
}

// Sixteen columns of codes, not scaled; e2m1 twice its value.
template <int64_t Code>
ALWAYS_INLINE void load_codes(const uint8_t* p, F32 (&w)[kRowStep / kLanes]) {
    if constexpr (Code == kRowE2m1) {
        load_twice_e2m1(p, w);
    } else {
        for (int i = 0; i < kRowStep / kLanes; ++i)
            w[i] = Code == kRowE4m3 ? load_e4m3(p + i * kLanes) : load_int8(p + i * kLanes);
    }
}

template <int64_t Code>
void decode_groups(const RowFormat& f, const uint8_t* codes, const uint8_t* scales, float* out) {
    constexpr int64_t kPerByte = Code == kRowE2m1 ? 2 : 1;
    const int64_t coded = f.dim - f.tail;
    for (int64_t first = 0, g = 0; first < coded; first += f.group, ++g) {
        const int64_t end = first + f.group < coded ? first + f.group : coded;
        float scale;
        if (f.scale == kScaleFloat) __builtin_memcpy(&scale, scales + 4 * g, 4);
        else scale = f.scale == kScaleE4m3 ? from_e4m3(scales[g]) : from_ue8m0(scales[g]);
        const F32 factor = splat(Code == kRowE2m1 ? scale * 0.5f : scale);
        F32 w[kRowStep / kLanes];
        int64_t d = first;
        for (; d + kRowStep <= end; d += kRowStep) {
            load_codes<Code>(codes + d / kPerByte, w);
            for (int i = 0; i < kRowStep / kLanes; ++i) store(out + d + i * kLanes, mul(w[i], factor));
        }
        if (d < end) {
            uint8_t rest[kRowStep] = {};
            float values[kRowStep];
            __builtin_memcpy(rest, codes + d / kPerByte, static_cast<size_t>((end - d + kPerByte - 1) / kPerByte));
            load_codes<Code>(rest, w);
            for (int i = 0; i < kRowStep / kLanes; ++i) store(values + i * kLanes, mul(w[i], factor));
            __builtin_memcpy(out + d, values, sizeof(float) * static_cast<size_t>(end - d));
        }
    }
}

// out [dim] of a row
void decode_row(const RowFormat& f, const uint8_t* row, float* out) {
    const int64_t coded = f.dim - f.tail;
    const uint8_t* tail = row + (f.code == kRowE2m1 ? (coded + 1) / 2 : coded);
    const uint8_t* scales = tail + 2 * f.tail;
    if (f.code == kRowE4m3) decode_groups<kRowE4m3>(f, row, scales, out);
    else if (f.code == kRowE2m1) decode_groups<kRowE2m1>(f, row, scales, out);
    else if (f.code == kRowInt8) decode_groups<kRowInt8>(f, row, scales, out);
    int64_t d = 0;
    for (; d + kLanes <= f.tail; d += kLanes) store(out + coded + d, load_bf16(tail + 2 * d));
    for (; d < f.tail; ++d) {
        uint16_t upper;
        __builtin_memcpy(&upper, tail + 2 * d, 2);
        out[coded + d] = float_of_bits(static_cast<uint32_t>(upper) << 16);
    }
}

// x [dim] to a row, which begins as zeros
void encode_row(const RowFormat& f, const float* x, uint8_t* row) {
    const int64_t coded = f.dim - f.tail;
    uint8_t* tail = row + (f.code == kRowE2m1 ? (coded + 1) / 2 : coded);
    uint8_t* scales = tail + 2 * f.tail;
    const float limit = f.code == kRowE4m3 ? 448.0f : f.code == kRowE2m1 ? 6.0f : 127.0f;
    for (int64_t first = 0, g = 0; first < coded; first += f.group, ++g) {
        const int64_t end = first + f.group < coded ? first + f.group : coded;
        uint32_t most = 0;  // magnitudes order like integers
        for (int64_t d = first; d < end; ++d) {
            const uint32_t magnitude = bits_of_float(x[d]) & 0x7fffffffu;
            most = magnitude > most ? magnitude : most;
        }
        const float largest = float_of_bits(most);
        float scale;
        if (f.scale == kScaleFloat) {
            scale = largest / limit;
            scale = scale > 0x1p-126f ? scale : 0x1p-126f;
            __builtin_memcpy(scales + 4 * g, &scale, 4);
        } else if (f.scale == kScaleE4m3) {
            scales[g] = to_e4m3(largest / limit);
            scale = from_e4m3(scales[g]);
        } else {
            scales[g] = covering_code(largest, limit);
            scale = from_ue8m0(scales[g]);
        }
        if (scale == 0) continue;  // codes of zero
        if (f.code == kRowE4m3) {
            for (int64_t d = first; d < end; ++d) row[d] = to_e4m3(x[d] / scale);
        } else if (f.code == kRowE2m1) {
            for (int64_t d = first; d < end; ++d)
                row[d / 2] = static_cast<uint8_t>(row[d / 2] | to_e2m1(x[d] / scale) << (d % 2 * 4));
        } else {
            for (int64_t d = first; d < end; ++d) {
                float value = (x[d] / scale + 0x1.8p23f) - 0x1.8p23f;
                value = value > limit ? limit : value < -limit ? -limit : value;
                row[d] = static_cast<uint8_t>(static_cast<int8_t>(value));
            }
        }
    }
    for (int64_t d = 0; d < f.tail; ++d) {
        const uint16_t upper = to_bf16(x[coded + d]);
        __builtin_memcpy(tail + 2 * d, &upper, 2);
    }
}

// x [n] times the orthonormal Hadamard matrix; n is a power of two.
void hadamard(float* x, int64_t n, float factor) {
    for (int64_t step = 1; step < n; step *= 2)
        for (int64_t first = 0; first < n; first += 2 * step)
            for (int64_t i = first; i < first + step; ++i) {
                const float a = x[i], b = x[i + step];
                x[i] = a + b;
                x[i + step] = a - b;
            }
    for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

}  // namespace
