// Operations of a program on tables: the embedding's rows, and those that a token's n-grams address.
#include <algorithm>
#include <cstring>

#include "pool.hpp"
#include "program.hpp"
#include "table_rows.hpp"

namespace loci {
namespace {

constexpr int64_t kWorthSharing = 32 * 1024;  // floats

float from_half(uint16_t half) {
    const uint32_t magnitude = (half & 0x7fffu) << 13;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits |= (magnitude >= 0x0f800000u ? 0x7f800000u : 0) | (half & 0x8000u) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
}

float from_bf16(uint16_t upper) {
    const uint32_t bits = static_cast<uint32_t>(upper) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// How a token's n-grams address tables; quant/kernels/cpu/row_notes.py has the same struct.
struct Ngrams {
    const int64_t* keys;  // of each token id
    int64_t pad;          // the key before a sequence's beginning
    int64_t history;      // earlier tokens that an address depends on
    int64_t tables, heads;
    const int64_t* multipliers;         // [tables][history + 1], the newest token's first
    const int64_t *primes, *offsets;    // [tables][history * heads]
    const RowTable* const* row_tables;  // [tables]
    int64_t columns() const { return history * heads; }
};

constexpr int64_t kMostHistory = 8;

void ask_for(const RowTable& table, int64_t row) {
    prefetch_row(table.codes + row * table.code_bytes, table.code_bytes);
    prefetch_row(table.scales + row * table.scale_bytes, table.scale_bytes);
}

}  // namespace

void plain_row(const void* table, int kind, int64_t cols, int64_t number, float factor, float* out) {
    const auto* row = static_cast<const uint8_t*>(table) + number * cols * (kind == 2 ? 4 : 2);
    const auto* words = reinterpret_cast<const uint16_t*>(row);
    if (kind == 0)
        for (int64_t c = 0; c < cols; ++c) out[c] = from_bf16(words[c]) * factor;
    else if (kind == 1)
        for (int64_t c = 0; c < cols; ++c) out[c] = from_half(words[c]) * factor;
    else
        for (int64_t c = 0; c < cols; ++c) out[c] = reinterpret_cast<const float*>(row)[c] * factor;
}

// The tokens' rows of a plain matrix of so many columns, as floats, times the factor.
void run_embed(const Team&, const Operation& op, const StepInput& step) {
    const int64_t cols = op.sizes[1];
    for (int64_t r = 0; r < step.rows; ++r)
        plain_row(op.in[0], static_cast<int>(op.sizes[0]), cols, step.tokens[r], op.factor,
                  floats(op.out[0]) + r * cols);
}

// The tokens' rows of a matrix of so many whole numbers each.
void run_by_token(const Team&, const Operation& op, const StepInput& step) {
    const int64_t cols = op.sizes[0];
    for (int64_t r = 0; r < step.rows; ++r)
        std::copy_n(static_cast<const int64_t*>(op.in[0]) + step.tokens[r] * cols, cols,
                    static_cast<int64_t*>(op.out[0]) + r * cols);
}

// The addresses [rows][tables][columns] of the tokens' n-grams, off rings [slots][ring] of the keys of the last tokens,
// which the tokens' own are written to. The rows are asked for: memory sends them while earlier layers compute.
void run_ngrams(const Team&, const Operation& op, const StepInput& step) {
    const auto& by = *static_cast<const Ngrams*>(op.in[0]);
    const int64_t ring = op.sizes[0], columns = by.columns();
    auto* out = static_cast<int64_t*>(op.out[1]);
    for (int64_t r = 0; r < step.rows; ++r) {
        int64_t* keys = static_cast<int64_t*>(op.out[0]) + step.slots[r] * ring;
        const int64_t position = step.positions[r];
        int64_t window[kMostHistory + 1];  // the newest first
        window[0] = keys[position % ring] = by.keys[step.tokens[r]];
        for (int64_t back = 1; back <= by.history; ++back)
            window[back] = position >= back ? keys[(position - back) % ring] : by.pad;
        for (int64_t t = 0; t < by.tables; ++t) {
            const int64_t* multipliers = by.multipliers + t * (by.history + 1);
            int64_t mixed = window[0] * multipliers[0];
            for (int64_t c = 0; c < columns; ++c) {
                if (c % by.heads == 0) mixed ^= window[c / by.heads + 1] * multipliers[c / by.heads + 1];
                *out = mixed % by.primes[t * columns + c] + by.offsets[t * columns + c];
                ask_for(*by.row_tables[t], *out++);
            }
        }
    }
}

// The rows of a table in memory that addresses [rows][tables][columns] name, as floats, side by side for each token.
// sizes: which table, of how many, and the columns. out[1]: how many rows were asked for and how many different ones,
// added up.
void run_table_rows(const Team& team, const Operation& op, const StepInput& step) {
    const auto& table = *static_cast<const RowTable*>(op.in[0]);
    const int64_t columns = op.sizes[2], apart = op.sizes[1] * columns;
    const auto* addresses = static_cast<const int64_t*>(op.in[1]) + op.sizes[0] * columns;
    const int threads = step.rows * columns * table.cols < kWorthSharing ? 1 : team.threads;
    parallel_for(step.rows, threads, [&](int64_t r) {
        float* out = floats(op.out[0]) + r * columns * table.cols;
        for (int64_t c = 0; c < columns; ++c) {
            const int64_t row = addresses[r * apart + c];
            team.level.fp8_row(table.codes + row * table.code_bytes, table.scales + row * table.scale_bytes,
                               table.float_scales != 0, table.cols, out + c * table.cols);
        }
    });
    auto* counts = static_cast<int64_t*>(op.out[1]);
    counts[0] += step.rows * columns;
    for (int64_t r = 0; r < step.rows; ++r)
        for (int64_t c = 0; c < columns; ++c) {  // a column's rows are no other column's
            bool is_new = true;
            for (int64_t other = 0; is_new && other < r; ++other)
                is_new = addresses[other * apart + c] != addresses[r * apart + c];
            counts[1] += is_new;
        }
}

}  // namespace loci
