// Work shared among a pool of threads that no caller ever waits for without need.
#pragma once
#include <atomic>
#include <cstdint>

namespace loci {
namespace detail {
// Calls fn(data) on this thread and on up to `threads` - 1 others that come before this one is done with it.
void run_team(void (*fn)(void*), void* data, int threads);

constexpr int kMostThreads = 256;

template <class F>
struct Team {
    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    };
    const F& fn;
    const int threads;
    std::atomic<int> arrived{0};
    Share shares[kMostThreads];

    Team(const F& f, int64_t items, int count) : fn(f), threads(count) {
        for (int i = 0; i < threads; ++i) {
            shares[i].next = items * i / threads;
            shares[i].end = items * (i + 1) / threads;
        }
    }
    // Works through a share of its own, then helps with the others.
    static void work(void* self) {
        Team& team = *static_cast<Team*>(self);
        const int mine = team.arrived.fetch_add(1);
        for (int k = 0; k < team.threads; ++k) {
            Share& share = team.shares[(mine + k) % team.threads];
            for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) team.fn(i);
        }
    }
};
}  // namespace detail

// Calls fn(0) .. fn(items - 1), each once, from up to `threads` threads. A thread takes items that follow each
// other as long as there are, so that it reads memory in sequence. Each item must write only what is its own:
// then results do not depend on who computes what.
template <class F>
void parallel_for(int64_t items, int threads, const F& fn) {
    if (threads > items) threads = static_cast<int>(items);
    if (threads > detail::kMostThreads) threads = detail::kMostThreads;
    if (threads <= 1) {
        for (int64_t i = 0; i < items; ++i) fn(i);
        return;
    }
    detail::Team<F> team(fn, items, threads);
    detail::run_team(&detail::Team<F>::work, &team, threads);
}

}  // namespace loci
