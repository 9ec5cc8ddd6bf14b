// Choices among scores, and what layers do to rows: who computes what.
#include "layers.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "pool.hpp"
#include "ranks.hpp"

namespace loci {
namespace {

// Below this many floats, waking the other threads costs more than it saves.
constexpr int64_t kWorthSharing = 4 * 1024;

int threads_for(const Team& team, int64_t floats) { return floats < kWorthSharing ? 1 : team.threads; }

// A row of more columns is searched in parts: a token of a long sequence is one row of a million.
constexpr int64_t kPart = 32 * 1024;

// The k largest ranks stay, in any order.
void keep_best(std::vector<uint64_t>& ranks, int64_t k) {
    if (static_cast<int64_t>(ranks.size()) <= k) return;
    std::nth_element(ranks.begin(), ranks.begin() + k, ranks.end(), std::greater<>());
    ranks.resize(static_cast<size_t>(k));
}

constexpr int64_t kAtOnce = 16;

// Whether one of so many scores is above `least`, or NaN.
bool has_above(const float* scores, float least) {
    int above = 0;
    for (int64_t i = 0; i < kAtOnce; ++i) above |= !(scores[i] <= least);
    return above != 0;
}

// The ranks of the k best of the columns from `first` to `last` that are not -inf, added to those there are. Most
// columns of a long row are only compared with the worst that was kept: of equal ones the earlier is the better.
void add_best(const float* scores, int64_t first, int64_t last, int64_t k, std::vector<uint64_t>& ranks) {
    const auto most = static_cast<size_t>(4 * k + 64);
    float least = -__builtin_inff();
    for (int64_t start = first; start < last; start += kAtOnce) {
        const int64_t stop = std::min(start + kAtOnce, last);
        if (stop - start == kAtOnce && !has_above(scores + start, least)) continue;
        for (int64_t c = start; c < stop; ++c) {
            if (scores[c] <= least) continue;  // NaN is not
            ranks.push_back(ranked(scores[c], c));
            if (ranks.size() < most) continue;
            keep_best(ranks, k);
            if (k > 0) least = static_cast<float>(value_of(*std::min_element(ranks.begin(), ranks.end())));
        }
    }
    keep_best(ranks, k);
}

void write_columns(std::vector<uint64_t>& ranks, int64_t k, int64_t* to) {
    keep_best(ranks, k);
    const auto found = static_cast<int64_t>(ranks.size());
    for (int64_t i = 0; i < found; ++i) to[i] = column_of(ranks[static_cast<size_t>(i)]);
    std::sort(to, to + found);
    std::fill(to + found, to + k, -1);
}

}  // namespace

void best_columns(const Team& team, const float* scores, int64_t rows, int64_t columns, int64_t k, int64_t* out) {
    if (rows == 0) return;
    if (rows < team.threads && columns > kPart) {
        const int64_t parts = std::min<int64_t>((columns + kPart - 1) / kPart, (team.threads + rows - 1) / rows);
        const int64_t part = (columns + parts - 1) / parts;
        std::vector<std::vector<uint64_t>> found(static_cast<size_t>(rows * parts));
        parallel_for(rows * parts, team.threads, [&](int64_t i) {
            const int64_t first = i % parts * part;
            add_best(scores + i / parts * columns, first, std::min(columns, first + part), k,
                     found[static_cast<size_t>(i)]);
        });
        for (int64_t row = 0; row < rows; ++row) {
            std::vector<uint64_t> ranks;
            for (int64_t i = 0; i < parts; ++i) {
                const auto& some = found[static_cast<size_t>(row * parts + i)];
                ranks.insert(ranks.end(), some.begin(), some.end());
            }
            write_columns(ranks, k, out + row * k);
        }
        return;
    }
    parallel_for(rows, threads_for(team, rows * columns), [&](int64_t row) {
        thread_local std::vector<uint64_t> ranks;
        ranks.clear();
        add_best(scores + row * columns, 0, columns, k, ranks);
        write_columns(ranks, k, out + row * k);
    });
}

void best_blocks(const Team& team, const float* scores, int64_t columns, int64_t block, int64_t k, int64_t* out) {
    const int64_t blocks = (columns + block - 1) / block;
    std::vector<float> best(static_cast<size_t>(blocks));
    parallel_for(blocks, threads_for(team, columns), [&](int64_t i) {
        const float* of_block = scores + i * block;
        const int64_t count = std::min(block, columns - i * block);
        float most = of_block[0];
        for (int64_t c = 1; c < count; ++c) most = of_block[c] > most ? of_block[c] : most;
        best[static_cast<size_t>(i)] = most;
    });
    if (columns > 0) best.back() = __builtin_inff();
    best_columns(team, best.data(), 1, blocks, k, out);
}

namespace {

void softmax(const float* x, int64_t n, float* out) {
    const float most = *std::max_element(x, x + n);
    float sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += out[i] = std::exp(x[i] - most);
    for (int64_t i = 0; i < n; ++i) out[i] /= sum;
}

void score(Score by, const float* logits, int64_t n, float* out) {
    switch (by) {
        case Score::kSqrtSoftplus:
            for (int64_t e = 0; e < n; ++e)
                out[e] = std::sqrt((logits[e] < 0 ? 0 : logits[e]) + std::log1p(std::exp(-std::fabs(logits[e]))));
            return;
        case Score::kSoftmax: return softmax(logits, n, out);
        case Score::kSigmoid:
            for (int64_t e = 0; e < n; ++e) out[e] = 1 / (1 + std::exp(-logits[e]));
            return;
        case Score::kChosenSoftmax: std::copy_n(logits, n, out);  // those chosen get theirs later
    }
}

// Takes the experts of all groups but the best ones out of the choice. A group is as good as its best ranks together.
void keep_best_groups(const Routing& rule, float* ranks, int64_t experts) {
    thread_local std::vector<float> group;
    thread_local std::vector<uint64_t> order;
    const int64_t size = experts / rule.groups;
    order.clear();
    for (int64_t g = 0; g < rule.groups; ++g) {
        group.assign(ranks + g * size, ranks + (g + 1) * size);
        std::partial_sort(group.begin(), group.begin() + rule.best, group.end(), std::greater<>());
        float value = 0;
        for (int64_t i = 0; i < rule.best; ++i) value += group[static_cast<size_t>(i)];
        order.push_back(ranked(value, g));
    }
    std::sort(order.begin(), order.end(), std::greater<>());
    for (size_t i = static_cast<size_t>(rule.kept); i < order.size(); ++i)
        std::fill_n(ranks + column_of(order[i]) * size, size, -__builtin_inff());
}

// The weights of chosen experts from all experts' scores.
void weigh_chosen(const Routing& rule, const float* scores, const int64_t* chosen, float* weight) {
    float sum = 0;
    for (int64_t i = 0; i < rule.top_k; ++i) sum += weight[i] = scores[chosen[i]];
    if (rule.score == Score::kChosenSoftmax) softmax(weight, rule.top_k, weight);
    for (int64_t i = 0; i < rule.top_k; ++i) {
        if (rule.is_renormalised) weight[i] /= sum + rule.epsilon;
        weight[i] *= rule.factor;
    }
}

}  // namespace

// A score takes as long as so many floats that are added up.
constexpr int64_t kScoreCost = 32;

void route(const Team& team, const float* logits, const float* bias, int64_t tokens, int64_t experts,
           const Routing& rule, int64_t* chosen, float* weights) {
    const int64_t top_k = rule.top_k;
    parallel_for(tokens, threads_for(team, tokens * experts * kScoreCost), [&](int64_t token) {
        thread_local std::vector<float> scores, ranks;
        thread_local std::vector<uint64_t> order;
        scores.resize(static_cast<size_t>(experts));
        ranks.resize(static_cast<size_t>(experts));
        order.resize(static_cast<size_t>(experts));
        score(rule.score, logits + token * experts, experts, scores.data());
        for (size_t e = 0; e < ranks.size(); ++e) ranks[e] = bias != nullptr ? scores[e] + bias[e] : scores[e];
        if (rule.groups > 0) keep_best_groups(rule, ranks.data(), experts);
        for (size_t e = 0; e < ranks.size(); ++e) order[e] = ranked(ranks[e], static_cast<int64_t>(e));
        std::partial_sort(order.begin(), order.begin() + top_k, order.end(), std::greater<>());
        for (int64_t i = 0; i < top_k; ++i) chosen[token * top_k + i] = column_of(order[static_cast<size_t>(i)]);
        weigh_chosen(rule, scores.data(), chosen + token * top_k, weights + token * top_k);
    });
}

void weigh(const Team& team, const float* logits, const int64_t* chosen, int64_t tokens, int64_t experts,
           const Routing& rule, float* weights) {
    parallel_for(tokens, threads_for(team, tokens * experts), [&](int64_t token) {
        thread_local std::vector<float> scores;
        scores.resize(static_cast<size_t>(experts));
        score(rule.score, logits + token * experts, experts, scores.data());
        weigh_chosen(rule, scores.data(), chosen + token * rule.top_k, weights + token * rule.top_k);
    });
}

void weighted_sum(const Team& team, const float* parts, const float* weights, int64_t rows, int64_t n, int64_t dim,
                  float* out) {
    parallel_for(rows, threads_for(team, rows * n * dim), [&](int64_t row) {
        team.level.sum_parts(parts + row * n * dim, dim, weights + row * n, 1, n, dim, nullptr, 0, out + row * dim);
    });
}

void mix_streams(const Team& team, const float* streams, const float* y, const float* post, const float* combine,
                 int64_t tokens, int64_t n, int64_t dim, float* out) {
    parallel_for(tokens, threads_for(team, tokens * n * n * dim), [&](int64_t t) {
        for (int64_t j = 0; j < n; ++j)
            team.level.sum_parts(streams + t * n * dim, dim, combine + t * n * n + j, n, n, dim, y + t * dim,
                                 post[t * n + j], out + (t * n + j) * dim);
    });
}

namespace {

// Calls fn(first, count) for spans of n floats that threads share.
template <class F>
void spans(const Team& team, int64_t n, const F& fn) {
    constexpr int64_t kSpan = 1024;
    parallel_for((n + kSpan - 1) / kSpan, threads_for(team, n),
                 [&](int64_t span) { fn(span * kSpan, std::min(kSpan, n - span * kSpan)); });
}

}  // namespace

void sigmoid(const Team& team, const float* x, int64_t n, float* out) {
    spans(team, n, [&](int64_t first, int64_t count) { team.level.sigmoid(x + first, count, out + first); });
}

void gated(const Team& team, const float* gate, const float* up, const Gating& gating, int64_t n, float* out) {
    spans(team, n, [&](int64_t first, int64_t count) {
        team.level.swiglu(gate + first, up + first, gating, count, out + first);
    });
}

void rotate(const Team& team, const float* x, const float* turns, int64_t tokens, int64_t heads, int64_t dim,
            int64_t pairs, float* out) {
    const int64_t kept = dim - 2 * pairs;
    parallel_for(tokens, threads_for(team, tokens * heads * dim), [&](int64_t t) {
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t at = (t * heads + h) * dim;
            if (out != x) std::memcpy(out + at, x + at, static_cast<size_t>(kept) * sizeof(float));
            team.level.rotate(x + at + kept, turns + 2 * t * pairs, pairs, out + at + kept);
        }
    });
}

