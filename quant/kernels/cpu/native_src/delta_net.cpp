// Gated DeltaNet over the tokens of sequences: who computes what.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "layers.hpp"
#include "pool.hpp"

namespace loci {
namespace {

// Below this many floats, waking the other threads costs more than it saves.
constexpr int64_t kWorthSharing = 4 * 1024;

double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }

}  // namespace

void convolve(const Team& team, const Convolve* calls, float* const* outs, int64_t n) {
    constexpr int64_t kSpan = 512;  // channels that stay in the first-level cache between passes
    int64_t tokens = 0;
    for (int64_t i = 0; i < n; ++i) tokens += calls[i].tokens;
    const int64_t spans = (calls[0].channels + kSpan - 1) / kSpan;
    const int threads = tokens * calls[0].channels < kWorthSharing ? 1 : team.threads;
    parallel_for(n * spans, threads, [&](int64_t item) {
        const Convolve& call = calls[item / spans];
        const int64_t first = item % spans * kSpan, count = std::min(kSpan, call.channels - first);
        const int64_t kept = call.taps - 1;
        thread_local std::vector<const float*> rows;
        rows.resize(static_cast<size_t>(call.taps));
        for (int64_t t = 0; t < call.tokens; ++t) {
            for (int64_t i = 0; i < call.taps; ++i) {
                const int64_t position = call.before + t - kept + i;
                const float* row = nullptr;
                if (position >= call.before) row = call.x + (position - call.before) * call.channels + first;
                else if (position >= 0) row = call.tail + position % kept * call.channels + first;
                rows[static_cast<size_t>(i)] = row;
            }
            team.level.convolve(rows.data(), call.weights + first, call.channels, call.taps, count,
                                outs[item / spans] + t * call.channels + first);
        }
        for (int64_t t = std::max<int64_t>(0, call.tokens - kept); t < call.tokens; ++t)
            std::memcpy(call.tail + (call.before + t) % kept * call.channels + first,
                        call.x + t * call.channels + first, static_cast<size_t>(count) * sizeof(float));
    });
}

void delta_rule(const Team& team, const DeltaRule* calls, float* const* outs, int64_t n) {
    constexpr int64_t kColumns = 64;  // of a state, at a time
    const int64_t heads = calls[0].value_heads, dim = calls[0].value_dim, key_dim = calls[0].key_dim;
    const int64_t keys = calls[0].key_heads * key_dim, width = 2 * keys + heads * dim;
    thread_local std::vector<float> decays, betas;
    thread_local std::vector<int64_t> firsts;  // of each call's tokens among all
    firsts.assign(1, 0);
    for (int64_t i = 0; i < n; ++i) firsts.push_back(firsts.back() + calls[i].tokens);
    decays.resize(static_cast<size_t>(firsts.back() * heads));
    betas.resize(decays.size());
    for (int64_t i = 0, at = 0; i < n; ++i)
        for (int64_t j = 0; j < calls[i].tokens * heads; ++j, ++at) {
            const double a = static_cast<double>(calls[i].a[j]) + static_cast<double>(calls[i].biases[j % heads]);
            const double rate = static_cast<double>(calls[i].rates[j % heads]);
            decays[static_cast<size_t>(at)] = static_cast<float>(std::exp(rate * softplus(a)));
            betas[static_cast<size_t>(at)] =
                static_cast<float>(1 / (1 + std::exp(-static_cast<double>(calls[i].b[j]))));
        }
    const float *all_decays = decays.data(), *all_betas = betas.data();
    const int64_t* begins = firsts.data();
    const int64_t parts = (dim + kColumns - 1) / kColumns;
    parallel_for(n * heads * parts, team.threads, [&](int64_t item) {
        const int64_t number = item / (heads * parts), head = item / parts % heads, first = item % parts * kColumns;
        const DeltaRule& call = calls[number];
        const int64_t key_head = head / (heads / call.key_heads);
        DeltaColumns columns{};
        columns.q = call.x + key_head * key_dim;
        columns.k = columns.q + keys;
        columns.v = call.x + 2 * keys + head * dim + first;
        columns.apart = width;
        columns.decay = all_decays + begins[number] * heads + head;
        columns.beta = all_betas + begins[number] * heads + head;
        columns.heads = heads;
        columns.tokens = call.tokens;
        columns.key_dim = key_dim;
        columns.columns = std::min(kColumns, dim - first);
        columns.scale = 1 / std::sqrt(static_cast<float>(key_dim));
        columns.state = call.state + head * key_dim * dim + first;
        columns.state_apart = dim;
        columns.out = outs[number] + head * dim + first;
        columns.out_apart = heads * dim;
        for (int64_t i = 0; call.is_first != 0 && i < key_dim; ++i)
            std::fill_n(columns.state + i * dim, columns.columns, 0.0f);
        team.level.delta_columns(columns);
    });
}

}  // namespace loci
