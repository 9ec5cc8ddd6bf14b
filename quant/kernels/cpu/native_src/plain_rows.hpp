// Products with rows that nobody has packed: bf16, fp16 and fp32. Sums run in one order whatever is computed together.
namespace {

constexpr int kDenseAhead = 2048;  // bytes ahead of the reads of each row

// Plain rows times float activations: vectors run along the columns, so nothing needs repacking. Two vectors at
// a time: of bf16 the even and the odd columns, which takes one instruction each; of other kinds one after the other.
constexpr int kDenseStep = 2 * kLanes;

template <int Kind>
ALWAYS_INLINE void load_dense(const uint8_t* row, F32 (&w)[2]) {
    for (int k = 0; k < 2; ++k)
        if constexpr (Kind == 1) w[k] = load_half(row + 2 * k * kLanes);
        else w[k] = in_register(load_float(reinterpret_cast<const float*>(row) + k * kLanes));
}
template <>
ALWAYS_INLINE void load_dense<0>(const uint8_t* row, F32 (&w)[2]) {
    load_bf16_pairs(row, w);
}

// Activations in the order in which weights are loaded, with zeros behind the last column, up to a whole step.
template <int Kind>
void arrange(const float* x, int64_t cols, float* to) {
    for (int64_t c = 0; c < cols; c += kDenseStep) {
        float tail[kDenseStep] = {};
        const float* from = x + c;
        if (c + kDenseStep > cols) {
            __builtin_memcpy(tail, from, sizeof(float) * static_cast<size_t>(cols - c));
            from = tail;
        }
        F32 v[2];
        if constexpr (Kind == 0) load_pairs(from, v);
        else load_dense<2>(reinterpret_cast<const uint8_t*>(from), v);
        for (int k = 0; k < 2; ++k) store(to + c + k * kLanes, v[k]);
    }
}

template <int Kind, int R, int T>
ALWAYS_INLINE void add_columns(const uint8_t* weight, int64_t row_bytes, const float* const* x, int64_t at,
                               F32 (&sums)[R][T]) {
    F32 values[T][2];
    UNROLL for (int t = 0; t < T; ++t) {
        UNROLL for (int k = 0; k < 2; ++k) values[t][k] = load_float(x[t] + at + k * kLanes);
    }
    UNROLL for (int r = 0; r < R; ++r) {
        F32 row[2];
        load_dense<Kind>(weight + r * row_bytes, row);
        UNROLL for (int k = 0; k < 2; ++k) {
            UNROLL for (int t = 0; t < T; ++t) sums[r][t] = fma(row[k], values[t][k], sums[r][t]);
        }
    }
}

// The last columns, fewer than a step. Not inlined: sums would lie in memory.
template <int Kind, int R, int T>
__attribute__((noinline)) void add_last_columns(const uint8_t* weight, int64_t row_bytes, const float* const* x,
                                                int64_t at, int64_t left, F32 (&sums)[R][T]) {
    constexpr size_t kSize = Kind == 2 ? 4 : 2;
    alignas(64) uint8_t rows[R][kDenseStep * kSize] = {};
    for (int r = 0; r < R; ++r) __builtin_memcpy(rows[r], weight + r * row_bytes, kSize * static_cast<size_t>(left));
    add_columns<Kind, R, T>(rows[0], sizeof rows[0], x, at, sums);
}

// R rows, `apart` from one another, and T tokens at a time, arranged. The vectors of a row's sum are added up in one
// order whatever R and T are, so that a token gets the same bits in any company.
template <int Kind, int R, int T>
void dense_block(const uint8_t* weight, int64_t apart, int64_t cols, const float* const* x, float* out,
                 int64_t out_stride) {
    constexpr int kSize = Kind == 2 ? 4 : 2;
    const int64_t row_bytes = kSize * cols * apart;
    F32 sums[R][T];
    UNROLL for (int r = 0; r < R; ++r) { UNROLL for (int t = 0; t < T; ++t) sums[r][t] = zero(); }
    int64_t c = 0;
    for (; c + kDenseStep <= cols; c += kDenseStep) {
        UNROLL for (int r = 0; r < R; ++r) {
            UNROLL for (int k = 0; k < kDenseStep * kSize; k += 64)
                prefetch(weight + r * row_bytes + kSize * c + kDenseAhead + k);
        }
        add_columns<Kind, R, T>(weight + kSize * c, row_bytes, x, c, sums);
    }
    if (c < cols) {
        F32 copies[R][T];
        UNROLL for (int r = 0; r < R; ++r) { UNROLL for (int t = 0; t < T; ++t) copies[r][t] = sums[r][t]; }
        add_last_columns<Kind, R, T>(weight + kSize * c, row_bytes, x, c, cols - c, copies);
        UNROLL for (int r = 0; r < R; ++r) { UNROLL for (int t = 0; t < T; ++t) sums[r][t] = copies[r][t]; }
    }
    UNROLL for (int t = 0; t < T; ++t) {
        if constexpr (R == 4) {
            const F32 four[4] = {sums[0][t], sums[1][t], sums[2][t], sums[3][t]};
            float found[4];
            reduce_four(four, found);
            for (int r = 0; r < R; ++r) out[t * out_stride + r * apart] = found[r];
        } else {
            UNROLL for (int r = 0; r < R; ++r) out[t * out_stride + r * apart] = reduce(sums[r][t]);
        }
    }
}

// Calls visit with as many tokens at a time as a kernel takes, `most` of them at most: a constant, and the first of
// them. Groups are as even as can be: unpacking a weight for one token alone costs most.
template <int Most, class F>
ALWAYS_INLINE void in_even_groups(int64_t tokens, const F& visit) {
    for (int64_t t = 0, n; t < tokens; t += n) {
        const int64_t left = tokens - t, groups = (left + Most - 1) / Most;
        n = (left + groups - 1) / groups;
        if constexpr (Most >= 4)
            if (n == 4) visit(std::integral_constant<int, 4>(), t);
        if constexpr (Most >= 3)
            if (n == 3) visit(std::integral_constant<int, 3>(), t);
        if constexpr (Most >= 2)
            if (n == 2) visit(std::integral_constant<int, 2>(), t);
        if (n == 1) visit(std::integral_constant<int, 1>(), t);
    }
}

template <int Kind, int R>
void dense_tokens(const uint8_t* rows, int64_t apart, int64_t cols, const float* const* x, int64_t tokens, float* out,
                  int64_t stride) {
    static_assert(kDenseTokens <= 4);
    in_even_groups<kDenseTokens>(tokens, [&](auto count, int64_t t) {
        dense_block<Kind, R, count()>(rows, apart, cols, x + t, out + t * stride, stride);
    });
}

// Room for arranged activations; each thread has its own. Not a vector: this file is compiled for one level, and what
// templates of the library become must run on any.
struct Arranged {
    static constexpr int64_t kTokens = 16;
    void* held = nullptr;
    int64_t size = 0;
    float* get(int64_t floats) {
        if (floats > size) {
            __builtin_free(held);
            held = __builtin_malloc(sizeof(float) * static_cast<size_t>(floats) + 64);
            size = floats;
        }
        return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(held) + 63) / 64 * 64);
    }
    ~Arranged() { __builtin_free(held); }
};
thread_local Arranged arranged;

