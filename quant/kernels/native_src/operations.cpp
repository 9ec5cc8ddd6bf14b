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
constexpr int64_t kTurnBytes = 128 * 1024;
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
    int64_t stride;  // bytes from token to token
    int64_t element_stride;  // bytes of 32 columns
    const void* token(int64_t t) const { return base + t * stride; }
};

bool one_digit(const Team& team, int64_t format) {
    return team.one_digit && team.level.panel[format][1][0] != nullptr;
}

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

// The panels of a matrix, tiled on the way where it lies in file layout.
class Panels {
  public:
    explicit Panels(const Matrix& m) : m_(m), bytes_(panel_bytes(m)) {}
    int64_t count() const { return (m_.rows + kPanelRows - 1) / kPanelRows; }
    int64_t bytes() const { return bytes_; }
    const uint8_t* get(int64_t panel, Scratch& scratch) const {
        if (m_.tiled) return m_.codes + panel * bytes_;
        uint8_t* copy = scratch.get(bytes_);
        tile_panel(m_, panel, copy);
        return copy;
    }
    PanelScales scales(int64_t panel) const {
        if (m_.format != kFp8) return {nullptr, m_.tile_cols, false};
        const int64_t row = panel * kPanelRows / m_.tile_rows;
        const int64_t size = m_.float_scales ? 4 : 1, columns = (m_.cols + m_.tile_cols - 1) / m_.tile_cols;
        return {static_cast<const uint8_t*>(m_.scales) + row * columns * size, m_.tile_cols, m_.float_scales != 0};
    }
    int rows_in(int64_t panel) const {
        return static_cast<int>(std::min<int64_t>(kPanelRows, m_.rows - panel * kPanelRows));
    }

  private:
    Matrix m_;
    int64_t bytes_;
};

// One panel times `tokens` (at most kMaxTokens) activations: out [tokens][32].
void multiply(const Team& team, const Matrix& m, const uint8_t* panel, PanelScales scales, const void* const* x,
              int64_t tokens, float* out) {
    const PanelKernel* kernels = team.level.panel[m.format][one_digit(team, m.format)];
    for (int log2 = 3; tokens > 0; --log2)
        for (const int64_t n = int64_t{1} << log2; kernels[log2] && tokens >= n; tokens -= n, x += n, out += n * kPanelRows)
            kernels[log2](panel, m.cols, x, scales, out);
}

thread_local Scratch worker_panel;                       // of each thread: a panel tiled on the way
thread_local Scratch caller_x, caller_h, caller_pairs;  // of the thread that calls

}  // namespace

void linear(const Team& team, const Matrix& m, const float* x, int64_t tokens, float* out) {
    const Panels panels(m);
    const Activations a = prepare(team, m.format, x, tokens, m.cols, caller_x);
    const int64_t per_turn = std::max<int64_t>(1, std::min(kTurnBytes / panels.bytes(), panels.count() / team.threads));
    const int64_t turns = (panels.count() + per_turn - 1) / per_turn;
    const int threads = panels.count() * panels.bytes() * tokens < kWorthSharing ? 1 : team.threads;
    parallel_for(turns, threads, [&](int64_t turn) {
        const int64_t end = std::min(panels.count(), (turn + 1) * per_turn);
        for (int64_t p = turn * per_turn; p < end; ++p) {
            const uint8_t* panel = panels.get(p, worker_panel);
            for (int64_t t = 0; t < tokens; t += kMaxTokens) {
                const int64_t n = std::min<int64_t>(kMaxTokens, tokens - t);
                const void* xs[kMaxTokens];
                float y[kMaxTokens][kPanelRows];
                for (int64_t i = 0; i < n; ++i) xs[i] = a.token(t + i);
                multiply(team, m, panel, panels.scales(p), xs, n, y[0]);
                const size_t size = static_cast<size_t>(panels.rows_in(p)) * sizeof(float);
                for (int64_t i = 0; i < n; ++i) std::memcpy(out + (t + i) * m.rows + p * kPanelRows, y[i], size);
            }
        }
    });
}

void dense_linear(const Team& team, const void* weight, int kind, int64_t rows, int64_t cols, const float* x,
                  int64_t tokens, float* out) {
    const int64_t row_bytes = cols * (kind == 2 ? 4 : 2);
    const int64_t per_turn = std::max<int64_t>(1, std::min(kTurnBytes / row_bytes, rows / team.threads));
    const int threads = rows * row_bytes * tokens < kWorthSharing ? 1 : team.threads;
    parallel_for((rows + per_turn - 1) / per_turn, threads, [&](int64_t turn) {
        const int64_t end = std::min(rows, (turn + 1) * per_turn);
        for (int64_t r = turn * per_turn; r < end; ++r)
            team.level.dense_rows(static_cast<const uint8_t*>(weight) + r * row_bytes, kind, cols, x, tokens, out + r,
                                  rows);
    });
}

