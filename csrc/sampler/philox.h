// Counter-based random numbers: Philox 4×32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
// The numbers of a task follow from (seed, task index) alone, so any worker can draw any task.
#pragma once

#include <array>
#include <cstdint>

namespace innerloop {

inline std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * counter[0];
    const uint64_t second = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(second >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(second),
               static_cast<uint32_t>(first >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(first)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// The stream of random integers of one task.
class TaskRandom {
 public:
  TaskRandom(uint64_t seed, uint64_t task)
      : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
        counter_{0, 0, static_cast<uint32_t>(task), static_cast<uint32_t>(task >> 32)} {}

  // Uniform in 0 … bound-1; the high half of a 64×64-bit product, whose bias of bound/2^64 nobody can observe.
  int64_t below(int64_t bound) {
    __extension__ using Wide = unsigned __int128;
    return static_cast<int64_t>((Wide{next()} * static_cast<uint64_t>(bound)) >> 64);
  }

 private:
  uint64_t next() {
    if (used_ == 4) {
      block_ = philox(counter_, key_);
      ++counter_[0];  // 2^32 blocks a task: no task draws as many
      used_ = 0;
    }
    const uint64_t high = block_[used_], low = block_[used_ + 1];
    used_ += 2;
    return (high << 32) | low;
  }

  std::array<uint32_t, 2> key_;
  std::array<uint32_t, 4> counter_;
  std::array<uint32_t, 4> block_{};
  int used_ = 4;
};

}  // namespace innerloop
