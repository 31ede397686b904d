// The entries of expert [T, k] as items of a counting sort.
#pragma once
#include "cuda/common/counting_sort.h"

namespace dyncore::cuda {

template <class Index>
struct RouteKeys {
  const Index* expert;
  int groups;

  __device__ unsigned operator()(int64_t item, int) const {
    const Index e = expert[item];
    return static_cast<unsigned>(e >= 0 && e < groups ? e : groups);
  }
  __device__ int source(int64_t item) const { return static_cast<int>(item); }
};

}  // namespace dyncore::cuda
