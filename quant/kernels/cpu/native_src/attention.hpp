// Attention and index scores: rows of queries over lists of keys.
//
// A score is summed along the columns, a weighted value along the keys, each in one order whatever rows are computed
// together: so a query gets the same bits in any company, and however its prompt was cut.
namespace {

// The vectors of a row's values that are summed at a time.
constexpr int kValueVectors = kLanes == 16 && kSumRegisters > 16 ? 4 : 2;

// scores [R][kKeyBlock]: products of R queries and n keys of `dim` columns, a multiple of kBlock / 2.
template <int R>
void score_rows(const float* const* q, const float* const* keys, int64_t n, int64_t dim, float* scores) {
    constexpr int K = kDenseRows;
    for (int64_t k = 0; k < n; k += K) {
        const float* key[K];
        for (int i = 0; i < K; ++i) key[i] = keys[k + i < n ? k + i : n - 1];
        F32 sums[K][R];
        for (int i = 0; i < K; ++i)
            for (int r = 0; r < R; ++r) sums[i][r] = zero();
        for (int64_t d = 0; d < dim; d += kLanes) {
            F32 x[R];
            for (int r = 0; r < R; ++r) x[r] = load_float(q[r] + d);
            for (int i = 0; i < K; ++i) {
                const F32 w = load_float(key[i] + d);
                for (int r = 0; r < R; ++r) sums[i][r] = fma(w, x[r], sums[i][r]);
            }
        }
        for (int r = 0; r < R; ++r) {
            F32 of_row[K];
            for (int i = 0; i < K; ++i) of_row[i] = sums[i][r];
            store_sums(scores + r * kKeyBlock + k, of_row);  // behind the n-th, what nobody reads
        }
    }
}

template <int R, int V>
void value_columns(const float* weights, const float* const* values, int64_t n, int64_t d, float* const* out) {
    F32 sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < V; ++j) sums[r][j] = zero();
    for (int64_t k = 0; k < n; ++k) {
        F32 v[V];
        for (int j = 0; j < V; ++j) v[j] = load_float(values[k] + d + j * kLanes);
        for (int r = 0; r < R; ++r) {
            const F32 w = splat(weights[r * kKeyBlock + k]);
            for (int j = 0; j < V; ++j) sums[r][j] = fma(v[j], w, sums[r][j]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < V; ++j) store(out[r] + d + j * kLanes, sums[r][j]);
}

// out [R][dim]: the sum of n values, weighted.
template <int R>
void value_rows(const float* weights, const float* const* values, int64_t n, int64_t dim, float* const* out) {
    constexpr int64_t kTogether = kValueVectors * kLanes;
    int64_t d = 0;
    for (; d + kTogether <= dim; d += kTogether) value_columns<R, kValueVectors>(weights, values, n, d, out);
    for (; d < dim; d += kLanes) value_columns<R, 1>(weights, values, n, d, out);
}

// Calls visit with as many rows at a time as a kernel takes: a constant, and the first of them.
template <class F>
void in_groups(int rows, const F& visit) {
    int r = 0;
    if constexpr (kDenseTokens >= 4)
        for (; r + 4 <= rows; r += 4) visit(std::integral_constant<int, 4>(), r);
    for (; r + 2 <= rows; r += 2) visit(std::integral_constant<int, 2>(), r);
    for (; r < rows; ++r) visit(std::integral_constant<int, 1>(), r);
}

// scores [kKeyBlock] to e^(score - the largest), zero from `seen` on; what the largest is, and the sum.
void to_weights(float* scores, int64_t seen, float scale, float* most, float* sum) {
    constexpr int kSide = 16;
    float lanes[kSide];
    for (int i = 0; i < kSide; ++i) lanes[i] = -__builtin_inff();
    for (int64_t k = 0; k < kKeyBlock; ++k) scores[k] = k < seen ? scores[k] * scale : -__builtin_inff();
    for (int64_t k = 0; k < kKeyBlock; k += kSide)
        for (int i = 0; i < kSide; ++i) lanes[i] = scores[k + i] > lanes[i] ? scores[k + i] : lanes[i];
    float largest = lanes[0];
    for (int i = 1; i < kSide; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    for (int64_t k = 0; k < kKeyBlock; ++k) scores[k] = k < seen ? exp_negative(largest - scores[k]) : 0.0f;
    for (int i = 0; i < kSide; ++i) lanes[i] = 0;
    for (int64_t k = 0; k < kKeyBlock; k += kSide)
        for (int i = 0; i < kSide; ++i) lanes[i] += scores[k + i];
    for (int width = kSide / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    *most = largest;
    *sum = lanes[0];
}

// A block of keys for some rows, each of which sees the first `seen` of them.
void attend_block(const AttendBlock& block) {
    alignas(64) float scores[kMostRows * kKeyBlock];
    in_groups(block.rows, [&](auto count, int r) {
        score_rows<count()>(block.q + r, block.keys, block.n, block.dim, scores + r * kKeyBlock);
    });
    for (int r = 0; r < block.rows; ++r)
        to_weights(scores + r * kKeyBlock, block.seen[r], block.scale, block.most + r, block.sum + r);
    in_groups(block.rows, [&](auto count, int r) {
        value_rows<count()>(scores + r * kKeyBlock, block.values, block.n, block.value_dim, block.out + r);
    });
}

// out [n] = the sum over heads of weight * max(query . key, 0); queries side by side.
void index_block(const float* q, int heads, const float* weights, const float* const* keys, int64_t n, int64_t dim,
                 float* out) {
    float scores[4 * kKeyBlock];
    for (int64_t k = 0; k < n; ++k) out[k] = 0;
    in_groups(heads, [&](auto count, int h) {
        const float* rows[count()];
        for (int r = 0; r < count(); ++r) rows[r] = q + (h + r) * dim;
        score_rows<count()>(rows, keys, n, dim, scores);
        for (int r = 0; r < count(); ++r)
            for (int64_t k = 0; k < n; ++k) {
                const float score = scores[r * kKeyBlock + k];
                out[k] += weights[h + r] * (score > 0 ? score : score != score ? score : 0.0f);
            }
    });
}

}  // namespace
