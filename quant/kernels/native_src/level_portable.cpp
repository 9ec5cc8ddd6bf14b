#include "kernels.hpp"

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNROLL  // the vectors are already split in four

namespace loci {
namespace {
constexpr int kMaxLog2 = 1;  // tokens that the registers of this level hold
}
#include "simd_portable.hpp"
#include "formats.hpp"
#include "panels.hpp"
#include "digits.hpp"
#include "level.hpp"

extern const Level kPortable = make_level("portable");

}  // namespace loci
