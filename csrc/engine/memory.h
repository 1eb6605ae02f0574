// What the blocks executor takes from a worker's arena: arrays of zeros.
#pragma once

#include <algorithm>
#include <cstdint>

#include "engine/arena.h"

namespace innerloop::INNERLOOP_ISA {

template <class T>
class Memory {
 public:
  Memory() = default;  // of nothing: whatever is taken is null
  explicit Memory(Arena& arena) : arena_(&arena) {}

  // count elements, all 0, with slack for one vector after them.
  T* take(int64_t count) {
    if (arena_ == nullptr) return nullptr;
    constexpr int64_t vector = 64 / sizeof(T);
    T* piece = arena_->take<T>(count + vector);
    std::fill_n(piece, count + vector, T(0));
    return piece;
  }

 private:
  Arena* const arena_ = nullptr;
};

// An array that the layers of a worker use in turns, as large as the largest of them asks for: what is in it does not
// outlast one function of a layer.
template <class T>
class Scratch {
 public:
  explicit Scratch(Memory<T>& memory) : memory_(memory) {}

  // Asks for count elements. To be called before data(), by every layer.
  Scratch& reserve(int64_t count) {
    size_ = std::max(size_, count);
    return *this;
  }

  T* data() {
    if (data_ == nullptr) data_ = memory_.take(size_);
    return data_;
  }

 private:
  Memory<T>& memory_;
  int64_t size_ = 0;
  T* data_ = nullptr;
};

// What convolutions need beside their arrays: weights and a direction in the form of their products, and the products'
// own memory.
template <class T>
struct ConvolutionScratch {
  explicit ConvolutionScratch(Memory<T>& memory) : weights(memory), direction(memory), products(memory) {}

  Scratch<T> weights, direction, products;
};

}  // namespace innerloop::INNERLOOP_ISA
