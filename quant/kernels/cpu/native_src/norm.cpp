// Rows divided by the root of their mean square: RMSNorm, one call instead of five passes over memory.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "layers.hpp"
#include "pool.hpp"

namespace {

constexpr int64_t kLanes = 16, kSpan = 512;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
// Values from which on threads share the rows: some microseconds of work.
constexpr int64_t kLeastShared = 1 << 12;

Lanes load(const float* x) {
    Lanes lanes;
    std::memcpy(&lanes, x, sizeof lanes);
    return lanes;
}

// Sixteen sums side by side; in double from block to block, so that long rows lose nothing.
double sum_of_squares(const float* x, int64_t n) {
    double total = 0;
    int64_t i = 0;
    while (i + kLanes <= n) {
        const int64_t end = i + kSpan < n ? i + kSpan : n;
        Lanes sums = {};
        for (; i + kLanes <= end; i += kLanes) sums += load(x + i) * load(x + i);
        for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
    }
    for (; i < n; ++i) total += x[i] * x[i];
    return total;
}

void normalise(const float* x, const float* weight, int64_t cols, float eps, float* out) {
    const float factor = 1.0f / std::sqrt(static_cast<float>(sum_of_squares(x, cols) / cols) + eps);
    int64_t i = 0;
    for (; i + kLanes <= cols; i += kLanes) {
        Lanes lanes = load(x + i) * factor;
        if (weight != nullptr) lanes *= load(weight + i);
        std::memcpy(out + i, &lanes, sizeof lanes);
    }
    for (; i < cols; ++i) out[i] = x[i] * factor * (weight != nullptr ? weight[i] : 1.0f);
}

}  // namespace

void loci::rms_norm(const Team& team, const float* x, const float* weight, int64_t rows, int64_t cols, float eps,
                    float* out) {
    const bool shared = rows > 1 && rows * cols >= kLeastShared;
    parallel_for(rows, shared ? team.threads : 1,
                 [&](int64_t row) { normalise(x + row * cols, weight, cols, eps, out + row * cols); });
}