void turns_at(const int64_t* positions, int64_t unit, const double* frequencies, int64_t rows, int64_t pairs,
              bool backwards, float* out) {
    for (int64_t r = 0; r < rows; ++r) {
        const auto position = static_cast<double>(positions[r] / unit * unit);
        for (int64_t p = 0; p < pairs; ++p) {
            const double angle = position * frequencies[p];
            const auto sine = static_cast<float>(std::sin(angle));
            *out++ = static_cast<float>(std::cos(angle));
            *out++ = backwards ? -sine : sine;
        }
    }
}

void stream_mix(const Team& team, const float* x, const float* scale, const float* base, int64_t rows, int64_t n,
                int64_t iterations, float eps, float* pre, float* post, float* combine) {
    const bool only_reads = post == nullptr;
    const int64_t width = only_reads ? n : (2 + n) * n;
    thread_local std::vector<float> mixed;
    mixed.resize(static_cast<size_t>(width));
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < width; ++i) mixed[static_cast<size_t>(i)] = x[r * width + i] * scale[i] + base[i];
        team.level.sigmoid(mixed.data(), only_reads ? n : 2 * n, mixed.data());
        for (int64_t i = 0; i < n; ++i) pre[r * n + i] = mixed[static_cast<size_t>(i)] + eps;
        if (only_reads) continue;
        for (int64_t i = 0; i < n; ++i) post[r * n + i] = 2 * mixed[static_cast<size_t>(n + i)];
        std::copy_n(mixed.data() + 2 * n, n * n, combine + r * n * n);
    }
    if (!only_reads) sinkhorn(combine, rows, n, iterations, eps);
}

