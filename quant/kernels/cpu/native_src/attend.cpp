// Attention: which rows and keys are computed together, and the sums of blocks of keys.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "layers.hpp"
#include "pool.hpp"

namespace loci {
namespace {

constexpr float kNone = -__builtin_inff();

// What the kernels take: a multiple of 16 columns.
int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

// Room for rows that are decoded, or copied to have as many columns; each thread has its own.
float* room_for(int64_t rows, int64_t columns, int which) {
    thread_local std::vector<float> rooms[2];
    auto& room = rooms[which];
    const auto floats = static_cast<size_t>(rows * columns);
    if (room.size() < floats) room.resize(floats);
    return room.data();
}

// What some rows of queries have seen so far.
struct Sums {
    float* most;  // [rows]
    float* sum;   // [rows]
    float* out;   // [rows][columns]
};

// Adds what a row makes of a further block of keys. Blocks come in one order, whoever computes them.
void add_block(float& most, float& sum, float* out, float block_most, float block_sum, const float* block,
               int64_t columns) {
    if (most == kNone) {
        most = block_most;
        sum = block_sum;
        std::memcpy(out, block, static_cast<size_t>(columns) * sizeof(float));
        return;
    }
    const float larger = block_most > most ? block_most : most;
    const float old = std::exp(most - larger), fresh = std::exp(block_most - larger);
    most = larger;
    sum = sum * old + block_sum * fresh;
    for (int64_t d = 0; d < columns; ++d) out[d] = out[d] * old + block[d] * fresh;
}

// The rows of queries that pass over keys together: of one key-value head; of one token where tokens see other keys.
class Tiles {
  public:
    explicit Tiles(const Attend& call)
        : c_(call), group_(call.heads / call.kv_heads),
          shares_(call.more == nullptr && call.window >= call.before + call.tokens),
          most_rows_(call.dim > 128 ? kMostRows / 2 : kMostRows), columns_(padded(call.dim)),
          value_columns_(padded(call.value_dim)) {
        const int64_t rows = shares_ ? call.tokens * group_ : group_;
        per_list_ = (rows + most_rows_ - 1) / most_rows_;
        rows_ = rows;
        most_rows_ = std::min(most_rows_, rows);  // no places for rows that there are not
    }
    int64_t count() const { return per_list_ * (shares_ ? 1 : c_.tokens) * c_.kv_heads; }
    int64_t value_columns() const { return value_columns_; }
    int64_t most_rows() const { return most_rows_; }
    // blocks of keys that a tile has at most
    int64_t blocks() const {
        const int64_t keys = std::min(c_.window, c_.before + c_.tokens) + (c_.more ? c_.choices : 0);
        return (keys + kKeyBlock - 1) / kKeyBlock;
    }

