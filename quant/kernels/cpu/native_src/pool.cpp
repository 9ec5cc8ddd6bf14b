#include "pool.hpp"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#include <time.h>
#endif

namespace loci {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

// How long a worker watches for the next call before it sleeps. A decode step makes its calls some tens of
// microseconds apart, and waking a sleeper takes about as long as a small product.
constexpr microseconds kWatch{100};
// How long a thread waits before it lets another have its core.
constexpr microseconds kPatience{20};
// How long a caller waits for a worker before it looks whether that one is running at all.
constexpr microseconds kSuspicion{300};
// How long a worker stays away that mostly made its caller wait: at first, then twice as long each time, until it has
// been of use for a while.
constexpr milliseconds kFirstRest{10}, kLongestRest{1000};

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
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

// How long a thread has been running, where the system tells.
bool running_time(pthread_t thread, Clock::duration* time) {
#if defined(__linux__)
    clockid_t clock;
    timespec now;
    if (pthread_getcpuclockid(thread, &clock) != 0 || clock_gettime(clock, &now) != 0) return false;
    *time = std::chrono::seconds(now.tv_sec) + std::chrono::nanoseconds(now.tv_nsec);
    return true;
#else
    (void)thread, (void)time;
    return false;
#endif
}

thread_local Span to_ask;                 // for while this thread waits
thread_local bool holds_threads = false;  // this thread is the pool's caller

// Something small and useful to do while waiting.
void ask_for_a_line() {
    if (to_ask.bytes <= 0) return pause();
    __builtin_prefetch(to_ask.begin, 0, 2);
    to_ask.begin += 64;
    to_ask.bytes -= 64;
}

// One job at a time. A worker enters it if it comes while the job is open; the caller, when nothing is left to do,
// closes it and waits for those inside alone. So a worker that is late, because another program has its core or it was
// asleep, costs nobody anything. One that loses its core inside a job does cost the caller time; it then rests.
class Pool {
  public:
    static Pool& shared() {
        static Pool* pool = new Pool;  // never deleted: its threads run until the process ends
        return *pool;
    }

    // Whether the threads are this thread's from now on; not while others are computing: their cores are taken.
    bool hold() {
        if (holds_threads || forked_ || !running_.try_lock()) return false;
        return holds_threads = true;
    }
    void release() {
        holds_threads = false;
        running_.unlock();
    }

    // For the thread that holds them.
    void run(void (*fn)(void*, int), void* data, int threads) {
        if (open_.load(std::memory_order_relaxed)) return fn(data, 0);  // within a call
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
        for (const auto& worker : workers_)
            if (worker->inside.load()) wait_for(*worker);
    }

  private:
    struct Job {
        void (*fn)(void*, int);
        void* data;
        int threads;
    };

    struct alignas(64) Worker {
        std::atomic<bool> inside{false};
        std::atomic<int64_t> rest{0};  // milliseconds that it is to take
        std::thread thread;
        // the caller's notes
        milliseconds last_rest{0};
        Clock::time_point back;      // from its last rest, or a second ago
        Clock::duration stalled{0};  // since then: time for which the caller waited while it did not run
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
            workers_.push_back(std::make_unique<Worker>());
            Worker* worker = workers_.back().get();
            try {
                worker->thread =
                    std::thread([this, worker, number = static_cast<int>(workers_.size())] { serve(*worker, number); });
            } catch (const std::system_error&) {  // the system allows no more threads
                workers_.pop_back();
                most_workers_ = static_cast<int>(workers_.size());
                break;
            }
            keep_off(worker->thread.native_handle(), core);
        }
        if (core != core_)
            for (const auto& worker : workers_) keep_off(worker->thread.native_handle(), core);
        core_ = core;
    }

    void serve(Worker& self, int number) {
        for (uint64_t seen = 0;;) {
            seen = next_call(seen);
            if (const int64_t rest = self.rest.exchange(0, std::memory_order_relaxed))
                std::this_thread::sleep_for(milliseconds(rest));
            self.inside.store(true);
            Job* job = open_.load();
            if (job && number < job->threads) job->fn(job->data, number);
            self.inside.store(false);
        }
    }

    // Returns when there was a call after `seen`.
    uint64_t next_call(uint64_t seen) {
        const Clock::time_point start = Clock::now();
        for (Clock::duration waited{0}; waited < kWatch; waited = Clock::now() - start) {
            for (int i = 0; i < 64; ++i) {
                const uint64_t now = calls_.load(std::memory_order_acquire);
                if (now != seen) return now;
                ask_for_a_line();
            }
            if (waited > kPatience) std::this_thread::yield();  // to whoever has more to do
        }
        std::unique_lock<std::mutex> lock(sleeping_);
        asleep_.fetch_add(1);
        called_.wait(lock, [&] { return calls_.load() != seen; });
        asleep_.fetch_sub(1);
        return calls_.load();
    }

    // Waits until a worker has left the job.
    void wait_for(Worker& worker) {
        const Clock::time_point start = Clock::now();
        Clock::time_point now = start, looked;
        Clock::duration ran{0}, ran_before{0};
        bool looking = false;
        for (; worker.inside.load(); now = Clock::now()) {
            ask_for_a_line();
            if (now - start > kPatience) std::this_thread::yield();
            if (looking || now - start < kSuspicion) continue;
            looking = running_time(worker.thread.native_handle(), &ran_before);
            looked = now;
        }
        if (!looking || !running_time(worker.thread.native_handle(), &ran)) return;
        if (2 * (ran - ran_before) < now - looked) blame(worker, now, now - start);
    }

    // A worker inside a job was not running for so long: another program had its core. Where that takes a good part of
    // the time, the caller is quicker without it.
    void blame(Worker& worker, Clock::time_point now, Clock::duration stalled) {
        const Clock::duration served = now - worker.back;
        if (served > kLongestRest) worker.stalled = {}, worker.back = now - kLongestRest;
        worker.stalled += stalled;
        if (4 * worker.stalled < now - worker.back) return;
        const bool again = served < 4 * worker.last_rest;
        worker.last_rest = again ? std::min(2 * worker.last_rest, kLongestRest) : kFirstRest;
        worker.stalled = {};
        worker.back = now + worker.last_rest;
        worker.rest.store(worker.last_rest.count(), std::memory_order_relaxed);
    }

    std::mutex running_;  // held by the caller whose job it is
    std::vector<std::unique_ptr<Worker>> workers_;
    int most_workers_ = 0;
    int core_ = -1;  // where the last caller ran
    bool forked_ = false;
    alignas(64) std::atomic<Job*> open_{nullptr};
    alignas(64) std::atomic<uint64_t> calls_{0};
    alignas(64) std::atomic<int> asleep_{0};
    std::mutex sleeping_;
    std::condition_variable called_;
};

}  // namespace

Threads::Threads() : held_(Pool::shared().hold()) {}

Threads::~Threads() {
    if (held_) Pool::shared().release();
}

void detail::run_team(void (*fn)(void*, int), void* data, int threads) {
    const Threads of_this_call;
    if (holds_threads) Pool::shared().run(fn, data, threads);
    else fn(data, 0);
}

void detail::ask_later(const Span& span) { to_ask = span; }

}  // namespace loci
