// The mixing matrices of hyper-connections: a softmax, then rows and columns normalised in turn.
//
// A matrix has 2x2 to 4x4 values and is normalised 20 times: as tensor operations that is 120 calls for
// microseconds of arithmetic, in every sublayer. Here it is one call. Each sum waits for the one before it, so the
// matrices of several tokens go side by side, one to a lane, and take as long as one.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "layers.hpp"

namespace {

constexpr int64_t kLanes = 4, kTogether = 2 * kLanes;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

void softmax(float* row, int64_t n, float eps) {
    float largest = row[0], sum = 0;
    for (int64_t i = 1; i < n; ++i) largest = std::fmax(largest, row[i]);
    for (int64_t i = 0; i < n; ++i) sum += row[i] = std::exp(row[i] - largest);
    for (int64_t i = 0; i < n; ++i) row[i] = row[i] / sum + eps;
}

// Divide each of `n` runs of `n` values, `stride` apart within a run and `step` from run to run, by its sum.
inline void normalise(Lanes* c, int64_t n, int64_t stride, int64_t step, float eps) {
    for (int64_t run = 0; run < n; ++run) {
        Lanes* values = c + run * step;
        Lanes sum = {};
        for (int64_t i = 0; i < n; ++i) sum += values[i * stride];
        const Lanes factor = sum + eps;
        for (int64_t i = 0; i < n; ++i) values[i * stride] /= factor;
    }
}

// At most kTogether matrices, in room for as many. N is n where the compiler is to know it, else 0.
template <int N>
void normalise_some(float* matrices, int64_t count, int64_t any, Lanes* room, int64_t iterations, float eps) {
    const int64_t n = N > 0 ? N : any, groups = count > kLanes ? 2 : 1;
    for (int64_t m = 0; m < groups * kLanes; ++m)
        for (int64_t i = 0; i < n * n; ++i)
            room[m / kLanes * n * n + i][m % kLanes] = m < count ? matrices[m * n * n + i] : 1.0f;
    for (int64_t turn = 0; turn < iterations; ++turn) {
        for (int64_t g = 0; turn > 0 && g < groups; ++g) normalise(room + g * n * n, n, 1, n, eps);
        for (int64_t g = 0; g < groups; ++g) normalise(room + g * n * n, n, n, 1, eps);
    }
    for (int64_t m = 0; m < count; ++m)
        for (int64_t i = 0; i < n * n; ++i) matrices[m * n * n + i] = room[m / kLanes * n * n + i][m % kLanes];
}

template <int N>
void normalise_all(float* matrices, int64_t count, int64_t n, int64_t iterations, float eps) {
    Lanes known[2 * N * N + 1];
    std::vector<Lanes> any(static_cast<size_t>(N > 0 ? 0 : 2 * n * n));
    for (int64_t m = 0; m < count; m += kTogether)
        normalise_some<N>(matrices + m * n * n, std::min(count - m, kTogether), n, N > 0 ? known : any.data(),
                          iterations, eps);
}

}  // namespace

void loci::sinkhorn(float* matrices, int64_t count, int64_t n, int64_t iterations, float eps) {
    for (int64_t row = 0; row < count * n; ++row) softmax(matrices + row * n, n, eps);
    iterations = std::max<int64_t>(iterations, 1);  // the first normalises columns alone
    if (n == 2) normalise_all<2>(matrices, count, n, iterations, eps);
    else if (n == 4) normalise_all<4>(matrices, count, n, iterations, eps);
    else normalise_all<0>(matrices, count, n, iterations, eps);
}
