// Rows of tables that may be larger than memory, looked up by threads of their own while others compute.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels.hpp"

namespace loci {

constexpr int64_t kWays = 8;  // rows that share a place in the cache of hot rows

// A table of rows. What is null lies in a file, at `..._at`; memory/engram/rows.py has the same struct.
struct RowTable {
    const uint8_t* codes;   // [rows][code_bytes]
    const uint8_t* scales;  // [rows][scale_bytes]
    int64_t rows, cols, code_bytes, scale_bytes;
    int64_t decodes;       // 1: e4m3 rows become floats, 0: rows are handed out as they are stored
    int64_t float_scales;  // e4m3: scales are float32, not ue8m0
    int64_t codes_file, codes_at, scales_file, scales_at;
    // Hot rows, where codes lie in a file: `sets` sets of kWays of them, each with the row's codes, and its
    // scales unless all of those are in memory.
    int64_t sets;
    int64_t* tags;     // [sets][kWays] rows, -1: none
    uint32_t* stamps;  // [sets][kWays] the look-up that used it last
    uint8_t* hot;      // [sets][kWays][held bytes]
};

// What a look-up found, and when: all zero until it is done.
struct RowCounts {
    int64_t asked, unique, cached, read;
    int64_t read_bytes;   // of whole blocks
    int64_t nanoseconds;  // from asking to done
};

// Why a look-up failed: 0 not at all, above 0 an errno.
constexpr int kNoSuchRow = -1, kFileEnds = -2, kClosed = -3;

class RowJob;

// Threads that look rows up. Tables are added first; then `ask` may be called from any thread.
class RowServer {
  public:
    RowServer(const Level& level, int threads);
    ~RowServer();  // what is still queued fails with kClosed
    int64_t add(const RowTable& table);
    // Rows `wanted` [n] of a table into `out`, [n][cols] floats or [n][code_bytes + scale_bytes] bytes.
    // `out` must stay until the job is deleted, which waits for it.
    RowJob* ask(int64_t table, const int64_t* wanted, int64_t n, void* out);

  private:
    struct Shared;
    struct Table;
    class Reader;
    void work();
    int look_up(RowJob& job, Reader& reader);

    const Level& level_;
    std::shared_ptr<Shared> shared_;
    std::vector<std::unique_ptr<Table>> tables_;
    std::deque<RowJob*> queue_;
    std::condition_variable asked_;
    bool closed_ = false;
    std::vector<std::thread> threads_;
    friend class RowJob;
};

// A look-up under way. Outlives its server.
class RowJob {
  public:
    ~RowJob();
    bool done() const;
    int wait(RowCounts* counts);

  private:
    friend class RowServer;
    std::shared_ptr<RowServer::Shared> shared_;
    int64_t table_ = 0;
    std::vector<int64_t> wanted_;
    void* out_ = nullptr;
    bool done_ = false;
    int error_ = 0;
    RowCounts counts_{};
};

}  // namespace loci
