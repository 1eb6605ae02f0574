// Memory for one worker that its thread keeps for the next call: touching fresh pages costs more than a small network's
// whole inner loop, and hundredths of a large one's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace innerloop::INNERLOOP_ISA {

class Arena {
 public:
  Arena() : blocks_(1) { std::swap(blocks_[0], kept()); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // A block that held everything is kept; after several, one that would have.
  ~Arena() {
    const bool keeps_memory = blocks_.size() == 1 && blocks_[0].capacity <= most_kept;
    kept() = keeps_memory ? std::move(blocks_[0]) : Block{nullptr, 0, taken_};
  }

  // count elements with whatever values, on a cache line of their own.
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = rounded_up(count * static_cast<int64_t>(sizeof(T)), line);
    if (blocks_.back().memory == nullptr || used_ + bytes > blocks_.back().capacity) add_block(bytes);
    T* taken = reinterpret_cast<T*>(static_cast<char*>(blocks_.back().memory.get()) + used_);
    used_ += bytes;
    taken_ += bytes;
    return taken;
  }

 private:
  static constexpr int64_t line = 64, least = int64_t{1} << 16, huge_page = int64_t{1} << 21;
  static constexpr int64_t most_kept = int64_t{1} << 29;

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  struct Block {
    std::unique_ptr<void, Free> memory;
    int64_t capacity = 0;
    int64_t wanted = 0;  // where there is no memory: what the thread's last call took
  };

  static Block& kept() {
    thread_local Block block;
    return block;
  }

  static int64_t rounded_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

  void add_block(int64_t bytes) {
    const Block& last = blocks_.back();
    const int64_t needed = std::max({least, bytes, last.wanted, 2 * last.capacity});
    const int64_t alignment = needed >= huge_page ? huge_page : line, capacity = rounded_up(needed, alignment);
    void* memory = std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(capacity));
    if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    // A step touches hundreds of megabytes for the first time: in small pages, a fifth of its time goes into faults.
    if (alignment == huge_page) madvise(memory, static_cast<size_t>(capacity), MADV_HUGEPAGE);
#endif
    Block block{std::unique_ptr<void, Free>(memory), capacity, 0};
    if (last.memory == nullptr) {
      blocks_.back() = std::move(block);
    } else {
      blocks_.push_back(std::move(block));
    }
    used_ = 0;
  }

  std::vector<Block> blocks_;
  int64_t used_ = 0;   // bytes of the last block
  int64_t taken_ = 0;  // of all
};

}  // namespace innerloop::INNERLOOP_ISA