// Rows that are multiplied together are far apart: each is part of a run that goes on with the row behind it, long
// enough for the processor to foresee. Rows side by side would be as many runs that end every few kilobytes.
template <int Kind>
void dense_rows_of(const uint8_t* rows, int64_t n, int64_t cols, const float* const* x, int64_t tokens, float* out,
                   int64_t stride) {
    constexpr int64_t R = kDenseRows, kSize = Kind == 2 ? 4 : 2;
    const int64_t width = (cols + kDenseStep - 1) / kDenseStep * kDenseStep, run = n / R;
    for (int64_t t = 0; t < tokens; t += Arranged::kTokens) {
        const int64_t some = tokens - t < Arranged::kTokens ? tokens - t : Arranged::kTokens;
        const float* xs[Arranged::kTokens];
        if (Kind == 0 || width != cols) {
            float* to = arranged.get(some * width);
            for (int64_t k = 0; k < some; ++k) {
                arrange<Kind>(x[t + k], cols, to + k * width);
                xs[k] = to + k * width;
            }
        } else {
            for (int64_t k = 0; k < some; ++k) xs[k] = x[t + k];
        }
        float* to = out + t * stride;
        for (int64_t r = 0; r < run; ++r)
            dense_tokens<Kind, R>(rows + r * cols * kSize, run, cols, xs, some, to + r, stride);
        for (int64_t r = run * R; r < n; ++r)
            dense_tokens<Kind, 1>(rows + r * cols * kSize, 1, cols, xs, some, to + r, stride);
    }
}

