#include "operations.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "pool.hpp"

namespace loci {
namespace {

// Bytes that one turn of a thread should read: long enough to stream, short enough to share evenly.
constexpr int64_t kTurnBytes = 1024 * 1024;  // of plain rows
// Below this many bytes of work, waking the others costs more than it saves.
constexpr int64_t kWorthSharing = 32 * 1024;

// Memory that a thread keeps between calls.
class Scratch {
  public:
    uint8_t* get(int64_t bytes) {
        if (bytes > size_) {
            size_ = (bytes + 4095) / 4096 * 4096;
            data_.reset(static_cast<uint8_t*>(std::aligned_alloc(4096, static_cast<size_t>(size_))));
        }
        return data_.get();
    }

  private:
    struct Free {
        void operator()(uint8_t* p) const { std::free(p); }
    };
    std::unique_ptr<uint8_t, Free> data_;
    int64_t size_ = 0;
};

// Activations as a format's panel kernels take them.
struct Activations {
    uint8_t* base;
    int64_t stride;          // bytes from token to token
    int64_t element_stride;  // bytes of 32 columns
    const void* token(int64_t t) const { return base + t * stride; }
};

bool one_digit(const Team& team, int64_t format) { return team.one_digit && team.level.panel[format][1][0] != nullptr; }

Activations layout_for(const Team& team, int64_t format, int64_t cols) {
    if (format == kFp8) return {nullptr, cols * static_cast<int64_t>(sizeof(float)), kBlock * sizeof(float)};
    const int64_t record = one_digit(team, format) ? sizeof(Block<1>) : sizeof(Block<3>);
    return {nullptr, cols / kBlock * record, record};
}

// Writes columns first .. first + cols of token t.
void write_activations(const Team& team, int64_t format, const Activations& to, int64_t t, int64_t first,
                       const float* x, int64_t cols) {
    uint8_t* p = to.base + t * to.stride + first / kBlock * to.element_stride;
    const int offset = offset_of(format);
    const bool halves = format == kQ6_K;
    if (format == kFp8) std::memcpy(p, x, static_cast<size_t>(cols) * sizeof(float));
    else if (one_digit(team, format)) team.level.digits1(x, cols, offset, halves, reinterpret_cast<Block<1>*>(p));
    else team.level.digits3(x, cols, offset, halves, reinterpret_cast<Block<3>*>(p));
}

Activations prepare(const Team& team, int64_t format, const float* x, int64_t tokens, int64_t cols, Scratch& scratch) {
    Activations a = layout_for(team, format, cols);
    if (format == kFp8) {
        a.base = reinterpret_cast<uint8_t*>(const_cast<float*>(x));
        return a;
    }
    a.base = scratch.get(tokens * a.stride);
    const int threads = tokens * cols < 16384 ? 1 : team.threads;
    parallel_for(tokens, threads, [&](int64_t t) { write_activations(team, format, a, t, 0, x + t * cols, cols); });
    return a;
}

thread_local Scratch worker_panels;                 // of each thread: panels tiled on the way
thread_local Scratch caller_x, caller_h, caller_y;  // of the thread that calls

// The panels of a matrix, tiled on the way where it lies in file layout.
class Panels {
  public:
    explicit Panels(const Matrix& m) : m_(m), bytes_(panel_bytes(m)) {}
    int64_t count() const { return (m_.rows + kPanelRows - 1) / kPanelRows; }
    int64_t bytes() const { return bytes_; }
    int64_t rows_in(int64_t panel) const { return std::min(kPanelRows, m_.rows - panel * kPanelRows); }
    void add_to(PanelSet& set, int64_t panel) const {
        set.panels[set.count] = m_.tiled ? m_.codes + panel * bytes_ : tiled_copy(panel, set.count);
        set.scales[set.count] = scales(panel);
        ++set.count;
    }

  private:
    const uint8_t* tiled_copy(int64_t panel, int place) const {
        uint8_t* copy = worker_panels.get(kMostPanels * bytes_) + place * bytes_;
        tile_panel(m_, panel, copy);
        return copy;
    }
    PanelScales scales(int64_t panel) const {
        if (m_.format != kFp8) return {nullptr, m_.tile_cols, false};
        const int64_t row = panel * kPanelRows / m_.tile_rows;
        const int64_t size = m_.float_scales ? 4 : 1, columns = (m_.cols + m_.tile_cols - 1) / m_.tile_cols;
        return {static_cast<const uint8_t*>(m_.scales) + row * columns * size, m_.tile_cols, m_.float_scales != 0};
    }

