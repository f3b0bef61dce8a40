// Memory for large results, for the runtime.
//
// Mapping and clearing fresh pages takes as long as a kernel needs to fill them. What a result
// leaves waits here for the next one of its size, a few blocks at most, and does not go back to the
// system.
#pragma once

#include <array>
#include <cstdlib>
#include <mutex>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace memcompile {

class Results {
 public:
  static constexpr size_t PAGE = size_t{2} << 20;  // a huge one
  static constexpr size_t SMALLEST = 2 * PAGE;     // smaller results are an allocator's work
  static constexpr size_t LARGEST = 64 * PAGE;     // that is kept

  // Null without memory. What it held before is still there.
  void* take(size_t bytes) {
    const size_t size = rounded(bytes);
    {
      const std::lock_guard lock(mutex_);
      for (Block& block : waiting_) {
        if (block.size == size) return std::exchange(block, {}).data;
      }
    }
    void* data = std::aligned_alloc(PAGE, size);
#if defined(__linux__)
    if (data) madvise(data, size, MADV_HUGEPAGE);  // a wish: small pages are right, only slower
#endif
    return data;
  }

  void give(void* data, size_t bytes) {
    Block block{data, rounded(bytes)};
    if (block.size <= LARGEST) {
      const std::lock_guard lock(mutex_);
      for (Block& other : waiting_) {
        if (!other.data) return std::swap(block, other);
      }
      std::swap(block, waiting_[next_]);
      next_ = (next_ + 1) % waiting_.size();
    }
    std::free(block.data);
  }

 private:
  struct Block {
    void* data = nullptr;
    size_t size = 0;
  };

  static size_t rounded(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

  std::mutex mutex_;
  std::array<Block, 2> waiting_;
  size_t next_ = 0;  // to make room
};

// Results may outlive what is torn down when a process ends; this never is.
inline Results& results() {
  static Results& held = *new Results;
  return held;
}

}  // namespace memcompile
