// The operation of a program that makes drafted tokens of a block's logits.
#include <algorithm>
#include <cmath>
#include <vector>

#include "program.hpp"

namespace loci {
namespace {

float dot(const float* x, const float* y, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(y[i]);
    return static_cast<float>(sum);
}

// The first of the largest values; 0 where there is a NaN.
int64_t largest_at(const Team& team, const float* x, int64_t n) {
    const float* found = std::find(x, x + n, team.level.largest_value(x, n));
    return found == x + n ? 0 : found - x;
}

}  // namespace

// Tokens of blocks of so many rows, from the left to the right: to each row's logits [rows][vocab] is added what the
// token before says of it, by two plain tables [vocab][rank]; the largest is the row's token. Before a block's first
// row is the step's token of that row. How sure that is: the sigmoid of states [rows][hidden] and of the token's row of
// the first table times weights [hidden + rank].
void run_chain(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t block = op.sizes[0], vocab = op.sizes[1], rank = op.sizes[2], hidden = op.sizes[3];
    const int embed_kind = static_cast<int>(op.sizes[4]), head_kind = static_cast<int>(op.sizes[5]);
    const int64_t blocks = step.rows / block;
    const float *states = floats(op.in[1]), *weights = floats(op.in[4]);
    float *logits = floats(op.out[0]), *chances = floats(op.out[2]);
    auto* tokens = static_cast<int64_t*>(op.out[1]);
    thread_local std::vector<float> said, added;
    said.resize(static_cast<size_t>(blocks * rank));
    added.resize(static_cast<size_t>(blocks * vocab));
    for (int64_t place = 0; place < block; ++place) {
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t row = b * block + place, before = place == 0 ? step.tokens[row] : tokens[row - 1];
            plain_row(op.in[2], embed_kind, rank, before, 1, said.data() + b * rank);
        }
        dense_linear(team, op.in[3], head_kind, vocab, rank, said.data(), blocks, added.data());
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t row = b * block + place;
            float* to = logits + row * vocab;
            for (int64_t i = 0; i < vocab; ++i) to[i] += added[static_cast<size_t>(b * vocab + i)];
            tokens[row] = largest_at(team, to, vocab);
            const float sure =
                dot(states + row * hidden, weights, hidden) + dot(said.data() + b * rank, weights + hidden, rank);
            chances[row] = 1 / (1 + std::exp(-sure));
        }
    }
}

}  // namespace loci
