// Work shared among the threads of the OpenMP pool that torch already runs.
#pragma once
#include <atomic>
#include <cstdint>

namespace loci {

// Whether the process has an OpenMP runtime to share; without one everything runs on the calling thread.
bool has_pool();

namespace detail {
void run_team(void (*fn)(void*), void* data, int threads);

template <class F>
struct Team {
    const F& fn;
    const int64_t items;
    std::atomic<int64_t> next{0};
    static void work(void* self) {
        Team& team = *static_cast<Team*>(self);
        for (int64_t i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.items;) team.fn(i);
    }
};
}  // namespace detail

// Calls fn(0) .. fn(items - 1), each once, from up to `threads` threads in any order. Each item must
// write only what is its own, so that results do not depend on who computes what.
template <class F>
void parallel_for(int64_t items, int threads, const F& fn) {
    if (threads <= 1 || items <= 1) {
        for (int64_t i = 0; i < items; ++i) fn(i);
        return;
    }
    detail::Team<F> team{fn, items};
    detail::run_team(&detail::Team<F>::work, &team, static_cast<int>(items < threads ? items : threads));
}

}  // namespace loci
