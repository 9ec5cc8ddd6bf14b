// The panel kernels: 16 rows of packed weights times a few tokens.
//
// Every product sum runs in an order that depends on the columns alone, never on how many tokens or threads
// take part, so a token's result is the same bit for bit in every batch.
namespace {

// How far ahead of the reads memory is asked for; hardware prefetchers alone lose a tenth of the bandwidth.
constexpr int kPrefetchBytes = 4096;

template <int D>
ALWAYS_INLINE F32 combine(const I32* digit_sums) {
    if constexpr (D == 1) return to_float(digit_sums[0]);
    // the upper two fit 24 bits for four-bit codes, 31 for eight-bit ones
    else return fma(to_float(add(times128(digit_sums[0]), digit_sums[1])), splat(128.0f), to_float(digit_sums[2]));
}

// Packed integer codes times fixed-point activations.
template <class Format, int T, int D>
void integer_panel(const uint8_t* panel, int64_t cols, const void* const* x, PanelScales, float* out) {
    const Format format{};
    constexpr int kGroups = 8 / Format::kParts;
    for (int row = 0; row < kPanelRows; row += kLanes) {
        F32 y[T];
        for (int t = 0; t < T; ++t) y[t] = zero();
        const uint8_t* strip = panel;
        int64_t block = 0;
        for (int64_t c = 0; c < cols; c += Format::kStrip) {
            const int64_t left = cols - c < Format::kStrip ? cols - c : Format::kStrip;
            const int blocks = static_cast<int>(left) / kBlock;
            const uint8_t* codes = strip + Format::header_bytes(blocks) + 4 * row;
            for (int b = 0; b < blocks; ++b, ++block, codes += Format::kBlockBytes) {
                if (row == 0) {
                    for (int k = 0; k < Format::kBlockBytes; k += 64) prefetch(codes + kPrefetchBytes + k);
                }
                for (int part = 0; part < Format::kParts; ++part) {
                    const F32 scale = format.scale(strip, b, part, row);
                    Dot<Format::kSmall> dots[T][D];
                    const Block<D>* xs[T];
                    for (int t = 0; t < T; ++t) {
                        xs[t] = static_cast<const Block<D>*>(x[t]) + block;
                        for (int d = 0; d < D; ++d) dots[t][d].start(xs[t]->correction[part][d]);
                    }
                    UNROLL for (int i = 0; i < kGroups; ++i) {
                        const int g = part * kGroups + i;
                        const Bytes w = format.group(codes, g);
                        for (int t = 0; t < T; ++t)
                            for (int d = 0; d < D; ++d) dots[t][d].add(w, xs[t]->digits[d] + 4 * g);
                        if (i % 4 == 3)
                            for (int t = 0; t < T; ++t)
                                for (int d = 0; d < D; ++d) dots[t][d].flush();
                    }
                    for (int t = 0; t < T; ++t) {
                        I32 sums[D];
                        for (int d = 0; d < D; ++d) sums[d] = dots[t][d].total();
                        y[t] = fma(mul(combine<D>(sums), splat(xs[t]->scale)), scale, y[t]);
                    }
                }
                for (int t = 0; t < T; ++t) {
                    const Block<D>* xs = static_cast<const Block<D>*>(x[t]) + block;
                    y[t] = format.constant(strip, blocks, b, row, xs->sum, y[t]);
                }
            }
            strip = codes - 4 * row;
        }
        for (int t = 0; t < T; ++t) store(out + t * kPanelRows + row, mul(y[t], splat(Format::kUnit)));
    }
}

ALWAYS_INLINE float scale_at(PanelScales scales, int64_t i) {
    if (scales.is_float) return static_cast<const float*>(scales.row)[i];
    const uint32_t code = static_cast<const uint8_t*>(scales.row)[i];
    const uint32_t bits = code ? code << 23 : 0x00400000u;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// e4m3 codes, column after column of 16 rows, times float activations.
template <int T>
void fp8_panel(const uint8_t* panel, int64_t cols, const void* const* x, PanelScales scales, float* out) {
    for (int row = 0; row < kPanelRows; row += kLanes) {
        F32 y[T];
        for (int t = 0; t < T; ++t) y[t] = zero();
        for (int64_t tile = 0; tile * scales.tile_cols < cols; ++tile) {
            const int64_t first = tile * scales.tile_cols;
            const int64_t end = first + scales.tile_cols < cols ? first + scales.tile_cols : cols;
            F32 even[T], odd[T];
            for (int t = 0; t < T; ++t) even[t] = odd[t] = zero();
            int64_t c = first;
            for (; c + 4 <= end; c += 4) {
                const uint8_t* codes = panel + c * kPanelRows + row;
                if (row == 0) prefetch(codes + kPrefetchBytes);
                UNROLL for (int k = 0; k < 4; k += 2) {
                    const F32 w0 = load_e4m3(codes + k * kPanelRows), w1 = load_e4m3(codes + (k + 1) * kPanelRows);
                    for (int t = 0; t < T; ++t) {
                        const float* xt = static_cast<const float*>(x[t]) + c + k;
                        even[t] = fma(w0, splat(xt[0]), even[t]);
                        odd[t] = fma(w1, splat(xt[1]), odd[t]);
                    }
                }
            }
            for (; c < end; ++c) {
                const F32 w = load_e4m3(panel + c * kPanelRows + row);
                for (int t = 0; t < T; ++t) even[t] = fma(w, splat(static_cast<const float*>(x[t])[c]), even[t]);
            }
            const F32 scale = splat(scale_at(scales, tile));
            for (int t = 0; t < T; ++t) y[t] = fma(add(even[t], odd[t]), scale, y[t]);
        }
        for (int t = 0; t < T; ++t) store(out + t * kPanelRows + row, mul(y[t], splat(256.0f)));
    }
}

// Plain rows times float activations: vectors run along the columns, so nothing needs repacking.
template <int Kind>
ALWAYS_INLINE F32 load_dense(const uint8_t* row, int64_t c) {
    if constexpr (Kind == 0) return load_bf16(row + 2 * c);
    else if constexpr (Kind == 1) return load_half(row + 2 * c);
    else return load_float(reinterpret_cast<const float*>(row) + c);
}

template <int Kind, int T>
void dense_row(const uint8_t* row, int64_t cols, const float* x, float* out, int64_t out_stride) {
    constexpr int kStep = 4 * kLanes, kSize = Kind == 2 ? 4 : 2;
    F32 sums[T][2];
    for (int t = 0; t < T; ++t) sums[t][0] = sums[t][1] = zero();
    const int64_t whole = cols / kStep * kStep;
    for (int64_t c = 0; c < whole; c += kStep) {
        prefetch(row + kSize * c + kPrefetchBytes);
        UNROLL for (int k = 0; k < 4; ++k) {
            const F32 w = load_dense<Kind>(row, c + k * kLanes);
            for (int t = 0; t < T; ++t)
                sums[t][k & 1] = fma(w, load_float(x + t * cols + c + k * kLanes), sums[t][k & 1]);
        }
    }
    if (whole < cols) {  // the last columns, padded with zeros
        alignas(64) uint8_t tail[kStep * kSize] = {};
        alignas(64) float tail_x[kStep] = {};
        __builtin_memcpy(tail, row + kSize * whole, static_cast<size_t>(kSize * (cols - whole)));
        for (int t = 0; t < T; ++t) {
            __builtin_memcpy(tail_x, x + t * cols + whole, sizeof(float) * static_cast<size_t>(cols - whole));
            for (int k = 0; k < 4; ++k)
                sums[t][k & 1] = fma(load_dense<Kind>(tail, k * kLanes), load_float(tail_x + k * kLanes), sums[t][k & 1]);
        }
    }
    for (int t = 0; t < T; ++t) out[t * out_stride] = reduce(add(sums[t][0], sums[t][1]));
}

template <int Kind>
void dense_tokens(const uint8_t* row, int64_t cols, const float* x, int64_t tokens, float* out, int64_t out_stride) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) dense_row<Kind, 4>(row, cols, x + t * cols, out + t * out_stride, out_stride);
    for (; t < tokens; ++t) dense_row<Kind, 1>(row, cols, x + t * cols, out + t * out_stride, out_stride);
}

void dense_rows(const void* row, int kind, int64_t cols, const float* x, int64_t tokens, float* out,
                int64_t out_stride) {
    const uint8_t* bytes = static_cast<const uint8_t*>(row);
    if (kind == 0) dense_tokens<0>(bytes, cols, x, tokens, out, out_stride);
    else if (kind == 1) dense_tokens<1>(bytes, cols, x, tokens, out, out_stride);
    else dense_tokens<2>(bytes, cols, x, tokens, out, out_stride);
}

// One row of e4m3 codes with a scale per 32 columns as floats.
void fp8_row(const uint8_t* codes, const void* scales, bool float_scales, int64_t cols, float* out) {
    for (int64_t c = 0; c < cols; c += kBlock) {
        const F32 scale = splat(256.0f * scale_at({scales, kBlock, float_scales}, c / kBlock));
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

}  // namespace
