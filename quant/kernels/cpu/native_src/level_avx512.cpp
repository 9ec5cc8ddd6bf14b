#include "kernels.hpp"
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c")
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
// Stops the compiler from loading now what is used later: it would run out of registers.
#define KEEP_ORDER asm volatile("" ::: "memory")

namespace loci {
#include "simd_avx512.hpp"
#include "formats.hpp"
#include "formats_gguf.hpp"
#include "panels.hpp"
#include "plain_rows.hpp"
#include "fp8_tiles.hpp"
#include "digits.hpp"
#include "attention.hpp"
#include "rows.hpp"
#include "row_codes.hpp"
#include "index_codes.hpp"
#include "delta_net.hpp"
#include "level.hpp"

extern const Level kAvx512 = make_level("avx512");

}  // namespace loci

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
