#include "bf16_products.hpp"

#include <cstring>

#include "bf16.hpp"
#include "work.hpp"

namespace loci {
namespace {

// Columns of a panel that are decoded at once: the tile stays in the second-level cache while all tokens use it.
constexpr int64_t kDepth = 2560;
// Pairs of token and expert that are packed at once: their activations should stay in the third-level cache.
constexpr int64_t kMostPairs = 2048;

thread_local Scratch worker_tile, worker_sums, worker_y;  // of each thread
thread_local Scratch caller_x, caller_h;                  // of the thread that calls

// Activations of some tokens as the kernels take them.
struct Packed {
    uint32_t* words;
    int64_t pairs;  // of columns
    Groups groups;
    uint32_t* at(int64_t group, int64_t pair) const {
        return words + pairs * groups.first(group) + pair * groups.size(group);
    }
    // Puts n pairs of token `place` of a group, from `pair` on.
    void put(int64_t group, int64_t place, int64_t pair, const uint32_t* from, int64_t n) const {
        const int64_t size = groups.size(group);
        uint32_t* to = at(group, pair) + place;
        for (int64_t i = 0; i < n; ++i) to[i * size] = from[i];
    }
};

// Packs a group's tokens; row(t) is where token t's columns begin.
template <class Row>
void pack_group(const Bf16Kernels& kernels, const Packed& packed, int64_t group, const Row& row) {
    const int64_t first = packed.groups.first(group), size = packed.groups.size(group);
    const float* rows[kMostGrouped];
    for (int64_t k = 0; k < size; ++k) rows[k] = row(first + k);
    kernels.pack(rows, size, packed.pairs, packed.at(group, 0));
}

// A panel times the activations of some groups, from `pair` on: out [token of the groups * stride + row], all 32 rows.
void multiply_panel(const Bf16Kernels& kernels, int64_t format, const Panel& panel, const Packed& x, int64_t pair,
                    int64_t first_group, int64_t last_group, float* out, int64_t stride) {
    const int64_t first = x.groups.first(first_group), tokens = x.groups.first(last_group) - first;
    uint32_t* tile = reinterpret_cast<uint32_t*>(worker_tile.get(kDepth / 2 * kPanelRows * 4));
    float* sums = panel.cols > kDepth ? reinterpret_cast<float*>(worker_sums.get(tokens * kPanelRows * 4)) : nullptr;
    for (int64_t c = 0; c < panel.cols; c += kDepth) {
        const int64_t columns = std::min(kDepth, panel.cols - c);
        const bool is_last = c + columns == panel.cols;
        kernels.decode[format](panel, c, columns, tile);
        for (int64_t g = first_group; g < last_group; ++g) {
            const int64_t token = x.groups.first(g) - first;
            float* so_far = sums + token * kPanelRows;
            kernels.multiply[x.groups.size(g)](tile, columns / 2, x.at(g, pair + c / 2), c == 0 ? nullptr : so_far,
                                               is_last ? out + token * stride : so_far, is_last ? stride : kPanelRows);
        }
    }
}

}  // namespace

bool takes_bf16(const Team& team, const Matrix& m) {
    return team.bf16 != nullptr && m.format <= kBf16 && team.bf16->decode[m.format] != nullptr && m.cols % 2 == 0;
}

void bf16_linears(const Team& team, const Bf16Part* parts, int64_t count, const float* x, int64_t tokens,
                  int64_t cols) {
    if (tokens == 0) return;
    const Bf16Kernels& kernels = *team.bf16;
    const Packed packed{reinterpret_cast<uint32_t*>(caller_x.get(tokens * cols * 2)), cols / 2, {tokens}};
    const int64_t groups = packed.groups.count();
    parallel_for(groups, tokens * cols < 4096 ? 1 : team.threads,
                 [&](int64_t g) { pack_group(kernels, packed, g, [&](int64_t t) { return x + t * cols; }); });
    std::vector<int64_t> first(static_cast<size_t>(count) + 1);  // panel of each matrix
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Panels panels(*parts[i].matrix);
        first[static_cast<size_t>(i) + 1] = first[static_cast<size_t>(i)] + panels.count();
        bytes += panels.count() * panels.bytes();
    }
    // with few panels, threads share their tokens too
    const int64_t panels = first.back(), shares = std::max<int64_t>(1, std::min(groups, 4 * team.threads / panels));
    parallel_for(panels * shares, bytes * tokens < kWorthSharing ? 1 : team.threads, [&](int64_t item) {
        const int64_t p = item / shares, share = item % shares;
        const int64_t i = std::upper_bound(first.begin(), first.end(), p) - first.begin() - 1;
        const int64_t number = p - first[static_cast<size_t>(i)];
        const Bf16Part& part = parts[i];
        const Panel panel = Panels(*part.matrix).at(number, nullptr, 0);
        const int64_t begin = groups * share / shares, end = groups * (share + 1) / shares;
        const int64_t from = packed.groups.first(begin), to = packed.groups.first(end);
        float* out = part.out + from * part.stride + number * kPanelRows;
        const bool is_whole = panel.rows == kPanelRows;
        float* y = is_whole ? out : reinterpret_cast<float*>(worker_y.get((to - from) * kPanelRows * 4));
        multiply_panel(kernels, part.matrix->format, panel, packed, part.column / 2, begin, end, y,
                       is_whole ? part.stride : kPanelRows);
        for (int64_t t = 0; t < to - from && !is_whole; ++t)
            std::memcpy(out + t * part.stride, y + t * kPanelRows, static_cast<size_t>(panel.rows) * sizeof(float));
    });
}

