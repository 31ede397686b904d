// What the threads of a block do together. Every function here is to be called by all threads of the block.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace dyncore::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() {
  return static_cast<int>(threadIdx.x) % kWarp;
}
__device__ inline int warp() {
  return static_cast<int>(threadIdx.x) / kWarp;
}
__device__ inline unsigned lanes_below() {
  return (1u << lane()) - 1;
}

// The block's dynamic shared memory.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_memory[];
  return reinterpret_cast<T*>(dynamic_memory);
}

template <class V>
__device__ V sum_of_warp(V value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// The sum over this lane and those before it.
template <class V>
__device__ V sum_up_to_lane(V value) {
  for (int step = 1; step < kWarp; step *= 2) {
    const V below = __shfl_up_sync(kAllLanes, value, step);
    if (lane() >= step) value += below;
  }
  return value;
}

// The sum over the threads before this one; *total is that over all.
template <class V>
__device__ V sum_before_thread(V value, V* total) {
  static __shared__ V sums[kWarp];
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const V up_to = sum_up_to_lane(value);
  if (lane() == kWarp - 1) sums[warp()] = up_to;
  __syncthreads();
  const V up_to_warp = sum_up_to_lane(lane() < warps ? sums[lane()] : V{0});
  const V before_warp = __shfl_sync(kAllLanes, up_to_warp, warp() == 0 ? 0 : warp() - 1);
  *total = __shfl_sync(kAllLanes, up_to_warp, kWarp - 1);
  __syncthreads();  // the next call writes sums
  return (warp() == 0 ? V{0} : before_warp) + up_to - value;
}

}  // namespace dyncore::cuda
