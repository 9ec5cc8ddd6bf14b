// Products of many tokens in bfloat16: weights become bfloat16 once for all tokens, activations are rounded to it, and
// sums are float32. A processor that multiplies pairs of bfloat16 does so 2.5 times as fast as it computes exact
// products.
//
// A tile has the columns of a panel in pairs: [pair][32 rows], each lane two columns of its row. Activations are packed
// in groups of tokens, [pair][tokens of the group]. Every sum runs over the pairs in their order, so that a token's
// result does not depend on who shares its group.
#pragma once
#include "kernels.hpp"

namespace loci {

constexpr int64_t kMostGrouped = 12;  // tokens of a group: their sums with 32 rows fill the registers

// Tokens, at least one, in groups of nearly the same size.
struct Groups {
    int64_t tokens;
    int64_t count() const { return (tokens + kMostGrouped - 1) / kMostGrouped; }
    int64_t first(int64_t group) const { return group * tokens / count(); }
    int64_t size(int64_t group) const { return first(group + 1) - first(group); }
};

struct Bf16Kernels {
    // Columns first .. first + columns of a panel as a tile; both whole strips of the format, or up to its end. By
    // format, with bf16 rows behind those in panels; null where there is none.
    void (*decode[kFormats + 1])(const Panel& panel, int64_t first, int64_t columns, uint32_t* tile);
    // out [token * stride + row] = sums [token][32] + x * tile for a group of so many tokens; sums may be null
    void (*multiply[kMostGrouped + 1])(const uint32_t* tile, int64_t pairs, const uint32_t* x, const float* sums,
                                       float* out, int64_t stride);
    // Tokens of a group, packed: pairs of columns of each row
    void (*pack)(const float* const* rows, int64_t tokens, int64_t pairs, uint32_t* packed);
    // n floats, an even number, rounded to pairs
    void (*round)(const float* x, int64_t n, uint32_t* pairs);
};

extern const Bf16Kernels kBf16Avx512;

}  // namespace loci
