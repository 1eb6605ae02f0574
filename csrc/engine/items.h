// Lists of values, steps or parameters, whose numbers are ints.
#pragma once

#include <cstddef>

namespace innerloop::INNERLOOP_ISA {

template <class Items>
decltype(auto) at(Items& items, int index) {
  return items[static_cast<size_t>(index)];
}

}  // namespace innerloop::INNERLOOP_ISA
