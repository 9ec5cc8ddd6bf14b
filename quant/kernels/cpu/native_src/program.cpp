// Runs a program: each operation as the family recorded it, for the rows of this step.
#include "program.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "layers.hpp"
#include "pool.hpp"

namespace loci {
namespace {

// out [rows][heads][columns] = x by each head's root mean square, times a weight [columns] or none
void norm(const Team& team, const Operation& op, const StepInput& step) {
    rms_norm(team, floats(op.in[0]), floats(op.in[1]), step.rows * op.sizes[1], op.sizes[0], op.factor,
             floats(op.out[0]));
}

// one to three packed matrices times the same x, each to a result of its own
void linear(const Team& team, const Operation& op, const StepInput& step) {
    const auto* matrices = static_cast<const Matrix* const*>(op.in[1]);
    float* out[3];
    for (int i = 0; i < 3; ++i) out[i] = floats(op.out[i]);
    linear_group(team, matrices, out, op.sizes[0], floats(op.in[0]), step.rows);
}

// a plain matrix times x: its kind, rows and columns
void dense(const Team& team, const Operation& op, const StepInput& step) {
    dense_linear(team, op.in[1], static_cast<int>(op.sizes[0]), op.sizes[1], op.sizes[2], floats(op.in[0]), step.rows,
                 floats(op.out[0]));
}

// matrices of one shape, each times its own columns of x, to its own columns of the result: packed ones, or plain ones
// one behind the other
void blocks(const Team& team, const Operation& op, const StepInput& step) {
    if (op.sizes[1] != 0)
        return dense_blocks(team, op.in[1], static_cast<int>(op.sizes[2]), op.sizes[0], op.sizes[3], op.sizes[4],
                            floats(op.in[0]), step.rows, floats(op.out[0]));
    linear_blocks(team, static_cast<const Matrix* const*>(op.in[1]), op.sizes[0], floats(op.in[0]), step.rows,
                  floats(op.out[0]));
}

// out [rows][pairs] cosine and sine of position times frequency (double [pairs]), of positions rounded down to a
// multiple of sizes[1]; the factor, 1 or -1, is the sense of the turn
void turns(const Team&, const Operation& op, const StepInput& step) {
    turns_at(step.positions, op.sizes[1], static_cast<const double*>(op.in[0]), step.rows, op.sizes[0], op.factor < 0,
             floats(op.out[0]));
}

// x [rows][heads][dim] by turns [rows][pairs]
void rotate(const Team& team, const Operation& op, const StepInput& step) {
    rotate(team, floats(op.in[0]), floats(op.in[1]), step.rows, op.sizes[0], op.sizes[1], op.sizes[2],
           floats(op.out[0]));
}

void gated(const Team& team, const Operation& op, const StepInput& step) {
    gated(team, floats(op.in[0]), floats(op.in[1]), {op.factor, 1, 0}, step.rows * op.sizes[0], floats(op.out[0]));
}

void add(const Team&, const Operation& op, const StepInput& step) {
    const float *x = floats(op.in[0]), *y = floats(op.in[1]);
    float* out = floats(op.out[0]);
    for (int64_t i = 0; i < step.rows * op.sizes[0]; ++i) out[i] = x[i] + y[i];
}

// x [rows][width] and, of some rows y in turn, that of each row's position
void bias(const Team&, const Operation& op, const StepInput& step) {
    const int64_t width = op.sizes[0], turn = op.sizes[1];
    for (int64_t r = 0; r < step.rows; ++r) {
        const float *x = floats(op.in[0]) + r * width, *y = floats(op.in[1]) + step.positions[r] % turn * width;
        float* out = floats(op.out[0]) + r * width;
        for (int64_t i = 0; i < width; ++i) out[i] = x[i] + y[i];
    }
}

void clip(const Team&, const Operation& op, const StepInput& step) {
    const float* x = floats(op.in[0]);
    float* out = floats(op.out[0]);
    for (int64_t i = 0; i < step.rows * op.sizes[0]; ++i) out[i] = std::min(std::max(x[i], -op.factor), op.factor);
}

void scale(const Team&, const Operation& op, const StepInput& step) {
    const float* x = floats(op.in[0]);
    float* out = floats(op.out[0]);
    for (int64_t i = 0; i < step.rows * op.sizes[0]; ++i) out[i] = x[i] * op.factor;
}

// some columns of each part of x [rows][parts][width]: out [rows][parts][count]
void part(const Team&, const Operation& op, const StepInput& step) {
    const int64_t parts = op.sizes[0], width = op.sizes[1], first = op.sizes[2], count = op.sizes[3];
    for (int64_t i = 0; i < step.rows * parts; ++i)
        std::copy_n(floats(op.in[0]) + i * width + first, count, floats(op.out[0]) + i * count);
}

// each part of x [rows][parts][.] and the same one of y [rows][parts][.], side by side
void join(const Team&, const Operation& op, const StepInput& step) {
    const int64_t parts = op.sizes[0], x_width = op.sizes[1], y_width = op.sizes[2];
    float* out = floats(op.out[0]);
    for (int64_t i = 0; i < step.rows * parts; ++i) {
        out = std::copy_n(floats(op.in[0]) + i * x_width, x_width, out);
        out = std::copy_n(floats(op.in[1]) + i * y_width, y_width, out);
    }
}

// x [rows][width] several times: out [rows][n][width]
void repeat(const Team&, const Operation& op, const StepInput& step) {
    const int64_t width = op.sizes[0], n = op.sizes[1];
    for (int64_t i = 0; i < step.rows * n; ++i)
        std::memcpy(floats(op.out[0]) + i * width, floats(op.in[0]) + i / n * width,
                    static_cast<size_t>(width) * sizeof(float));
}

void weighted_sum(const Team& team, const Operation& op, const StepInput& step) {
    weighted_sum(team, floats(op.in[0]), floats(op.in[1]), step.rows, op.sizes[0], op.sizes[1], floats(op.out[0]));
}

// how n streams are read, written and mixed (pre and post [rows][n], combine [rows][n][n]), of what was read off them
// [rows][(2 + n) n], its scale and its base; or only how they are read, of [rows][n]
void mix(const Team& team, const Operation& op, const StepInput& step) {
    stream_mix(team, floats(op.in[0]), floats(op.in[1]), floats(op.in[2]), step.rows, op.sizes[0], op.sizes[1],
               op.factor, floats(op.out[0]), floats(op.out[1]), floats(op.out[2]));
}

void mix_streams(const Team& team, const Operation& op, const StepInput& step) {
    mix_streams(team, floats(op.in[0]), floats(op.in[1]), floats(op.in[2]), floats(op.in[3]), step.rows, op.sizes[0],
                op.sizes[1], floats(op.out[0]));
}

// streams [rows][n][dim] and the gated value of table rows, of keys and value [rows][n + 1][dim]
void engram(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t n = op.sizes[0], dim = op.sizes[1];
    const float *streams = floats(op.in[0]), *kv = floats(op.in[1]);
    float *out = floats(op.out[0]), *gates = floats(op.out[1]);
    engram_gates(team, streams, floats(op.in[2]), kv, (n + 1) * dim, step.rows, n, dim, op.factor, gates);
    for (int64_t i = 0; i < step.rows * n; ++i) {
        const float* value = kv + (i / n * (n + 1) + n) * dim;
        for (int64_t d = 0; d < dim; ++d) out[i * dim + d] = streams[i * dim + d] + gates[i] * value[d];
    }
}

// logits [rows][experts], bias or none, a rule, and perhaps who was chosen without them, whose weights are wanted
void route(const Team& team, const Operation& op, const StepInput& step) {
    if (op.in[3] != nullptr)
        return weigh(team, floats(op.in[0]), static_cast<const int64_t*>(op.in[3]), step.rows, op.sizes[0],
                     *static_cast<const Routing*>(op.in[2]), floats(op.out[1]));
    route(team, floats(op.in[0]), floats(op.in[1]), step.rows, op.sizes[0], *static_cast<const Routing*>(op.in[2]),
          static_cast<int64_t*>(op.out[0]), floats(op.out[1]));
}

// x [rows][gates][width] times the sigmoid of gates [rows][gates]
void gate(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t gates = step.rows * op.sizes[0], width = op.sizes[1];
    thread_local std::vector<float> shares;
    shares.resize(static_cast<size_t>(gates));
    sigmoid(team, floats(op.in[1]), gates, shares.data());
    const float* x = floats(op.in[0]);
    float* out = floats(op.out[0]);
    for (int64_t i = 0; i < gates; ++i)
        for (int64_t j = 0; j < width; ++j) out[i * width + j] = x[i * width + j] * shares[static_cast<size_t>(i)];
}

// Whether all chosen experts have matrices [experts][3], which come and go between runs.
bool are_there(const int64_t* choice, int64_t count, const Matrix* const* matrices) {
    return std::all_of(choice, choice + count, [&](int64_t expert) { return matrices[3 * expert] != nullptr; });
}

// out = 1 where all chosen experts of a layer are at hand and none of it is on its way, for which somebody might have
// to be told. in: ids, matrices, how many are on their way
void at_hand(const Team&, const Operation& op, const StepInput& step) {
    const bool is_quiet = *static_cast<const int64_t*>(op.in[2]) == 0;
    *static_cast<int64_t*>(op.out[0]) =
        is_quiet && are_there(static_cast<const int64_t*>(op.in[0]), step.rows * op.sizes[0],
                              static_cast<const Matrix* const*>(op.in[1]));
}

// Whether the chosen experts of a layer are computed here: always, or where they were found at hand and still are.
bool computes_experts(const Operation& op, const StepInput& step) {
    if (op.in[4] == nullptr) return true;
    return *static_cast<const int64_t*>(op.in[4]) != 0 &&
           are_there(static_cast<const int64_t*>(op.in[1]), step.rows * op.sizes[0],
                     static_cast<const Matrix* const*>(op.in[3]));
}

// What experts have beyond matrices: their activation, and biases [experts][width] and [experts][hidden] or none.
struct Extras {
    Gating gating;
    const float *gate, *up, *down;
};

// The sum of the chosen experts, weighted, in the router's order. in: x, ids, weights, matrices [experts][3], perhaps
// whether they are at hand, extras; out: result, each choice's own result, and how many experts were used, added up
void experts(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t top_k = op.sizes[0], hidden = op.sizes[1], count = step.rows * top_k;
    const auto* choice = static_cast<const int64_t*>(op.in[1]);
    const auto* matrices = static_cast<const Matrix* const*>(op.in[3]);
    thread_local std::vector<int64_t> ids;
    thread_local std::vector<const Matrix*> used;
    ids.assign(choice, choice + count);
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    used.clear();
    for (const int64_t id : ids) used.insert(used.end(), matrices + 3 * id, matrices + 3 * id + 3);
    Moe call{};
    call.experts = used.data();
    call.ids = ids.data();
    call.used = static_cast<int64_t>(ids.size());
    call.choice = choice;
    call.tokens = step.rows;
    call.top_k = top_k;
    const auto& extras = *static_cast<const Extras*>(op.in[5]);
    thread_local std::vector<const float*> biases;
    biases.clear();
    if (extras.gate != nullptr)
        for (const int64_t id : ids) {
            biases.push_back(extras.gate + id * op.sizes[2]);
            biases.push_back(extras.up + id * op.sizes[2]);
            biases.push_back(extras.down + id * hidden);
        }
    call.gating = extras.gating;
    call.biases = biases.empty() ? nullptr : biases.data();
    float* apart = floats(op.out[1]);
    moe(team, call, floats(op.in[0]), apart);
    weighted_sum(team, apart, floats(op.in[2]), step.rows, top_k, hidden, floats(op.out[0]));
    *static_cast<int64_t*>(op.out[2]) += call.used;
}

// In the order of Kind; null for what decides how to go on.
constexpr OperationFunction kFunctions[] = {
    norm,        linear,       dense,          blocks,
    turns,       rotate,       run_append,     run_attend,
    gated,       add,          bias,           clip,
    scale,       repeat,       weighted_sum,   mix,
    mix_streams, engram,       run_ring,       run_attend_sparse,
    nullptr,     run_pool,     run_entry,      run_select,
    route,       at_hand,      experts,        part,
    join,        run_convolve, run_delta_rule, gate,
    run_embed,   run_ngrams,   run_table_rows, run_by_token,
    run_chain,   nullptr,
};
static_assert(sizeof kFunctions / sizeof *kFunctions == static_cast<size_t>(Kind::kKinds));

// Whether some row is the last token of a group of so many.
bool completes_any(const StepInput& step, int64_t ratio) {
    return std::any_of(step.positions, step.positions + step.rows,
                       [&](int64_t position) { return (position + 1) % ratio == 0; });
}

// The weights that are read first from an operation on; none if that depends on what is computed before.
Upcoming upcoming(const Operation* op, const Operation* end) {
    for (; op != end; ++op) {
        const bool plain = op->kind == Kind::kDense || (op->kind == Kind::kBlocks && op->sizes[1] != 0);
        if (plain) {
            const int64_t *sizes = op->sizes + (op->kind == Kind::kBlocks ? 2 : 0), each = sizes[1] * sizes[2];
            const int64_t matrices = op->kind == Kind::kBlocks ? op->sizes[0] : 1;
            return {nullptr, 0, static_cast<const uint8_t*>(op->in[1]), matrices * each * (sizes[0] == 2 ? 4 : 2)};
        }
        if (op->kind == Kind::kLinear || op->kind == Kind::kBlocks)
            return {static_cast<const Matrix* const*>(op->in[1]), op->sizes[0], nullptr, 0};
        if (op->kind == Kind::kExperts || op->kind == Kind::kHandOver) break;
    }
    return {};
}

// Whether n operations that take each row by itself are done by rows: enough rows for each thread, which unpacks all
// weights for its own; and products among them, or enough bytes of rows to be worth waking a thread.
bool pays_by_rows(const Team& team, const Operation* operations, int64_t n, int64_t rows) {
    constexpr int64_t kRowsEach = 3, kWorthSharing = 64 * 1024;
    if (n < 2 || team.threads < 2 || rows < kRowsEach * team.threads) return false;
    int64_t bytes = 0;
    for (const Operation* op = operations; op != operations + n; ++op) {
        if (op->kind == Kind::kLinear || op->kind == Kind::kDense || op->kind == Kind::kBlocks) return true;
        for (const int64_t apart : op->in_apart) bytes += rows * apart;
        for (const int64_t apart : op->out_apart) bytes += rows * apart;
    }
    return bytes >= kWorthSharing;
}

// Runs n operations that take each row by itself: a thread does all of them for some rows. Waiting for the others after
// each takes longer than what there is to do, where rows and matrices are small.
void run_by_rows(const Team& team, const Operation* operations, int64_t n, const StepInput& step) {
    parallel_for(team.threads, team.threads, [&](int64_t part) {
        const int64_t first = step.rows * part / team.threads, end = step.rows * (part + 1) / team.threads;
        const StepInput rows{end - first, step.slots + first, step.positions + first, step.tokens + first};
        const Team alone{team.level, 1, team.one_digit, nullptr, team.bf16};
        for (int64_t i = 0; i < n; ++i) {
            Operation op = operations[i];
            for (int k = 0; k < 6; ++k) op.in[k] = static_cast<const uint8_t*>(op.in[k]) + first * op.in_apart[k];
            for (int k = 0; k < 4; ++k) op.out[k] = static_cast<uint8_t*>(op.out[k]) + first * op.out_apart[k];
            kFunctions[static_cast<int64_t>(op.kind)](alone, op, rows);
        }
    });
}

}  // namespace

int64_t run_program(const Team& team, const Operation* operations, int64_t first, int64_t count,
                    const StepInput& step) {
    const Threads held;
    for (int64_t i = first; i < count; ++i) {
        const Operation& op = operations[i];
        if (op.kind == Kind::kHandOver) {
            const auto* is_done = static_cast<const int64_t*>(op.in[0]);  // or null: it is never done before
            if (is_done == nullptr || *is_done == 0) return i;
        } else if (op.kind == Kind::kUnlessComplete) {
            if (!completes_any(step, op.sizes[0])) i += op.sizes[1];  // so many operations are about groups' ends
        } else if (op.kind == Kind::kExperts && !computes_experts(op, step)) {
            return i;
        } else if (i + op.together <= count && pays_by_rows(team, &op, op.together, step.rows)) {
            run_by_rows(team, &op, op.together, step);
            i += op.together - 1;
        } else {
            const Upcoming then = upcoming(&op + 1, operations + count);
            kFunctions[static_cast<int64_t>(op.kind)]({team.level, team.threads, team.one_digit, &then, team.bf16}, op,
                                                      step);
        }
    }
    return count;
}

}  // namespace loci
