// The mixing matrices of hyper-connections: a softmax, then rows and columns normalised in turn.
//
// A matrix has 2x2 to 4x4 values and is normalised 20 times: as tensor operations that is 120 calls for
// microseconds of arithmetic, in every sublayer. Here it is one call, a matrix at a time in registers.

#include <cmath>
#include <cstdint>

#include "layers.hpp"

namespace {

// Divide each of `n` runs of `n` values, `stride` apart within a run and `step` from run to run, by its sum.
void normalise(float* c, int64_t n, int64_t stride, int64_t step, float eps) {
    for (int64_t run = 0; run < n; ++run) {
        float* values = c + run * step;
        float sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += values[i * stride];
        const float factor = sum + eps;
        for (int64_t i = 0; i < n; ++i) values[i * stride] /= factor;
    }
}

void softmax(float* row, int64_t n, float eps) {
    float largest = row[0], sum = 0;
    for (int64_t i = 1; i < n; ++i) largest = std::fmax(largest, row[i]);
    for (int64_t i = 0; i < n; ++i) sum += row[i] = std::exp(row[i] - largest);
    for (int64_t i = 0; i < n; ++i) row[i] = row[i] / sum + eps;
}

}  // namespace

void loci::sinkhorn(float* matrices, int64_t count, int64_t n, int64_t iterations, float eps) {
    for (int64_t m = 0; m < count; ++m) {
        float* c = matrices + m * n * n;
        for (int64_t row = 0; row < n; ++row) softmax(c + row * n, n, eps);
        normalise(c, n, n, 1, eps);
        for (int64_t turn = 1; turn < iterations; ++turn) {
            normalise(c, n, 1, n, eps);
            normalise(c, n, n, 1, eps);
        }
    }
}
