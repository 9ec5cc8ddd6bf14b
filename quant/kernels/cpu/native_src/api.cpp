// The C functions that quant/kernels/cpu/native.py calls through ctypes, and the choice of a level.
#include <atomic>

#include "draws.hpp"
#include "layers.hpp"
#include "pool.hpp"
#include "program.hpp"
#include "table_rows.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace loci;

const Level* level_at(int index) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
                        __builtin_cpu_supports("avx512vnni");
    if (index == 2) return avx512 ? &kAvx512 : nullptr;
    if (index == 1) return avx2 ? &kAvx2 : nullptr;
#endif
    return index == 0 ? &kPortable : nullptr;
}

const Bf16Kernels* bf16_at([[maybe_unused]] int index) {
#if defined(__x86_64__)
    if (level_at(index) == &kAvx512 && __builtin_cpu_supports("avx512bf16")) return &kBf16Avx512;
#endif
    return nullptr;
}

// How products see activations, as quant/kernels/cpu/native.py counts them.
enum Activations { kExact, kInt8, kBfloat16 };

Team team_of(int level, int threads, int activations) {
    return {*level_at(level), threads, activations == kInt8, nullptr,
            activations == kBfloat16 ? bf16_at(level) : nullptr};
}

}  // namespace

// Every function below takes a level (0 portable, 1 avx2, 2 avx512; one that loci_level_name knows), a
// number of threads and, for products, what becomes of activations.
EXPORT const char* loci_level_name(int level) {
    const Level* found = level_at(level);
    return found ? found->name : nullptr;
}

EXPORT int loci_has_bf16(int level) { return bf16_at(level) != nullptr; }

// Raised with every change of a signature, a struct or the layout of panels; quant/kernels/cpu/library.py expects it.
EXPORT int loci_interface() { return 24; }

EXPORT int64_t loci_panel_bytes(const Matrix* m) { return panel_bytes(*m); }

EXPORT void loci_tile(int threads, const Matrix* m, uint8_t* out) { tile({kPortable, threads, false}, *m, out); }

EXPORT void loci_untile(int threads, const Matrix* m, const int64_t* rows, int64_t n, uint8_t* codes, uint8_t* scales) {
    untile({kPortable, threads, false}, *m, rows, n, codes, scales);
}

EXPORT void loci_linear(int level, int threads, int activations, const Matrix* m, const float* x, int64_t tokens,
                        float* out) {
    linear(team_of(level, threads, activations), *m, x, tokens, out);
}

EXPORT void loci_linear_blocks(int level, int threads, int activations, const Matrix* const* matrices, int64_t count,
                               const float* x, int64_t tokens, float* out) {
    linear_blocks(team_of(level, threads, activations), matrices, count, x, tokens, out);
}

EXPORT void loci_dense_linear(int level, int threads, int activations, const void* weight, int kind, int64_t rows,
                              int64_t cols, const float* x, int64_t tokens, float* out) {
    dense_linear(team_of(level, threads, activations), weight, kind, rows, cols, x, tokens, out);
}

EXPORT void loci_dense_blocks(int level, int threads, int activations, const void* weights, int kind, int64_t count,
                              int64_t rows, int64_t cols, const float* x, int64_t tokens, float* out) {
    dense_blocks(team_of(level, threads, activations), weights, kind, count, rows, cols, x, tokens, out);
}

EXPORT int loci_moe(int level, int threads, int activations, const Moe* call, const float* x, float* out) {
    return moe(team_of(level, threads, activations), *call, x, out);
}

EXPORT void loci_gather_rows(int level, int threads, const uint8_t* codes, const void* scales, int float_scales,
                             int64_t cols, const int64_t* rows, int64_t n, float* out) {
    gather_rows({*level_at(level), threads, false}, codes, scales, float_scales != 0, cols, rows, n, out);
}

EXPORT void loci_rms_norm(int level, int threads, const float* x, const float* weight, int64_t rows, int64_t cols,
                          float eps, float* out) {
    rms_norm({*level_at(level), threads, false}, x, weight, rows, cols, eps, out);
}

EXPORT int64_t loci_run_program(int level, int threads, int activations, const Operation* operations, int64_t first,
                                int64_t count, const StepInput* step) {
    return run_program(team_of(level, threads, activations), operations, first, count, *step);
}

EXPORT void loci_sinkhorn(float* matrices, int64_t count, int64_t n, int64_t iterations, float eps) {
    sinkhorn(matrices, count, n, iterations, eps);
}

EXPORT void loci_turns(const int64_t* positions, const double* frequencies, int64_t rows, int64_t pairs, float* out) {
    turns_at(positions, 1, frequencies, rows, pairs, false, out);
}

EXPORT void loci_attend(int level, int threads, const Attend* call, float* out) {
    attend({*level_at(level), threads, false}, *call, out);
}

EXPORT void loci_encode_rows(int level, int threads, const RowFormat* format, const float* x, int64_t n, uint8_t* out) {
    encode_rows({*level_at(level), threads, false}, *format, x, n, out);
}

EXPORT void loci_index_scores(int level, int threads, const Index* call, float* out) {
    index_scores({*level_at(level), threads, false}, *call, out);
}

EXPORT void loci_best_columns(int threads, const float* scores, int64_t rows, int64_t columns, int64_t k,
                              int64_t* out) {
    best_columns({kPortable, threads, false}, scores, rows, columns, k, out);
}

