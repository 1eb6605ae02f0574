// Memory for one worker that its thread keeps for the next call: touching fresh pages costs more than a small network's
// whole inner loop.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace innerloop::INNERLOOP_ISA {

class Arena {
 public:
  Arena() : blocks_(1) { std::swap(blocks_[0], kept()); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // A block that held everything is kept; after several, one that would have.
  ~Arena() {
    int64_t capacity = 0;
    for (const Block& block : blocks_) capacity += block.capacity;
    if (capacity > most_kept) return;
    kept() = blocks_.size() == 1 ? std::move(blocks_[0]) : Block{nullptr, 0, capacity};
  }

  // count elements with whatever values, on a cache line of their own.
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + alignment - 1) / alignment * alignment;
    if (blocks_.back().memory == nullptr || used_ + bytes > blocks_.back().capacity) add_block(bytes);
    T* taken = reinterpret_cast<T*>(static_cast<char*>(blocks_.back().memory.get()) + used_);
    used_ += bytes;
    return taken;
  }

 private:
  static constexpr int64_t alignment = 64, least = int64_t{1} << 16, most_kept = int64_t{1} << 26;

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  struct Block {
    std::unique_ptr<void, Free> memory;
    int64_t capacity = 0;
    int64_t wanted = 0;  // where there is no memory: what the thread's last call needed
  };

  static Block& kept() {
    thread_local Block block;
    return block;
  }

  void add_block(int64_t bytes) {
    const Block& last = blocks_.back();
    const int64_t capacity = std::max({least, bytes, last.wanted, 2 * last.capacity}) / alignment * alignment;
    Block block{std::unique_ptr<void, Free>(std::aligned_alloc(alignment, static_cast<size_t>(capacity))), capacity, 0};
    if (block.memory == nullptr) throw std::bad_alloc();
    if (last.memory == nullptr) {
      blocks_.back() = std::move(block);
    } else {
      blocks_.push_back(std::move(block));
    }
    used_ = 0;
  }

  std::vector<Block> blocks_;
  int64_t used_ = 0;  // of the last block
};

}  // namespace innerloop::INNERLOOP_ISA
