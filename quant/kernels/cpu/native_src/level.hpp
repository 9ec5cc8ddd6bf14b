// The kernel table of one level; included by level_*.cpp after the level's vector operations.
namespace {

template <class Format, int D, int T>
constexpr PanelKernel integer_kernel() {
    if constexpr (D * T <= kMostSums) return integer_panel<Format, T, D>;
    else return nullptr;
}

template <int T>
constexpr PanelKernel fp8_kernel() {
    if constexpr (T <= kMostFp8Tokens) return fp8_panel<T>;
    else return nullptr;
}

template <class Format, int D>
constexpr void add_integer(Level& level, int number) {
    PanelKernel* kernels = level.panel[number][D == 1];
    kernels[0] = integer_kernel<Format, D, 1>();
    kernels[1] = integer_kernel<Format, D, 2>();
    kernels[3] = integer_kernel<Format, D, 4>();
    kernels[7] = integer_kernel<Format, D, 8>();
}

constexpr void add_fp8(Level& level) {
    PanelKernel* kernels = level.panel[kFp8][0];
    kernels[0] = fp8_kernel<1>();
    kernels[1] = fp8_kernel<2>();
    kernels[2] = fp8_kernel<3>();
    kernels[3] = fp8_kernel<4>();
}

constexpr Level make_level(const char* name) {
    Level level{};
    level.name = name;
    add_fp8(level);
    level.fp8_many = fp8_many;
    add_integer<Mxfp4, 3>(level, kMxfp4);
    add_integer<Mxfp4, 1>(level, kMxfp4);
    add_integer<Nf4, 3>(level, kNf4);
    add_integer<Nf4, 1>(level, kNf4);
    add_integer<Mxfp4, 3>(level, kMxfp4Blocks);
    add_integer<Mxfp4, 1>(level, kMxfp4Blocks);
    add_integer<Int4<Bf16, false>, 3>(level, kInt4);
    add_integer<Int4<Bf16, false>, 1>(level, kInt4);
    add_integer<Int4<Bf16, true>, 3>(level, kInt4Offset);
    add_integer<Int4<Bf16, true>, 1>(level, kInt4Offset);
    add_integer<Q4_0, 3>(level, kQ4_0);
    add_integer<Q4_0, 1>(level, kQ4_0);
    add_integer<Q4_1, 3>(level, kQ4_1);
    add_integer<Q4_1, 1>(level, kQ4_1);
    // these stay exact in int8 mode: whole digits of eight and six bits would overflow the 16-bit sums of AVX2
    add_integer<Q8_0, 3>(level, kQ8_0);
    add_integer<Q5_0, 3>(level, kQ5_0);
    add_integer<Q5_1, 3>(level, kQ5_1);
    add_integer<Q2_K, 3>(level, kQ2_K);
    add_integer<Q3_K, 3>(level, kQ3_K);
    add_integer<Q4_K, 3>(level, kQ4_K);
    add_integer<Q5_K, 3>(level, kQ5_K);
    add_integer<Q6_K, 3>(level, kQ6_K);
    add_integer<Iq4Nl, 3>(level, kIq4Nl);
    add_integer<Iq4Xs, 3>(level, kIq4Xs);
    add_integer<Int4<Half, false>, 3>(level, kInt4Half);
    add_integer<Int4<Single, true>, 3>(level, kInt4OffsetFloat);
    add_integer<Nvfp4, 3>(level, kNvfp4);
    level.digits3 = to_digits<3>;
    level.digits1 = to_digits<1>;
    level.swiglu = swiglu;
    level.dense_rows = dense_rows;
    level.add_rows = add_rows;
    level.fp8_row = fp8_row;
    level.attend_block = attend_block;
    level.index_block = index_block;
    level.index_codes = index_codes;
    level.sum_parts = sum_parts;
    level.normalise = normalise;
    level.sigmoid = sigmoid;
    level.rotate = rotate;
    level.pool_group = pool_group;
    level.gate_sums = gate_sums;
    level.convolve = convolve;
    level.delta_columns = delta_columns;
    level.largest_value = largest_value;
    level.exponentials = exponentials;
    level.masked = masked;
    level.decode_row = decode_row;
    level.encode_row = encode_row;
    level.hadamard = hadamard;
    level.read = read_bytes;
    level.read_rows = read_rows;
    return level;
}

}  // namespace
