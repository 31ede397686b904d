// Vectors of floats in the width of the instruction set, written with the compiler's vector extension so that one
// source serves all sets. Everything here lives in the set's own namespace: see check_symbols.cmake.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef DYNCORE_ISA
#error "compiled once per instruction set, with DYNCORE_ISA defined"
#endif

#define DYNCORE_INLINE inline __attribute__((always_inline))
#define DYNCORE_INLINE_LAMBDA __attribute__((always_inline))

namespace dyncore::DYNCORE_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats in a vector
// Rows of the register tile, which is MR x 2 vectors. The addresses of more than 8 do not stay in registers beside
// those of the panel: alone 12 rows are multiplied at 107 GFLOP/s (float, Zen 4), 10 and 8 at 115; in a whole MoE
// forward pass 8 take 3-4% less time than 12, 9 and 10 rows lie between. And 8 rows that are 4096 bytes apart fit the 8
// ways of an L1 set: 12 had to be copied.
constexpr int MR = 8;
// Of the tile whose rows lie packed behind one address, or which reads its right operand from memory.
constexpr int TR = 12;
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr int MR = 6;
constexpr int TR = 6;
#else
constexpr int VL = 4;
constexpr int MR = 6;
constexpr int TR = 6;
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
struct half {
  uint16_t bits;
};

// Whether the processor multiplies pairs of T itself; products of any other type narrower than float are made of
// floats.
template <class T>
constexpr bool kPairs = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool kPairs<bf16> = true;
#endif

template <class T>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<float> = true;

DYNCORE_INLINE vf splat(float x) {
  return x - vf{};
}

// Conversions: floats of 16-bit elements, exactly, and back, rounded to nearest even; NaN stays NaN.
template <class T>
DYNCORE_INLINE vf widen(vh bits);
template <class T>
DYNCORE_INLINE vh narrow(vf v);

template <>
DYNCORE_INLINE vf widen<bf16>(vh bits) {
  return (vf)(__builtin_convertvector(bits, vu) << 16);
}
template <>
DYNCORE_INLINE vh narrow<bf16>(vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((v == v) ? rounded : quiet, vh);
}

#if defined(__AVX512F__)
template <>
DYNCORE_INLINE vf widen<half>(vh bits) {
  return (vf)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);  // unmasked, g++ 12 gives a false warning
}
template <>
DYNCORE_INLINE vh narrow<half>(vf v) {
  return (vh)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
template <>
DYNCORE_INLINE vf widen<half>(vh bits) {
  return (vf)_mm256_cvtph_ps((__m128i)bits);
}
template <>
DYNCORE_INLINE vh narrow<half>(vf v) {
  return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
template <>
DYNCORE_INLINE vf widen<half>(vh bits) {
  const vu wide = __builtin_convertvector(bits, vu), magnitude = wide & 0x7fffu;
  // The exponent's bias grows from 15 to 127, that of infinity and NaN to the top; a subnormal counts units of 2^-24.
  const vu normal = (magnitude << 13) + (112u << 23), top = normal + (112u << 23);
  const vu subnormal = (vu)(__builtin_convertvector((vi)magnitude, vf) * (1.0f / (1 << 24)));
  const vu value = magnitude < 0x400u ? subnormal : (magnitude < 0x7c00u ? normal : top);
  return (vf)(value | (wide & 0x8000u) << 16);
}
template <>
DYNCORE_INLINE vh narrow<half>(vf v) {
  const vu bits = (vu)v, magnitude = bits & 0x7fffffffu;
  const vu normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the units are 2^-24, which are those of a float in [0.5, 1): adding 0.5 rounds.
  const vu subnormal = (vu)((vf)magnitude + 0.5f) - (126u << 23);
  const vu finite = magnitude < (113u << 23) ? subnormal : normal;  // from 65520 on that is infinity
  const vu limited = magnitude < (143u << 23) ? finite : vu{} + 0x7c00u;
  const vu quiet = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const vu value = magnitude > (255u << 23) ? quiet : limited;
  return __builtin_convertvector(value | ((bits >> 16) & 0x8000u), vh);
}
#endif

DYNCORE_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
DYNCORE_INLINE vf load(const T* p) {
  vh bits;
  std::memcpy(&bits, p, sizeof bits);
  return widen<T>(bits);
}

DYNCORE_INLINE void store(float* p, vf v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
DYNCORE_INLINE void store(T* p, vf v) {
  const vh bits = narrow<T>(v);
  std::memcpy(p, &bits, sizeof bits);
}

// The first n <= VL elements, the others as 0, none for n <= 0; and their store.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
DYNCORE_INLINE __mmask16 lanes_below(int64_t n) {
  return static_cast<__mmask16>((1u << (n > 0 ? n : 0)) - 1);
}
DYNCORE_INLINE vf load_some(const float* p, int64_t n) {
  return (vf)_mm512_maskz_loadu_ps(lanes_below(n), p);
}
template <class T>
DYNCORE_INLINE vf load_some(const T* p, int64_t n) {
  return widen<T>((vh)_mm256_maskz_loadu_epi16(lanes_below(n), p));
}
DYNCORE_INLINE void store_some(float* p, vf v, int64_t n) {
  _mm512_mask_storeu_ps(p, lanes_below(n), (__m512)v);
}
template <class T>
DYNCORE_INLINE void store_some(T* p, vf v, int64_t n) {
  _mm256_mask_storeu_epi16(p, lanes_below(n), (__m256i)narrow<T>(v));
}
#else
template <class T>
DYNCORE_INLINE vf load_some(const T* p, int64_t n) {
  T padded[VL] = {};
  for (int j = 0; j < VL; ++j)
    if (j < n) padded[j] = p[j];
  return load(padded);
}
template <class T>
DYNCORE_INLINE void store_some(T* p, vf v, int64_t n) {
  T padded[VL];
  store(padded, v);
  for (int j = 0; j < VL; ++j)
    if (j < n) p[j] = padded[j];
}
#endif

DYNCORE_INLINE float to_float(float x) {
  return x;
}
template <class T>
DYNCORE_INLINE float to_float(T x) {
  const vf v = widen<T>(vh{} + x.bits);
  return v[0];
}

template <class T>
DYNCORE_INLINE T from_float(float x) {
  const vh bits = narrow<T>(splat(x));
  return T{bits[0]};
}
template <>
DYNCORE_INLINE float from_float<float>(float x) {
  return x;
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
    for (int j = 0; j < NV; ++j) r.v[j] = n >= (j + 1) * VL ? load(p + j * VL) : load_some(p + j * VL, n - j * VL);
  }
  return r;
}

template <class T>
DYNCORE_INLINE void store_row(T* p, const Row& r, int n) {
  if (n == NC) {
    for (int j = 0; j < NV; ++j) store(p + j * VL, r.v[j]);
  } else {
    for (int j = 0; j < NV; ++j) {
      if (n >= (j + 1) * VL) {
        store(p + j * VL, r.v[j]);
      } else {
        store_some(p + j * VL, r.v[j], n - j * VL);
      }
    }
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