void pool_groups(const Team& team, const float* rows, const float* gates, int64_t groups, int64_t n, int64_t dim,
                 float* out) {
    parallel_for(groups, threads_for(team, groups * n * dim), [&](int64_t g) {
        team.level.pool_group(rows + g * n * dim, gates + g * n * dim, n, dim, out + g * dim);
    });
}

void engram_gates(const Team& team, const float* streams, const float* qk, const float* keys, int64_t key_stride,
                  int64_t tokens, int64_t n, int64_t dim, float eps, float* gates) {
    parallel_for(tokens, threads_for(team, tokens * n * dim), [&](int64_t t) {
        for (int64_t j = 0; j < n; ++j) {
            double sums[3];
            team.level.gate_sums(streams + (t * n + j) * dim, qk + j * dim, keys + t * key_stride + j * dim, dim, sums);
            const double width = static_cast<double>(dim);
            const double dot = sums[0] / std::sqrt((sums[1] / width + eps) * (sums[2] / width + eps) * width);
            const double root = std::sqrt(std::fabs(dot) < 1e-6 ? 1e-6 : std::fabs(dot));
            gates[t * n + j] = static_cast<float>(1 / (1 + std::exp(dot == 0 ? 0 : -std::copysign(root, dot))));
        }
    });
}

}  // namespace loci
