// Products of e4m3 panels with many tokens: some columns of a panel are decoded once, and all tokens use them while
// they are near. Sums run in the order of fp8_panel, so that a token gets the same bits from either.
namespace {

constexpr int kFp8Vectors = kPanelRows / kLanes, kFp8AtOnce = kSumRegisters > 1 ? 2 : 1;
constexpr int kFp8Together = kSumRegisters > 4 ? kSumRegisters / 4 : 1;  // tokens whose sums registers hold
constexpr int64_t kFp8Columns = 128;                                     // as floats, half of the first-level cache

// The tile of columns `first` to `stop` of a panel: for each pair of columns and kFp8AtOnce vectors of rows, those of
// the even column and those of the odd one.
inline void fp8_decode(const E4m3& e4m3, const Panel& panel, int64_t first, int64_t stop, float* tile) {
    constexpr int R = kFp8AtOnce;
    for (int64_t c = first; c < stop; c += 2) {
        if (c % 8 == 0) ask_ahead(panel, (c + kFp8Columns) * kPanelRows, 8 * kPanelRows);
        for (int v = 0; v < kFp8Vectors; v += R, tile += 2 * R * kLanes) {
            F32 w[2][R];
            e4m3.decode(panel.codes + c * kPanelRows, v, w);
            for (int k = 0; k < 2; ++k)
                for (int r = 0; r < R; ++r) store(tile + (k * R + r) * kLanes, w[k][r]);
        }
    }
}

// A tile times T tokens, added to their sums: [T][32], in the order of vectors.
template <int T>
void fp8_add(const float* tile, const Panel& panel, int64_t first, int64_t stop, const float* const* x, float* sums) {
    constexpr int R = kFp8AtOnce, kPair = 2 * kPanelRows;  // floats of a pair of columns
    const int64_t scale_cols = panel.scales.tile_cols;
    for (int64_t begin = first, end; begin < stop; begin = end) {
        end = begin + scale_cols < stop ? begin + scale_cols : stop;
        const F32 scale = splat(scale_at(panel.scales, begin / scale_cols));
        for (int v = 0; v < kFp8Vectors; v += R) {
            KEEP_ORDER;
            F32 parts[T][2][R];  // [token][even or odd column][vector of rows]
            for (int t = 0; t < T; ++t)
                for (int r = 0; r < R; ++r) parts[t][0][r] = parts[t][1][r] = zero();
            const float* from = tile + (begin - first) / 2 * kPair + 2 * v * kLanes;
            for (int64_t c = begin; c < end; c += 2, from += kPair) {
                F32 w[2][R];
                for (int k = 0; k < 2; ++k)
                    for (int r = 0; r < R; ++r) w[k][r] = load_float(from + (k * R + r) * kLanes);
                for (int k = 0; k < 2; ++k)
                    for (int t = 0; t < T; ++t) {
                        const F32 xk = splat(x[t][c + k]);
                        for (int r = 0; r < R; ++r) parts[t][k][r] = fma(w[k][r], xk, parts[t][k][r]);
                    }
            }
            for (int t = 0; t < T; ++t)
                for (int r = 0; r < R; ++r) {
                    float* sum = sums + t * kPanelRows + (v + r) * kLanes;
                    store(sum, fma(add(parts[t][0][r], parts[t][1][r]), scale, load_float(sum)));
                }
        }
    }
}

template <int T = kFp8Together>
void fp8_add_some(int64_t tokens, const float* tile, const Panel& panel, int64_t first, int64_t stop,
                  const float* const* x, float* sums) {
    if constexpr (T > 1)
        if (tokens < T) return fp8_add_some<T - 1>(tokens, tile, panel, first, stop, x, sums);
    fp8_add<T>(tile, panel, first, stop, x, sums);
}

// Several panels of as many columns, an even number, times many tokens: sums [panel][token][32]. A panel's columns
// begin with those of x at `at[panel]`.
void fp8_many(const Panel* panels, int64_t count, const float* const* x, const int64_t* at, int64_t tokens,
              float* sums) {
    const E4m3 e4m3;
    alignas(64) float tile[kFp8Columns * kPanelRows];
    for (int64_t i = 0; i < count * tokens * kPanelRows; i += kLanes) store(sums + i, zero());
    for (int64_t first = 0; first < panels[0].cols; first += kFp8Columns)
        for (int64_t p = 0; p < count; ++p) {
            const int64_t cols = panels[p].cols, stop = first + kFp8Columns < cols ? first + kFp8Columns : cols;
            fp8_decode(e4m3, panels[p], first, stop, tile);
            for (int64_t t = 0; t < tokens; t += kFp8Together) {
                const int64_t left = tokens - t, some = left < kFp8Together ? left : kFp8Together;
                const float* xs[kFp8Together];
                for (int64_t k = 0; k < some; ++k) xs[k] = x[t + k] + at[p];
                for (int64_t k = t + some; k < tokens && k < t + 2 * kFp8Together; ++k)
                    for (int64_t c = first; c < stop; c += 16)
                        prefetch(reinterpret_cast<const uint8_t*>(x[k] + at[p] + c));
                fp8_add_some(some, tile, panels[p], first, stop, xs, sums + (p * tokens + t) * kPanelRows);
            }
        }
    for (int64_t i = 0; i < count * tokens; ++i) {
        F32 y[kFp8Vectors];
        for (int v = 0; v < kFp8Vectors; ++v) y[v] = load_float(sums + i * kPanelRows + v * kLanes);
        for (int v = 0; v < kFp8Vectors; ++v) E4m3::store_rows(sums + i * kPanelRows, v, y[v]);
    }
}

}  // namespace