EXPORT void loci_route(int threads, const float* logits, const float* bias, int64_t tokens, int64_t experts,
                       const Routing* rule, int64_t* chosen, float* weights) {
    route({kPortable, threads, false}, logits, bias, tokens, experts, *rule, chosen, weights);
}

EXPORT void loci_weigh(int threads, const float* logits, const int64_t* chosen, int64_t tokens, int64_t experts,
                       const Routing* rule, float* weights) {
    weigh({kPortable, threads, false}, logits, chosen, tokens, experts, *rule, weights);
}

EXPORT void loci_weighted_sum(int level, int threads, const float* parts, const float* weights, int64_t rows, int64_t n,
                              int64_t dim, float* out) {
    weighted_sum({*level_at(level), threads, false}, parts, weights, rows, n, dim, out);
}

EXPORT void loci_mix_streams(int level, int threads, const float* streams, const float* y, const float* post,
                             const float* combine, int64_t tokens, int64_t n, int64_t dim, float* out) {
    mix_streams({*level_at(level), threads, false}, streams, y, post, combine, tokens, n, dim, out);
}

EXPORT void loci_sigmoid(int level, int threads, const float* x, int64_t n, float* out) {
    sigmoid({*level_at(level), threads, false}, x, n, out);
}

EXPORT void loci_gated(int level, int threads, const float* gate, const float* up, float limit, float alpha,
                       float shift, int64_t n, float* out) {
    gated({*level_at(level), threads, false}, gate, up, {limit, alpha, shift}, n, out);
}

EXPORT void loci_rotate(int level, int threads, const float* x, const float* turns, int64_t tokens, int64_t heads,
                        int64_t dim, int64_t pairs, float* out) {
    rotate({*level_at(level), threads, false}, x, turns, tokens, heads, dim, pairs, out);
}

EXPORT void loci_pool_groups(int level, int threads, const float* rows, const float* gates, int64_t groups, int64_t n,
                             int64_t dim, float* out) {
    pool_groups({*level_at(level), threads, false}, rows, gates, groups, n, dim, out);
}

EXPORT void loci_convolve(int level, int threads, const Convolve* call, float* out) {
    convolve({*level_at(level), threads, false}, call, &out, 1);
}

EXPORT void loci_delta_rule(int level, int threads, const DeltaRule* call, float* out) {
    delta_rule({*level_at(level), threads, false}, call, &out, 1);
}

EXPORT void loci_engram_gates(int level, int threads, const float* streams, const float* qk, const float* keys,
                              int64_t key_stride, int64_t tokens, int64_t n, int64_t dim, float eps, float* gates) {
    engram_gates({*level_at(level), threads, false}, streams, qk, keys, key_stride, tokens, n, dim, eps, gates);
}

EXPORT void loci_draw(int level, int threads, const float* logits, int64_t vocab, const Draw* draws, int64_t n,
                      int64_t* tokens) {
    draw({*level_at(level), threads, false}, logits, vocab, draws, n, tokens);
}

EXPORT void loci_log_probabilities(int level, int threads, const float* logits, int64_t vocab, int64_t token,
                                   int64_t top, int64_t* ids, double* values) {
    log_probabilities({*level_at(level), threads, false}, logits, vocab, token, top, ids, values);
}

EXPORT void loci_mask(int level, const float* logits, int64_t vocab, const uint8_t* bits, int64_t bytes, float* out) {
    mask(*level_at(level), logits, vocab, bits, bytes, out);
}

// Reads n bytes with as many threads, each its own part, in one or four streams; what a kernel is measured by.
EXPORT uint64_t loci_read(int level, int threads, const uint8_t* bytes, int64_t n, int64_t streams) {
    const Level* found = level_at(level);
    constexpr int64_t kTurn = 1 << 20;
    std::atomic<uint64_t> sum{0};
    parallel_for((n + kTurn - 1) / kTurn, threads, [&](int64_t turn) {
        const int64_t first = turn * kTurn, size = n - first < kTurn ? n - first : kTurn;
        sum += found->read(bytes + first, size, streams);
    });
    return sum;
}

// Reads n rows of a table in the order named: what gathering is measured by.
EXPORT uint64_t loci_read_rows(int level, int threads, const uint8_t* bytes, int64_t row_bytes, const int64_t* rows,
                               int64_t n) {
    const Level* found = level_at(level);
    constexpr int64_t kTurn = 256;
    std::atomic<uint64_t> sum{0};
    parallel_for((n + kTurn - 1) / kTurn, threads, [&](int64_t turn) {
        const int64_t first = turn * kTurn, count = n - first < kTurn ? n - first : kTurn;
        sum += found->read_rows(bytes, row_bytes, rows + first, count);
    });
    return sum;
}

// Look-ups of table rows (table_rows.hpp): a server with its threads and tables, and jobs.
EXPORT RowServer* loci_rows_open(int level, int threads) { return new RowServer(*level_at(level), threads); }
EXPORT int64_t loci_rows_add(RowServer* server, const RowTable* table) { return server->add(*table); }
EXPORT RowJob* loci_rows_ask(RowServer* server, int64_t table, const int64_t* rows, int64_t n, void* out) {
    return server->ask(table, rows, n, out);
}
EXPORT int loci_rows_done(const RowJob* job) { return job->done(); }
EXPORT int loci_rows_wait(RowJob* job, RowCounts* counts) { return job->wait(counts); }
EXPORT void loci_rows_forget(RowJob* job) { delete job; }
EXPORT void loci_rows_close(RowServer* server) { delete server; }
