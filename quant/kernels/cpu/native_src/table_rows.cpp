#include "table_rows.hpp"

#include <fcntl.h>
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>

namespace loci {
namespace {

constexpr int64_t kSector = 4096;  // direct reads want offsets, lengths and addresses to be multiples of this
constexpr int64_t kDepth = 128;    // requests to the disk at once, for each thread
constexpr int64_t kWave = 1024;    // rows that are read before any of them is taken up

int64_t nanoseconds() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

uint64_t scrambled(int64_t row) {
    const uint64_t x = static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u;
    return x ^ x >> 32;
}

// `wanted` without repeats, in order of first appearance; back[i] is where wanted[i] went.
void unique_rows(const std::vector<int64_t>& wanted, std::vector<int64_t>* unique, std::vector<int32_t>* back) {
    size_t size = 16;
    while (size < wanted.size() * 2) size *= 2;
    std::vector<int32_t> places(size, -1);
    unique->reserve(wanted.size());
    back->resize(wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) {
        size_t at = scrambled(wanted[i]) & (size - 1);
        while (places[at] >= 0 && (*unique)[places[at]] != wanted[i]) at = (at + 1) & (size - 1);
        if (places[at] < 0) {
            places[at] = static_cast<int32_t>(unique->size());
            unique->push_back(wanted[i]);
        }
        (*back)[i] = places[at];
    }
}

// Neighbouring sectors of a file, read with one request.
struct Run {
    int file;
    int64_t sector, count;
    int64_t least;  // bytes that must come; the file may end after them
    uint8_t* to;
};

// Where a row's codes and scales are; what is null has still to be found.
struct Place {
    const uint8_t* codes;
    const uint8_t* scales;
};

}  // namespace

struct RowServer::Shared {
    std::mutex mutex;
    std::condition_variable done;
};

struct RowServer::Table {
    RowTable t;
    std::mutex mutex;  // of the hot rows
    uint32_t now = 0;

    int64_t held_bytes() const { return t.code_bytes + (t.scales ? 0 : t.scale_bytes); }
    int64_t set_of(int64_t row) const { return static_cast<int64_t>(scrambled(row) % static_cast<uint64_t>(t.sets)); }

    // Copies hot rows into their places in `staged`; the numbers of those that are not hot are left in `missing`.
    void find(const std::vector<int64_t>& rows, uint8_t* staged, std::vector<int32_t>* missing) {
        const int64_t held = held_bytes();
        std::lock_guard<std::mutex> lock(mutex);
        ++now;
        for (size_t i = 0; i < rows.size(); ++i) {
            int64_t at = -1;
            if (t.sets > 0) {
                const int64_t first = set_of(rows[i]) * kWays;
                for (int64_t way = first; way < first + kWays; ++way) {
                    if (t.tags[way] == rows[i]) at = way;
                }
            }
            if (at < 0) {
                missing->push_back(static_cast<int32_t>(i));
                continue;
            }
            t.stamps[at] = now;
            std::memcpy(staged + static_cast<int64_t>(i) * held, t.hot + at * held, held);
        }
    }

    // Holds rows that were read, each in place of the one of its set that was used longest ago.
    void keep(const std::vector<int64_t>& rows, const uint8_t* staged, const std::vector<int32_t>& read) {
        if (t.sets == 0) return;
        const int64_t held = held_bytes();
        std::lock_guard<std::mutex> lock(mutex);
        for (const int32_t i : read) {
            const int64_t first = set_of(rows[i]) * kWays;
            int64_t oldest = first;
            bool is_there = false;  // another look-up may have read the same row meanwhile
            for (int64_t way = first; way < first + kWays; ++way) {
                is_there |= t.tags[way] == rows[i];
                const bool free = t.tags[way] < 0, taken = t.tags[oldest] >= 0;
                if (taken && (free || now - t.stamps[way] > now - t.stamps[oldest])) oldest = way;
            }
            if (is_there) continue;
            t.tags[oldest] = rows[i];
            t.stamps[oldest] = now;
            std::memcpy(t.hot + oldest * held, staged + i * held, held);
        }
    }
};

// Reads of one thread: many requests at once where the kernel lets us, else one after the other.
class RowServer::Reader {
  public:
    Reader() {
        if (syscall(SYS_io_setup, kDepth, &context_) != 0) context_ = 0;
    }
    ~Reader() {
        if (context_) syscall(SYS_io_destroy, context_);
        std::free(buffer_);
    }
    Reader(const Reader&) = delete;

