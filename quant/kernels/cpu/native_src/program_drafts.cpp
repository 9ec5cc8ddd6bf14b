// The operation of a program that makes drafted tokens of a block's logits.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.hpp"
#include "program.hpp"

namespace loci {
namespace {

constexpr int64_t kPart = 512;  // columns of a thread's turn

float dot(const float* x, const float* y, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(y[i]);
    return static_cast<float>(sum);
}

// Where `value` is, of n values; 0 for NaN.
int64_t find(const float* x, int64_t n, float value) {
    const float* found = std::find(x, x + n, value);
    return found == x + n ? 0 : found - x;
}

}  // namespace

// Tokens of blocks of so many rows, from the left to the right: to each row's logits [rows][vocab] is added what the
// token before says of it, by two plain tables, [vocab][rank] and [rank][vocab]; the largest is the row's token. Before
// a block's first row is the step's token of that row. How sure that is: the sigmoid of states [rows][hidden] and of
// the token's row of the first table times weights [hidden + rank].
void run_chain(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t block = op.sizes[0], vocab = op.sizes[1], rank = op.sizes[2], hidden = op.sizes[3];
    const int embed_kind = static_cast<int>(op.sizes[4]), head_kind = static_cast<int>(op.sizes[5]);
    const int64_t blocks = step.rows / block, parts = (vocab + kPart - 1) / kPart, head_bytes = head_kind == 2 ? 4 : 2;
    const float *states = floats(op.in[1]), *weights = floats(op.in[4]);
    float *logits = floats(op.out[0]), *chances = floats(op.out[2]);
    auto* tokens = static_cast<int64_t*>(op.out[1]);
    thread_local std::vector<float> said_of_caller, most_of_caller;
    std::vector<float>&said = said_of_caller, &most = most_of_caller;  // [rows][rank], [blocks][parts]
    said.resize(static_cast<size_t>(step.rows * rank));
    most.resize(static_cast<size_t>(blocks * parts));
    for (int64_t place = 0; place < block; ++place) {
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t row = b * block + place, before = place == 0 ? step.tokens[row] : tokens[row - 1];
            plain_row(op.in[2], embed_kind, rank, before, 1, said.data() + row * rank);
        }
        parallel_for(blocks * parts, team.threads, [&](int64_t item) {
            const int64_t row = item / parts * block + place, first = item % parts * kPart;
            const int64_t columns = std::min(kPart, vocab - first);
            float* to = logits + row * vocab + first;
            team.level.add_rows(static_cast<const uint8_t*>(op.in[3]) + first * head_bytes, head_kind, vocab, rank,
                                said.data() + row * rank, columns, to);
            most[static_cast<size_t>(item)] = team.level.largest_value(to, columns);
        });
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t row = b * block + place;
            const float largest = team.level.largest_value(most.data() + b * parts, parts);
            const int64_t first = find(most.data() + b * parts, parts, largest) * kPart;
            const int64_t at = find(logits + row * vocab + first, std::min(kPart, vocab - first), largest);
            tokens[row] = std::isnan(largest) ? 0 : first + at;
        }
    }
    parallel_for(step.rows, team.threads, [&](int64_t row) {
        const float sure =
            dot(states + row * hidden, weights, hidden) + dot(said.data() + row * rank, weights + hidden, rank);
        chances[row] = 1 / (1 + std::exp(-sure));
    });
}

}  // namespace loci
