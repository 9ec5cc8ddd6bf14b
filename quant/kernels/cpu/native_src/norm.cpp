// Rows divided by the root of their mean square: RMSNorm, one call instead of five passes over memory.
#include "layers.hpp"
#include "pool.hpp"

void loci::rms_norm(const Team& team, const float* x, const float* weight, int64_t rows, int64_t cols, float eps,
                    float* out) {
    constexpr int64_t kLeastShared = 1 << 12;  // values from which on threads share the rows: a microsecond of work
    const bool shared = rows > 1 && rows * cols >= kLeastShared;
    parallel_for(rows, shared ? team.threads : 1,
                 [&](int64_t row) { team.level.normalise(x + row * cols, weight, cols, eps, out + row * cols); });
}
