// Rows of a cache encoded, and queries turned as such rows are.
#include <cmath>
#include <cstring>
#include <vector>

#include "layers.hpp"
#include "pool.hpp"

namespace loci {

void turn_rows(const Level& level, float* x, int64_t n, int64_t dim) {
    const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
    for (int64_t i = 0; i < n; ++i) level.hadamard(x + i * dim, dim, factor);
}

void encode_row(const Level& level, const RowFormat* format, const float* x, int64_t dim, uint8_t* out) {
    if (format == nullptr) {
        std::memcpy(out, x, static_cast<size_t>(dim) * sizeof(float));
        return;
    }
    std::memset(out, 0, static_cast<size_t>(format->row_bytes));
    if (format->is_turned == 0) {
        level.encode_row(*format, x, out);
        return;
    }
    thread_local std::vector<float> turned;
    turned.assign(x, x + dim);
    turn_rows(level, turned.data(), 1, dim);
    level.encode_row(*format, turned.data(), out);
}

void encode_rows(const Team& team, const RowFormat& format, const float* x, int64_t n, uint8_t* out) {
    constexpr int64_t kTogether = 8;
    parallel_for((n + kTogether - 1) / kTogether, team.threads, [&](int64_t item) {
        for (int64_t i = item * kTogether; i < n && i < (item + 1) * kTogether; ++i)
            encode_row(team.level, &format, x + i * format.dim, format.dim, out + i * format.row_bytes);
    });
}

void read_rows(const Level& level, const RowFormat* format, int64_t dim, int64_t columns, const uint8_t* const* rows,
               int64_t n, float* buffer, const float** out) {
    for (int64_t i = 0; i < n; ++i) {
        if (format == nullptr && columns == dim) {
            out[i] = reinterpret_cast<const float*>(rows[i]);
            continue;
        }
        float* to = buffer + i * columns;
        if (format != nullptr) level.decode_row(*format, rows[i], to);
        else std::memcpy(to, rows[i], static_cast<size_t>(dim) * sizeof(float));
        for (int64_t d = dim; d < columns; ++d) to[d] = 0;
        out[i] = to;
    }
}

}  // namespace loci
