// Operations of a program on the state of sequences: appended rows, rings, compressed entries.
#include <algorithm>
#include <cstring>
#include <vector>

#include "layers.hpp"
#include "pool.hpp"
#include "program.hpp"

namespace loci {
namespace {

constexpr int64_t kRowsWorthSharing = 4;  // of a cache, whose lines are far away

size_t bytes_of(int64_t floats) { return static_cast<size_t>(floats) * sizeof(float); }

const uint8_t* octets(const void* p) { return static_cast<const uint8_t*>(p); }
uint8_t* octets(void* p) { return static_cast<uint8_t*>(p); }
const RowFormat* format_at(const void* p) { return static_cast<const RowFormat*>(p); }  // null: float32

bool completes(int64_t position, int64_t ratio) { return (position + 1) % ratio == 0; }

// How many rows from r on are of one sequence: its newest token, and drafted ones behind it.
int64_t rows_of_slot(const StepInput& step, int64_t r) {
    int64_t end = r + 1;
    while (end < step.rows && step.slots[end] == step.slots[r] && step.positions[end] == step.positions[end - 1] + 1)
        ++end;
    return end - r;
}

}  // namespace

// Strides of caches are in bytes, and in[] names the format of their rows.

// keys and values [rows][kv_heads][dim] to their places in a layer's cache; or keys alone, of which values are a part
void run_append(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t heads = op.sizes[0], dim = op.sizes[1], head_stride = op.sizes[2], slot_stride = op.sizes[3];
    const int64_t ring = op.sizes[4];  // places, or 0: as many as there are positions
    const RowFormat* format = format_at(op.in[2]);
    parallel_for(step.rows, step.rows < kRowsWorthSharing ? 1 : team.threads, [&](int64_t r) {
        const int64_t place = ring > 0 ? step.positions[r] % ring : step.positions[r];
        const int64_t to = step.slots[r] * slot_stride + place * row_bytes(format, dim);
        for (int side = 0; side < 2 && op.in[side] != nullptr; ++side)
            for (int64_t h = 0; h < heads; ++h)
                encode_row(team.level, format, floats(op.in[side]) + (r * heads + h) * dim, dim,
                           octets(op.out[side]) + to + h * head_stride);
    });
}

// queries [rows][heads][dim] over what their slots hold in a layer's cache of keys and values: all, or the last rows
// of a window, or those chosen [rows][choices] where all heads share keys that begin with the values; with sinks
// [heads] or none
void run_attend(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t heads = op.sizes[0], kv_heads = op.sizes[1], dim = op.sizes[2], value_dim = op.sizes[6];
    const int64_t choices = op.sizes[7], ring = op.sizes[8];
    std::vector<Attend> calls;
    std::vector<float*> outs;
    for (int64_t r = 0, count = 0; r < step.rows; r += count) {
        // Drafted tokens pass over the keys together with the token before them, as long as they see the same first
        // one.
        count = choices > 0 || ring > 0 ? 1 : rows_of_slot(step, r);
        if (op.sizes[5] > 0 && step.positions[r] + count > op.sizes[5]) count = 1;
        const int64_t slot = step.slots[r] * op.sizes[4];
        Attend& call = calls.emplace_back();
        call.q = floats(op.in[0]) + r * heads * dim;
        call.keys = octets(op.in[1]) + slot;
        call.values = octets(op.in[2]) + slot;
        call.format = format_at(op.in[5]);
        call.tokens = count;
        call.heads = heads;
        call.kv_heads = kv_heads;
        call.dim = dim;
        call.value_dim = value_dim;
        call.head_stride = op.sizes[3];
        call.before = step.positions[r];
        call.window = op.sizes[5] > 0 ? op.sizes[5] : step.positions[r] + count;
        call.sink = floats(op.in[3]);
        if (ring > 0) {
            call.ring = ring;
            call.before = std::min(call.window - 1, call.before);
            call.first = step.positions[r] - call.before;
        }
        if (choices > 0) {
            call.window = 0;
            call.more = call.keys;
            call.more_format = call.format;
            call.chosen = static_cast<const int64_t*>(op.in[4]) + r * choices;
            call.choices = choices;
        }
        outs.push_back(floats(op.out[0]) + r * heads * value_dim);
    }
    attend(team, calls.data(), outs.data(), static_cast<int64_t>(calls.size()));
}

// x [rows][dim], each row to its position's place in a ring [ring][dim] of its slot
void run_ring(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t dim = op.sizes[0], ring = op.sizes[1], slot_stride = op.sizes[2];
    const RowFormat* format = format_at(op.in[1]);
    for (int64_t r = 0; r < step.rows; ++r)
        encode_row(team.level, format, floats(op.in[0]) + r * dim, dim,
                   octets(op.out[0]) + step.slots[r] * slot_stride + step.positions[r] % ring * row_bytes(format, dim));
}

// queries [rows][heads][dim] over the last tokens in their slots' rings and, of compressed entries [slots][.][dim],
// those chosen [rows][choices]; or over all that stand for `every` so many tokens, of which choices [entries] then
// names the first ones; with sinks [heads]; in[5] has the formats of the rings' rows and of entries
void run_attend_sparse(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t heads = op.sizes[0], dim = op.sizes[1], window = op.sizes[2], ring = op.sizes[3];
    const int64_t choices = op.sizes[5], every = op.sizes[7];
    const auto* formats = static_cast<const RowFormat* const*>(op.in[5]);
    std::vector<Attend> calls(static_cast<size_t>(step.rows));
    std::vector<float*> outs;
    for (int64_t r = 0; r < step.rows; ++r) {
        const int64_t seen = std::min(window, step.positions[r] + 1);
        Attend& call = calls[static_cast<size_t>(r)];
        call.q = floats(op.in[0]) + r * heads * dim;
        call.keys = call.values = octets(op.in[1]) + step.slots[r] * op.sizes[4];
        call.format = formats[0];
        call.ring = ring;
        call.first = step.positions[r] + 1 - seen;
        call.tokens = call.kv_heads = 1;
        call.heads = heads;
        call.dim = call.value_dim = dim;
        call.before = seen - 1;
        call.window = window;
        call.sink = floats(op.in[2]);
        if (choices > 0) {
            call.more = octets(op.in[3]) + step.slots[r] * op.sizes[6];
            call.more_format = formats[1];
            call.chosen = static_cast<const int64_t*>(op.in[4]) + (every > 0 ? 0 : r * choices);
            call.choices = every > 0 ? std::min(choices, (step.positions[r] + 1) / every) : choices;
        }
        outs.push_back(floats(op.out[0]) + r * heads * dim);
    }
    attend(team, calls.data(), outs.data(), step.rows);
}

// Rows and gates in rings of the last tokens [ring][width]: those of the group that a row completes, pooled to [dim];
// zeros for other rows. Where groups overlap, width is 2 dim: the group's second halves, and before them the first
// halves of the group before it, if there is one.
void run_pool(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t dim = op.sizes[0], ring = op.sizes[1], slot_stride = op.sizes[2], ratio = op.sizes[3];
    const bool overlaps = op.sizes[4] != 0;
    const int64_t width = overlaps ? 2 * dim : dim;
    thread_local std::vector<float> rows, gates;
    rows.resize(static_cast<size_t>(2 * ratio * dim));
    gates.resize(static_cast<size_t>(2 * ratio * dim));
    for (int64_t r = 0; r < step.rows; ++r) {
        float* out = floats(op.out[0]) + r * dim;
        if (!completes(step.positions[r], ratio)) {
            std::fill_n(out, dim, 0.0f);
            continue;
        }
        const int64_t first = step.positions[r] + 1 - ratio;
        int64_t n = 0;
        for (int64_t p = overlaps ? std::max<int64_t>(0, first - ratio) : first; p < first + ratio; ++p, ++n) {
            const int64_t half = overlaps && p >= first ? dim : 0;
            const int64_t from = step.slots[r] * slot_stride + p % ring * width + half;
            std::memcpy(rows.data() + n * dim, floats(op.in[0]) + from, bytes_of(dim));
            std::memcpy(gates.data() + n * dim, floats(op.in[1]) + from, bytes_of(dim));
        }
        pool_groups(team, rows.data(), gates.data(), 1, n, dim, out);
    }
}

// x [rows][dim], of rows that complete a group, to the group's place among its slot's entries
void run_entry(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t dim = op.sizes[0], slot_stride = op.sizes[1], ratio = op.sizes[2];
    const RowFormat* format = format_at(op.in[1]);
    for (int64_t r = 0; r < step.rows; ++r)
        if (completes(step.positions[r], ratio))
            encode_row(
                team.level, format, floats(op.in[0]) + r * dim, dim,
                octets(op.out[0]) + step.slots[r] * slot_stride + step.positions[r] / ratio * row_bytes(format, dim));
}

// x [rows][channels] convolved with the last rows of their sequences, which each joins
void run_convolve(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t channels = op.sizes[0];
    std::vector<Convolve> calls;
    std::vector<float*> outs;
    for (int64_t r = 0, count = 0; r < step.rows; r += count) {
        count = rows_of_slot(step, r);
        Convolve& call = calls.emplace_back();
        call.x = floats(op.in[0]) + r * channels;
        call.weights = floats(op.in[1]);
        call.tail = floats(op.out[1]) + step.slots[r] * op.sizes[2];
        call.tokens = count;
        call.channels = channels;
        call.taps = op.sizes[1];
        call.before = step.positions[r];
        outs.push_back(floats(op.out[0]) + r * channels);
    }
    convolve(team, calls.data(), outs.data(), static_cast<int64_t>(calls.size()));
}

// queries, keys and values [rows][.] by the states of their slots, which each changes; in: these, a, b, rates, biases
void run_delta_rule(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t key_heads = op.sizes[0], heads = op.sizes[1], key_dim = op.sizes[2], dim = op.sizes[3];
    std::vector<DeltaRule> calls;
    std::vector<float*> outs;
    for (int64_t r = 0, count = 0; r < step.rows; r += count) {
        count = rows_of_slot(step, r);
        DeltaRule& call = calls.emplace_back();
        call.x = floats(op.in[0]) + r * (2 * key_heads * key_dim + heads * dim);
        call.a = floats(op.in[1]) + r * heads;
        call.b = floats(op.in[2]) + r * heads;
        call.rates = floats(op.in[3]);
        call.biases = floats(op.in[4]);
        call.state = floats(op.out[1]) + step.slots[r] * op.sizes[4];
        call.tokens = count;
        call.key_heads = key_heads;
        call.value_heads = heads;
        call.key_dim = key_dim;
        call.value_dim = dim;
        call.is_first = step.positions[r] == 0;
        outs.push_back(floats(op.out[0]) + r * heads * dim);
    }
    delta_rule(team, calls.data(), outs.data(), static_cast<int64_t>(calls.size()));
}

namespace {

// What a row of a selection needs besides its operation: room for the scores of all columns and for their names.
struct SelectRoom {
    float* scores;
    int64_t* named;
};

// The columns among which row r chooses: all that it sees, or the entries of blocks that were chosen before.
int64_t most_columns(const Operation& op, const StepInput& step, int64_t r) {
    return op.in[3] != nullptr ? op.sizes[5] * op.sizes[6] : (step.positions[r] + 1) / op.sizes[2];
}

void select_row(const Team& team, const Operation& op, const StepInput& step, int64_t r, const SelectRoom& room) {
    const int64_t heads = op.sizes[0], dim = op.sizes[1], ratio = op.sizes[2], slot_stride = op.sizes[3];
    const int64_t k = op.sizes[4], block = op.sizes[5], most_blocks = op.sizes[6];
    const auto* pool = static_cast<const int64_t*>(op.in[3]);
    auto* chosen = static_cast<int64_t*>(op.out[0]) + r * k;
    const int64_t visible = (step.positions[r] + 1) / ratio;
    if (visible <= k && pool == nullptr && op.out[3] == nullptr) {  // all of them, whatever their scores
        for (int64_t i = 0; i < k; ++i) chosen[i] = i < visible ? i : -1;
        return;
    }
    Index call{};
    call.queries = floats(op.in[0]) + r * heads * dim;
    call.weights = floats(op.in[1]) + r * heads;
    call.keys = octets(op.in[2]) + step.slots[r] * slot_stride;
    call.format = format_at(op.in[4]);
    call.tokens = 1;
    call.heads = heads;
    call.dim = dim;
    call.visible = &visible;
    call.columns = visible;
    if (pool != nullptr) {
        call.columns = 0;
        for (int64_t b = 0; b < most_blocks; ++b)
            for (int64_t i = 0, first = pool[r * most_blocks + b] * block; first >= 0 && i < block; ++i)
                if (first + i < visible) room.named[call.columns++] = first + i;
        call.entries = room.named;
    }
    index_scores(team, call, room.scores);
    best_columns(team, room.scores, 1, call.columns, k, chosen);
    if (op.out[3] != nullptr)
        best_blocks(team, room.scores, visible, block, most_blocks, static_cast<int64_t*>(op.out[3]) + r * most_blocks);
    for (int64_t i = 0; pool != nullptr && i < k; ++i)
        if (chosen[i] >= 0) chosen[i] = room.named[chosen[i]];
}

}  // namespace

// Which compressed entries each row attends to. in: queries [rows][heads][dim], weights [rows][heads], index keys
// [slots][.][dim], and perhaps blocks of entries [rows][most blocks] to choose from; out: entries [rows][k], scores
// [columns] and named entries [columns] of a row at a time, and perhaps its best blocks
void run_select(const Team& team, const Operation& op, const StepInput& step) {
    constexpr int64_t kFewColumns = 4096;  // which are too few to be shared: rather, each thread takes some rows
    int64_t most = 0;
    for (int64_t r = 0; r < step.rows; ++r) most = std::max(most, most_columns(op, step, r));
    if (most > kFewColumns || step.rows < team.threads) {
        for (int64_t r = 0; r < step.rows; ++r)
            select_row(team, op, step, r, {floats(op.out[1]), static_cast<int64_t*>(op.out[2])});
        return;
    }
    const Team alone{team.level, 1, team.one_digit};
    parallel_for(step.rows, team.threads, [&](int64_t r) {
        thread_local std::vector<float> scores;
        thread_local std::vector<int64_t> named;
        scores.resize(static_cast<size_t>(most));
        named.resize(static_cast<size_t>(most));
        select_row(alone, op, step, r, {scores.data(), named.data()});
    });
}

}  // namespace loci
