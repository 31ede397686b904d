// The device that kernels run on.
#include "cuda/common/launch.h"

namespace dyncore::cuda {

namespace {

__global__ void nothing() {}

}  // namespace

std::string unusable(int device) {
  try {
    const OnDevice on(device);
    cudaFuncAttributes attributes;
    expect_success(cudaFuncGetAttributes(&attributes, nothing), "loading kernels");
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

// The current device is that of the thread's driver context, whichever copy of the CUDA runtime made it current.
OnDevice::OnDevice(int device) {
  int current;
  expect_success(cudaGetDevice(&current), "the current device");
  if (current == device) return;
  expect_success(cudaSetDevice(device), "making a device current");
  before_ = current;
}

OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace dyncore::cuda
