// Stands in for CUDA's header of this name where the kernels of csrc/cuda are compiled as C++ and run on the host, in
// the sanitizers' builds. Each thread of a block is a coroutine that runs until it meets a barrier or an exchange among
// a warp's lanes; in which order they run can be chosen, so that a missing barrier shows as another result. Blocks run
// one after another. Threads that wait for each other in vain end the program.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__  // every such variable is static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum class Order { ascending, descending, shuffled };
void set_order(Order order);  // of a block's threads, and of the blocks

int launches();  // since the program began

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
void barrier();
// The values of all lanes of this warp, once each has come here.
const uint64_t* exchange(uint64_t value);

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8, "one word a lane");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}

template <class T>
T unpack(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

inline int lane() {
  return static_cast<int>(threadIdx.x % 32);
}

void expect_all_lanes(unsigned mask);

}  // namespace emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... args) {
  return emulation::run(*config, [=] { kernel(args...); });
}

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "invalid configuration";
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

inline void __syncthreads() {
  emulation::barrier();
}
inline void __syncwarp() {
  emulation::exchange(0);
}

inline unsigned __ballot_sync(unsigned mask, bool value) {
  emulation::expect_all_lanes(mask);
  const uint64_t* all = emulation::exchange(value);
  unsigned bits = 0;
  for (int l = 0; l < 32; ++l) bits |= static_cast<unsigned>(all[l]) << l;
  return bits;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  emulation::expect_all_lanes(mask);
  const uint64_t mine = emulation::pack(value);
  const uint64_t* all = emulation::exchange(mine);
  unsigned bits = 0;
  for (int l = 0; l < 32; ++l) bits |= static_cast<unsigned>(all[l] == mine) << l;
  return bits;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  emulation::expect_all_lanes(mask);
  const uint64_t* all = emulation::exchange(emulation::pack(value));
  return emulation::unpack<T>(all[emulation::lane() / width * width + source % width]);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int step) {
  emulation::expect_all_lanes(mask);
  const uint64_t* all = emulation::exchange(emulation::pack(value));
  return emulation::unpack<T>(all[emulation::lane() < step ? emulation::lane() : emulation::lane() - step]);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32) {
  emulation::expect_all_lanes(mask);
  const uint64_t* all = emulation::exchange(emulation::pack(value));
  return emulation::unpack<T>(all[emulation::lane() ^ bits]);
}

template <class T, class Reduce>
T reduce_lanes(unsigned mask, T value, Reduce reduce) {
  emulation::expect_all_lanes(mask);
  const uint64_t* all = emulation::exchange(emulation::pack(value));
  T result = emulation::unpack<T>(all[0]);
  for (int l = 1; l < 32; ++l) result = reduce(result, emulation::unpack<T>(all[l]));
  return result;
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return reduce_lanes(mask, value, [](int a, int b) { return a + b; });
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return reduce_lanes(mask, value, [](int a, int b) { return b < a ? b : a; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return reduce_lanes(mask, value, [](unsigned a, unsigned b) { return a < b ? b : a; });
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(unsigned bits) {
  return __builtin_ffs(static_cast<int>(bits));
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

inline int atomicAdd(int* sum, int value) {
  const int before = *sum;
  *sum += value;
  return before;
}
