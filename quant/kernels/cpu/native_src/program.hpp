// A decode step as data: operations on fixed addresses, all run by one call.
#pragma once
#include "operations.hpp"

namespace loci {

// What changes from step to step. Buffers hold the rows that are alive one after the other; each row is the newest
// token of a sequence of its own.
struct StepInput {
    int64_t rows;
    const int64_t* slots;      // [rows] of the cache
    const int64_t* positions;  // [rows]
};

enum class Kind : int64_t { kNorm, kLinear, kDense, kRotate, kAppend, kAttend, kGated, kAdd, kScale };

// Pointers, sizes and a factor mean what the operation's function in program.cpp says.
struct Operation {
    Kind kind;
    const void* in[3];
    void* out[3];
    int64_t sizes[5];
    float factor;
};

void run_program(const Team& team, const Operation* operations, int64_t count, const StepInput& step);

}  // namespace loci
