// Index scores: how well entries match tokens, for an indexer to choose by.
#include <algorithm>
#include <cstring>
#include <vector>

#include "layers.hpp"
#include "pool.hpp"

namespace loci {
namespace {

constexpr float kNone = -__builtin_inff();
constexpr int64_t kWorthSharing = 32 * 1024;  // values of queries

// What the kernels take: a multiple of 16 columns.
int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

// The power of two of a code, by `shift` bits less.
float power(int code, int shift) {
    const int exponent = code - shift;
    const uint32_t bits =
        exponent > 0 ? static_cast<uint32_t>(exponent) << 23 : 0x00800000u >> std::min(1 - exponent, 31);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

bool has_integers(const RowFormat* format, int64_t dim) {
    return format != nullptr && format->code == kRowE2m1 && format->scale == kScaleUe8m0 && format->group == kBlock &&
           format->tail == 0 && dim % kBlock == 0 && dim / kBlock <= kMostIndexBlocks;
}

// Queries of all tokens as `Level::index_codes` takes them.
class CodedQueries {
  public:
    CodedQueries(const Team& team, const Index& c)
        : c_(c), heads_(c.heads), dim_(c.dim), blocks_(c.dim / kBlock),
          places_((heads_ + kHeadsTogether - 1) / kHeadsTogether * kHeadsTogether),
          is_wide_(sized<uint8_t>(c.tokens * heads_)), shifted_(sized<int8_t>(c.tokens * places_ * dim_)),
          plain_(sized<int8_t>(c.tokens * heads_ * dim_)), shifted_starts_(is_wide_.size()),
          plain_starts_(is_wide_.size() * static_cast<size_t>(blocks_)), shifted_weights_(is_wide_.size()),
          factors_(plain_starts_.size()) {
        const int64_t rows = c.tokens * heads_;
        parallel_for(rows, rows * dim_ < kWorthSharing ? 1 : team.threads, [&](int64_t row) {
            thread_local std::vector<uint8_t> coded;
            coded.resize(static_cast<size_t>(c.format->row_bytes));
            encode_row(team.level, c.format, c.queries + row * dim_, dim_, coded.data());
            add(row, coded.data(), c.weights[row]);
        });
    }
    IndexQueries of(int64_t token) const {
        const int64_t row = token * heads_;
        return {c_.weights + row,
                is_wide_.data() + row,
                shifted_.data() + token * places_ * dim_,
                shifted_starts_.data() + row,
                shifted_weights_.data() + row,
                plain_.data() + row * dim_,
                plain_starts_.data() + row * blocks_,
                factors_.data() + row * blocks_};
    }

  private:
    template <class T>
    static std::vector<T> sized(int64_t n) {
        return std::vector<T>(static_cast<size_t>(n));
    }

    void add(int64_t row, const uint8_t* coded, float weight) {
        static constexpr int8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
        constexpr int kHalved = 2;  // both factors are twice what they stand for
        constexpr int64_t kDigits = 4;
        const uint8_t* scales = coded + dim_ / 2;
        const auto [least, most] = std::minmax_element(scales, scales + blocks_);
        const auto at = static_cast<size_t>(row);
        is_wide_[at] = *most - *least > kMostQueryShift;
        shifted_weights_[at] = weight * power(*least, kHalved);
        const int64_t head = row % heads_, together = head / kHeadsTogether * kHeadsTogether;
        int8_t* of_head =
            shifted_.data() + (row / heads_ * places_ + together) * dim_ + head % kHeadsTogether * kDigits;
        int32_t shifted_sum = 0;
        for (int64_t b = 0; b < blocks_; ++b) {
            const int shift = is_wide_[at] ? 0 : scales[b] - *least;
            int8_t* plain = plain_.data() + row * dim_ + b * kBlock;
            int32_t sum = 0;
            for (int64_t i = 0; i < kBlock; ++i) {
                // of eight columns the even ones, then the odd ones
                const int64_t d = b * kBlock + i / 8 * 8 + i % 4 * 2 + i / 4 % 2;
                plain[i] = kTwice[coded[d / 2] >> (d % 2 * 4) & 15];
                const int64_t at = b * kBlock + i;
                of_head[at / kDigits * kDigits * kHeadsTogether + at % kDigits] =
                    static_cast<int8_t>(plain[i] * (1 << shift));
                sum += plain[i];
            }
            const auto block = static_cast<size_t>(row * blocks_ + b);
            plain_starts_[block] = -kIndexOffset * sum;
            factors_[block] = power(scales[b], kHalved);
            shifted_sum += sum * (1 << shift);
        }
        shifted_starts_[at] = -kIndexOffset * shifted_sum;
    }

    const Index& c_;
    int64_t heads_, dim_, blocks_, places_;
    std::vector<uint8_t> is_wide_;
    std::vector<int8_t> shifted_, plain_;
    std::vector<int32_t> shifted_starts_, plain_starts_;
    std::vector<float> shifted_weights_, factors_;
};

// Queries of all tokens as floats: turned and rounded as keys are, with columns that kernels take.
class PlainQueries {
  public:
    PlainQueries(const Team& team, const Index& c) : queries_(c.queries), columns_(padded(c.dim)) {
        const RowFormat* format = c.format;
        const bool is_turned = format != nullptr && format->is_turned != 0;
        // whoever keeps keys with powers of two as scales rounds queries, too
        const bool is_rounded = format != nullptr && format->tail == 0 && format->scale == kScaleUe8m0;
        if (columns_ == c.dim && !is_turned && !is_rounded) return;
        const int64_t rows = c.tokens * c.heads;
        copies_.assign(static_cast<size_t>(rows * columns_), 0.0f);
        parallel_for(rows, rows * c.dim < kWorthSharing ? 1 : team.threads, [&](int64_t row) {
            const float* x = c.queries + row * c.dim;
            float* to = copies_.data() + row * columns_;
            if (is_rounded) {
                thread_local std::vector<uint8_t> coded;
                coded.resize(static_cast<size_t>(format->row_bytes));
                encode_row(team.level, format, x, c.dim, coded.data());
                team.level.decode_row(*format, coded.data(), to);
                return;
            }
            std::memcpy(to, x, static_cast<size_t>(c.dim) * sizeof(float));
            if (is_turned) turn_rows(team.level, to, 1, c.dim);
        });
        queries_ = copies_.data();
    }
    const float* of(int64_t row) const { return queries_ + row * columns_; }

  private:
    const float* queries_;
    int64_t columns_;
    std::vector<float> copies_;
};

// Tokens that see a block of keys before the next tokens do, where all see the first keys: keys are decoded once.
constexpr int64_t kTokensTogether = 32;

// Some tokens and the rows of keys that they see.
struct KeyRows {
    int64_t token, tokens;
    const uint8_t* rows[kKeyBlock];
    int64_t n;
};

// Calls compute(rows, scores [n] of the first token, others c.columns apart) for blocks of the first keys, as far as
// tokens see them.
template <class F>
void in_blocks(const Team& team, const Index& c, float* out, const F& compute) {
    const int64_t blocks = (c.columns + kKeyBlock - 1) / kKeyBlock, key_bytes = row_bytes(c.format, c.dim);
    parallel_for((c.tokens + kTokensTogether - 1) / kTokensTogether * blocks, team.threads, [&](int64_t item) {
        KeyRows keys;
        keys.token = item / blocks * kTokensTogether;
        keys.tokens = std::min(kTokensTogether, c.tokens - keys.token);
        const int64_t first = item % blocks * kKeyBlock, n = std::min(kKeyBlock, c.columns - first);
        const int64_t* visible = c.visible + keys.token;
        keys.n = std::clamp<int64_t>(*std::max_element(visible, visible + keys.tokens) - first, 0, n);
        for (int64_t k = 0; k < keys.n; ++k) keys.rows[k] = c.keys + (first + k) * key_bytes;
        float* scores = out + keys.token * c.columns + first;
        if (keys.n > 0) compute(keys, scores);
        for (int64_t t = 0; t < keys.tokens; ++t, scores += c.columns) {
            const int64_t seen = std::clamp<int64_t>(visible[t] - first, 0, n);
            std::fill(scores + seen, scores + n, kNone);
        }
    });
}

// The same of named keys, each token's own.
template <class F>
void in_named_blocks(const Team& team, const Index& c, float* out, const F& compute) {
    const int64_t blocks = (c.columns + kKeyBlock - 1) / kKeyBlock, key_bytes = row_bytes(c.format, c.dim);
    parallel_for(c.tokens * blocks, team.threads, [&](int64_t item) {
        KeyRows keys{item / blocks, 1, {}, 0};
        const int64_t first = item % blocks * kKeyBlock, n = std::min(kKeyBlock, c.columns - first);
        const int64_t* entries = c.entries + keys.token * c.columns + first;
        int64_t places[kKeyBlock];
        for (int64_t k = 0; k < n; ++k) {
            if (entries[k] < 0) continue;
            keys.rows[keys.n] = c.keys + entries[k] * key_bytes;
            places[keys.n++] = k;
        }
        float found[kKeyBlock];
        if (keys.n > 0) compute(keys, found);
        float* scores = out + keys.token * c.columns + first;
        std::fill_n(scores, n, kNone);
        for (int64_t k = 0; k < keys.n; ++k) scores[places[k]] = found[k];
    });
}

}  // namespace

void index_scores(const Team& team, const Index& c, float* out) {
    if (c.tokens == 0 || c.columns == 0) return;
    const auto of_blocks = [&](const auto& compute) {
        if (c.entries != nullptr) in_named_blocks(team, c, out, compute);
        else in_blocks(team, c, out, compute);
    };
    if (has_integers(c.format, c.dim)) {
        const CodedQueries queries(team, c);
        const auto blocks = static_cast<int>(c.dim / kBlock);
        of_blocks([&](const KeyRows& k, float* scores) {
            const IndexQueries of_tokens = queries.of(k.token);
            team.level.index_codes({k.tokens, c.heads, blocks, of_tokens, k.rows, k.n, scores, c.columns});
        });
        return;
    }
    const PlainQueries queries(team, c);
    const int64_t columns = padded(c.dim);
    of_blocks([&](const KeyRows& k, float* scores) {
        thread_local std::vector<float> room;
        room.resize(static_cast<size_t>(kKeyBlock * columns));
        const float* keys[kKeyBlock];
        read_rows(team.level, c.format, c.dim, columns, k.rows, k.n, room.data(), keys);
        for (int64_t row = k.token * c.heads, t = 0; t < k.tokens; ++t, row += c.heads)
            team.level.index_block(queries.of(row), static_cast<int>(c.heads), c.weights + row, keys, k.n, columns,
                                   scores + t * c.columns);
    });
}

}  // namespace loci