void moe(const Team& team, const Moe& call, const float* x, float* out) {
    const int64_t hidden = call.experts[0].cols, width = call.experts[0].rows;
    const int64_t format = call.experts[0].format, down_format = call.experts[2].format;

    // (token, choice) pairs by expert: those of expert e are start[e] .. start[e + 1]
    const int64_t pairs = call.tokens * call.top_k;
    std::vector<int64_t> start(static_cast<size_t>(call.used) + 1), expert_of(static_cast<size_t>(pairs)),
        by_expert(static_cast<size_t>(pairs));
    for (int64_t i = 0; i < pairs; ++i) {
        const int64_t e = std::lower_bound(call.ids, call.ids + call.used, call.choice[i]) - call.ids;
        expert_of[static_cast<size_t>(i)] = e;
        ++start[static_cast<size_t>(e) + 1];
    }
    for (size_t e = 0; e < static_cast<size_t>(call.used); ++e) start[e + 1] += start[e];
    {
        std::vector<int64_t> next(start.begin(), start.end() - 1);
        for (int64_t i = 0; i < pairs; ++i)
            by_expert[static_cast<size_t>(next[static_cast<size_t>(expert_of[static_cast<size_t>(i)])]++)] = i;
    }

    const Activations a = prepare(team, format, x, call.tokens, hidden, caller_x);
    Activations h = layout_for(team, down_format, width);
    h.base = caller_h.get(pairs * h.stride);

    // gate and up: a panel of both gives a block of h
    static_assert(kPanelRows == kBlock);
    const int64_t h_panels = Panels(call.experts[0]).count();
    parallel_for(call.used * h_panels, team.threads, [&](int64_t item) {
        const int64_t e = item / h_panels, panel = item % h_panels;
        const Matrix* expert = call.experts + 3 * e;
        for (int64_t i = start[static_cast<size_t>(e)]; i < start[static_cast<size_t>(e) + 1]; i += kMaxTokens) {
            const int64_t n = std::min<int64_t>(kMaxTokens, start[static_cast<size_t>(e) + 1] - i);
            const void* xs[kMaxTokens];
            for (int64_t k = 0; k < n; ++k) xs[k] = a.token(by_expert[static_cast<size_t>(i + k)] / call.top_k);
            float sides[2][kMaxTokens][kPanelRows];
            for (int side = 0; side < 2; ++side) {
                const Panels panels(expert[side]);
                multiply(team, expert[side], panels.get(panel, worker_panel), panels.scales(panel), xs, n, sides[side][0]);
            }
            for (int64_t k = 0; k < n; ++k) {
                float block[kBlock];
                team.level.swiglu(sides[0][k], sides[1][k], call.limit, kBlock, block);
                write_activations(team, down_format, h, i + k, panel * kBlock, block, std::min(kBlock, width - panel * kBlock));
            }
        }
    });

    // down: each turn owns some rows of the result and adds the experts to them in order
    const Panels shape(call.experts[2]);
    const int64_t per_turn = std::max<int64_t>(1, std::min(kTurnBytes / shape.bytes(), shape.count() / team.threads));
    parallel_for((shape.count() + per_turn - 1) / per_turn, team.threads, [&](int64_t turn) {
        const int64_t begin = turn * per_turn, end = std::min(shape.count(), begin + per_turn);
        const int64_t first_row = begin * kPanelRows, last_row = std::min(hidden, end * kPanelRows);
        for (int64_t t = 0; t < call.tokens; ++t)
            std::fill(out + t * hidden + first_row, out + t * hidden + last_row, 0.0f);
        for (int64_t e = 0; e < call.used; ++e) {
            const Matrix& down = call.experts[3 * e + 2];
            const Panels panels(down);
            for (int64_t p = begin; p < end; ++p) {
                const uint8_t* panel = panels.get(p, worker_panel);
                for (int64_t i = start[static_cast<size_t>(e)]; i < start[static_cast<size_t>(e) + 1]; i += kMaxTokens) {
                    const int64_t n = std::min<int64_t>(kMaxTokens, start[static_cast<size_t>(e) + 1] - i);
                    const void* hs[kMaxTokens];
                    float y[kMaxTokens][kPanelRows];
                    for (int64_t k = 0; k < n; ++k) hs[k] = h.token(i + k);
                    multiply(team, down, panel, panels.scales(p), hs, n, y[0]);
                    for (int64_t k = 0; k < n; ++k) {
                        const int64_t pair = by_expert[static_cast<size_t>(i + k)];
                        float* to = out + pair / call.top_k * hidden + p * kPanelRows;
                        for (int r = 0; r < panels.rows_in(p); ++r) to[r] += call.weights[pair] * y[k][r];
                    }
                }
            }
        }
    });
}

void gather_rows(const Team& team, const uint8_t* codes, const void* scales, bool float_scales, int64_t cols,
                 const int64_t* rows, int64_t n, float* out) {
    constexpr int64_t kTurn = 32, kAhead = 8;
    const int64_t scale_bytes = (cols + kBlock - 1) / kBlock * (float_scales ? 4 : 1);
    const uint8_t* scale_base = static_cast<const uint8_t*>(scales);
    parallel_for((n + kTurn - 1) / kTurn, n * cols < kWorthSharing ? 1 : team.threads, [&](int64_t turn) {
        const int64_t end = std::min(n, (turn + 1) * kTurn);
        const auto prefetch = [&](int64_t i) {
            if (i >= end) return;
            for (int64_t c = 0; c < cols; c += 64) __builtin_prefetch(codes + rows[i] * cols + c);
            __builtin_prefetch(scale_base + rows[i] * scale_bytes);
        };
        for (int64_t i = turn * kTurn; i < turn * kTurn + kAhead; ++i) prefetch(i);
        for (int64_t i = turn * kTurn; i < end; ++i) {
            prefetch(i + kAhead);
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
    parallel_for(n, team.threads, [&](int64_t i) {
        untile_row(tiled, rows[i], codes + i * code_bytes, scales + i * scale_bytes);
    });
}

}  // namespace loci
