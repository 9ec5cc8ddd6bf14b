#include "operations.hpp"

#include <cstring>

#include "bf16_products.hpp"
#include "work.hpp"

namespace loci {
namespace {

// Bytes that one turn of a thread should read: long enough to stream, short enough to share evenly.
constexpr int64_t kTurnBytes = 1024 * 1024;  // of plain rows

// Activations as a format's panel kernels take them.
struct Activations {
    uint8_t* base;
    int64_t stride;          // bytes from token to token
    int64_t element_stride;  // bytes of 32 columns
    const uint8_t* token(int64_t t) const { return base + t * stride; }
};

bool one_digit(const Team& team, int64_t format) { return team.one_digit && team.level.panel[format][1][0] != nullptr; }

// Whether two formats take the same activations.
bool take_the_same(const Team& team, int64_t a, int64_t b) {
    if (takes_floats(a) || takes_floats(b)) return takes_floats(a) && takes_floats(b);
    return offset_of(a) == offset_of(b) && has_halves(a) == has_halves(b) && one_digit(team, a) == one_digit(team, b);
}

Activations layout_for(const Team& team, int64_t format, int64_t cols) {
    if (takes_floats(format)) return {nullptr, cols * static_cast<int64_t>(sizeof(float)), kBlock * sizeof(float)};
    const int64_t record = one_digit(team, format) ? sizeof(Block<1>) : sizeof(Block<3>);
    return {nullptr, cols / kBlock * record, record};
}

// Writes columns first .. first + cols of token t.
void write_activations(const Team& team, int64_t format, const Activations& to, int64_t t, int64_t first,
                       const float* x, int64_t cols) {
    uint8_t* p = to.base + t * to.stride + first / kBlock * to.element_stride;
    const int offset = offset_of(format);
    const bool halves = has_halves(format);
    if (takes_floats(format)) std::memcpy(p, x, static_cast<size_t>(cols) * sizeof(float));
    else if (one_digit(team, format)) team.level.digits1(x, cols, offset, halves, reinterpret_cast<Block<1>*>(p));
    else team.level.digits3(x, cols, offset, halves, reinterpret_cast<Block<3>*>(p));
}

// Of the tokens that row(0), row(1) ... name, one after the other.
template <class Row>
Activations prepare_some(const Team& team, int64_t format, const float* x, int64_t count, int64_t cols,
                         Scratch& scratch, const Row& row) {
    Activations a = layout_for(team, format, cols);
    a.base = scratch.get(count * a.stride);
    const int threads = count * cols < 4096 ? 1 : team.threads;
    parallel_for(count, threads, [&](int64_t t) { write_activations(team, format, a, t, 0, x + row(t) * cols, cols); });
    return a;
}

Activations prepare(const Team& team, int64_t format, const float* x, int64_t tokens, int64_t cols, Scratch& scratch) {
    if (!takes_floats(format)) return prepare_some(team, format, x, tokens, cols, scratch, [](int64_t t) { return t; });
    Activations a = layout_for(team, format, cols);
    a.base = reinterpret_cast<uint8_t*>(const_cast<float*>(x));
    return a;
}

thread_local Scratch caller_x, caller_h, caller_y;  // of the thread that calls
thread_local Scratch caller_other_x;

// A panel times `tokens` (at most kMaxTokens) activations: out [tokens][32].
void multiply(const Team& team, int64_t format, const Panel& panel, const void* const* x, int64_t tokens, float* out) {
    if (is_plain(format)) {
        const float* xs[kMaxTokens];
        for (int64_t k = 0; k < tokens; ++k) xs[k] = static_cast<const float*>(x[k]);
        team.level.dense_rows(panel.codes, panel.rows, kind_of(format), panel.cols, xs, tokens, out, kPanelRows);
        return;
    }
    const PanelKernel* kernels = team.level.panel[format][one_digit(team, format)];
    int64_t most = kMaxTokens;
    while (kernels[most - 1] == nullptr) --most;
    for (int64_t done = 0, n; done < tokens; done += n) {  // in groups that are as even as kernels can be had
        const int64_t left = tokens - done;
        n = divide_up(left, divide_up(left, most));
        while (kernels[n - 1] == nullptr) ++n;
        while (n > left || kernels[n - 1] == nullptr) --n;
        kernels[n - 1](panel, x + done, out + done * kPanelRows);
    }
}

// A matrix, where in each token's activations those of its columns begin, in bytes, and where its products go: those of
// a token `stride` behind the last's.
struct Product {
    Panels panels;
    int64_t begin;
    float* out;
    int64_t stride;
};

// The panels of several matrices in the order in which they are read.
class Line {
  public:
    void add(const Product& product) {
        parts_.push_back({product, count_});
        count_ += product.panels.count();
        bytes_ += product.panels.count() * product.panels.bytes();
    }
    int64_t count() const { return count_; }
    int64_t bytes() const { return bytes_; }
    // The matrix that has panel p, and the panel's number there.
    const Product& find(int64_t p, int64_t* number) const {
        size_t i = 0;
        while (i + 1 < parts_.size() && parts_[i + 1].first <= p) ++i;
        *number = p - parts_[i].first;
        return parts_[i].product;
    }
    const uint8_t* begin(int64_t p) const {
        if (p < 0 || p >= count_) return nullptr;
        int64_t number;
        const Panels& panels = find(p, &number).panels;
        return panels.begin(number);
    }

