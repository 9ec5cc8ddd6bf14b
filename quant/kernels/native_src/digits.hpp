// Activations as fixed-point digits, and the gate of a gated feed-forward. Plain loops over 32 values, which
// the compiler turns into vectors of whatever width it is allowed.
namespace {

// Largest magnitude of 32 values, as bits: magnitudes of floats order like integers, NaN above infinity.
ALWAYS_INLINE uint32_t largest_bits(const float* x) {
    uint32_t bits[kBlock], largest = 0;
    __builtin_memcpy(bits, x, sizeof bits);
    for (int i = 0; i < kBlock; ++i) {
        const uint32_t magnitude = bits[i] & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

// Rounds to the nearest integer, |v| < 2^22.
ALWAYS_INLINE int32_t round_small(float v) {
    const float shifted = v + 12582912.0f;  // 1.5 * 2^23
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    return bits - 0x4b400000;
}

template <int D>
void to_digits(const float* x, int64_t cols, int offset, bool halves, Block<D>* out) {
    constexpr float kLargest = D == 1 ? 127.0f : 1048576.0f;  // 64 * 128 * 128
    for (int64_t c = 0; c < cols; c += kBlock, ++out, x += kBlock) {
        const uint32_t bits = largest_bits(x);
        float largest;
        __builtin_memcpy(&largest, &bits, 4);
        // Below 1e-32 the block counts as zero; infinities and NaN make the scale NaN, and the result with it.
        const bool usable = largest > 1e-32f && bits < 0x7f800000u;
        const float inverse = usable ? kLargest / largest : 0.0f;
        int32_t fixed[kBlock];
        for (int i = 0; i < kBlock; ++i) fixed[i] = usable ? round_small(x[i] * inverse) : 0;
        int32_t sums[D] = {}, half_sums[D] = {};
        for (int d = D - 1; d > 0; --d) {
            int32_t sum = 0, half = 0;
            for (int i = 0; i < kBlock; ++i) {
                const int32_t digit = ((fixed[i] + 64) & 127) - 64;
                fixed[i] = (fixed[i] - digit) >> 7;
                out->digits[d][i] = static_cast<int8_t>(digit);
                sum += digit;
                half += i < 16 ? digit : 0;
            }
            sums[d] = sum;
            half_sums[d] = half;
        }
        for (int i = 0; i < kBlock; ++i) {
            out->digits[0][i] = static_cast<int8_t>(fixed[i]);
            sums[0] += fixed[i];
            half_sums[0] += i < 16 ? fixed[i] : 0;
        }
        const float scale = bits >= 0x7f800000u ? __builtin_nanf("") : usable ? largest / kLargest : 0.0f;
        float sum = 0;
        for (int d = 0; d < D; ++d) {
            out->correction[0][d] = -offset * (halves ? half_sums[d] : sums[d]);
            out->correction[1][d] = -offset * (sums[d] - half_sums[d]);
            sum = sum * 128.0f + static_cast<float>(sums[d]);
        }
        out->scale = scale;
        out->sum = scale * sum;
    }
}

// e^-x for x clamped to +-87, within 2 ulp: 2^n times a polynomial in the remainder.
ALWAYS_INLINE float exp_negative(float x) {
    const float t = -(x > 87.0f ? 87.0f : x < -87.0f ? -87.0f : x);
    const float shifted = t * 1.44269504f + 12582912.0f;
    int32_t n;
    __builtin_memcpy(&n, &shifted, 4);
    n -= 0x4b400000;
    const float whole = shifted - 12582912.0f;
    const float r = (t - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t power = (n + 127) << 23;
    float two_n;
    __builtin_memcpy(&two_n, &power, 4);
    return p * two_n;
}

void swiglu(const float* gate, const float* up, float limit, int64_t n, float* h) {
    for (int64_t i = 0; i < n; ++i) {
        const float g = gate[i] > limit ? limit : gate[i];  // NaN passes through
        const float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
        h[i] = g / (1.0f + exp_negative(g)) * u;
    }
}

}  // namespace
