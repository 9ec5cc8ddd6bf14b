// The kernel table of one level; included by level_*.cpp after the level's vector operations.
namespace {

template <class Format, int D, int Log2>
constexpr PanelKernel integer_kernel() {
    if constexpr ((D << Log2) <= kMostSums) return integer_panel<Format, 1 << Log2, D>;
    else return nullptr;
}

template <int Log2>
constexpr PanelKernel fp8_kernel() {
    if constexpr ((4 << Log2) <= kMostSums) return fp8_panel<1 << Log2>;
    else return nullptr;
}

template <int Log2>
constexpr void add_panels(Level& level) {
    level.panel[kMxfp4][0][Log2] = integer_kernel<Mxfp4, 3, Log2>();
    level.panel[kMxfp4][1][Log2] = integer_kernel<Mxfp4, 1, Log2>();
    level.panel[kQ4_0][0][Log2] = integer_kernel<Q4_0, 3, Log2>();
    level.panel[kQ4_0][1][Log2] = integer_kernel<Q4_0, 1, Log2>();
    level.panel[kQ4_1][0][Log2] = integer_kernel<Q4_1, 3, Log2>();
    level.panel[kQ4_1][1][Log2] = integer_kernel<Q4_1, 1, Log2>();
    // eight and six bits stay exact in int8 mode: whole digits would overflow the 16-bit sums of AVX2
    level.panel[kQ8_0][0][Log2] = integer_kernel<Q8_0, 3, Log2>();
    level.panel[kQ6_K][0][Log2] = integer_kernel<Q6_K, 3, Log2>();
    level.panel[kNf4][0][Log2] = integer_kernel<Nf4, 3, Log2>();
    level.panel[kNf4][1][Log2] = integer_kernel<Nf4, 1, Log2>();
    level.panel[kInt4][0][Log2] = integer_kernel<Int4<false>, 3, Log2>();
    level.panel[kInt4][1][Log2] = integer_kernel<Int4<false>, 1, Log2>();
    level.panel[kInt4Offset][0][Log2] = integer_kernel<Int4<true>, 3, Log2>();
    level.panel[kInt4Offset][1][Log2] = integer_kernel<Int4<true>, 1, Log2>();
    level.panel[kFp8][0][Log2] = fp8_kernel<Log2>();
}

constexpr Level make_level(const char* name) {
    Level level{};
    level.name = name;
    add_panels<0>(level);
    add_panels<1>(level);
    add_panels<2>(level);
    add_panels<3>(level);
    level.digits3 = to_digits<3>;
    level.digits1 = to_digits<1>;
    level.swiglu = swiglu;
    level.dense_rows = dense_rows;
    level.fp8_row = fp8_row;
    level.read = read_bytes;
    return level;
}

}  // namespace
