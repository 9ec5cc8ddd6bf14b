// The operations of the back end on one level: what quant/kernels/cpu/native.py calls.
#pragma once
#include "bf16.hpp"
#include "pool.hpp"

namespace loci {

// Weights that are read after those of an operation: packed matrices one after the other, or plain rows.
struct Upcoming {
    const Matrix* const* matrices;
    int64_t count;
    const uint8_t* rows;
    int64_t bytes;
    Span share(int number, int threads) const;  // where thread `number` begins to read
};

struct Team {
    const Level& level;
    int threads;
    bool one_digit;                     // int8 activations where the format has such kernels
    const Upcoming* then = nullptr;     // threads ask for it at the end of an operation
    const Bf16Kernels* bf16 = nullptr;  // what matrices are multiplied with that takes_bf16; null: exactly
    Span ahead(int number) const { return then != nullptr ? then->share(number, threads) : Span(); }
};

// out [tokens][rows] = x [tokens][cols] * weight^T
void linear(const Team& team, const Matrix& weight, const float* x, int64_t tokens, float* out);

// Several matrices of one format (plain ones too) and as many columns, times the same x: outs[i] [tokens][rows of
// matrix i].
void linear_group(const Team& team, const Matrix* const* weights, float* const* outs, int64_t count, const float* x,
                  int64_t tokens);

// Several matrices of one format and shape, each times its own columns of x [tokens][count * columns], to its own
// columns of out [tokens][count * rows].
void linear_blocks(const Team& team, const Matrix* const* weights, int64_t count, const float* x, int64_t tokens,
                   float* out);

// out [tokens][rows] = x [tokens][cols] * rows^T for plain rows: kind 0 bf16, 1 fp16, 2 fp32.
void dense_linear(const Team& team, const void* weight, int kind, int64_t rows, int64_t cols, const float* x,
                  int64_t tokens, float* out);

// Plain matrices [count][rows][cols], each times its own columns of x [tokens][count][cols]: out [tokens][count][rows].
void dense_blocks(const Team& team, const void* weights, int kind, int64_t count, int64_t rows, int64_t cols,
                  const float* x, int64_t tokens, float* out);

struct Moe {
    const Matrix* const* experts;  // w1, w3, w2 of each expert in use
    const int64_t* ids;            // [used] the experts in use, ascending
    int64_t used;
    const int64_t* choice;  // [tokens][top_k] expert ids
    const float* weights;   // [tokens][top_k]; or null: each choice has a result of its own
    int64_t tokens, top_k;
    Gating gating;
    const float* const* biases;  // of w1, w3, w2 of each expert in use; or null
    const int64_t* some;         // [count] choices (token * top_k + place) that are computed, no others; or null: all
    int64_t count;
};

// out [tokens][hidden] = the weighted sum of the chosen experts, in ascending order of expert id; or, without weights,
// [tokens][top_k][hidden], of which only `some` are written. False, and nothing computed, where experts have their
// matrices in other formats than others.
bool moe(const Team& team, const Moe& call, const float* x, float* out);

// Rows of an e4m3 table with a scale per 32 columns, as floats.
void gather_rows(const Team& team, const uint8_t* codes, const void* scales, bool float_scales, int64_t cols,
                 const int64_t* rows, int64_t n, float* out);

void tile(const Team& team, const Matrix& weight, uint8_t* out);
void untile(const Team& team, const Matrix& tiled, const int64_t* rows, int64_t n, uint8_t* codes, uint8_t* scales);

}  // namespace loci
