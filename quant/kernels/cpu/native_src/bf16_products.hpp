// Products of prompts in bfloat16: what operations.cpp computes exactly, where a Team has kernels for it.
#pragma once
#include "operations.hpp"

namespace loci {

// Whether a matrix is multiplied in bfloat16: by its format and its columns, never by who is in a call.
bool takes_bf16(const Team& team, const Matrix& m);

// A matrix, the first of its columns in the activations, and where its products go, `stride` floats from token to
// token.
struct Bf16Part {
    const Matrix* matrix;
    int64_t column;
    float* out;
    int64_t stride;
};

// Several matrices times the same activations x [tokens][cols].
void bf16_linears(const Team& team, const Bf16Part* parts, int64_t count, const float* x, int64_t tokens, int64_t cols);

// As `moe`.
void bf16_moe(const Team& team, const Moe& call, const float* x, float* out);

}  // namespace loci
