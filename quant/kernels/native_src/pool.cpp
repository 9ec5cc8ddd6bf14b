#include "pool.hpp"

#include <dlfcn.h>

namespace loci {
namespace {

// torch loads its OpenMP runtime globally. Entering that runtime, instead of bringing a second one or
// threads of our own, means that its workers, which spin for a while after each torch operation, are the
// ones that work for us: two pools on the same cores would take turns (docs/kernels.md has figures).
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel gomp_parallel() {
    static const auto entry = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return entry;
}

}  // namespace

bool has_pool() { return gomp_parallel() != nullptr; }

void detail::run_team(void (*fn)(void*), void* data, int threads) {
    if (GompParallel parallel = gomp_parallel()) {
        parallel(fn, data, static_cast<unsigned>(threads), 0);
    } else {
        fn(data);
    }
}

}  // namespace loci
