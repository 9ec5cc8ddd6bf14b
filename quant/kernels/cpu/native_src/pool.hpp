// Work shared among a pool of threads that no caller ever waits for without need.
#pragma once
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace loci {

// One item for a thread, and the one it is to take next: -1 behind the last of its share.
struct Turn {
    int64_t item, next;
    int share;  // whose it is: a thread's number, the caller's is 0
};

// Memory that a thread is about to read.
struct Span {
    const uint8_t* begin = nullptr;
    int64_t bytes = 0;
};

// While one lives, the threads belong to its creator, who need not ask for them at each call. Inside another one, or
// while others compute, it does nothing.
class Threads {
  public:
    Threads();
    ~Threads();
    Threads(const Threads&) = delete;

  private:
    bool held_;
};

namespace detail {
// Calls fn(data, number) on this thread, number 0, and on up to `threads` - 1 others that come before it is done.
void run_team(void (*fn)(void*, int), void* data, int threads);
// What this thread asks for while it waits.
void ask_later(const Span& span);

constexpr int kMostThreads = 256;

template <class F>
void call(const F& fn, const Turn& turn) {
    if constexpr (std::is_invocable_v<const F&, Turn>) fn(turn);
    else fn(turn.item);
}

struct NothingAhead {
    Span operator()(int) const { return {}; }
};

template <class F, class Ahead>
struct Team {
    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    };
    const F& fn;
    const Ahead& ahead;
    const int threads;
    Share shares[kMostThreads];

    Team(const F& f, const Ahead& a, int64_t items, int count) : fn(f), ahead(a), threads(count) {
        for (int i = 0; i < threads; ++i) {
            shares[i].next = items * i / threads;
            shares[i].end = items * (i + 1) / threads;
        }
    }
    // Works through a share of its own, then helps with the others.
    static void work(void* self, int number) {
        Team& team = *static_cast<Team*>(self);
        for (int k = 0; k < team.threads; ++k) {
            const int share = (number + k) % team.threads;
            std::atomic<int64_t>& next = team.shares[share].next;
            const int64_t end = team.shares[share].end;
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < end;)
                call(team.fn, {i, i + 1 < end ? i + 1 : -1, share});
            if (k == 0) ask_later(team.ahead(number));
        }
    }
};
}  // namespace detail

// Calls fn with items 0 .. items - 1, or with turns, each once, from up to `threads` threads. A thread takes items that
// follow each other as long as there are, so that it reads memory in sequence; the same share of as many items in every
// call. Each item must write only what is its own: then results do not depend on who computes what. ahead(number) is
// what thread `number` will read in the call after this one.
template <class F, class Ahead = detail::NothingAhead>
void parallel_for(int64_t items, int threads, const F& fn, const Ahead& ahead = {}) {
    if (threads > items) threads = static_cast<int>(items);
    if (threads > detail::kMostThreads) threads = detail::kMostThreads;
    if (threads <= 1) {
        for (int64_t i = 0; i < items; ++i) detail::call(fn, {i, i + 1 < items ? i + 1 : -1, 0});
        return;
    }
    detail::Team<F, Ahead> team(fn, ahead, items, threads);
    detail::run_team(&detail::Team<F, Ahead>::work, &team, threads);
}

}  // namespace loci