    // The codes, and scales unless they are in memory, of some of `rows` into their places in `staged`.
    int read(const RowTable& t, const std::vector<int64_t>& rows, std::vector<int32_t> which, uint8_t* staged,
             int64_t* read_bytes) {
        std::sort(which.begin(), which.end(), [&](int32_t a, int32_t b) { return rows[a] < rows[b]; });
        const int64_t held = t.code_bytes + (t.scales ? 0 : t.scale_bytes);
        for (size_t begin = 0; begin < which.size(); begin += kWave) {
            const size_t end = std::min(which.size(), begin + kWave);
            const int64_t most = sectors_of(t.code_bytes) + (t.scales ? 0 : sectors_of(t.scale_bytes));
            if (const int error = grow(static_cast<int64_t>(end - begin) * most * kSector)) return error;
            runs_.clear();
            from_.clear();
            next_ = buffer_;
            for (size_t i = begin; i < end; ++i) add(t.codes_file, t.codes_at, t.code_bytes, rows[which[i]]);
            if (!t.scales) {
                const size_t codes = runs_.size();
                for (size_t i = begin; i < end; ++i)
                    add(t.scales_file, t.scales_at, t.scale_bytes, rows[which[i]], codes);
            }
            if (const int error = read_runs(read_bytes)) return error;
            for (size_t i = begin; i < end; ++i) {
                uint8_t* to = staged + which[i] * held;
                std::memcpy(to, from_[i - begin], t.code_bytes);
                if (!t.scales) std::memcpy(to + t.code_bytes, from_[end - begin + i - begin], t.scale_bytes);
            }
        }
        return 0;
    }

  private:
    static int64_t sectors_of(int64_t bytes) { return (bytes + 2 * kSector - 2) / kSector; }

    int grow(int64_t bytes) {
        if (bytes <= size_) return 0;
        std::free(buffer_);
        buffer_ = nullptr;
        size_ = 0;
        void* fresh = nullptr;
        if (posix_memalign(&fresh, kSector, bytes) != 0) return ENOMEM;
        buffer_ = static_cast<uint8_t*>(fresh);
        size_ = bytes;
        return 0;
    }

    // Notes what a row's part needs read and where it will lie. Rows come ascending; runs before `first` are others'.
    void add(int64_t file, int64_t at, int64_t width, int64_t row, size_t first = 0) {
        const int64_t start = at + row * width, stop = start + width;
        const int64_t sector = start / kSector, end = (stop + kSector - 1) / kSector;
        Run* last = runs_.size() > first ? &runs_.back() : nullptr;
        if (!last || sector > last->sector + last->count) {
            runs_.push_back({static_cast<int>(file), sector, 0, 0, next_});
            last = &runs_.back();
        }
        const int64_t more = std::max<int64_t>(0, end - last->sector - last->count);
        last->count += more;
        next_ += more * kSector;
        last->least = stop - last->sector * kSector;
        from_.push_back(last->to + start - last->sector * kSector);
    }

    int read_runs(int64_t* read_bytes) {
        int error = 0;
        for (const Run& run : runs_) *read_bytes += run.count * kSector;
        if (!context_) {
            for (const Run& run : runs_) error = error ? error : finish(run, 0);
            return error;
        }
        size_t sent = 0;
        int64_t under_way = 0;
        iocb* requests[kDepth];
        io_event events[kDepth];
        calls_.assign(runs_.size(), iocb{});
        while (under_way > 0 || (sent < runs_.size() && !error)) {
            int64_t batch = 0;
            for (size_t i = sent; i < runs_.size() && !error && under_way + batch < kDepth; ++i, ++batch) {
                iocb& call = calls_[i];
                call.aio_data = i;
                call.aio_lio_opcode = IOCB_CMD_PREAD;
                call.aio_fildes = static_cast<uint32_t>(runs_[i].file);
                call.aio_buf = reinterpret_cast<uint64_t>(runs_[i].to);
                call.aio_nbytes = static_cast<uint64_t>(runs_[i].count * kSector);
                call.aio_offset = runs_[i].sector * kSector;
                requests[batch] = &call;
            }
            if (batch > 0) {
                const long taken = syscall(SYS_io_submit, context_, batch, requests);
                if (taken > 0) {
                    sent += static_cast<size_t>(taken);
                    under_way += taken;
                } else if (under_way == 0) {  // refused: this one the plain way, which also says why
                    error = finish(runs_[sent++], 0);
                }
            }
            if (under_way == 0) continue;
            const long ready = syscall(SYS_io_getevents, context_, 1, kDepth, events, nullptr);
            for (long i = 0; i < ready; ++i) {
                const int64_t came = static_cast<int64_t>(events[i].res);
                const int failed = came < 0 ? static_cast<int>(-came) : finish(runs_[events[i].data], came);
                if (!error) error = failed;
            }
            under_way -= std::max(ready, 0L);
        }
        return error;
    }

    // What of a run has not come yet.
    static int finish(const Run& run, int64_t came) {
        while (came < run.least) {
            const ssize_t more =
                pread(run.file, run.to + came, run.count * kSector - came, run.sector * kSector + came);
            if (more < 0 && errno == EINTR) continue;
            if (more < 0 && came == 0) return errno;
            if (more <= 0) return kFileEnds;  // behind the end, direct reads are refused as unaligned
            came += more;
        }
        return 0;
    }

