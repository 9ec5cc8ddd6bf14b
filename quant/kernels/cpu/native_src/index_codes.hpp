// Index scores of queries and keys that are both e2m1 with a power of two per 32 columns: products of integers.
//
// Twice an e2m1 value is an integer of at most 12. Where the scales of a row are near each other, the codes of its
// larger ones are shifted, so that one integer sum makes the whole product: exact, like the sum over blocks in floats,
// which is what is made where they are not. Weighted products are then added in the order of the heads. So every level
// gives the same bits.
namespace {

constexpr int kKeyVectors = kSumRegisters > 12 ? 2 : 1;  // of keys that pass over the queries together
constexpr int kIndexHeads = kSumRegisters > 1 ? kHeadsTogether : 1;
constexpr int kWideHeads = kIndexHeads > 4 ? 4 : 1;
constexpr int kTileKeys = kKeyVectors * kLanes;
constexpr int kGroupsOfBlock = kBlock / 4;
constexpr int kLargestKey = 2 * kIndexOffset, kLargestQuery = 12 << kMostQueryShift;
using IndexDot = Dot<kLargestKey, kLargestQuery>;
static_assert(!IndexDot::kPrepares);

// Some keys: codes in groups of four columns, of each block the even and the odd ones of eight columns in turn, raised
// by kIndexOffset; lane for lane.
struct KeyTile {
    alignas(64) uint8_t codes[kMostIndexBlocks * kGroupsOfBlock][kKeyVectors][4 * kLanes];
    bool is_wide;                                            // sums of blocks cannot be added as they are
    alignas(64) float factors[kMostIndexBlocks][kTileKeys];  // then: of sums over a block
    alignas(64) float factor[kTileKeys];                     // of scores
};

// Scales of a tile's keys: by how much codes of each block are to be shifted, and what sums of their products count.
template <int Blocks>
ALWAYS_INLINE void read_scales(const uint8_t* const (&rows)[kTileKeys], int of_row, KeyTile& tile,
                               int32_t (&shifts)[kMostIndexBlocks][kTileKeys]) {
    const int blocks = Blocks > 0 ? Blocks : of_row;
    constexpr int kOfWord = 4;
    alignas(64) uint32_t words[kMostIndexBlocks / kOfWord][kTileKeys];  // rows are filled up to whole ones
    for (int first = 0; first < blocks; first += kOfWord)
        for (int v = 0; v < kKeyVectors; ++v) {
            Bytes dwords[4];  // the last of them is the word
            load_dwords(rows + v * kLanes, blocks * (kBlock / 2) + first - 3 * kOfWord, dwords);
            store_codes(reinterpret_cast<uint8_t*>(words[first / kOfWord] + v * kLanes), dwords[3]);
        }
    const auto code = [&](int b, int i) {
        return static_cast<int32_t>(words[b / kOfWord][i] >> 8 * (b % kOfWord) & 255);
    };
    alignas(64) int32_t least[kTileKeys], bits[kTileKeys];
    int32_t spread = 0;
    for (int i = 0; i < kTileKeys; ++i) {
        int32_t low = code(0, i), high = low;
        for (int b = 1; b < blocks; ++b) {
            low = code(b, i) < low ? code(b, i) : low;
            high = code(b, i) > high ? code(b, i) : high;
        }
        least[i] = low;
        spread = high - low > spread ? high - low : spread;
    }
    tile.is_wide = spread > kMostKeyShift;
    const auto ue8m0_bits = [](int32_t number) { return number > 0 ? number << 23 : 0x00400000; };
    if (!tile.is_wide) {
        for (int i = 0; i < kTileKeys; ++i) bits[i] = ue8m0_bits(least[i]);
        __builtin_memcpy(tile.factor, bits, sizeof bits);
        for (int b = 0; b < blocks; ++b)
            for (int i = 0; i < kTileKeys; ++i) shifts[b][i] = code(b, i) - least[i];
        return;
    }
    for (float& factor : tile.factor) factor = 1.0f;
    for (int b = 0; b < blocks; ++b) {
        for (int i = 0; i < kTileKeys; ++i) bits[i] = ue8m0_bits(code(b, i)), shifts[b][i] = 0;
        __builtin_memcpy(tile.factors[b], bits, sizeof bits);
    }
}

// Blocks: of a row, where the compiler knows how many; else 0.
template <int Blocks>
void unpack_keys(const IndexCodes& c, int64_t first, KeyTile& tile) {
    const int blocks = Blocks > 0 ? Blocks : c.blocks;
    const uint8_t* rows[kTileKeys];
    for (int i = 0; i < kTileKeys; ++i) rows[i] = c.keys[first + i < c.n ? first + i : c.n - 1];
    alignas(64) int32_t shifts[kMostIndexBlocks][kTileKeys];
    read_scales<Blocks>(rows, blocks, tile, shifts);
    const KeyCodes key_codes;
    for (int b = 0; b < blocks; ++b)
        for (int v = 0; v < kKeyVectors; ++v) {
            Bytes dwords[4];
            load_dwords(rows + v * kLanes, b * (kBlock / 2), dwords);
            const KeyCodes::Shift shift(shifts[b] + v * kLanes);
            for (int j = 0; j < 4; ++j) {
                uint8_t (*to)[4 * kLanes] = tile.codes[b * kGroupsOfBlock + 2 * j];
                store_codes(to[v], key_codes.low(dwords[j], shift));
                to += kKeyVectors;
                store_codes(to[v], key_codes.high(dwords[j], shift));
            }
        }
}

// Where the codes of some heads are: four bytes for each group of four columns.
struct Digits4 {
    const int8_t* first;
    int64_t of_head, of_group;  // bytes from one to the next
};

// Products of H queries and the tile's keys, over the blocks from `first` to `last`.
template <int H>
ALWAYS_INLINE void index_sums(const KeyTile& tile, const Digits4& digits, const int32_t* starts, int64_t starts_apart,
                              int first, int last, I32 (&sums)[H][kKeyVectors]) {
    IndexDot dots[H][kKeyVectors];
    for (int h = 0; h < H; ++h)
        for (int v = 0; v < kKeyVectors; ++v) dots[h][v].begin(starts[h * starts_apart]);
    for (int b = first; b < last; ++b) {
        UNROLL
        for (int j = 0; j < kGroupsOfBlock; ++j) {
            const int64_t g = b * kGroupsOfBlock + j;
            Bytes codes[kKeyVectors];
            for (int v = 0; v < kKeyVectors; ++v) codes[v] = load_bytes(tile.codes[g][v]);
            for (int h = 0; h < H; ++h) {
                const auto four = four_digits(digits.first + g * digits.of_group + h * digits.of_head);
                for (int v = 0; v < kKeyVectors; ++v) {
                    dots[h][v].add(codes[v], four);
                    dots[h][v].after(j);
                }
            }
        }
    }
    for (int h = 0; h < H; ++h)
        for (int v = 0; v < kKeyVectors; ++v) sums[h][v] = dots[h][v].end(1);
}

// Adds what H heads of a token make of a tile's keys: of those that lie side by side.
template <int H>
void add_heads(const IndexCodes& c, const KeyTile& tile, int64_t token, int64_t head, F32 (&scores)[kKeyVectors]) {
    constexpr int64_t kGroupBytes = 4 * kHeadsTogether;
    const int64_t number = token * c.heads + head;
    const int64_t of_token = (c.heads + kHeadsTogether - 1) / kHeadsTogether, groups = c.blocks * kGroupsOfBlock;
    const int8_t* of_heads = c.queries.shifted + (token * of_token + head / kHeadsTogether) * groups * kGroupBytes;
    I32 sums[H][kKeyVectors];
    index_sums<H>(tile, {of_heads + head % kHeadsTogether * 4, 4, kGroupBytes}, c.queries.shifted_starts + number, 1, 0,
                  c.blocks, sums);
    for (int h = 0; h < H; ++h) {
        const F32 weight = splat(c.queries.shifted_weights[number + h]);
        for (int v = 0; v < kKeyVectors; ++v)
            scores[v] = add(scores[v], mul(weight, to_float(larger(sums[h][v], splat_int(0)))));
    }
}

// The same of heads whose products are made block by block.
template <int H>
void add_wide_heads(const IndexCodes& c, const KeyTile& tile, int64_t token, int64_t head, F32 (&scores)[kKeyVectors]) {
    const int64_t number = token * c.heads + head, columns = c.blocks * kBlock;
    F32 dots[H][kKeyVectors];
    for (int h = 0; h < H; ++h)
        for (F32& dot : dots[h]) dot = zero();
    for (int b = 0; b < c.blocks; ++b) {
        I32 sums[H][kKeyVectors];
        const int64_t at = number * c.blocks + b;
        index_sums<H>(tile, {c.queries.plain + number * columns, columns, 4}, c.queries.plain_starts + at, c.blocks, b,
                      b + 1, sums);
        for (int v = 0; v < kKeyVectors; ++v) {
            const F32 of_keys = tile.is_wide ? load_float(tile.factors[b] + v * kLanes) : splat(1.0f);
            for (int h = 0; h < H; ++h) {
                const F32 factor = mul(splat(c.queries.factors[at + h * c.blocks]), of_keys);
                dots[h][v] = add(dots[h][v], mul(factor, to_float(sums[h][v])));
            }
        }
    }
    for (int h = 0; h < H; ++h) {
        const F32 weight = splat(c.queries.weights[number + h]);
        for (int v = 0; v < kKeyVectors; ++v) {
            alignas(64) float values[kLanes];
            store(values, dots[h][v]);
            for (float& value : values) value = value > 0 ? value : 0.0f;
            scores[v] = add(scores[v], mul(weight, load_float(values)));
        }
    }
}

// As many of a token's heads from `head` on, all wide or none, as are computed together; how many.
ALWAYS_INLINE int add_some_heads(const IndexCodes& c, const KeyTile& tile, int64_t token, int64_t head,
                                 F32 (&scores)[kKeyVectors]) {
    const auto is_wide = [&](int64_t h) { return tile.is_wide || c.queries.is_wide[token * c.heads + h] != 0; };
    const int64_t side_by_side = (head / kHeadsTogether + 1) * kHeadsTogether;
    const int64_t end = side_by_side < c.heads ? side_by_side : c.heads;
    const bool wide = is_wide(head);
    int64_t alike = 1;
    while (head + alike < end && is_wide(head + alike) == wide) ++alike;
    if (wide) {
        if (alike < kWideHeads) return add_wide_heads<1>(c, tile, token, head, scores), 1;
        return add_wide_heads<kWideHeads>(c, tile, token, head, scores), kWideHeads;
    }
    if (alike >= kIndexHeads) return add_heads<kIndexHeads>(c, tile, token, head, scores), kIndexHeads;
    if (alike < kWideHeads) return add_heads<1>(c, tile, token, head, scores), 1;
    return add_heads<kWideHeads>(c, tile, token, head, scores), kWideHeads;
}

// out = the sum over heads of weight * max(query . key, 0)
void index_codes(const IndexCodes& c) {
    KeyTile tile;
    for (int64_t first = 0; first < c.n; first += kTileKeys) {
        if (c.blocks == 4) unpack_keys<4>(c, first, tile);
        else unpack_keys<0>(c, first, tile);
        const int64_t count = c.n - first < kTileKeys ? c.n - first : kTileKeys;
        for (int64_t token = 0; token < c.tokens; ++token) {
            F32 scores[kKeyVectors];
            for (F32& score : scores) score = zero();
            for (int64_t head = 0; head < c.heads;) head += add_some_heads(c, tile, token, head, scores);
            alignas(64) float values[kTileKeys];
            for (int v = 0; v < kKeyVectors; ++v)
                store(values + v * kLanes, mul(scores[v], load_float(tile.factor + v * kLanes)));
            __builtin_memcpy(c.out + token * c.apart + first, values, static_cast<size_t>(count) * sizeof(float));
        }
    }
}

}  // namespace
