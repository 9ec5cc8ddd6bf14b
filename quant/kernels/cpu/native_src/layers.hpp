// What layers do besides products with weights: what quant/kernels/cpu/native_layers.py calls.
#pragma once
#include "operations.hpp"

namespace loci {

// Rows of a cache: float32 where the format is null. out: a row of format->row_bytes, or of floats.
void encode_row(const Level& level, const RowFormat* format, const float* x, int64_t dim, uint8_t* out);
// x [n][dim] to out [n][row_bytes]
void encode_rows(const Team& team, const RowFormat& format, const float* x, int64_t n, uint8_t* out);
// Rows as floats with `columns` >= dim columns, zeros behind: out[i] is the row itself, or lies in buffer [n][columns].
void read_rows(const Level& level, const RowFormat* format, int64_t dim, int64_t columns, const uint8_t* const* rows,
               int64_t n, float* buffer, const float** out);
// x [n][dim] turned as rows of formats are that say so.
void turn_rows(const Level& level, float* x, int64_t n, int64_t dim);

inline int64_t row_bytes(const RowFormat* format, int64_t dim) {
    return format != nullptr ? format->row_bytes : dim * static_cast<int64_t>(sizeof(float));
}

// Causal attention of the last `tokens` of `before + tokens` rows of keys and values; each token also sees the rows of
// `more` (keys and values at once) that it has chosen. Scores are divided by the root of `dim`. A value may have fewer
// columns than a key, of whose rows the values then are the beginnings.
struct Attend {
    const float* q;                // [tokens][heads][dim]
    const uint8_t *keys, *values;  // row r of key-value head g at g * head_stride + r * row_bytes
    const RowFormat* format;       // of keys and values; null: float32
    int64_t tokens, heads, kv_heads, dim, value_dim, head_stride;
    int64_t before;
    int64_t window;  // rows that a token sees, the last of them its own
    int64_t ring;    // 0, or how many places the rows have: row r lies at (first + r) % ring
    int64_t first;
    const uint8_t* more;           // rows, or null
    const RowFormat* more_format;  // null: float32
    const int64_t* chosen;         // [tokens][choices], -1 for none
    int64_t choices;
    const float* sink;  // [heads], or null: the denominator gains e^sink
};

// out [tokens][heads][value_dim]
void attend(const Team& team, const Attend& call, float* out);
// Several calls of as many heads and columns at once.
void attend(const Team& team, const Attend* calls, float* const* outs, int64_t n);

// How well entries match each token: queries [tokens][heads][dim], weights [tokens][heads], rows of keys.
struct Index {
    const float *queries, *weights;
    const uint8_t* keys;
    const RowFormat* format;  // of keys; null: float32
    int64_t tokens, heads, dim;
    const int64_t* visible;  // [tokens] of the first entries; null where entries are named
    const int64_t* entries;  // [tokens][columns], -1 for none; or null: the first `columns`
    int64_t columns;
};

// out [tokens][columns], -inf where there is no entry or a token does not see it
void index_scores(const Team& team, const Index& call, float* out);

// The columns of the k largest scores of each row, ascending; the first of equal ones; -1 behind where -inf is all
// that is left. scores [rows][columns], out [rows][k].
void best_columns(const Team& team, const float* scores, int64_t rows, int64_t columns, int64_t k, int64_t* out);

enum class Score : int64_t { kSqrtSoftplus, kSoftmax, kSigmoid, kChosenSoftmax };

// How a router chooses; quant/kernels/layers.py says what it means.
struct Routing {
    Score score;
    int64_t top_k;
    int64_t groups, kept, best;  // groups of experts, of which the best are kept; 0 for none
    int64_t is_renormalised;
    float epsilon, factor;
};

// The experts that logits [tokens][experts] choose, with a bias for the choice alone (or null), best first, the first
// of equal ones; and their weights. chosen, weights [tokens][top_k]
void route(const Team& team, const float* logits, const float* bias, int64_t tokens, int64_t experts,
           const Routing& rule, int64_t* chosen, float* weights);
// The weights [tokens][top_k] that a router gives experts which were chosen without it.
void weigh(const Team& team, const float* logits, const int64_t* chosen, int64_t tokens, int64_t experts,
           const Routing& rule, float* weights);

// out [rows][dim] = sum over i of weights [rows][n] * parts [rows][n][dim]
void weighted_sum(const Team& team, const float* parts, const float* weights, int64_t rows, int64_t n, int64_t dim,
                  float* out);

// out [tokens][n][dim]: new_j = post_j * y + sum over i of combine[i][j] * stream_i
void mix_streams(const Team& team, const float* streams, const float* y, const float* post, const float* combine,
                 int64_t tokens, int64_t n, int64_t dim, float* out);

// out [rows][cols] = x by its root mean square, times weight [cols], or null for none.
void rms_norm(const Team& team, const float* x, const float* weight, int64_t rows, int64_t cols, float eps, float* out);

// out [rows][pairs] cosine and sine of position times frequency, computed in double; of positions [rows] rounded down
// to a multiple of `unit`.
void turns_at(const int64_t* positions, int64_t unit, const double* frequencies, int64_t rows, int64_t pairs,
              bool backwards, float* out);

// Of what was read off n streams for each row, x [rows][(2 + n) n], times scale plus base: pre [rows][n] and post
// [rows][n] by sigmoid, combine [rows][n][n] by `iterations` of Sinkhorn's normalisation. Without post, of x [rows][n]
// pre alone.
void stream_mix(const Team& team, const float* x, const float* scale, const float* base, int64_t rows, int64_t n,
                int64_t iterations, float eps, float* pre, float* post, float* combine);

// matrices [count][n][n] of logits, replaced by nearly doubly stochastic ones
void sinkhorn(float* matrices, int64_t count, int64_t n, int64_t iterations, float eps);

// The k blocks of so many scores each whose best score is largest, ascending, -1 behind; the last one always wins.
void best_blocks(const Team& team, const float* scores, int64_t columns, int64_t block, int64_t k, int64_t* out);

void sigmoid(const Team& team, const float* x, int64_t n, float* out);

void gated(const Team& team, const float* gate, const float* up, const Gating& gating, int64_t n, float* out);

// The last 2 * pairs of dim channels of x [tokens][heads][dim] turned by turns [tokens][pairs], cosine and sine.
void rotate(const Team& team, const float* x, const float* turns, int64_t tokens, int64_t heads, int64_t dim,
            int64_t pairs, float* out);

// out [groups][dim] of rows and gates [groups][n][dim]
void pool_groups(const Team& team, const float* rows, const float* gates, int64_t groups, int64_t n, int64_t dim,
                 float* out);

// A causal convolution of each channel by itself, then silu; `tail` has the last taps - 1 rows of x before the first
// token, that of position p at p % (taps - 1), and then those before the next one.
struct Convolve {
    const float* x;        // [tokens][channels]
    const float* weights;  // [taps][channels], the last of the token itself
    float* tail;           // [taps - 1][channels]
    int64_t tokens, channels, taps;
    int64_t before;  // tokens of the sequence
};

// outs [tokens][channels] of several calls with as many channels
void convolve(const Team& team, const Convolve* calls, float* const* outs, int64_t n);

// The gated delta rule (arXiv 2412.06464) over the next tokens of a sequence; quant/kernels/layers.py says what it is.
struct DeltaRule {
    const float* x;               // [tokens] of queries and keys [key_heads][key_dim], values [value_heads][value_dim]
    const float *a, *b;           // [tokens][value_heads]
    const float *rates, *biases;  // [value_heads]
    float* state;                 // [value_heads][key_dim][value_dim]
    int64_t tokens, key_heads, value_heads, key_dim, value_dim;
    int64_t is_first;  // the state before is zero, whatever it holds
};

// outs [tokens][value_heads][value_dim] of several calls of the same sizes
void delta_rule(const Team& team, const DeltaRule* calls, float* const* outs, int64_t n);

// Gates [tokens][n] of streams [tokens][n][dim], qk [n][dim] and keys, those of a token key_stride behind the last's.
void engram_gates(const Team& team, const float* streams, const float* qk, const float* keys, int64_t key_stride,
                  int64_t tokens, int64_t n, int64_t dim, float eps, float* gates);

}  // namespace loci
