// The panel kernels: 16 rows of packed weights times a few tokens.
//
// Every product sum runs in an order that depends on the columns alone, never on how many tokens or threads
// take part, so a token's result is the same bit for bit in every batch.
namespace {

// Asks for what a thread reads some way behind place `at` of a panel: of the panel itself or of what follows it.
ALWAYS_INLINE void ask_ahead(const Panel& panel, int64_t at, int64_t bytes) {
    const uint8_t* p = at < panel.bytes ? panel.codes + at : panel.next + (at - panel.bytes);
    for (int64_t k = 0; k < bytes; k += 64) prefetch(p + k);
}

// Two vectors of rows share each activation that is broadcast, as long as registers hold all sums.
constexpr int vectors_at_once(int sums) { return 2 * sums <= kSumRegisters ? 2 : 1; }

// Whether the three sums of a part of a block fit an integer together: those of codes of up to six bits.
template <class Format>
constexpr bool fits_integer() {
    constexpr int64_t kMost = int64_t{Format::kLargest} * 64 * kBlock / Format::kParts;
    return Format::kDigits == 1 && kMost * (128 * 128 + 128 + 1) < int64_t{1} << 31;
}

// Sums of descending weight together, in units of the last. Each counts 128 times the next; the first comes multiplied
// with that.
template <int S, bool FitsInteger>
ALWAYS_INLINE F32 combine(const I32* sums) {
    if constexpr (S == 1) return to_float(sums[0]);
    else if constexpr (S == 2) return to_float(add(sums[0], sums[1]));
    else if constexpr (FitsInteger) return to_float(add(shift_left_7(add(sums[0], sums[1])), sums[2]));
    else return fma(to_float(add(sums[0], sums[1])), splat(128.0f), to_float(sums[2]));
}

// The sum of 16 activations, of a block that has the sums of digits in place of corrections.
template <int D>
ALWAYS_INLINE float sum_of_part(const Block<D>& x, int part) {
    float sum = 0;
    for (int d = 0; d < D; ++d) sum = sum * 128.0f + static_cast<float>(x.correction[part][d]);
    return x.scale * sum;
}

// What a row's sum is multiplied with in the end.
template <class Format>
ALWAYS_INLINE F32 factor(const uint8_t* panel, int row, int digits) {
    const F32 unit = splat(Format::unit(digits));
    if constexpr (Format::kPrefixBytes == 0) return unit;
    else return mul(unit, load_float(reinterpret_cast<const float*>(panel) + row));
}

// Packed codes times fixed-point activations of D digits: T tokens, R vectors of rows at a time.
template <class Format, int T, int D>
void integer_panel(const Panel& panel, const void* const* x, float* out) {
    using Sum = Dot<Format::kLargest, D == 1 ? 127 : 64>;
    const Format format(panel.scales);
    // Products of a code's digit and an activation's digit by weight; those below the last sum are dropped.
    constexpr int S = D > 1 ? D : Format::kDigits > 1 ? 2 : 1, W = Format::kDigits < S ? Format::kDigits : S;
    constexpr int kVectors = kPanelRows / kLanes, R = vectors_at_once(T * S), kGroups = 8 / Format::kParts;
    constexpr int kStripBlocks = Format::kStrip / kBlock;
    const int64_t block_bytes = format.header_bytes(kStripBlocks) / kStripBlocks + Format::kBlockBytes;
    F32 y[T][kVectors];
    for (int t = 0; t < T; ++t)
        for (int v = 0; v < kVectors; ++v) y[t][v] = zero();
    int64_t block = 0, strip = Format::kPrefixBytes;  // strip: where it begins
    for (int64_t c = 0; c < panel.cols; c += Format::kStrip) {
        const int64_t left = panel.cols - c < Format::kStrip ? panel.cols - c : Format::kStrip;
        const int blocks = static_cast<int>(left) / kBlock;
        const uint8_t* header = panel.codes + strip;
        const uint8_t* codes = header + format.header_bytes(blocks);
        for (int b = 0; b < blocks; ++b, ++block, codes += Format::kBlockBytes) {
            ask_ahead(panel, strip + b * block_bytes + Format::kAhead, block_bytes);
            const Block<D>* xs[T];
            for (int t = 0; t < T; ++t) xs[t] = static_cast<const Block<D>*>(x[t]) + block;
            // where sums begin: once for all rows where that takes instructions, else read when it is needed
            int32_t prepared[T][Format::kParts][S] = {};
            for (int t = 0; t < T; ++t)
                for (int part = 0; part < Format::kParts && Sum::kPrepares && Format::kCorrects; ++part)
                    for (int s = 0; s < D; ++s) prepared[t][part][s] = Sum::prepare(xs[t]->correction[part][s]);
            const auto start = [&](int t, int part, int s) {
                return Sum::kPrepares || !Format::kCorrects ? prepared[t][part][s]
                       : s < D                              ? xs[t]->correction[part][s]
                                                            : 0;
            };
            float totals[T][Format::kParts];  // of the activations, where something is added to products
            for (int t = 0; t < T && Format::kConstant; ++t)
                for (int part = 0; part < Format::kParts; ++part)
                    totals[t][part] = Format::kParts == 1 ? xs[t]->sum : sum_of_part(*xs[t], part);
            for (int v = 0; v < kVectors; v += R)
                for (int part = 0; part < Format::kParts; ++part) {
                    KEEP_ORDER;
                    Sum dots[T][S][R];
                    for (int t = 0; t < T; ++t)
                        for (int s = 0; s < S; ++s)
                            for (int r = 0; r < R; ++r) dots[t][s][r].begin(start(t, part, s));
                    UNROLL for (int i = 0; i < kGroups; ++i) {
                        const int g = part * kGroups + i;
                        UNROLL for (int j = 0; j < W; ++j) {
                            Bytes w[R];
                            for (int r = 0; r < R; ++r) w[r] = format.group(codes + 4 * (v + r) * kLanes, g, j);
                            for (int t = 0; t < T; ++t) {
                                UNROLL for (int d = 0; d < D; ++d) {
                                    if (j + d >= S) continue;
                                    const auto digits = four_digits(xs[t]->digits[d] + 4 * g);
                                    for (int r = 0; r < R; ++r) dots[t][j + d][r].add(w[r], digits);
                                }
                            }
                        }
                        for (int t = 0; t < T; ++t)
                            for (int s = 0; s < S; ++s)
                                for (int r = 0; r < R; ++r) dots[t][s][r].after(i);
                    }
                    UNROLL for (int r = 0; r < R; ++r) {
                        const int row = (v + r) * kLanes;
                        const F32 scale = format.scale(header, b, part, row);
                        for (int t = 0; t < T; ++t) {
                            I32 sums[S];
                            UNROLL for (int s = 0; s < S; ++s) {
                                sums[s] = dots[t][s][r].end(s == 0 && S > 1 ? 128 : 1);
                            }
                            F32& sum = y[t][v + r];
                            sum = fma(mul(combine<S, fits_integer<Format>()>(sums), splat(xs[t]->scale)), scale, sum);
                            if (Format::kConstant)
                                sum = format.constant(header, blocks, b, part, row, totals[t][part], sum);
                        }
                    }
                }
        }
        strip = codes - panel.codes;
    }
    for (int t = 0; t < T; ++t)
        for (int v = 0; v < kVectors; ++v)
            store(out + t * kPanelRows + v * kLanes, mul(y[t][v], factor<Format>(panel.codes, v * kLanes, D)));
}

ALWAYS_INLINE float scale_at(PanelScales scales, int64_t i) {
    if (scales.is_float) return static_cast<const float*>(scales.row)[i];
    const uint32_t code = static_cast<const uint8_t*>(scales.row)[i];
    const uint32_t bits = code ? code << 23 : 0x00400000u;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// e4m3 codes, column pair after column pair, times float activations. The products of even and odd columns are
// summed apart: two short chains of additions instead of a long one.
template <int T>
void fp8_panel(const Panel& panel, const void* const* x, float* out) {
    constexpr int kVectors = kPanelRows / kLanes, R = vectors_at_once(2 * T);
    const E4m3 e4m3;
    const int64_t tile_cols = panel.scales.tile_cols;
    const float* xs[T];
    for (int t = 0; t < T; ++t) xs[t] = static_cast<const float*>(x[t]);
    F32 y[T][kVectors];
    for (int t = 0; t < T; ++t)
        for (int v = 0; v < kVectors; ++v) y[t][v] = zero();
    for (int64_t tile = 0; tile * tile_cols < panel.cols; ++tile) {
        const int64_t first = tile * tile_cols, end = first + tile_cols < panel.cols ? first + tile_cols : panel.cols;
        const F32 scale = splat(scale_at(panel.scales, tile));
        for (int v = 0; v < kVectors; v += R) {
            KEEP_ORDER;
            F32 sums[T][2][R];  // [token][even or odd column][vector of rows]
            for (int t = 0; t < T; ++t)
                for (int r = 0; r < R; ++r) sums[t][0][r] = sums[t][1][r] = zero();
            const auto add_pair = [&](int64_t c, bool both) {
                F32 w[2][R];
                e4m3.decode(panel.codes + c * kPanelRows, v, w);
                for (int k = 0; k < 2; ++k)
                    for (int t = 0; t < T; ++t) {
                        const F32 xk = splat(k == 0 || both ? xs[t][c + k] : 0.0f);
                        for (int r = 0; r < R; ++r) sums[t][k][r] = fma(w[k][r], xk, sums[t][k][r]);
                    }
            };
            int64_t c = first;
            for (; c + 8 <= end; c += 8) {
                if (v == 0) ask_ahead(panel, c * kPanelRows + kPanelAhead, 8 * kPanelRows);
                UNROLL for (int k = 0; k < 8; k += 2) add_pair(c + k, true);
            }
            for (; c < end; c += 2) add_pair(c, c + 1 < end);
            for (int t = 0; t < T; ++t)
                for (int r = 0; r < R; ++r) y[t][v + r] = fma(add(sums[t][0][r], sums[t][1][r]), scale, y[t][v + r]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int v = 0; v < kVectors; ++v) E4m3::store_rows(out + t * kPanelRows, v, y[t][v]);
}

// One row of e4m3 codes with a scale per 32 columns as floats.
void fp8_row(const uint8_t* codes, const void* scales, bool float_scales, int64_t cols, float* out) {
    for (int64_t c = 0; c < cols; c += kBlock) {
        const F32 scale = splat(scale_at({scales, kBlock, float_scales}, c / kBlock));
        if (c + kBlock <= cols) {
            for (int k = 0; k < kBlock; k += kLanes) store(out + c + k, mul(load_e4m3(codes + c + k), scale));
        } else {
            uint8_t tail[kBlock] = {};
            float values[kBlock];
            __builtin_memcpy(tail, codes + c, static_cast<size_t>(cols - c));
            for (int k = 0; k < kBlock; k += kLanes) store(values + k, mul(load_e4m3(tail + k), scale));
            __builtin_memcpy(out + c, values, sizeof(float) * static_cast<size_t>(cols - c));
        }
    }
}

// Reads whole rows in the order named, a multiple of eight bytes each; nothing but their sum comes of it.
uint64_t read_rows(const uint8_t* bytes, int64_t row_bytes, const int64_t* rows, int64_t n) {
    constexpr int64_t kAhead = 16;
    uint64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (i + kAhead < n)
            for (int64_t k = 0; k < row_bytes; k += 64) prefetch(bytes + rows[i + kAhead] * row_bytes + k);
        for (int64_t k = 0; k + 8 <= row_bytes; k += 8) {
            uint64_t word;
            __builtin_memcpy(&word, bytes + rows[i] * row_bytes + k, 8);
            sum += word;
        }
    }
    return sum;
}

}  // namespace
