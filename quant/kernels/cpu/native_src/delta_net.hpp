// Gated DeltaNet: a short convolution, and a state that each token of a sequence changes.
//
// Columns of a state know nothing of each other, and each is computed token by token, along the keys: so a token gets
// the same bits however its prompt was cut and whoever computes what.
namespace {

constexpr int kSide = 16;
typedef float Side __attribute__((vector_size(4 * kSide)));

ALWAYS_INLINE Side load_side(const float* x) {
    Side side;
    __builtin_memcpy(&side, x, sizeof side);
    return side;
}
ALWAYS_INLINE void store_side(float* x, Side side) { __builtin_memcpy(x, &side, sizeof side); }

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
    Side sums = {};
    for (int64_t i = 0; i < dim; i += kSide) sums += load_side(x + i) * load_side(x + i);
    float sum = 0;
    for (int i = 0; i < kSide; ++i) sum += sums[i];
    const float factor = length / __builtin_sqrtf(sum + 1e-6f);
    for (int64_t i = 0; i < dim; i += kSide) store_side(out + i, load_side(x + i) * factor);
}

// N times kSide columns of a head's state, which stay in the first-level cache from token to token.
template <int N>
void delta_columns(const DeltaColumns& call) {
    alignas(64) float q[kMostKeyDim], k[kMostKeyDim];
    for (int64_t t = 0; t < call.tokens; ++t) {
        to_length(call.q + t * call.apart, call.key_dim, call.scale, q);
        to_length(call.k + t * call.apart, call.key_dim, 1, k);
        const float decay = call.decay[t * call.heads], beta = call.beta[t * call.heads];
        Side known[N] = {};  // what the state, decayed, has for the key
        for (int64_t i = 0; i < call.key_dim; ++i)
            for (int j = 0; j < N; ++j) {
                float* at = call.state + i * call.state_apart + j * kSide;
                const Side held = load_side(at) * decay;
                store_side(at, held);
                known[j] += held * k[i];
            }
        Side change[N], sums[N] = {};
        for (int j = 0; j < N; ++j) change[j] = (load_side(call.v + t * call.apart + j * kSide) - known[j]) * beta;
        for (int64_t i = 0; i < call.key_dim; ++i)
            for (int j = 0; j < N; ++j) {
                float* at = call.state + i * call.state_apart + j * kSide;
                const Side held = load_side(at) + change[j] * k[i];
                store_side(at, held);
                sums[j] += held * q[i];
            }
        for (int j = 0; j < N; ++j) store_side(call.out + t * call.out_apart + j * kSide, sums[j]);
    }
}

void delta_columns(const DeltaColumns& call) {
    switch (call.columns / kSide) {
        case 4: return delta_columns<4>(call);
        case 3: return delta_columns<3>(call);
        case 2: return delta_columns<2>(call);
        default: return delta_columns<1>(call);
    }
}

}  // namespace