    aio_context_t context_ = 0;
    uint8_t* buffer_ = nullptr;
    uint8_t* next_ = nullptr;
    int64_t size_ = 0;
    std::vector<Run> runs_;
    std::vector<const uint8_t*> from_;
    std::vector<iocb> calls_;
};

RowServer::RowServer(const Level& level, int threads) : level_(level), shared_(std::make_shared<Shared>()) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back(&RowServer::work, this);
}

RowServer::~RowServer() {
    {
        std::lock_guard<std::mutex> lock(shared_->mutex);
        closed_ = true;
        for (RowJob* job : queue_) {
            job->error_ = kClosed;
            job->done_ = true;
        }
        queue_.clear();
    }
    asked_.notify_all();
    shared_->done.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

int64_t RowServer::add(const RowTable& table) {
    tables_.push_back(std::make_unique<Table>());
    tables_.back()->t = table;
    return static_cast<int64_t>(tables_.size()) - 1;
}

RowJob* RowServer::ask(int64_t table, const int64_t* wanted, int64_t n, void* out) {
    auto* job = new RowJob;
    job->shared_ = shared_;
    job->table_ = table;
    job->wanted_.assign(wanted, wanted + n);
    job->out_ = out;
    job->counts_.nanoseconds = -nanoseconds();
    bool was_empty;
    {
        std::lock_guard<std::mutex> lock(shared_->mutex);
        was_empty = queue_.empty();
        queue_.push_back(job);
    }
    if (was_empty) asked_.notify_one();  // whom it wakes wakes the next: waking costs more than asking
    return job;
}

void RowServer::work() {
    Reader reader;
    for (;;) {
        RowJob* job = nullptr;
        {
            std::unique_lock<std::mutex> lock(shared_->mutex);
            asked_.wait(lock, [&] { return closed_ || !queue_.empty(); });
            if (queue_.empty()) return;
            job = queue_.front();
            queue_.pop_front();
            if (!queue_.empty()) asked_.notify_one();
        }
        int error;
        try {
            error = look_up(*job, reader);
        } catch (const std::bad_alloc&) { error = ENOMEM; }
        {
            std::lock_guard<std::mutex> lock(shared_->mutex);
            job->counts_.nanoseconds += nanoseconds();
            job->error_ = error;
            job->done_ = true;
        }
        shared_->done.notify_all();
    }
}

int RowServer::look_up(RowJob& job, Reader& reader) {
    Table& table = *tables_[job.table_];
    const RowTable& t = table.t;
    for (const int64_t row : job.wanted_) {
        if (row < 0 || row >= t.rows) return kNoSuchRow;
    }
    std::vector<int64_t> rows;
    std::vector<int32_t> back, missing;
    unique_rows(job.wanted_, &rows, &back);

    const int64_t count = static_cast<int64_t>(rows.size()), held = table.held_bytes();
    std::unique_ptr<uint8_t[]> staged;
    if (!t.codes) {
        staged.reset(new uint8_t[count * held]);
        table.find(rows, staged.get(), &missing);
        if (!missing.empty()) {
            if (const int error = reader.read(t, rows, missing, staged.get(), &job.counts_.read_bytes)) return error;
            table.keep(rows, staged.get(), missing);
        }
    }
    const auto place = [&](int64_t i) {
        const uint8_t* codes = t.codes ? t.codes + rows[i] * t.code_bytes : staged.get() + i * held;
        return Place{codes, t.scales ? t.scales + rows[i] * t.scale_bytes : codes + t.code_bytes};
    };
    const int64_t n = static_cast<int64_t>(back.size());
    const auto prefetch = [&](int64_t i) {
        const Place at = place(back[i]);
        prefetch_row(at.codes, t.code_bytes);
        prefetch_row(at.scales, t.scale_bytes);
    };
    for (int64_t i = 0; i < std::min(n, kRowsAhead); ++i) prefetch(i);
    for (int64_t i = 0; i < n; ++i) {
        if (i + kRowsAhead < n) prefetch(i + kRowsAhead);
        const Place at = place(back[i]);
        if (t.decodes) {
            float* to = static_cast<float*>(job.out_) + i * t.cols;
            level_.fp8_row(at.codes, at.scales, t.float_scales != 0, t.cols, to);
        } else {
            uint8_t* to = static_cast<uint8_t*>(job.out_) + i * (t.code_bytes + t.scale_bytes);
            std::memcpy(to, at.codes, t.code_bytes);
            std::memcpy(to + t.code_bytes, at.scales, t.scale_bytes);
        }
    }
    const int64_t read = static_cast<int64_t>(missing.size());
    job.counts_.asked = n;
    job.counts_.unique = count;
    job.counts_.cached = count - read;
    job.counts_.read = read;
    return 0;
}

RowJob::~RowJob() { wait(nullptr); }

bool RowJob::done() const {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    return done_;
}

int RowJob::wait(RowCounts* counts) {
    std::unique_lock<std::mutex> lock(shared_->mutex);
    shared_->done.wait(lock, [&] { return done_; });
    if (counts) *counts = counts_;
    return error_;
}

}  // namespace loci
