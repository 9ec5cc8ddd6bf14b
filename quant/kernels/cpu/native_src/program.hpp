// A decode step as data: operations on fixed addresses, run by one call as far as they can.
#pragma once
#include "operations.hpp"

namespace loci {

// What changes from step to step. Buffers hold the rows that are alive one after the other; each row is the newest
// token of a sequence, or a drafted one that follows the row before it.
struct StepInput {
    int64_t rows;
    const int64_t* slots;      // [rows] of the cache
    const int64_t* positions;  // [rows]
    const int64_t* tokens;     // [rows]
};

// In the order of KINDS in quant/kernels/cpu/program.py.
enum class Kind : int64_t {
    kNorm,
    kLinear,
    kDense,
    kBlocks,
    kTurns,
    kRotate,
    kAppend,
    kAttend,
    kGated,
    kAdd,
    kBias,
    kClip,
    kScale,
    kRepeat,
    kWeightedSum,
    kMix,
    kMixStreams,
    kEngram,
    kRing,
    kAttendSparse,
    kUnlessComplete,
    kPool,
    kEntry,
    kSelect,
    kRoute,
    kAtHand,
    kExperts,
    kPart,
    kJoin,
    kConvolve,
    kDeltaRule,
    kGate,
    kEmbed,
    kNgrams,
    kTableRows,
    kByToken,
    kChain,
    kHandOver,
    kKinds
};

// Pointers, sizes and a factor mean what the operation's function says.
struct Operation {
    Kind kind;
    const void* in[6];
    void* out[4];
    int64_t sizes[9];
    float factor;
    int64_t in_apart[6], out_apart[4];  // bytes from row to row; 0 for what is no row's
    int64_t together;                   // from this one on, so many take each row by itself; 0 or 1: none or it alone
};

// Runs operations from `first` on. Returns the number of the first one that is the caller's to do (a hand-over), or
// `count` at the end.
int64_t run_program(const Team& team, const Operation* operations, int64_t first, int64_t count, const StepInput& step);

using OperationFunction = void (*)(const Team& team, const Operation& op, const StepInput& step);

// program_cache.cpp: operations on a sequence's state
void run_append(const Team& team, const Operation& op, const StepInput& step);
void run_attend(const Team& team, const Operation& op, const StepInput& step);
void run_ring(const Team& team, const Operation& op, const StepInput& step);
void run_attend_sparse(const Team& team, const Operation& op, const StepInput& step);
void run_pool(const Team& team, const Operation& op, const StepInput& step);
void run_entry(const Team& team, const Operation& op, const StepInput& step);
void run_convolve(const Team& team, const Operation& op, const StepInput& step);
void run_delta_rule(const Team& team, const Operation& op, const StepInput& step);
void run_select(const Team& team, const Operation& op, const StepInput& step);

// program_rows.cpp: rows of tables
void run_embed(const Team& team, const Operation& op, const StepInput& step);
void run_by_token(const Team& team, const Operation& op, const StepInput& step);
void run_ngrams(const Team& team, const Operation& op, const StepInput& step);
void run_table_rows(const Team& team, const Operation& op, const StepInput& step);

// Row `number` of a plain matrix of so many columns (kind 0 bf16, 1 fp16, 2 fp32), as floats, times a factor.
void plain_row(const void* table, int kind, int64_t cols, int64_t number, float factor, float* out);

// program_drafts.cpp
void run_chain(const Team& team, const Operation& op, const StepInput& step);

inline const float* floats(const void* p) { return static_cast<const float*>(p); }
inline float* floats(void* p) { return static_cast<float*>(p); }

}  // namespace loci
