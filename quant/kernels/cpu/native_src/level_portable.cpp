#include "kernels.hpp"

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNROLL  // the vectors are already split in four
// Stops the compiler from loading now what is used later: it would run out of registers.
#define KEEP_ORDER asm volatile("" ::: "memory")

namespace loci {
#include "simd_portable.hpp"
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

extern const Level kPortable = make_level("portable");

}  // namespace loci
