// Gated DeltaNet: a short convolution, and a state that each token of a sequence changes.
//
// Columns of a state know nothing of each other, and each is computed token by token, along the keys: so a token gets
// the same bits however its prompt was cut and whoever computes what.
namespace {

constexpr int kDeltaVectors = 4;  // of columns, whose sums registers hold

// out [n] = silu of the sum over taps of weights [taps][.] times rows, in that order; there is nothing where a row is
// null.
void convolve(const float* const* rows, const float* weights, int64_t apart, int64_t taps, int64_t n, float* out) {
    for (int64_t d = 0; d < n; ++d) out[d] = 0;
    for (int64_t i = 0; i < taps; ++i) {
        if (rows[i] == nullptr) continue;
        for (int64_t d = 0; d < n; ++d) out[d] += weights[i * apart + d] * rows[i][d];
    }
    for (int64_t d = 0; d < n; ++d) out[d] = out[d] / (1.0f + exp_negative(out[d]));
}

// out [dim] = x as a vector of length `length`; 1e-6 is added to the sum of its squares
void to_length(const float* x, int64_t dim, float length, float* out) {
    F32 sums = zero();
    for (int64_t i = 0; i < dim; i += kLanes) sums = fma(load_float(x + i), load_float(x + i), sums);
    const F32 factor = splat(length / __builtin_sqrtf(reduce(sums) + 1e-6f));
    for (int64_t i = 0; i < dim; i += kLanes) store(out + i, mul(load_float(x + i), factor));
}

// What a pass over columns of a state does: it ends a token, begins the next one, or both.
template <int N>
struct DeltaPass {
    const float *k, *q;  // of the token that ends, if any
    F32 change[N];
    const float* next_k;  // of the one that begins, if any
    F32 decay;
    F32 out[N], known[N];  // what the first one gets, and what the state, decayed, has for the second one's key

    template <bool Ends, bool Begins>
    ALWAYS_INLINE void run(float* state, int64_t apart, int64_t key_dim) {
        for (int j = 0; j < N; ++j) out[j] = known[j] = zero();
        for (int64_t i = 0; i < key_dim; ++i)
            for (int j = 0; j < N; ++j) {
                float* at = state + i * apart + j * kLanes;
                F32 held = load_float(at);
                if (Ends) {
                    held = fma(change[j], splat(k[i]), held);
                    out[j] = fma(held, splat(q[i]), out[j]);
                }
                if (Begins) {
                    held = mul(held, decay);
                    known[j] = fma(held, splat(next_k[i]), known[j]);
                }
                store(at, held);
            }
    }
};

// N vectors of columns from `first` on, which stay in the first-level cache from token to token.
template <int N>
void delta_vectors(const DeltaColumns& call, int64_t first) {
    alignas(64) float q[kMostKeyDim], keys[2][kMostKeyDim];
    DeltaPass<N> pass{};
    pass.q = q;
    float* state = call.state + first;
    for (int64_t t = 0; t <= call.tokens; ++t) {
        const bool begins = t < call.tokens;
        pass.k = keys[(t + 1) % 2];
        pass.next_k = keys[t % 2];
        if (begins) {
            to_length(call.k + t * call.apart, call.key_dim, 1, keys[t % 2]);
            pass.decay = splat(call.decay[t * call.heads]);
        }
        if (t > 0) to_length(call.q + (t - 1) * call.apart, call.key_dim, call.scale, q);
        if (t == 0) pass.template run<false, true>(state, call.state_apart, call.key_dim);
        else if (begins) pass.template run<true, true>(state, call.state_apart, call.key_dim);
        else pass.template run<true, false>(state, call.state_apart, call.key_dim);
        for (int j = 0; j < N && t > 0; ++j)
            store(call.out + (t - 1) * call.out_apart + first + j * kLanes, pass.out[j]);
        for (int j = 0; j < N && begins; ++j) {
            const F32 missing = fma(pass.known[j], splat(-1), load_float(call.v + t * call.apart + first + j * kLanes));
            pass.change[j] = mul(missing, splat(call.beta[t * call.heads]));
        }
    }
}

void delta_columns(const DeltaColumns& call) {
    int64_t first = 0;
    for (; first + kDeltaVectors * kLanes <= call.columns; first += kDeltaVectors * kLanes)
        delta_vectors<kDeltaVectors>(call, first);
    for (; first < call.columns; first += kLanes) delta_vectors<1>(call, first);
}

}  // namespace
