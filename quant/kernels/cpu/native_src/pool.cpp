#include "pool.hpp"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif

namespace loci {
namespace {

using Clock = std::chrono::steady_clock;

// How long a worker watches for the next call before it sleeps. A decode step makes its calls some tens of
// microseconds apart, and waking a sleeper takes about as long as a small product.
constexpr std::chrono::microseconds kWatch{100};
// How long a caller waits for the last items of others before it lets another thread have its core.
constexpr std::chrono::microseconds kPatience{20};

void pause_briefly() {
    for (int i = 0; i < 16; ++i) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
}

int this_core() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

// How many cores this thread may run on, where the system tells.
int cores_allowed() {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    return detail::kMostThreads;
}

// Linux may wake a thread on the core of the thread that wakes it, where it waits for its turn while another core is
// idle: on two cores, products of a millisecond were computed by one thread most of the time. So a worker may run on
// any core of the caller's but the caller's own.
void keep_off(pthread_t worker, int core) {
#if defined(__linux__)
    cpu_set_t others;
    if (core < 0 || sched_getaffinity(0, sizeof others, &others) != 0) return;
    CPU_CLR(static_cast<size_t>(core), &others);
    if (CPU_COUNT(&others) > 0) pthread_setaffinity_np(worker, sizeof others, &others);
#else
    (void)worker, (void)core;
#endif
}

// One job at a time. A worker enters it if it comes while the job is open; the caller, when nothing is left to do,
// closes it and waits for those inside alone. So a worker that is late, because another program has its core or it was
// asleep, costs nobody anything.
class Pool {
  public:
    static Pool& shared() {
        static Pool* pool = new Pool;  // never deleted: its threads run until the process ends
        return *pool;
    }

    void run(void (*fn)(void*, int), void* data, int threads) {
        std::unique_lock<std::mutex> turn(running_, std::try_to_lock);
        if (!turn.owns_lock() || forked_) return fn(data, 0);  // others are computing: their cores are taken
        gather(threads - 1);
        Job job{fn, data, threads};
        open_.store(&job);
        calls_.fetch_add(1);
        if (asleep_.load() > 0) {
            { std::lock_guard<std::mutex> lock(sleeping_); }
            called_.notify_all();
        }
        fn(data, 0);
        open_.store(nullptr);
        const Clock::time_point start = Clock::now();
        for (bool patient = true; inside_.load() > 0;) {
            if (patient) pause_briefly();
            else std::this_thread::yield();
            patient = patient && Clock::now() - start < kPatience;
        }
    }

  private:
    struct Job {
        void (*fn)(void*, int);
        void* data;
        int threads;
    };

    Pool() {
        pthread_atfork(nullptr, nullptr, [] { shared().forked_ = true; });  // a child has no workers
    }

    // Sees to it that there are so many workers, on other cores than this one.
    void gather(int count) {
        const int core = this_core();
        if (core == core_ && static_cast<int>(workers_.size()) >= count) return;
        if (core != core_ || workers_.empty()) most_workers_ = cores_allowed() - 1;
        while (static_cast<int>(workers_.size()) < std::min(count, most_workers_)) {
            workers_.emplace_back([this, number = static_cast<int>(workers_.size()) + 1] { serve(number); });
            keep_off(workers_.back().native_handle(), core);
        }
        if (core != core_)
            for (std::thread& worker : workers_) keep_off(worker.native_handle(), core);
        core_ = core;
    }

    void serve(int number) {
        for (uint64_t seen = 0;;) {
            seen = next_call(seen);
            inside_.fetch_add(1);
            Job* job = open_.load();
            if (job && number < job->threads) job->fn(job->data, number);
            inside_.fetch_sub(1);
        }
    }

    // Returns when there was a call after `seen`.
    uint64_t next_call(uint64_t seen) {
        const Clock::time_point start = Clock::now();
        while (Clock::now() - start < kWatch) {
            for (int i = 0; i < 8; ++i) {
                const uint64_t now = calls_.load(std::memory_order_acquire);
                if (now != seen) return now;
                pause_briefly();
            }
            std::this_thread::yield();  // to whoever has more to do
        }
        std::unique_lock<std::mutex> lock(sleeping_);
        asleep_.fetch_add(1);
        called_.wait(lock, [&] { return calls_.load() != seen; });
        asleep_.fetch_sub(1);
        return calls_.load();
    }

    std::mutex running_;  // held by the caller whose job it is
    std::vector<std::thread> workers_;
    int most_workers_ = 0;
    int core_ = -1;  // where the last caller ran
    bool forked_ = false;
    alignas(64) std::atomic<Job*> open_{nullptr};
    std::atomic<int> inside_{0};
    alignas(64) std::atomic<uint64_t> calls_{0};
    alignas(64) std::atomic<int> asleep_{0};
    std::mutex sleeping_;
    std::condition_variable called_;
};

}  // namespace

void detail::run_team(void (*fn)(void*, int), void* data, int threads) { Pool::shared().run(fn, data, threads); }

}  // namespace loci
