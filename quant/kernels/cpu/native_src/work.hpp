// What the operations of the back end share: scratch memory, panels of a matrix, who chose which expert.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "operations.hpp"

namespace loci {

// Below this many bytes of work, waking the others costs more than it saves.
constexpr int64_t kWorthSharing = 32 * 1024;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void add_to(float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

// Memory that a thread keeps between calls; megabytes of it in huge pages, whose addresses are found faster.
class Scratch {
  public:
    uint8_t* get(int64_t bytes) {
        if (bytes > size_) {
            constexpr int64_t kHuge = 2 * 1024 * 1024;
            const int64_t page = bytes < kHuge ? 4096 : kHuge;
            size_ = divide_up(bytes, page) * page;
            data_.reset(
                static_cast<uint8_t*>(std::aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(size_))));
#if defined(__linux__)
            if (page == kHuge) madvise(data_.get(), static_cast<size_t>(size_), MADV_HUGEPAGE);
#endif
        }
        return data_.get();
    }

  private:
    struct Free {
        void operator()(uint8_t* p) const { std::free(p); }
    };
    std::unique_ptr<uint8_t, Free> data_;
    int64_t size_ = 0;
};

constexpr int64_t kMostPanels = 4;                       // of a turn
inline thread_local Scratch worker_panels[kMostPanels];  // of each thread: panels tiled on the way

// The panels of a matrix, tiled on the way where it lies in file layout.
class Panels {
  public:
    explicit Panels(const Matrix& m) : m_(&m), bytes_(is_plain(m.format) ? plain_panel(m) : panel_bytes(m)) {}
    int64_t count() const { return (m_->rows + kPanelRows - 1) / kPanelRows; }
    int64_t bytes() const { return bytes_; }
    int64_t rows_in(int64_t panel) const { return std::min(kPanelRows, m_->rows - panel * kPanelRows); }
    // Where a panel begins; null where nothing can be asked for ahead.
    const uint8_t* begin(int64_t panel) const { return m_->tiled ? m_->codes + panel * bytes_ : nullptr; }
    // A panel and where its thread reads on: behind it, if that is not known. `place`: which of a turn's it is.
    Panel at(int64_t panel, const uint8_t* next, int64_t place) const {
        const uint8_t* codes = m_->tiled ? begin(panel) : tiled_copy(panel, place);
        return {rows_in(panel), m_->cols, bytes_, codes, next != nullptr ? next : codes + bytes_, scales(panel)};
    }

  private:
    // Plain rows need no rearranging: 32 of them are a panel.
    static int64_t plain_panel(const Matrix& m) { return kPanelRows * m.cols * plain_bytes(kind_of(m.format)); }
    const uint8_t* tiled_copy(int64_t panel, int64_t place) const {
        uint8_t* copy = worker_panels[place].get(bytes_);
        tile_panel(*m_, panel, copy);
        return copy;
    }
    PanelScales scales(int64_t panel) const {
        if (m_->format != kFp8) return {nullptr, m_->tile_cols, false};
        const int64_t row = panel * kPanelRows / m_->tile_rows;
        const int64_t size = m_->float_scales ? 4 : 1, columns = (m_->cols + m_->tile_cols - 1) / m_->tile_cols;
        return {static_cast<const uint8_t*>(m_->scales) + row * columns * size, m_->tile_cols, m_->float_scales != 0};
    }

    const Matrix* m_;
    int64_t bytes_;
};

// The (token, choice) pairs of a call, ordered by expert, then by token.
struct Pairs {
    std::vector<int64_t> start;  // those of the expert in place e are start[e] .. start[e + 1]
    std::vector<int64_t> pair;   // token * top_k + choice

    explicit Pairs(const Moe& call) : start(static_cast<size_t>(call.used) + 1) {
        const int64_t count = call.some != nullptr ? call.count : call.tokens * call.top_k;
        std::vector<size_t> place(static_cast<size_t>(count));
        const auto choice = [&](size_t i) { return call.some != nullptr ? call.some[i] : static_cast<int64_t>(i); };
        for (size_t i = 0; i < place.size(); ++i) {
            const int64_t id = call.choice[choice(i)];
            place[i] = static_cast<size_t>(std::lower_bound(call.ids, call.ids + call.used, id) - call.ids);
            ++start[place[i] + 1];
        }
        for (size_t e = 1; e < start.size(); ++e) start[e] += start[e - 1];
        std::vector<int64_t> next(start.begin(), start.end() - 1);
        pair.resize(place.size());
        for (size_t i = 0; i < place.size(); ++i) pair[static_cast<size_t>(next[place[i]]++)] = choice(i);
    }
    int64_t begin(int64_t e) const { return start[static_cast<size_t>(e)]; }
    int64_t end(int64_t e) const { return start[static_cast<size_t>(e) + 1]; }
    int64_t at(int64_t i) const { return pair[static_cast<size_t>(i)]; }
};

}  // namespace loci