  private:
    struct Part {
        Product product;
        int64_t first;
    };
    std::vector<Part> parts_;
    int64_t count_ = 0, bytes_ = 0;
};

constexpr int64_t kFewTokens = 4;     // of FP8, for which panels are decoded on the way
constexpr int64_t kManyTokens = 256;  // whose sums a thread's second-level cache holds
thread_local Scratch worker_sums;     // of each thread

// Some panels of FP8 times many tokens.
void multiply_fp8(const Team& team, const Product* const* products, const int64_t* numbers, const Panel* panels,
                  int64_t count, const Activations& a, int64_t tokens) {
    float* sums = reinterpret_cast<float*>(worker_sums.get(kMostPanels * kManyTokens * kPanelRows * 4));
    int64_t at[kMostPanels];
    for (int64_t q = 0; q < count; ++q) at[q] = products[q]->begin / static_cast<int64_t>(sizeof(float));
    for (int64_t t = 0; t < tokens; t += kManyTokens) {
        const int64_t n = std::min(kManyTokens, tokens - t);
        const float* xs[kManyTokens];
        for (int64_t k = 0; k < n; ++k) xs[k] = reinterpret_cast<const float*>(a.token(t + k));
        team.level.fp8_many(panels, count, xs, at, n, sums);
        for (int64_t q = 0; q < count; ++q)
            for (int64_t k = 0; k < n; ++k)
                std::memcpy(products[q]->out + (t + k) * products[q]->stride + numbers[q] * kPanelRows,
                            sums + (q * n + k) * kPanelRows, static_cast<size_t>(panels[q].rows) * sizeof(float));
    }
}

// All products of a line of matrices of one format.
void multiply(const Team& team, const Line& line, int64_t format, const Activations& a, int64_t tokens) {
    const int64_t per_turn = tokens > kMaxTokens ? kMostPanels : 1;  // they use activations while these are near
    const int threads = line.bytes() * tokens < kWorthSharing ? 1 : team.threads;
    const auto compute = [&](const Turn& turn) {
        const int64_t first = turn.item * per_turn, count = std::min(line.count() - first, per_turn);
        const Product* products[kMostPanels];
        int64_t numbers[kMostPanels];  // of panels in their matrices
        Panel panels[kMostPanels];
        for (int64_t q = 0; q < count; ++q) {
            products[q] = &line.find(first + q, &numbers[q]);
            const bool is_last = q + 1 == count && turn.next < 0;
            const uint8_t* next = is_last ? team.ahead(turn.share).begin
                                          : line.begin(q + 1 < count ? first + q + 1 : turn.next * per_turn);
            panels[q] = products[q]->panels.at(numbers[q], next, q);
        }
        if (format == kFp8 && tokens > kFewTokens && panels[0].cols % 2 == 0) {
            multiply_fp8(team, products, numbers, panels, count, a, tokens);
            return;
        }
        for (int64_t t = 0; t < tokens; t += kMaxTokens)
            for (int64_t q = 0; q < count; ++q) {
                const Product& product = *products[q];
                const int64_t n = std::min(kMaxTokens, tokens - t), row = numbers[q] * kPanelRows;
                const void* xs[kMaxTokens];
                for (int64_t k = 0; k < n; ++k) xs[k] = a.token(t + k) + product.begin;
                float y[kMaxTokens][kPanelRows];
                multiply(team, format, panels[q], xs, n, y[0]);
                for (int64_t k = 0; k < n; ++k)
                    std::memcpy(product.out + (t + k) * product.stride + row, y[k],
                                static_cast<size_t>(product.panels.rows_in(numbers[q])) * sizeof(float));
            }
    };
    parallel_for(divide_up(line.count(), per_turn), threads, compute, [&](int number) { return team.ahead(number); });
}

Matrix plain_matrix(const void* rows, int kind, int64_t count, int64_t cols) {
    return {static_cast<const uint8_t*>(rows), nullptr, kBf16 + kind, 1, count, cols, 1, 1, 0};
}

}  // namespace

Span Upcoming::share(int number, int threads) const {
    constexpr int64_t kAsked = 48 * 1024;  // what comes while small operations are computed
    if (rows != nullptr) return {rows + bytes / threads * number, kAsked};
    int64_t panels = 0;
    for (int64_t i = 0; i < count; ++i) panels += Panels(*matrices[i]).count();
    int64_t first = panels * number / threads;
    for (int64_t i = 0; i < count; first -= Panels(*matrices[i++]).count())
        if (first < Panels(*matrices[i]).count()) return {Panels(*matrices[i]).begin(first), kAsked};
    return {};
}

void linear_group(const Team& team, const Matrix* const* matrices, float* const* outs, int64_t count, const float* x,
                  int64_t tokens) {
    const Matrix& first = *matrices[0];
    if (takes_bf16(team, first)) {
        std::vector<Bf16Part> parts;
        for (int64_t i = 0; i < count; ++i) parts.push_back({matrices[i], 0, outs[i], matrices[i]->rows});
        return bf16_linears(team, parts.data(), count, x, tokens, first.cols);
    }
    if (is_plain(first.format)) {
        for (int64_t i = 0; i < count; ++i)
            dense_linear(team, matrices[i]->codes, kind_of(first.format), matrices[i]->rows, first.cols, x, tokens,
                         outs[i]);
        return;
    }
    Line line;
    for (int64_t i = 0; i < count; ++i) line.add({Panels(*matrices[i]), 0, outs[i], matrices[i]->rows});
    multiply(team, line, first.format, prepare(team, first.format, x, tokens, first.cols, caller_x), tokens);
}

void linear_blocks(const Team& team, const Matrix* const* matrices, int64_t count, const float* x, int64_t tokens,
                   float* out) {
    const Matrix& first = *matrices[0];
    if (takes_bf16(team, first)) {
        std::vector<Bf16Part> parts;
        for (int64_t i = 0; i < count; ++i)
            parts.push_back({matrices[i], i * first.cols, out + i * first.rows, count * first.rows});
        return bf16_linears(team, parts.data(), count, x, tokens, count * first.cols);
    }
    Line line;
    const int64_t apart = layout_for(team, first.format, first.cols).stride;
    for (int64_t i = 0; i < count; ++i)
        line.add({Panels(*matrices[i]), i * apart, out + i * first.rows, count * first.rows});
    multiply(team, line, first.format, prepare(team, first.format, x, tokens, count * first.cols, caller_x), tokens);
}

void linear(const Team& team, const Matrix& m, const float* x, int64_t tokens, float* out) {
    const Matrix* matrices[] = {&m};
    linear_group(team, matrices, &out, 1, x, tokens);
}

void dense_linear(const Team& team, const void* weight, int kind, int64_t rows, int64_t cols, const float* x,
                  int64_t tokens, float* out) {
    if (const Matrix m = plain_matrix(weight, kind, rows, cols); takes_bf16(team, m)) {
        const Bf16Part part{&m, 0, out, rows};
        return bf16_linears(team, &part, 1, x, tokens, cols);
    }
    const int64_t row_bytes = cols * plain_bytes(kind);
    constexpr int64_t kTogether = 4;   // rows that a kernel takes at most
    constexpr int64_t kTurnsEach = 4;  // of a thread, at least
    constexpr int64_t kLeast = 16;     // rows of a turn, for which activations are arranged, where there are as many
    const int threads = rows * row_bytes * tokens < kWorthSharing ? 1 : team.threads;
    const int64_t fair = std::min(kTurnBytes / row_bytes, std::max(kLeast, rows / (kTurnsEach * threads)));
    const int64_t per_turn = std::max<int64_t>(1, std::min(fair, divide_up(rows, threads)) / kTogether) * kTogether;
    std::vector<const float*> xs(static_cast<size_t>(tokens));
    for (int64_t t = 0; t < tokens; ++t) xs[static_cast<size_t>(t)] = x + t * cols;
    parallel_for((rows + per_turn - 1) / per_turn, threads, [&](int64_t turn) {
        const int64_t first = turn * per_turn, n = std::min(rows - first, per_turn);
        team.level.dense_rows(static_cast<const uint8_t*>(weight) + first * row_bytes, n, kind, cols, xs.data(), tokens,
                              out + first, rows);
    });
}

void dense_blocks(const Team& team, const void* weights, int kind, int64_t count, int64_t rows, int64_t cols,
                  const float* x, int64_t tokens, float* out) {
    const int64_t row_bytes = cols * plain_bytes(kind);
    if (takes_bf16(team, plain_matrix(weights, kind, rows, cols))) {
        std::vector<Matrix> matrices;
        for (int64_t i = 0; i < count; ++i)
            matrices.push_back(
                plain_matrix(static_cast<const uint8_t*>(weights) + i * rows * row_bytes, kind, rows, cols));
        std::vector<Bf16Part> parts;
        for (int64_t i = 0; i < count; ++i)
            parts.push_back({&matrices[static_cast<size_t>(i)], i * cols, out + i * rows, count * rows});
        return bf16_linears(team, parts.data(), count, x, tokens, count * cols);
    }
    const int64_t shares = std::max<int64_t>(1, 2 * team.threads / count);  // of a matrix's rows
    const int64_t per_share = (rows + 4 * shares - 1) / (4 * shares) * 4;   // as many as a kernel takes, and no rest
    const int threads = count * rows * row_bytes * tokens < kWorthSharing ? 1 : team.threads;
    parallel_for(count * shares, threads, [&](int64_t item) {
        const int64_t block = item / shares, first = item % shares * per_share;
        const int64_t n = std::min(rows - first, per_share);
        if (n <= 0) return;
        thread_local std::vector<const float*> xs;
        xs.resize(static_cast<size_t>(tokens));
        for (int64_t t = 0; t < tokens; ++t) xs[static_cast<size_t>(t)] = x + (t * count + block) * cols;
        team.level.dense_rows(static_cast<const uint8_t*>(weights) + (block * rows + first) * row_bytes, n, kind, cols,
                              xs.data(), tokens, out + block * rows + first, count * rows);
    });
}

bool moe(const Team& team, const Moe& call, const float* x, float* out) {
    const int64_t hidden = call.experts[0]->cols, width = call.experts[0]->rows;
    int64_t formats[3];
    for (int i = 0; i < 3; ++i) formats[i] = call.experts[i]->format;
    for (int64_t i = 3; i < 3 * call.used; ++i)
        if (call.experts[i]->format != formats[i % 3]) return false;
    if (std::all_of(call.experts, call.experts + 3, [&](const Matrix* m) { return takes_bf16(team, *m); })) {
        bf16_moe(team, call, x, out);
        return true;
    }
    const Pairs pairs(call);
    // Of some choices, activations are made for each, in their order; of all, once for each token.
    const auto token_of = [&](int64_t i) { return pairs.at(i) / call.top_k; };
    const auto inputs = [&](int64_t format, Scratch& scratch) {
        if (call.some == nullptr || takes_floats(format)) return prepare(team, format, x, call.tokens, hidden, scratch);
        return prepare_some(team, format, x, call.count, hidden, scratch, token_of);
    };
    const auto input = [&](int64_t format, int64_t i) {
        return call.some == nullptr || takes_floats(format) ? token_of(i) : i;
    };
    const Activations a = inputs(formats[0], caller_x);
    const Activations b = take_the_same(team, formats[0], formats[1]) ? a : inputs(formats[1], caller_other_x);
    Activations h = layout_for(team, formats[2], width);  // one for each pair, in their order
    h.base = caller_h.get(static_cast<int64_t>(pairs.pair.size()) * h.stride);

    // Gate and up: a panel of both gives a block of h.
    static_assert(kPanelRows == kBlock);
    const int64_t h_panels = divide_up(width, kPanelRows);
    parallel_for(call.used * h_panels, team.threads, [&](const Turn& turn) {
        const int64_t e = turn.item / h_panels, p = turn.item % h_panels;
        const Panels gates(*call.experts[3 * e]), ups(*call.experts[3 * e + 1]);
        const uint8_t* next = nullptr;
        if (turn.next >= 0) next = Panels(*call.experts[3 * (turn.next / h_panels)]).begin(turn.next % h_panels);
        const Panel gate_panel = gates.at(p, ups.begin(p), 0), up_panel = ups.at(p, next, 1);
        for (int64_t i = pairs.begin(e); i < pairs.end(e); i += kMaxTokens) {
            const int64_t n = std::min(kMaxTokens, pairs.end(e) - i);
            const void *gate_x[kMaxTokens], *up_x[kMaxTokens];
            for (int64_t k = 0; k < n; ++k) {
                gate_x[k] = a.token(input(formats[0], i + k));
                up_x[k] = b.token(input(formats[1], i + k));
            }
            float gate[kMaxTokens][kPanelRows], up[kMaxTokens][kPanelRows];
            multiply(team, formats[0], gate_panel, gate_x, n, gate[0]);
            multiply(team, formats[1], up_panel, up_x, n, up[0]);
            for (int64_t k = 0; k < n; ++k) {
                float block[kBlock];
                const int64_t columns = std::min(kBlock, width - p * kBlock);
                if (call.biases != nullptr) {
                    add_to(gate[k], call.biases[3 * e] + p * kBlock, columns);
                    add_to(up[k], call.biases[3 * e + 1] + p * kBlock, columns);
                }
                team.level.swiglu(gate[k], up[k], call.gating, kBlock, block);
                write_activations(team, formats[2], h, i + k, p * kBlock, block, columns);
            }
        }
    });

    // Down, some experts at a time: all their products first, each matrix read in sequence; then the weighted sums,
    // in the order of the experts. Without weights, products are results, of all experts at once.
    const bool apart = call.weights == nullptr;
    if (!apart) std::fill_n(out, call.tokens * hidden, 0.0f);
    const int64_t y_panels = divide_up(hidden, kPanelRows);
    constexpr int64_t kProducts = 1024 * 1024, kColumns = 512;  // floats
    for (int64_t first = 0, last = 0; first < call.used; first = last) {
        for (++last; last < call.used && (apart || (pairs.end(last) - pairs.begin(first)) * hidden <= kProducts);)
            ++last;
        const int64_t begin = pairs.begin(first), count = pairs.begin(last) - begin;
        const int64_t bytes = count * hidden * static_cast<int64_t>(sizeof(float));
        float* products = apart ? out : reinterpret_cast<float*>(caller_y.get(bytes));
        parallel_for((last - first) * y_panels, team.threads, [&](const Turn& turn) {
            const int64_t e = first + turn.item / y_panels, p = turn.item % y_panels;
            const Panels panels(*call.experts[3 * e + 2]);
            const uint8_t* next = nullptr;
            if (turn.next >= 0)
                next = Panels(*call.experts[3 * (first + turn.next / y_panels) + 2]).begin(turn.next % y_panels);
            const Panel panel = panels.at(p, next, 0);
            for (int64_t i = pairs.begin(e); i < pairs.end(e); i += kMaxTokens) {
                const int64_t n = std::min(kMaxTokens, pairs.end(e) - i);
                const void* hs[kMaxTokens];
                for (int64_t k = 0; k < n; ++k) hs[k] = h.token(i + k);
                float y[kMaxTokens][kPanelRows];
                multiply(team, formats[2], panel, hs, n, y[0]);
                for (int64_t k = 0; k < n; ++k) {
                    if (call.biases != nullptr)
                        add_to(y[k], call.biases[3 * e + 2] + p * kPanelRows, panels.rows_in(p));
                    const int64_t place = apart ? pairs.at(i + k) : i - begin + k;
                    std::memcpy(products + place * hidden + p * kPanelRows, y[k],
                                static_cast<size_t>(panels.rows_in(p)) * sizeof(float));
                }
            }
        });
        if (apart) break;
        const int threads = count * hidden < kWorthSharing ? 1 : team.threads;
        parallel_for(divide_up(hidden, kColumns), threads, [&](int64_t item) {
            const int64_t c = item * kColumns, columns = std::min(kColumns, hidden - c);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t pair = pairs.at(begin + i);
                const float weight = call.weights[pair];
                const float* from = products + i * hidden + c;
                float* to = out + pair / call.top_k * hidden + c;
                for (int64_t k = 0; k < columns; ++k) to[k] += weight * from[k];
            }
        });
    }
    return true;
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