void bf16_moe(const Team& team, const Moe& call, const float* x, float* out) {
    const Bf16Kernels& kernels = *team.bf16;
    const int64_t hidden = call.experts[0]->cols, width = call.experts[0]->rows;
    const int64_t h_panels = divide_up(width, kPanelRows);
    const Pairs pairs(call);
    if (call.weights != nullptr) std::fill_n(out, call.tokens * hidden, 0.0f);
    for (int64_t first = 0, last = 0; first < call.used; first = last) {
        for (++last; last < call.used && pairs.end(last) - pairs.begin(first) <= kMostPairs;) ++last;
        const int64_t begin = pairs.begin(first), count = pairs.begin(last) - begin;
        uint32_t* xs = reinterpret_cast<uint32_t*>(caller_x.get(count * hidden * 2));
        uint32_t* hs = reinterpret_cast<uint32_t*>(caller_h.get(count * width * 2));
        const auto packed = [&](uint32_t* words, int64_t cols, int64_t e) {
            const int64_t before = pairs.begin(e) - begin;
            return Packed{words + before * (cols / 2), cols / 2, {pairs.end(e) - pairs.begin(e)}};
        };
        std::vector<int64_t> groups{0};  // of the experts before
        for (int64_t e = first; e < last; ++e) groups.push_back(groups.back() + packed(xs, hidden, e).groups.count());
        parallel_for(groups.back(), team.threads, [&](int64_t item) {
            const int64_t place = std::upper_bound(groups.begin(), groups.end(), item) - groups.begin() - 1;
            const int64_t e = first + place, group = item - groups[static_cast<size_t>(place)];
            pack_group(kernels, packed(xs, hidden, e), group,
                       [&](int64_t i) { return x + pairs.at(pairs.begin(e) + i) / call.top_k * hidden; });
        });

        // Gate and up: a panel of both gives 32 columns of h.
        parallel_for((last - first) * h_panels, team.threads, [&](int64_t item) {
            const int64_t e = first + item / h_panels, p = item % h_panels;
            const int64_t column = p * kPanelRows, columns = std::min(kPanelRows, width - column);
            const Packed in = packed(xs, hidden, e), h = packed(hs, width, e);
            const int64_t experts_groups = in.groups.count(), size = in.groups.tokens * kPanelRows;
            float* y = reinterpret_cast<float*>(worker_y.get(2 * size * 4));
            for (int64_t k = 0; k < 2; ++k) {
                const Matrix& w = *call.experts[3 * e + k];
                multiply_panel(kernels, w.format, Panels(w).at(p, nullptr, 0), in, 0, 0, experts_groups, y + k * size,
                               kPanelRows);
            }
            for (int64_t g = 0; g < experts_groups; ++g)
                for (int64_t k = 0; k < h.groups.size(g); ++k, y += kPanelRows) {
                    float *gate = y, *up = y + size, block[kPanelRows];
                    if (call.biases != nullptr) {
                        add_to(gate, call.biases[3 * e] + column, columns);
                        add_to(up, call.biases[3 * e + 1] + column, columns);
                    }
                    uint32_t rounded[kPanelRows / 2];
                    team.level.swiglu(gate, up, call.gating, kPanelRows, block);
                    kernels.round(block, columns, rounded);
                    h.put(g, k, column / 2, rounded, columns / 2);
                }
        });

        // Down: each turn adds its columns of all these experts to its own part of the result, in their order.
        parallel_for(divide_up(hidden, kPanelRows), team.threads, [&](int64_t p) {
            const int64_t column = p * kPanelRows, columns = std::min(kPanelRows, hidden - column);
            for (int64_t e = first; e < last; ++e) {
                const Matrix& w2 = *call.experts[3 * e + 2];
                const Packed h = packed(hs, width, e);
                float* y = reinterpret_cast<float*>(worker_y.get(h.groups.tokens * kPanelRows * 4));
                multiply_panel(kernels, w2.format, Panels(w2).at(p, nullptr, 0), h, 0, 0, h.groups.count(), y,
                               kPanelRows);
                for (int64_t i = pairs.begin(e); i < pairs.end(e); ++i, y += kPanelRows) {
                    const int64_t pair = pairs.at(i);
                    if (call.biases != nullptr) add_to(y, call.biases[3 * e + 2] + column, columns);
                    if (call.weights == nullptr) {
                        std::memcpy(out + pair * hidden + column, y, static_cast<size_t>(columns) * sizeof(float));
                        continue;
                    }
                    float* to = out + pair / call.top_k * hidden + column;
                    for (int64_t k = 0; k < columns; ++k) to[k] += call.weights[pair] * y[k];
                }
            }
        });
    }
}

}  // namespace loci
