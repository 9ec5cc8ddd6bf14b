#include "kernels.hpp"
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
// Stops the compiler from loading now what is used later: it would run out of registers.
#define KEEP_ORDER asm volatile("" ::: "memory")

namespace loci {
#include "simd_avx2.hpp"
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

extern const Level kAvx2 = make_level("avx2");

}  // namespace loci

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
