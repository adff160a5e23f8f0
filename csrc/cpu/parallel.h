// Threads of torch's own pool, by its C shim.

#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

namespace fusedskip::cpu {

inline int64_t num_threads() {
  uint32_t threads = 1;
  if (torch_get_num_threads(&threads) != 0) throw std::runtime_error("torch_get_num_threads");
  return threads;
}

// Calls body(begin, end) over parts of [0, items), in this thread alone where there is little to
// do. body must not throw.
template <typename Body>
void parallel_for(int64_t items, int64_t elements_an_item, const Body& body) {
  constexpr int64_t kGrain = 8192;  // elements: to start threads takes as long as several passes
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_an_item));
  if (items <= grain) {
    if (items > 0) body(int64_t{0}, items);
    return;
  }
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  if (torch_parallel_for(0, items, grain, call, const_cast<Body*>(&body)) != 0)
    throw std::runtime_error("torch_parallel_for");
}

}  // namespace fusedskip::cpu