    // One tile: its rows, and the keys of one token or of all.
    class Tile {
      public:
        Tile(const Tiles& tiles, int64_t number) : t_(tiles), c_(tiles.c_) {
            const int64_t lists = t_.shares_ ? 1 : c_.tokens;
            first_ = number % t_.per_list_ * t_.most_rows_;
            token_ = number / t_.per_list_ % lists;
            head_ = number / t_.per_list_ / lists;
            rows_ = static_cast<int>(std::min(t_.most_rows_, t_.rows_ - first_));
            if (t_.columns_ != c_.dim) q_copies_.assign(static_cast<size_t>(rows_ * t_.columns_), 0.0f);
            for (int r = 0; r < rows_; ++r) {
                q_[r] = c_.q + at(r) * c_.dim;
                if (t_.columns_ == c_.dim) continue;
                float* copy = q_copies_.data() + r * t_.columns_;
                std::memcpy(copy, q_[r], static_cast<size_t>(c_.dim) * sizeof(float));
                q_[r] = copy;
            }
            const int64_t last = token(rows_ - 1);
            begin_ = std::max<int64_t>(0, c_.before + last + 1 - c_.window);
            near_ = c_.before + last + 1 - begin_;
            for (int64_t i = 0; c_.more != nullptr && i < c_.choices; ++i)
                if (const int64_t entry = c_.chosen[last * c_.choices + i]; entry >= 0) more_.push_back(entry);
        }
        int rows() const { return rows_; }
        int64_t keys() const { return near_ + static_cast<int64_t>(more_.size()); }
        // The number of a row in q and in the result.
        int64_t at(int r) const { return token(r) * c_.heads + head(r); }
        int64_t head(int r) const { return head_ * t_.group_ + (first_ + r) % t_.group_; }
        // What the rows make of a block of keys.
        void compute(const Level& level, int64_t block, const Sums& to) {
            const float *keys[kKeyBlock], *values[kKeyBlock];
            const uint8_t *key_rows[kKeyBlock], *value_rows[kKeyBlock];
            const int64_t first = block * kKeyBlock, n = std::min(kKeyBlock, this->keys() - first);
            const int64_t near = std::clamp<int64_t>(near_ - first, 0, n);
            const int64_t near_bytes = row_bytes(c_.format, c_.dim), more_bytes = row_bytes(c_.more_format, c_.dim);
            for (int64_t k = 0; k < near; ++k) {
                const int64_t row = begin_ + first + k;
                const int64_t place = c_.ring > 0 ? (c_.first + row) % c_.ring : row;
                const int64_t at = head_ * c_.head_stride + place * near_bytes;
                key_rows[k] = c_.keys + at;
                value_rows[k] = c_.values + at;
            }
            for (int64_t k = near; k < n; ++k)
                key_rows[k] = c_.more + more_[static_cast<size_t>(first + k - near_)] * more_bytes;
            const int64_t columns = t_.columns_;
            float* room = room_for(kKeyBlock, columns, 0);
            read_rows(level, c_.format, c_.dim, columns, key_rows, near, room, keys);
            read_rows(level, c_.more_format, c_.dim, columns, key_rows + near, n - near, room + near * columns,
                      keys + near);
            std::copy(keys, keys + n, values);  // a value is its key, or the beginning of it
            if (c_.values != c_.keys)
                read_rows(level, c_.format, c_.dim, columns, value_rows, near, room_for(kKeyBlock, columns, 1), values);
            int64_t seen[kMostRows];
            float* out[kMostRows];
            for (int r = 0; r < rows_; ++r) {
                const int64_t all = t_.shares_ ? c_.before + token(r) + 1 : this->keys();
                seen[r] = std::clamp<int64_t>(all - first, 0, n);
                out[r] = to.out + r * t_.value_columns();
            }
            const float scale = 1.0f / std::sqrt(static_cast<float>(c_.dim));
            level.attend_block(
                {rows_, n, columns, t_.value_columns(), scale, q_, seen, keys, values, to.most, to.sum, out});
        }

      private:
        int64_t token(int r) const { return t_.shares_ ? (first_ + r) / t_.group_ : token_; }

        const Tiles& t_;
        const Attend& c_;
        int64_t first_, token_, head_, begin_, near_;
        int rows_;
        const float* q_[kMostRows];
        std::vector<int64_t> more_;
        std::vector<float> q_copies_;
    };

  private:
    const Attend& c_;
    int64_t group_;
    bool shares_;
    int64_t most_rows_, per_list_, rows_;
    int64_t columns_, value_columns_;
};

// A place for what a tile's rows make of a block of keys.
class Places {
  public:
    Places(int64_t count, int64_t rows, int64_t columns)
        : rows_(rows), columns_(columns), numbers_(static_cast<size_t>(2 * count * rows)),
          out_(new float[static_cast<size_t>(count * rows * columns)]) {}
    Sums at(int64_t place) {
        float* numbers = numbers_.data() + 2 * place * rows_;
        return {numbers, numbers + rows_, out_.get() + place * rows_ * columns_};
    }

