#include "pool.hpp"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
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

// Linux likes to wake a thread on the core of the thread that wakes it, and on a machine whose cores are all busy
// it may stay there: two threads then take turns on one core while another is idle. False where there is no other.
bool leave_core(int core) {
#if defined(__linux__)
    cpu_set_t allowed, others;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return false;
    others = allowed;
    CPU_CLR(static_cast<size_t>(core), &others);
    if (sched_setaffinity(0, sizeof others, &others) != 0) return false;  // moves at once
    return sched_setaffinity(0, sizeof allowed, &allowed) == 0;
#else
    (void)core;
    return false;
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

    void run(void (*fn)(void*), void* data, int threads) {
        std::unique_lock<std::mutex> turn(running_, std::try_to_lock);
        if (!turn.owns_lock() || forked_) return fn(data);  // others are computing: their cores are taken
        while (workers_ < threads - 1) {
            std::thread([this] { serve(); }).detach();
            ++workers_;
        }
        Job job{fn, data, {threads - 1}};
        core_.store(this_core(), std::memory_order_relaxed);
        open_.store(&job);
        calls_.fetch_add(1);
        if (asleep_.load() > 0) {
            { std::lock_guard<std::mutex> lock(sleeping_); }
            called_.notify_all();
        }
        fn(data);
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
        void (*fn)(void*);
        void* data;
        std::atomic<int> places;  // for workers
    };

    Pool() {
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, [] { shared().forked_ = true; });  // a child has no workers
#endif
    }

    void serve() {
        for (uint64_t seen = 0;;) {
            seen = next_call(seen);
            if (this_core() == core_.load(std::memory_order_relaxed)) leave_core(this_core());
            inside_.fetch_add(1);
            Job* job = open_.load();
            if (job && job->places.fetch_sub(1) > 0) job->fn(job->data);
            inside_.fetch_sub(1);
        }
    }

    // Returns when there was a call after `seen`.
    uint64_t next_call(uint64_t seen) {
        const Clock::time_point start = Clock::now();
        while (this_core() != core_.load(std::memory_order_relaxed) && Clock::now() - start < kWatch) {
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
    int workers_ = 0;
    bool forked_ = false;
    alignas(64) std::atomic<Job*> open_{nullptr};
    std::atomic<int> inside_{0};
    alignas(64) std::atomic<uint64_t> calls_{0};
    std::atomic<int> core_{-1};  // where the last caller runs
    alignas(64) std::atomic<int> asleep_{0};
    std::mutex sleeping_;
    std::condition_variable called_;
};

}  // namespace

void detail::run_team(void (*fn)(void*), void* data, int threads) { Pool::shared().run(fn, data, threads); }

}  // namespace loci
