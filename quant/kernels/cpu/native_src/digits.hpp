// Activations as fixed-point digits, and the gate of a gated feed-forward.
namespace {

template <int D>
void to_digits(const float* x, int64_t cols, int offset, bool halves, Block<D>* out) {
    constexpr float kLargest = D == 1 ? 127.0f : 1048576.0f;  // 64 * 128 * 128
    constexpr int kVectors = kBlock / kLanes;
    for (int64_t c = 0; c < cols; c += kBlock, ++out, x += kBlock) {
        F32 values[kVectors];
        for (int i = 0; i < kVectors; ++i) values[i] = load_float(x + i * kLanes);
        // magnitudes of floats order like integers, NaN above infinity
        I32 magnitudes = magnitude_bits(values[0]);
        for (int i = 1; i < kVectors; ++i) magnitudes = larger(magnitudes, magnitude_bits(values[i]));
        const int32_t bits = largest(magnitudes);
        float most;
        __builtin_memcpy(&most, &bits, 4);
        // Below 1e-32 the block counts as zero; infinities and NaN make the scale NaN, and the result with it.
        const bool finite = bits < 0x7f800000, usable = finite && most > 1e-32f;
        const F32 inverse = splat(usable ? kLargest / most : 0.0f);
        I32 fixed[kVectors];
        for (int i = 0; i < kVectors; ++i) fixed[i] = round_to_int(mul(finite ? values[i] : zero(), inverse));
        int32_t sums[D][2];  // of the first and second 16 columns, or of all 32 in the first entry
        for (int d = D - 1; d >= 0; --d) {
            I32 halves_of[2] = {};
            for (int i = 0; i < kVectors; ++i) {
                I32 digit = fixed[i];
                if (d > 0) {
                    fixed[i] = shift_right_7(add(digit, splat_int(64)));
                    digit = sub(digit, shift_left_7(fixed[i]));
                }
                store_bytes(out->digits[d] + i * kLanes, digit);
                I32& half = halves_of[2 * i / kVectors];
                half = add(half, digit);
            }
            sums[d][0] = reduce(halves ? halves_of[0] : add(halves_of[0], halves_of[1]));
            sums[d][1] = halves ? reduce(halves_of[1]) : 0;
        }
        float sum = 0;
        for (int d = 0; d < D; ++d) {
            for (int half = 0; half < 2; ++half) out->correction[half][d] = -offset * sums[d][half];
            sum = sum * 128.0f + static_cast<float>(sums[d][0] + sums[d][1]);
        }
        out->scale = finite ? usable ? most / kLargest : 0.0f : __builtin_nanf("");
        out->sum = out->scale * sum;
    }
}

// e^-x for x clamped to +-87, within 2 ulp: 2^n times a polynomial in the remainder. F is float or a vector of floats,
// N the integer or vector of integers of its size.
template <class F, class N>
ALWAYS_INLINE F exp_negative_of(F x) {
    const F most = F{} + 87.0f;
    const F t = -(x > most ? most : x < -most ? -most : x);
    const F shifted = t * 1.44269504f + 12582912.0f;
    N n;
    __builtin_memcpy(&n, &shifted, sizeof n);
    n -= 0x4b400000;
    const F whole = shifted - 12582912.0f;
    const F r = (t - whole * 0.693359375f) + whole * 2.12194440e-4f;
    F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const N power = (n + 127) << 23;
    F two_n;
    __builtin_memcpy(&two_n, &power, sizeof two_n);
    return p * two_n;
}

ALWAYS_INLINE float exp_negative(float x) { return exp_negative_of<float, int32_t>(x); }

void swiglu(const float* gate, const float* up, const Gating& gating, int64_t n, float* h) {
    const float limit = gating.limit, alpha = gating.alpha, shift = gating.shift;
    for (int64_t i = 0; i < n; ++i) {
        const float g = gate[i] > limit ? limit : gate[i];  // NaN passes through
        const float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
        h[i] = g / (1.0f + exp_negative(alpha * g)) * (u + shift);
    }
}

}  // namespace