  private:
    int64_t rows_, columns_;
    std::vector<float> numbers_;
    std::unique_ptr<float[]> out_;  // not cleared: what is computed of a block is written whole
};

// Adds up blocks of keys for a tile, of which `block` gives what number b makes, and writes the rows' results.
template <class F>
void finish(const Attend& c, const Tiles& tiles, const Tiles::Tile& tile, const F& block, float* out) {
    const int64_t columns = tiles.value_columns(), blocks = (tile.keys() + kKeyBlock - 1) / kKeyBlock;
    Places place(1, tiles.most_rows(), columns);
    const Sums sums = place.at(0);
    std::fill_n(sums.out, tile.rows() * columns, 0.0f);
    for (int r = 0; r < tile.rows(); ++r) {
        sums.most[r] = c.sink != nullptr ? c.sink[tile.head(r)] : kNone;
        sums.sum[r] = c.sink != nullptr ? 1.0f : 0.0f;
    }
    for (int64_t b = 0; b < blocks; ++b) {
        const Sums& fresh = block(b);
        for (int r = 0; r < tile.rows(); ++r)
            if (fresh.most[r] != kNone || fresh.sum[r] != 0)
                add_block(sums.most[r], sums.sum[r], sums.out + r * columns, fresh.most[r], fresh.sum[r],
                          fresh.out + r * columns, columns);
    }
    for (int r = 0; r < tile.rows(); ++r) {
        float* to = out + tile.at(r) * c.value_dim;
        const float* from = sums.out + r * columns;
        for (int64_t d = 0; d < c.value_dim; ++d) to[d] = from[d] / sums.sum[r];
    }
}

}  // namespace

void attend(const Team& team, const Attend* calls, float* const* outs, int64_t n) {
    if (n == 0) return;
    std::vector<Tiles> tiles(calls, calls + n);
    std::vector<int64_t> first_tile{0}, first_block{0};  // of each call
    int64_t most_blocks = 0;
    for (const Tiles& of_call : tiles) {
        first_tile.push_back(first_tile.back() + of_call.count());
        first_block.push_back(first_block.back() + of_call.count() * of_call.blocks());
        most_blocks = std::max(most_blocks, of_call.blocks());
    }
    // The call that has an item, and the item's number there.
    const auto call_of = [](const std::vector<int64_t>& first, int64_t* item) {
        const auto call = std::upper_bound(first.begin(), first.end(), *item) - first.begin() - 1;
        *item -= first[static_cast<size_t>(call)];
        return static_cast<size_t>(call);
    };
    const auto ahead = [&](int number) { return team.ahead(number); };
    const int64_t count = first_tile.back(), columns = tiles[0].value_columns();
    int64_t rows = 0;
    for (const Tiles& of_call : tiles) rows = std::max(rows, of_call.most_rows());
    if (count >= 2 * team.threads || most_blocks == 1) {
        const auto compute_tile = [&](int64_t item) {
            const size_t call = call_of(first_tile, &item);
            Tiles::Tile tile(tiles[call], item);
            Places place(1, rows, columns);
            const auto compute = [&](int64_t b) {
                tile.compute(team.level, b, place.at(0));
                return place.at(0);
            };
            finish(calls[call], tiles[call], tile, compute, outs[call]);
        };
        parallel_for(count, team.threads, compute_tile, ahead);
        return;
    }
    Places places(first_block.back(), rows, columns);  // few rows, many keys: blocks are shared out
    parallel_for(first_block.back(), team.threads, [&](int64_t item) {
        const int64_t place = item;
        const size_t call = call_of(first_block, &item);
        const int64_t blocks = tiles[call].blocks();
        Tiles::Tile tile(tiles[call], item / blocks);
        if (item % blocks * kKeyBlock < tile.keys()) tile.compute(team.level, item % blocks, places.at(place));
    });
    const auto finish_tile = [&](int64_t item) {
        const size_t call = call_of(first_tile, &item);
        const Tiles::Tile tile(tiles[call], item);
        const int64_t place = first_block[call] + item * tiles[call].blocks();
        finish(calls[call], tiles[call], tile, [&](int64_t b) { return places.at(place + b); }, outs[call]);
    };
    parallel_for(count, team.threads, finish_tile, ahead);
}

void attend(const Team& team, const Attend& call, float* out) { attend(team, &call, &out, 1); }

}  // namespace loci
