// Tokens drawn from logits, and their log probabilities: what quant/kernels/cpu/draws.py calls.
#pragma once
#include "operations.hpp"

namespace loci {

// How a row's token is drawn; quant/kernels/cpu/draws.py has the same struct.
struct Draw {
    double temperature;  // 0: the best token
    double top_p, min_p;
    int64_t top_k;  // 0 for all
    double number;  // random, at least 0 and below 1
};

// A token for each of n rows of logits [n][vocab]; -1 where they are not numbers. A row's token depends on that row
// alone.
void draw(const Team& team, const float* logits, int64_t vocab, const Draw* draws, int64_t n, int64_t* tokens);

// Log probabilities under logits [vocab]: values [1 + top] are those of `token` and of the `top` best tokens, whose ids
// [top] are best first, of equal ones the first.
void log_probabilities(const Team& team, const float* logits, int64_t vocab, int64_t token, int64_t top, int64_t* ids,
                       double* values);

// out [vocab] = logits where a token's bit is 1, minus infinity where it is 0 or missing: bits [bytes], the lowest
// first.
void mask(const Level& level, const float* logits, int64_t vocab, const uint8_t* bits, int64_t bytes, float* out);

}  // namespace loci
