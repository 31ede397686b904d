// Launching kernels, on the host.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace dyncore::cuda {

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

inline void expect_success(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // which forgets it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// `bytes` of dynamic shared memory, at most 48 KB.
template <class... Parameters, class... Arguments>
void launch(const char* name, Stream stream, int64_t blocks, int threads, int64_t bytes, void (*kernel)(Parameters...),
            Arguments... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  expect_success(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

template <class T>
void clear(const char* name, Stream stream, T* data, int64_t count) {
  if (count == 0) return;
  expect_success(cudaMemsetAsync(data, 0, static_cast<size_t>(count) * sizeof(T), static_cast<cudaStream_t>(stream)),
                 name);
}

}  // namespace dyncore::cuda
