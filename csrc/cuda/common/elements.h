// Elements of float32, bfloat16 and float16: as float, and several at a time as the words that memory moves.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/types.h"

namespace dyncore::cuda {

__device__ inline unsigned bits_of(float x) {
#if defined(__CUDACC__)
  return __float_as_uint(x);
#else
  unsigned bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
#endif
}

__device__ inline float float_of(unsigned bits) {
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
#endif
}

// Storage of an element, and its value.
struct Float {
  uint32_t bits;
  __device__ float value() const { return float_of(bits); }
  __device__ static Float of(float x) { return {bits_of(x)}; }
};

struct Bfloat16 {
  uint16_t bits;
  __device__ float value() const { return float_of(static_cast<unsigned>(bits) << 16); }
  // To the nearest, ties to even; NaN stays NaN.
  __device__ static Bfloat16 of(float x) {
#if defined(__CUDACC__)
    Bfloat16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    const unsigned bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
  }
};

struct Float16 {
  uint16_t bits;
#if defined(__CUDACC__)
  __device__ float value() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
  __device__ static Float16 of(float x) {
    Float16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
  }
#else
  float value() const {
    _Float16 half;
    __builtin_memcpy(&half, &bits, 2);
    return static_cast<float>(half);
  }
  static Float16 of(float x) {
    const _Float16 half = static_cast<_Float16>(x);
    Float16 y;
    __builtin_memcpy(&y.bits, &half, 2);
    return y;
  }
#endif
};

// Unsigned integers of the order of floats: NaN above everything, the two zeros equal, 0 below all.
__device__ inline unsigned ordered(float x) {
  const unsigned bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0xffffffffu;
  if (magnitude == 0) return 0x80000000u;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline float value_of(unsigned key) {
  return float_of(key >> 31 ? key ^ 0x80000000u : ~key);
}

// Elements that move together: `count` of them fill a Word.
template <class Element_, class Word_>
struct Pack {
  using Element = Element_;
  using Word = Word_;
  static constexpr int count = sizeof(Word) / sizeof(Element);

  union {
    Word word;
    Element elements[count];
  };
};

inline int element_bytes(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : 2;
}

__device__ inline const void* element_address(const void* data, Dtype dtype, int64_t index) {
  return static_cast<const char*>(data) + index * (dtype == Dtype::float32 ? 4 : 2);
}

__device__ inline float load_element(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::float32) return static_cast<const float*>(data)[index];
  if (dtype == Dtype::bfloat16) return static_cast<const Bfloat16*>(data)[index].value();
  return static_cast<const Float16*>(data)[index].value();
}

}  // namespace dyncore::cuda
