// Memory that a thread keeps between its calls.
#pragma once

#include <stdint.h>

#include <memory>

namespace fastbert {

// Uninitialised, aligned to a cache line, and of one user at a time: a function has its own, as a thread_local
// variable. In a steady state it touches no new pages; what is larger than kKept is given back after use.
class Scratch {
  public:
    static constexpr int64_t kLine = 64;
    static constexpr int64_t kKept = int64_t{256} << 20;

    static int64_t round_up(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

    char* get(int64_t bytes) {
        if (bytes > size_) {
            release();
            data_.reset(new char[static_cast<size_t>(bytes + kLine)]);
            size_ = bytes;
        }
        const int64_t beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data_.get()) % kLine);
        return data_.get() + (beyond ? kLine - beyond : 0);
    }
    void done() {
        if (size_ > kKept) release();
    }

  private:
    void release() {
        data_.reset();
        size_ = 0;
    }

    std::unique_ptr<char[]> data_;
    int64_t size_ = 0;
};

}  // namespace fastbert
