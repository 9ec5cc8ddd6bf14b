// Draws tokens: the probabilities block by block, so that sums have one order, and of the best ones only as many as it
// takes.
#include "draws.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "pool.hpp"
#include "ranks.hpp"

namespace loci {
namespace {

constexpr int64_t kSpan = 512;            // values of a block, which have one sum
constexpr int64_t kTurn = 16 * kSpan;     // values of a thread's turn
constexpr int64_t kWorthSharing = 32768;  // values; below, waking others costs more than it saves

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// e^(x - most) of a row, by the temperature, and their sums by block.
struct Likely {
    const float* values;
    const double* sums;
    int64_t count;
    int64_t blocks() const { return divide_up(count, kSpan); }
    int64_t end(int64_t block) const { return std::min(count, (block + 1) * kSpan); }
};

double sum_of(const double* sums, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += sums[i];
    return sum;
}

// The column that `point` of the sum of all falls on, columns in their order; never one whose value is 0.
int64_t column_at(const Likely& row, double point) {
    double sum = 0;
    int64_t block = 0, last = -1;
    for (; block < row.blocks(); ++block) {
        if (row.sums[block] > 0) last = block;
        if (sum + row.sums[block] > point) break;
        sum += row.sums[block];
    }
    int64_t found = -1;
    const bool is_behind = block == row.blocks();  // by rounding
    if (is_behind) block = last;
    for (int64_t c = block * kSpan; c < row.end(block); ++c) {
        if (row.values[c] <= 0) continue;
        found = c;
        if (!is_behind && (sum += static_cast<double>(row.values[c])) > point) break;
    }
    return found;
}

// Columns with at least `least`, which is above 0, in no order.
void collect(const Likely& row, float least, std::vector<uint64_t>* found) {
    found->clear();
    for (int64_t block = 0; block < row.blocks(); ++block) {
        if (row.sums[block] < static_cast<double>(least)) continue;  // not even all of them together
        for (int64_t c = block * kSpan; c < row.end(block); ++c)
            if (row.values[c] >= least) found->push_back(ranked(row.values[c], c));
    }
}

// Among the columns that top_k, top_p and min_p leave, the likeliest first.
int64_t column_among(const Likely& row, double total, const Draw& by) {
    thread_local std::vector<uint64_t> found;
    const int64_t limit = by.top_k > 0 && by.top_k < row.count ? by.top_k : row.count;
    const bool is_limited = limit < row.count;
    constexpr float kFirst = 1.0f / 64, kGrowth = 1.0f / 4096, kSmallest = 1e-37f;
    for (float least = kFirst;; least = std::max(least * kGrowth, kSmallest)) {
        // What min_p drops is needed where top_p is a share of what top_k leaves.
        const bool is_far = !(is_limited && by.top_p < 1) && static_cast<double>(least) <= by.min_p;
        if (is_far) least = std::nextafter(static_cast<float>(by.min_p), 0.0f);
        const bool is_all = is_far || least <= kSmallest;
        collect(row, least, &found);
        if (is_all) break;
        if (is_limited && static_cast<int64_t>(found.size()) >= limit) break;
        double held = 0;
        for (const uint64_t rank : found) held += value_of(rank);
        // A little more than enough, as these are added up in another order than those that are kept.
        if (!is_limited && held > by.top_p * total * (1 + 1e-9)) break;
    }
    // Sorted as far as necessary: to where what is before a column holds top_p of what top_k leaves.
    const auto most = std::min(limit, static_cast<int64_t>(found.size()));
    int64_t sorted = 0;
    const auto sort_up_to = [&](int64_t end) {
        end = std::min(end, most);
        if (end <= sorted) return;
        const auto from = found.begin() + sorted;
        if (end < static_cast<int64_t>(found.size()))
            std::nth_element(from, found.begin() + end, found.end(), std::greater<>());
        std::sort(from, found.begin() + end, std::greater<>());
        sorted = end;
    };
    double whole = total;
    if (is_limited) {
        sort_up_to(limit);
        whole = 0;
        for (int64_t i = 0; i < most; ++i) whole += value_of(found[static_cast<size_t>(i)]);
    }
    thread_local std::vector<double> ends;  // of the columns that stay, one behind the other
    ends.clear();
    double sum = 0;
    for (int64_t i = 0; i < most; ++i) {
        if (i == sorted) sort_up_to(std::max<int64_t>(64, 4 * i));
        const double value = value_of(found[static_cast<size_t>(i)]);
        if (i > 0 && (sum >= by.top_p * whole || value < by.min_p * value_of(found[0]))) break;
        ends.push_back(sum += value);
    }
    const auto at = std::upper_bound(ends.begin(), ends.end(), by.number * sum) - ends.begin();
    return column_of(found[std::min(static_cast<size_t>(at), ends.size() - 1)]);
}

int64_t first_of(const float* x, int64_t n, float value) {
    for (int64_t begin = 0; begin < n; begin += kSpan) {
        const int64_t end = std::min(n, begin + kSpan);
        bool is_here = false;
        for (int64_t c = begin; c < end; ++c) is_here |= x[c] == value;
        for (int64_t c = begin; is_here && c < end; ++c)
            if (x[c] == value) return c;
    }
    return -1;
}

int threads_for(const Team& team, int64_t values) { return values < kWorthSharing ? 1 : team.threads; }

// Calls fn(row, first, last) for spans of n rows of so many values, which threads share.
template <class F>
void turns(const Team& team, int64_t n, int64_t values, const F& fn) {
    const int64_t each = divide_up(values, kTurn);
    parallel_for(n * each, threads_for(team, n * values), [&](int64_t item) {
        const int64_t first = item % each * kTurn;
        fn(item / each, first, std::min(values, first + kTurn));
    });
}

// The largest value of each of n rows.
void largest_values(const Team& team, const float* rows, int64_t n, int64_t values, float* out) {
    const int64_t each = divide_up(values, kTurn);
    thread_local std::vector<float> parts_of_caller;
    std::vector<float>& parts = parts_of_caller;
    parts.resize(static_cast<size_t>(n * each));
    turns(team, n, values, [&](int64_t row, int64_t first, int64_t last) {
        parts[static_cast<size_t>(row * each + first / kTurn)] =
            team.level.largest_value(rows + row * values + first, last - first);
    });
    for (int64_t row = 0; row < n; ++row) out[row] = team.level.largest_value(parts.data() + row * each, each);
}

}  // namespace

void draw(const Team& team, const float* logits, int64_t vocab, const Draw* draws, int64_t n, int64_t* tokens) {
    thread_local std::vector<float> most_of_caller, values_of_caller;
    thread_local std::vector<double> sums_of_caller;
    std::vector<float>&most = most_of_caller, &values = values_of_caller;
    std::vector<double>& sums = sums_of_caller;
    const int64_t blocks = divide_up(vocab, kSpan);
    most.resize(static_cast<size_t>(n));
    largest_values(team, logits, n, vocab, most.data());
    const bool draws_any = std::any_of(draws, draws + n, [](const Draw& by) { return by.temperature > 0; });
    if (draws_any) {
        values.resize(static_cast<size_t>(n * vocab));
        sums.resize(static_cast<size_t>(n * blocks));
        turns(team, n, vocab, [&](int64_t row, int64_t first, int64_t last) {
            if (draws[row].temperature <= 0) return;
            const auto factor = static_cast<float>(1 / draws[row].temperature);
            for (int64_t at = first; at < last; at += kSpan)
                sums[static_cast<size_t>(row * blocks + at / kSpan)] =
                    team.level.exponentials(logits + row * vocab + at, std::min(last - at, kSpan),
                                            most[static_cast<size_t>(row)], factor, values.data() + row * vocab + at);
        });
    }
    parallel_for(n, threads_for(team, n * vocab), [&](int64_t row) {
        const float largest = most[static_cast<size_t>(row)];
        const Draw& by = draws[row];
        if (by.temperature <= 0) {
            tokens[row] = first_of(logits + row * vocab, vocab, largest);  // none equals NaN
            return;
        }
        const Likely likely{values.data() + row * vocab, sums.data() + row * blocks, vocab};
        const double total = sum_of(likely.sums, blocks);
        if (!std::isfinite(largest) || !std::isfinite(total)) tokens[row] = -1;
        else if (by.top_p >= 1 && by.min_p <= 0 && (by.top_k <= 0 || by.top_k >= vocab))
            tokens[row] = column_at(likely, by.number * total);
        else tokens[row] = column_among(likely, total, by);
    });
}

void log_probabilities(const Team& team, const float* logits, int64_t vocab, int64_t token, int64_t top, int64_t* ids,
                       double* values) {
    thread_local std::vector<float> exponentials_of_caller;
    thread_local std::vector<double> sums_of_caller;
    std::vector<float>& exponentials = exponentials_of_caller;
    std::vector<double>& sums = sums_of_caller;
    const int64_t blocks = divide_up(vocab, kSpan);
    float most;
    largest_values(team, logits, 1, vocab, &most);
    exponentials.resize(static_cast<size_t>(vocab));
    sums.resize(static_cast<size_t>(blocks));
    turns(team, 1, vocab, [&](int64_t, int64_t first, int64_t last) {
        for (int64_t at = first; at < last; at += kSpan)
            sums[static_cast<size_t>(at / kSpan)] =
                team.level.exponentials(logits + at, std::min(last - at, kSpan), most, 1, exponentials.data() + at);
    });
    const double total = static_cast<double>(most) + std::log(sum_of(sums.data(), blocks));  // NaN with any NaN
    values[0] = static_cast<double>(logits[token]) - total;
    if (top > 0) {
        // The best so far, the worst of them in front: hardly any column gets behind the first comparison.
        thread_local std::vector<uint64_t> best;
        best.clear();
        const auto is_full = [&] { return static_cast<int64_t>(best.size()) == top; };
        for (int64_t first = 0; first < vocab; first += kSpan) {
            const int64_t last = std::min(vocab, first + kSpan);
            if (is_full() && ranked(team.level.largest_value(logits + first, last - first), first) < best.front())
                continue;
            for (int64_t c = first; c < last; ++c) {
                const uint64_t rank = ranked(logits[c], c);
                if (is_full()) {
                    if (rank <= best.front()) continue;
                    std::pop_heap(best.begin(), best.end(), std::greater<>());
                    best.pop_back();
                }
                best.push_back(rank);
                std::push_heap(best.begin(), best.end(), std::greater<>());
            }
        }
        std::sort(best.begin(), best.end(), std::greater<>());
        for (size_t i = 0; i < best.size(); ++i) {
            ids[i] = column_of(best[i]);
            values[1 + i] = static_cast<double>(logits[ids[i]]) - total;
        }
    }
}

void mask(const Level& level, const float* logits, int64_t vocab, const uint8_t* bits, int64_t bytes, float* out) {
    thread_local std::vector<uint32_t> words;
    words.assign(static_cast<size_t>(divide_up(vocab, 32)), 0);
    std::memcpy(words.data(), bits, static_cast<size_t>(std::min(bytes, divide_up(vocab, 8))));
    const int64_t whole = vocab / 32 * 32;
    level.masked(logits, words.data(), whole, out);
    for (int64_t c = whole; c < vocab; ++c)
        out[c] = words[static_cast<size_t>(c / 32)] >> c % 32 & 1 ? logits[c] : -__builtin_inff();
}

}  // namespace loci
