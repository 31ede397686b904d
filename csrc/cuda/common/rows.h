// How rows are shared out among threads, and which words move them. Host code but for Team.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "cuda/common/elements.h"

namespace dyncore::cuda {

constexpr int kRowThreads = 256;

// Rows of several words each: 2^log_lanes neighbouring threads to a row, as many rows to a block as fit.
struct Team {
  int log_lanes;

  __host__ __device__ int lanes() const { return 1 << log_lanes; }
  __host__ __device__ int rows_per_block() const { return kRowThreads >> log_lanes; }
  __device__ int lane() const { return static_cast<int>(threadIdx.x) & (lanes() - 1); }
  __device__ int64_t row() const {
    return int64_t{blockIdx.x} * rows_per_block() + (static_cast<int>(threadIdx.x) >> log_lanes);
  }
};

// About `words_per_lane` words for each thread, `most_lanes` threads at most.
inline Team team_for(int64_t words, int words_per_lane, int most_lanes) {
  int log_lanes = 0;
  while (1 << log_lanes < most_lanes && (int64_t{words_per_lane} << log_lanes) < words) ++log_lanes;
  return {log_lanes};
}

// The most bytes, a power of two and 16 at most, that divide every one of these.
inline int64_t word_bytes(std::initializer_list<int64_t> addresses_and_sizes) {
  int64_t bits = 16;
  for (int64_t n : addresses_and_sizes) bits |= n;
  return bits & -bits;
}

inline int64_t address(const void* data) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
}

// Calls with a Pack of 16 bytes where these are multiples of 16, else with one of a single element.
template <class Call>
void with_pack(Dtype dtype, std::initializer_list<int64_t> addresses_and_sizes, Call call) {
  const bool wide = word_bytes(addresses_and_sizes) == 16;
  if (dtype == Dtype::float32) return wide ? call(Pack<Float, uint4>{}) : call(Pack<Float, uint32_t>{});
  if (dtype == Dtype::bfloat16) return wide ? call(Pack<Bfloat16, uint4>{}) : call(Pack<Bfloat16, uint16_t>{});
  return wide ? call(Pack<Float16, uint4>{}) : call(Pack<Float16, uint16_t>{});
}

}  // namespace dyncore::cuda
