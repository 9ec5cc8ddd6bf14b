// What a layer does to each of its rows besides products with weights: plain loops, which the compiler turns into
// vectors. Products and sums are not contracted (-ffp-contract=off), so that a value has the same bits wherever in a
// vector, or behind the last whole one, it is computed.
namespace {

constexpr int64_t kSpanFloats = 512;  // columns that stay in the first-level cache between passes

// out [dim] = sum over n parts [dim], `apart` from one another, of weights[i * weight_step] * part, in that order;
// begun with first_weight * first where there is one.
void sum_parts(const float* parts, int64_t apart, const float* weights, int64_t weight_step, int64_t n, int64_t dim,
               const float* first, float first_weight, float* out) {
    for (int64_t begin = 0; begin < dim; begin += kSpanFloats) {
        const int64_t size = dim - begin < kSpanFloats ? dim - begin : kSpanFloats;
        float* to = out + begin;
        if (first != nullptr)
            for (int64_t d = 0; d < size; ++d) to[d] = first_weight * first[begin + d];
        else
            for (int64_t d = 0; d < size; ++d) to[d] = 0;
        for (int64_t i = 0; i < n; ++i) {
            const float* part = parts + i * apart + begin;
            const float weight = weights[i * weight_step];
            for (int64_t d = 0; d < size; ++d) to[d] += weight * part[d];
        }
    }
}

constexpr int64_t kNormLanes = 16;  // at every level: sums have one order
typedef float NormLanes __attribute__((vector_size(4 * kNormLanes)));

ALWAYS_INLINE NormLanes load_norm(const float* x) {
    NormLanes lanes;
    __builtin_memcpy(&lanes, x, sizeof lanes);
    return lanes;
}

// Sixteen sums side by side; in double from span to span, so that long rows lose nothing.
double sum_of_squares(const float* x, int64_t n) {
    double total = 0;
    int64_t i = 0;
    while (i + kNormLanes <= n) {
        const int64_t end = i + kSpanFloats < n ? i + kSpanFloats : n;
        NormLanes sums = {};
        for (; i + kNormLanes <= end; i += kNormLanes) sums += load_norm(x + i) * load_norm(x + i);
        for (int64_t lane = 0; lane < kNormLanes; ++lane) total += static_cast<double>(sums[lane]);
    }
    for (; i < n; ++i) total += static_cast<double>(x[i] * x[i]);
    return total;
}

// A row divided by the root of its mean square, times a weight or nothing.
void normalise(const float* x, const float* weight, int64_t cols, float eps, float* out) {
    const auto mean = static_cast<float>(sum_of_squares(x, cols) / static_cast<double>(cols));
    const float factor = 1.0f / __builtin_sqrtf(mean + eps);
    int64_t i = 0;
    for (; i + kNormLanes <= cols; i += kNormLanes) {
        NormLanes lanes = load_norm(x + i) * factor;
        if (weight != nullptr) lanes *= load_norm(weight + i);
        __builtin_memcpy(out + i, &lanes, sizeof lanes);
    }
    for (; i < cols; ++i) out[i] = x[i] * factor * (weight != nullptr ? weight[i] : 1.0f);
}

void sigmoid(const float* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = 1.0f / (1.0f + exp_negative(x[i]));
}

// Pairs of channels times cosine and sine, side by side in turns.
void rotate(const float* x, const float* turns, int64_t pairs, float* out) {
    for (int64_t p = 0; p < pairs; ++p) {
        const float a = x[2 * p], b = x[2 * p + 1], c = turns[2 * p], s = turns[2 * p + 1];
        out[2 * p] = a * c - b * s;
        out[2 * p + 1] = a * s + b * c;
    }
}

// The mean of n rows [dim], weighted for each column by the softmax of gates [n][dim].
void pool_group(const float* rows, const float* gates, int64_t n, int64_t dim, float* out) {
    constexpr int kSide = 64;
    for (int64_t d = 0; d < dim; d += kSide) {
        const int size = static_cast<int>(dim - d < kSide ? dim - d : kSide);
        float most[kSide], sum[kSide] = {}, total[kSide] = {};
        for (int i = 0; i < size; ++i) most[i] = gates[d + i];
        for (int64_t r = 1; r < n; ++r)
            for (int i = 0; i < size; ++i)
                most[i] = gates[r * dim + d + i] > most[i] ? gates[r * dim + d + i] : most[i];
        for (int64_t r = 0; r < n; ++r)
            for (int i = 0; i < size; ++i) {
                const float weight = exp_negative(most[i] - gates[r * dim + d + i]);
                sum[i] += weight;
                total[i] += weight * rows[r * dim + d + i];
            }
        for (int i = 0; i < size; ++i) out[d + i] = total[i] / sum[i];
    }
}

// Sums over n columns of a * b * c, a * a and c * c.
void gate_sums(const float* a, const float* b, const float* c, int64_t n, double* sums) {
    constexpr int kSide = 16;
    float lanes[3][kSide] = {};
    const auto fold = [&] {
        for (int s = 0; s < 3; ++s)
            for (int i = 0; i < kSide; ++i) sums[s] += static_cast<double>(lanes[s][i]), lanes[s][i] = 0;
    };
    for (int s = 0; s < 3; ++s) sums[s] = 0;
    int64_t k = 0;
    for (; k + kSide <= n; k += kSide) {
        for (int i = 0; i < kSide; ++i) {
            lanes[0][i] += a[k + i] * b[k + i] * c[k + i];
            lanes[1][i] += a[k + i] * a[k + i];
            lanes[2][i] += c[k + i] * c[k + i];
        }
        if (k % kSpanFloats == kSpanFloats - kSide) fold();
    }
    for (int i = 0; k < n; ++k, ++i) {
        lanes[0][i] += a[k] * b[k] * c[k];
        lanes[1][i] += a[k] * a[k];
        lanes[2][i] += c[k] * c[k];
    }
    fold();
}

// The largest of n values, NaN if there is one.
float largest_value(const float* x, int64_t n) {
    constexpr int kSide = 32;
    float most[kSide];
    int32_t odd[kSide] = {};
    for (int i = 0; i < kSide; ++i) most[i] = -__builtin_inff();
    int64_t k = 0;
    for (; k + kSide <= n; k += kSide)
        for (int i = 0; i < kSide; ++i) {
            most[i] = x[k + i] > most[i] ? x[k + i] : most[i];
            odd[i] |= x[k + i] != x[k + i];
        }
    for (int i = 0; k < n; ++k, ++i) {
        most[i] = x[k] > most[i] ? x[k] : most[i];
        odd[i] |= x[k] != x[k];
    }
    for (int i = 1; i < kSide; ++i) {
        most[0] = most[i] > most[0] ? most[i] : most[0];
        odd[0] |= odd[i];
    }
    return odd[0] ? __builtin_nanf("") : most[0];
}

// out [n] = e^((x - most) * factor), for x of at most `most`: 0 where that is nearly nothing. Their sum.
double exponentials(const float* x, int64_t n, float most, float factor, float* out) {
    constexpr int kSide = 32;
    constexpr float kNothing = 80.0f;
    float lanes[kSide] = {};
    int64_t k = 0;
    for (; k + kSide <= n; k += kSide)
        for (int i = 0; i < kSide; ++i) {
            const float below = (most - x[k + i]) * factor;
            out[k + i] = below > kNothing ? 0.0f : exp_negative(below);
            lanes[i] += out[k + i];
        }
    for (int i = 0; k < n; ++k, ++i) {
        const float below = (most - x[k]) * factor;
        out[k] = below > kNothing ? 0.0f : exp_negative(below);
        lanes[i] += out[k];
    }
    double sum = 0;
    for (int i = 0; i < kSide; ++i) sum += static_cast<double>(lanes[i]);
    return sum;
}

// out [n] = x where its bit is 1, minus infinity where it is 0; n is a multiple of 32.
void masked(const float* x, const uint32_t* bits, int64_t n, float* out) {
    for (int64_t k = 0; k < n; k += 32)
        for (uint32_t i = 0; i < 32; ++i) out[k + i] = bits[k / 32] >> i & 1 ? x[k + i] : -__builtin_inff();
}

}  // namespace