void dense_rows(const void* rows, int64_t n, int kind, int64_t cols, const float* const* x, int64_t tokens, float* out,
                int64_t out_stride) {
    const uint8_t* bytes = static_cast<const uint8_t*>(rows);
    if (kind == 0) dense_rows_of<0>(bytes, n, cols, x, tokens, out, out_stride);
    else if (kind == 1) dense_rows_of<1>(bytes, n, cols, x, tokens, out, out_stride);
    else dense_rows_of<2>(bytes, n, cols, x, tokens, out, out_stride);
}

// Two vectors of a plain row as they were loaded, back in the order of the columns.
template <int Kind>
ALWAYS_INLINE void store_dense(float* to, const F32 (&v)[2]) {
    if constexpr (Kind == 0) store_pairs(to, v);
    else
        for (int k = 0; k < 2; ++k) store(to + k * kLanes, v[k]);
}

// At most kDenseStep * V columns: out [columns] += the sum of n rows, `width` apart, weighted.
template <int Kind, int V>
void add_row_columns(const uint8_t* rows, int64_t width, int64_t n, const float* weights, float* out) {
    constexpr int kSize = Kind == 2 ? 4 : 2;
    F32 sums[V][2];
    for (int v = 0; v < V; ++v) sums[v][0] = sums[v][1] = zero();
    for (int64_t r = 0; r < n; ++r) {
        const F32 weight = splat(weights[r]);
        for (int v = 0; v < V; ++v) {
            F32 row[2];
            const uint8_t* from = rows + kSize * (r * width + v * kDenseStep);
            prefetch(from + kSize * V * kDenseStep);  // what is read next of this row
            load_dense<Kind>(from, row);
            for (int k = 0; k < 2; ++k) sums[v][k] = fma(row[k], weight, sums[v][k]);
        }
    }
    for (int v = 0; v < V; ++v) {
        float found[kDenseStep];
        store_dense<Kind>(found, sums[v]);
        for (int i = 0; i < kDenseStep; ++i) out[v * kDenseStep + i] += found[i];
    }
}

template <int Kind>
void add_rows_of(const uint8_t* rows, int64_t width, int64_t n, const float* weights, int64_t columns, float* out) {
    constexpr int64_t kSize = Kind == 2 ? 4 : 2, V = kSumRegisters > 1 ? 4 : 1, kTogether = V * kDenseStep;
    int64_t c = 0;
    for (; c + kTogether <= columns; c += kTogether)
        add_row_columns<Kind, V>(rows + kSize * c, width, n, weights, out + c);
    for (; c + kDenseStep <= columns; c += kDenseStep)
        add_row_columns<Kind, 1>(rows + kSize * c, width, n, weights, out + c);
    if (c == columns) return;
    const auto left = static_cast<size_t>(columns - c);
    float sums[kDenseStep] = {}, one[kDenseStep] = {};  // the last columns, padded, row by row
    for (int64_t r = 0; r < n; ++r) {
        alignas(64) uint8_t row[kDenseStep * kSize] = {};
        __builtin_memcpy(row, rows + kSize * (r * width + c), kSize * left);
        F32 v[2];
        load_dense<Kind>(row, v);
        store_dense<Kind>(one, v);
        for (size_t i = 0; i < left; ++i) sums[i] += weights[r] * one[i];
    }
    for (size_t i = 0; i < left; ++i) out[c + static_cast<int64_t>(i)] += sums[i];
}

// out [columns] += the sum of n plain rows (kind 0 bf16, 1 fp16, 2 fp32), `width` values apart, weighted.
void add_rows(const void* rows, int kind, int64_t width, int64_t n, const float* weights, int64_t columns, float* out) {
    const uint8_t* bytes = static_cast<const uint8_t*>(rows);
    if (kind == 0) add_rows_of<0>(bytes, width, n, weights, columns, out);
    else if (kind == 1) add_rows_of<1>(bytes, width, n, weights, columns, out);
    else add_rows_of<2>(bytes, width, n, weights, columns, out);
}

}  // namespace