    Matrix m_;
    int64_t bytes_;
};

// A set of panels times `tokens` (at most kMaxTokens) activations: out [panels][tokens][32].
void multiply(const Team& team, int64_t format, const PanelSet& set, const void* const* x, int64_t tokens, float* out) {
    const bool one = one_digit(team, format);
    if (tokens == 1 && set.count == kMostPanels) {
        team.level.panels[format][one](set, x, out);
        return;
    }
    const PanelKernel* kernels = team.level.panel[format][one];
    for (int q = 0; q < set.count; ++q) {
        PanelSet single{set.cols, 1, {set.panels[q]}, {set.scales[q]}};
        int64_t done = 0;
        for (int log2 = 3; log2 >= 0; --log2)
            for (const int64_t n = int64_t{1} << log2; kernels[log2] && tokens - done >= n; done += n)
                kernels[log2](single, x + done, out + (q * tokens + done) * kPanelRows);
    }
}

// How many panels a turn of a thread takes: several at once, unless too few turns would be left to share.
int64_t panels_per_turn(int64_t panels, int threads) {
    constexpr int64_t kTurnsEach = 4;
    return panels >= kMostPanels * kTurnsEach * threads || threads == 1 ? kMostPanels : 1;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The panels of a turn lie far apart, those of the next turn behind each of them: so each is part of a run that goes
// on from turn to turn, long enough for the processor to foresee.
struct Turns {
    int64_t panels, count;
    Turns(int64_t all, int64_t per_turn) : panels(all), count(divide_up(all, per_turn)) {}
    template <class F>
    void each_panel(int64_t turn, const F& visit) const {
        int place = 0;
        for (int64_t p = turn; p < panels; p += count) visit(place++, p);
    }
};

}  // namespace

void linear_group(const Team& team, const Matrix* const* matrices, float* const* outs, int64_t count, const float* x,
                  int64_t tokens) {
    const Matrix& first = *matrices[0];
    const Activations a = prepare(team, first.format, x, tokens, first.cols, caller_x);
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; ++i) bytes += Panels(*matrices[i]).count() * Panels(*matrices[i]).bytes();
    const int threads = bytes * tokens < kWorthSharing ? 1 : team.threads;
    const auto turns_of = [&](int64_t i) {
        const int64_t panels = Panels(*matrices[i]).count();
        return Turns(panels, panels_per_turn(panels, threads));
    };
    int64_t all = 0;
    for (int64_t i = 0; i < count; ++i) all += turns_of(i).count;
    parallel_for(all, threads, [&](int64_t item) {
        int64_t i = 0, turn = item;
        for (; turn >= turns_of(i).count; ++i) turn -= turns_of(i).count;
        const Matrix& m = *matrices[i];
        const Panels panels(m);
        const Turns turns = turns_of(i);
        PanelSet set{m.cols};
        turns.each_panel(turn, [&](int, int64_t p) { panels.add_to(set, p); });
        for (int64_t t = 0; t < tokens; t += kMaxTokens) {
            const int64_t n = std::min(kMaxTokens, tokens - t);
            const void* xs[kMaxTokens];
            float y[kMostPanels * kMaxTokens][kPanelRows];
            for (int64_t k = 0; k < n; ++k) xs[k] = a.token(t + k);
            multiply(team, m.format, set, xs, n, y[0]);
            turns.each_panel(turn, [&](int q, int64_t p) {
                for (int64_t k = 0; k < n; ++k)
                    std::memcpy(outs[i] + (t + k) * m.rows + p * kPanelRows, y[q * n + k],
                                static_cast<size_t>(panels.rows_in(p)) * sizeof(float));
            });
        }
    });
}

void linear_blocks(const Team& team, const Matrix* const* matrices, int64_t count, const float* x, int64_t tokens,
                   float* out) {
    const Matrix& first = *matrices[0];
    const Activations a = prepare(team, first.format, x, tokens, count * first.cols, caller_x);
    const int64_t panels_each = Panels(first).count();
    const int threads = count * panels_each * Panels(first).bytes() * tokens < kWorthSharing ? 1 : team.threads;
    const Turns turns(panels_each, panels_per_turn(count * panels_each, threads));
    parallel_for(count * turns.count, threads, [&](int64_t item) {
        const int64_t i = item / turns.count, turn = item % turns.count;
        const Panels panels(*matrices[i]);
        PanelSet set{first.cols};
        turns.each_panel(turn, [&](int, int64_t p) { panels.add_to(set, p); });
        for (int64_t t = 0; t < tokens; t += kMaxTokens) {
            const int64_t n = std::min(kMaxTokens, tokens - t);
            const void* xs[kMaxTokens];
            float y[kMostPanels * kMaxTokens][kPanelRows];
            for (int64_t k = 0; k < n; ++k)
                xs[k] = a.base + (t + k) * a.stride + i * (first.cols / kBlock) * a.element_stride;
            multiply(team, first.format, set, xs, n, y[0]);
            turns.each_panel(turn, [&](int q, int64_t p) {
                for (int64_t k = 0; k < n; ++k)
                    std::memcpy(out + ((t + k) * count + i) * first.rows + p * kPanelRows, y[q * n + k],
                                static_cast<size_t>(panels.rows_in(p)) * sizeof(float));
            });
        }
    });
}

void linear(const Team& team, const Matrix& m, const float* x, int64_t tokens, float* out) {
    const Matrix* matrices[] = {&m};
    linear_group(team, matrices, &out, 1, x, tokens);
}

void dense_linear(const Team& team, const void* weight, int kind, int64_t rows, int64_t cols, const float* x,
                  int64_t tokens, float* out) {
    const int64_t row_bytes = cols * (kind == 2 ? 4 : 2);
    constexpr int64_t kTogether = 4;   // rows that a kernel takes at most
    constexpr int64_t kTurnsEach = 4;  // of a thread, at least
    const int64_t fair = std::min(kTurnBytes / row_bytes, rows / (kTurnsEach * team.threads));
    const int64_t per_turn = std::max(kTogether, fair / kTogether * kTogether);
    const int threads = rows * row_bytes * tokens < kWorthSharing ? 1 : team.threads;
    parallel_for((rows + per_turn - 1) / per_turn, threads, [&](int64_t turn) {
        const int64_t first = turn * per_turn, n = std::min(rows - first, per_turn);
        team.level.dense_rows(static_cast<const uint8_t*>(weight) + first * row_bytes, n, kind, cols, x, tokens,
                              out + first, rows);
    });
}

namespace {

// The (token, choice) pairs of a call, ordered by expert, then by token.
struct Pairs {
    std::vector<int64_t> start;  // those of the expert in place e are start[e] .. start[e + 1]
    std::vector<int64_t> pair;   // token * top_k + choice

