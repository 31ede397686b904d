// Vectors of floats in the width of the instruction set, written with the compiler's vector extension so that one
// source serves all sets. Everything here lives in the set's own namespace: see check_symbols.cmake.
#pragma once
#include <cstdint>
#include <cstring>

#ifndef DYNCORE_ISA
#error "compiled once per instruction set, with DYNCORE_ISA defined"
#endif

#define DYNCORE_INLINE inline __attribute__((always_inline))
#define DYNCORE_INLINE_LAMBDA __attribute__((always_inline))

namespace dyncore::DYNCORE_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats in a vector
constexpr int MR = 12;  // rows of the register tile, which is MR x 2 vectors
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr int MR = 6;
#else
constexpr int VL = 4;
constexpr int MR = 6;
#endif

#if defined(__AVX512BF16__)
constexpr bool kDotBf16 = true;  // the processor multiplies pairs of bfloat16 itself
#else
constexpr bool kDotBf16 = false;
#endif

constexpr int NC = 32;  // columns of a panel, the unit of work
constexpr int NV = NC / VL;

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

struct bf16 {
  uint16_t bits;
};

DYNCORE_INLINE vf splat(float x) {
  return x - vf{};
}

DYNCORE_INLINE float to_float(float x) {
  return x;
}
DYNCORE_INLINE float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

DYNCORE_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
DYNCORE_INLINE vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

DYNCORE_INLINE void store(float* p, vf v) {
  std::memcpy(p, &v, sizeof v);
}
// Rounds to nearest even; NaN stays NaN.
DYNCORE_INLINE void store(bf16* p, vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  const vh h = __builtin_convertvector((v == v) ? rounded : quiet, vh);
  std::memcpy(p, &h, sizeof h);
}

template <class T>
DYNCORE_INLINE T from_float(float x);
template <>
DYNCORE_INLINE float from_float<float>(float x) {
  return x;
}
template <>
DYNCORE_INLINE bf16 from_float<bf16>(float x) {
  bf16 out[VL];
  store(out, splat(x));
  return out[0];
}

inline int64_t panels_of(int64_t columns) {
  return (columns + NC - 1) / NC;
}
inline int panel_width(int64_t columns, int64_t n0) {
  return static_cast<int>(columns - n0 < NC ? columns - n0 : NC);
}

// Rows of NC columns, of which `n` exist: absent ones read as 0 and are not written.
struct Row {
  vf v[NV];
};

template <class T>
DYNCORE_INLINE Row load_row(const T* p, int n) {
  Row r;
  if (n == NC) {
    for (int j = 0; j < NV; ++j) r.v[j] = load(p + j * VL);
  } else {
    float padded[NC] = {};
    for (int j = 0; j < n; ++j) padded[j] = to_float(p[j]);
    for (int j = 0; j < NV; ++j) r.v[j] = load(padded + j * VL);
  }
  return r;
}

template <class T>
DYNCORE_INLINE void store_row(T* p, const Row& r, int n) {
  if (n == NC) {
    for (int j = 0; j < NV; ++j) store(p + j * VL, r.v[j]);
  } else {
    T padded[NC];
    for (int j = 0; j < NV; ++j) store(padded + j * VL, r.v[j]);
    for (int j = 0; j < n; ++j) p[j] = padded[j];
  }
}

DYNCORE_INLINE Row zero_row() {
  Row r;
  for (int j = 0; j < NV; ++j) r.v[j] = vf{};
  return r;
}

DYNCORE_INLINE Row operator+(const Row& a, const Row& b) {
  Row c;
  for (int j = 0; j < NV; ++j) c.v[j] = a.v[j] + b.v[j];
  return c;
}

DYNCORE_INLINE float sum(vf v) {
  float lanes[VL];
  store(lanes, v);
  for (int width = VL / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  return lanes[0];
}

}  // namespace dyncore::DYNCORE_ISA