    explicit Pairs(const Moe& call) : start(static_cast<size_t>(call.used) + 1) {
        const int64_t count = call.tokens * call.top_k;
        std::vector<size_t> place(static_cast<size_t>(count));
        for (size_t i = 0; i < place.size(); ++i) {
            place[i] = static_cast<size_t>(std::lower_bound(call.ids, call.ids + call.used, call.choice[i]) - call.ids);
            ++start[place[i] + 1];
        }
        for (size_t e = 1; e < start.size(); ++e) start[e] += start[e - 1];
        std::vector<int64_t> next(start.begin(), start.end() - 1);
        pair.resize(place.size());
        for (size_t i = 0; i < place.size(); ++i) pair[static_cast<size_t>(next[place[i]]++)] = static_cast<int64_t>(i);
    }
    int64_t begin(int64_t e) const { return start[static_cast<size_t>(e)]; }
    int64_t end(int64_t e) const { return start[static_cast<size_t>(e) + 1]; }
    int64_t at(int64_t i) const { return pair[static_cast<size_t>(i)]; }
};

}  // namespace

void moe(const Team& team, const Moe& call, const float* x, float* out) {
    const Matrix &up_shape = *call.experts[0], &down_shape = *call.experts[2];
    const int64_t hidden = up_shape.cols, width = up_shape.rows;
    const Pairs pairs(call);
    const Activations a = prepare(team, up_shape.format, x, call.tokens, hidden, caller_x);
    Activations h = layout_for(team, down_shape.format, width);  // one for each pair, in their order
    h.base = caller_h.get(static_cast<int64_t>(pairs.pair.size()) * h.stride);

    // Gate and up: two panels of each at a time; a panel of both gives a block of h.
    static_assert(kPanelRows == kBlock);
    const Turns h_turns(divide_up(width, kPanelRows), 2);
    parallel_for(call.used * h_turns.count, team.threads, [&](int64_t item) {
        const int64_t e = item / h_turns.count, turn = item % h_turns.count;
        PanelSet set{hidden};
        for (int side = 0; side < 2; ++side)
            h_turns.each_panel(turn, [&](int, int64_t p) { Panels(*call.experts[3 * e + side]).add_to(set, p); });
        for (int64_t i = pairs.begin(e); i < pairs.end(e); i += kMaxTokens) {
            const int64_t n = std::min(kMaxTokens, pairs.end(e) - i);
            const void* xs[kMaxTokens];
            for (int64_t k = 0; k < n; ++k) xs[k] = a.token(pairs.at(i + k) / call.top_k);
            float y[kMostPanels * kMaxTokens][kPanelRows];
            multiply(team, up_shape.format, set, xs, n, y[0]);
            h_turns.each_panel(turn, [&](int q, int64_t p) {
                for (int64_t k = 0; k < n; ++k) {
                    float block[kBlock];
                    const float *gate = y[q * n + k], *up = y[(set.count / 2 + q) * n + k];
                    team.level.swiglu(gate, up, call.limit, kBlock, block);
                    const int64_t columns = std::min(kBlock, width - p * kBlock);
                    write_activations(team, down_shape.format, h, i + k, p * kBlock, block, columns);
                }
            });
        }
    });

    // Down, some experts at a time: all their products first, each matrix read in sequence; then the weighted sums,
    // in the order of the experts.
    std::fill_n(out, call.tokens * (call.weights != nullptr ? 1 : call.top_k) * hidden, 0.0f);
    const Turns y_turns(divide_up(hidden, kPanelRows), kMostPanels);
    constexpr int64_t kProducts = 1024 * 1024, kColumns = 512;  // floats
    for (int64_t first = 0, last = 0; first < call.used; first = last) {
        for (++last; last < call.used && (pairs.end(last) - pairs.begin(first)) * hidden <= kProducts;) ++last;
        const int64_t begin = pairs.begin(first), count = pairs.begin(last) - begin;
        float* products = reinterpret_cast<float*>(caller_y.get(count * hidden * static_cast<int64_t>(sizeof(float))));
        parallel_for((last - first) * y_turns.count, team.threads, [&](int64_t item) {
            const int64_t e = first + item / y_turns.count, turn = item % y_turns.count;
            const Panels panels(*call.experts[3 * e + 2]);
            PanelSet set{width};
            y_turns.each_panel(turn, [&](int, int64_t p) { panels.add_to(set, p); });
            for (int64_t i = pairs.begin(e); i < pairs.end(e); i += kMaxTokens) {
                const int64_t n = std::min(kMaxTokens, pairs.end(e) - i);
                const void* hs[kMaxTokens];
                for (int64_t k = 0; k < n; ++k) hs[k] = h.token(i + k);
                float y[kMostPanels * kMaxTokens][kPanelRows];
                multiply(team, down_shape.format, set, hs, n, y[0]);
                y_turns.each_panel(turn, [&](int q, int64_t p) {
                    for (int64_t k = 0; k < n; ++k)
                        std::memcpy(products + (i - begin + k) * hidden + p * kPanelRows, y[q * n + k],
                                    static_cast<size_t>(panels.rows_in(p)) * sizeof(float));
                });
            }
        });
        const int threads = count * hidden < kWorthSharing ? 1 : team.threads;
        parallel_for(divide_up(hidden, kColumns), threads, [&](int64_t item) {
            const int64_t c = item * kColumns, columns = std::min(kColumns, hidden - c);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t pair = pairs.at(begin + i);
                const float weight = call.weights != nullptr ? call.weights[pair] : 1;
                const float* from = products + i * hidden + c;
                float* to = out + (call.weights != nullptr ? pair / call.top_k : pair) * hidden + c;
                for (int64_t k = 0; k < columns; ++k) to[k] += weight * from[k];
            }
        });
    }
}

void gather_rows(const Team& team, const uint8_t* codes, const void* scales, bool float_scales, int64_t cols,
                 const int64_t* rows, int64_t n, float* out) {
    constexpr int64_t kTurn = 128;
    const int64_t scale_bytes = (cols + kBlock - 1) / kBlock * (float_scales ? 4 : 1);
    const uint8_t* scale_base = static_cast<const uint8_t*>(scales);
    parallel_for((n + kTurn - 1) / kTurn, n * cols < kWorthSharing ? 1 : team.threads, [&](int64_t turn) {
        const int64_t end = std::min(n, (turn + 1) * kTurn);
        const auto prefetch = [&](int64_t i) {
            if (i >= end) return;
            prefetch_row(codes + rows[i] * cols, cols);
            prefetch_row(scale_base + rows[i] * scale_bytes, scale_bytes);
        };
        for (int64_t i = turn * kTurn; i < turn * kTurn + kRowsAhead; ++i) prefetch(i);
        for (int64_t i = turn * kTurn; i < end; ++i) {
            prefetch(i + kRowsAhead);
            team.level.fp8_row(codes + rows[i] * cols, scale_base + rows[i] * scale_bytes, float_scales, cols,
                               out + i * cols);
        }
    });
}

void tile(const Team& team, const Matrix& m, uint8_t* out) {
    const int64_t panels = (m.rows + kPanelRows - 1) / kPanelRows;
    parallel_for(panels, team.threads, [&](int64_t p) { tile_panel(m, p, out + p * panel_bytes(m)); });
}

void untile(const Team& team, const Matrix& tiled, const int64_t* rows, int64_t n, uint8_t* codes, uint8_t* scales) {
    int64_t code_bytes, scale_bytes;
    file_row_bytes(tiled, &code_bytes, &scale_bytes);
    parallel_for(n, team.threads,
                 [&](int64_t i) { untile_row(tiled, rows[i], codes + i * code_bytes, scales + i * scale_bytes); });
}

}  // namespace loci
