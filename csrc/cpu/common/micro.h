// Register tiles: R rows times a packed panel of 32 columns, and the dot form, which reads both operands along k.
// The rows of the left operand are read where they lie, through one pointer each, so gathering them costs nothing.
// Bound by the multiply-adds: R x 2 of them for R + 2 loads.
#pragma once
#include "cpu/common/pack.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace dyncore::DYNCORE_ISA {

// c[r][0:2*VL] (+)= acc[r] for R rows.
template <int R>
DYNCORE_INLINE void store_tile(float* c, vf (&acc)[R][2], bool accumulate) {
  if (accumulate) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      acc[r][0] += load(c + r * NC);
      acc[r][1] += load(c + r * NC + VL);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    store(c + r * NC, acc[r][0]);
    store(c + r * NC + VL, acc[r][1]);
  }
}

// Weights that will be packed next: some rows of them, fetched into the L2 cache while a tile is made, a line of each
// row with every 16 steps of k.
struct Fetch {
  uintptr_t at;    // an address: it may lie past the weights' end
  int64_t stride;  // bytes
  int rows;
  int step;  // bytes with every 16 steps of k

  DYNCORE_INLINE void operator()(int64_t k) const {
    for (int i = 0; i < rows; ++i)
      __builtin_prefetch(reinterpret_cast<const char*>(at + i * stride + k / 16 * step), 0, 2);
  }
  void advance(int64_t k) { at += k / 16 * step; }
};

// c[r][0:32] (+)= sum_k rows[r][k] * b[k][0:32]; b's rows are ldb apart. What c held is added last, so that the sum
// over k does not lengthen the chain of roundings that made it.
template <int R>
inline __attribute__((noinline)) void tile(const float* const* rows, const float* b, int64_t ldb, int64_t depth,
                                           float* c, bool accumulate, const Fetch& fetch) {
  for (int j0 = 0; j0 < NC; j0 += 2 * VL) {
    vf acc[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      acc[r][0] = vf{};
      acc[r][1] = vf{};
    }
    const float* bk = b + j0;
    for (int64_t k0 = 0; k0 < depth; k0 += 16) {
      if (j0 == 0) fetch(k0);
      const int64_t end = k0 + 16 < depth ? k0 + 16 : depth;
      for (int64_t k = k0; k < end; ++k, bk += ldb) {
        const vf b0 = load(bk), b1 = load(bk + VL);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const vf a = splat(rows[r][k]);
          acc[r][0] += a * b0;
          acc[r][1] += a * b1;
        }
      }
    }
    store_tile<R>(c + j0, acc, accumulate);
  }
}

#if defined(__AVX512BF16__)
// The same from pairs of bfloat16: b is [ceil(depth/2)][32] words.
template <int R>
inline __attribute__((noinline)) void tile_pairs(const bf16* const* rows, const float* b, int64_t depth, float* c,
                                                 bool accumulate, const Fetch& fetch) {
  vf acc[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    acc[r][0] = vf{};
    acc[r][1] = vf{};
  }
  const int64_t words = depth / 2;
  for (int64_t k0 = 0; k0 < words; k0 += 16) {
    fetch(k0);
    const int64_t end = k0 + 16 < words ? k0 + 16 : words;
    for (int64_t k = k0; k < end; ++k) {
      const __m512bh b0 = (__m512bh)load(b + k * NC), b1 = (__m512bh)load(b + k * NC + VL);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        int32_t word;
        std::memcpy(&word, rows[r] + 2 * k, 4);
        const __m512bh a = (__m512bh)_mm512_set1_epi32(word);
        acc[r][0] = (vf)_mm512_dpbf16_ps((__m512)acc[r][0], a, b0);
        acc[r][1] = (vf)_mm512_dpbf16_ps((__m512)acc[r][1], a, b1);
      }
    }
  }
  if (depth % 2) {
    const __m512bh b0 = (__m512bh)load(b + words * NC), b1 = (__m512bh)load(b + words * NC + VL);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(rows[r][2 * words].bits);
      acc[r][0] = (vf)_mm512_dpbf16_ps((__m512)acc[r][0], a, b0);
      acc[r][1] = (vf)_mm512_dpbf16_ps((__m512)acc[r][1], a, b1);
    }
  }
  store_tile<R>(c, acc, accumulate);
}
#endif

// Adds neighbouring lanes of a and b: [a0+a1, a2+a3, ..., b0+b1, ...].
template <int... J>
DYNCORE_INLINE vf add_neighbours(vf a, vf b, std::integer_sequence<int, J...>) {
  return DYNCORE_SHUFFLE(a, b, (2 * J)...) + DYNCORE_SHUFFLE(a, b, (2 * J + 1)...);
}

// Lane j of the result is the sum of all lanes of v[j].
DYNCORE_INLINE vf sum_each(vf (&v)[VL]) {
#pragma GCC unroll 4
  for (int width = VL / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
    for (int j = 0; j < width; ++j)
      v[j] = add_neighbours(v[2 * j], v[2 * j + 1], std::make_integer_sequence<int, VL>{});
  }
  return v[0];
}

#if defined(__AVX512F__)
constexpr int DR = 4, DC = 4;  // rows and columns of the dot form's tile
#else
constexpr int DR = 2, DC = 4;
#endif

// Weights that the dot form will need next: fetched into the L2 cache while it works on the present ones.
template <class T>
struct Ahead {
  uintptr_t at[DC];  // addresses: they may lie past the weights' end
  int count;

  DYNCORE_INLINE void fetch(int64_t k) const {
    for (int i = 0; i < count; ++i) __builtin_prefetch(reinterpret_cast<const char*>(at[i] + k * sizeof(T)), 0, 2);
  }
};

// c[r][j] = sum_k a[r][k] * b[j][k] for R rows and C columns.
template <int R, int C, class T>
inline __attribute__((noinline)) void dot_tile(const T* const* a, const T* const* b, int64_t depth, float* c,
                                               const Ahead<T>& ahead) {
  vf acc[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) acc[r][j] = vf{};
  int64_t k = 0;
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) {
    for (; k + 2 * VL <= depth; k += 2 * VL) {
      ahead.fetch(k);
      __m512bh w[C];
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) w[j] = (__m512bh)_mm512_loadu_si512(b[j] + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512bh x = (__m512bh)_mm512_loadu_si512(a[r] + k);
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) acc[r][j] = (vf)_mm512_dpbf16_ps((__m512)acc[r][j], x, w[j]);
      }
    }
  }
#endif
  for (; k + VL <= depth; k += VL) {
    ahead.fetch(k);
    vf w[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) w[j] = load(b[j] + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf x = load(a[r] + k);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) acc[r][j] += x * w[j];
    }
  }
  if (k < depth) {
    vf w[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) w[j] = load_some(b[j] + k, depth - k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf x = load_some(a[r] + k, depth - k);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) acc[r][j] += x * w[j];
    }
  }
  constexpr int kGroups = (R * C + VL - 1) / VL;
  float sums[kGroups * VL];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    vf part[VL];
#pragma GCC unroll 16
    for (int j = 0; j < VL; ++j) {
      const int at = g * VL + j;
      part[j] = at < R * C ? acc[at / C][at % C] : vf{};
    }
    store(sums + g * VL, sum_each(part));
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) c[r * NC + j] = sums[r * C + j];
}

// How far ahead in a column dot_line fetches, and beyond its end those that lie behind it.
constexpr int64_t kLineAhead = 4096;

// c[r] = sum_k a[r][k] * b[k], r NC apart, for R rows and one column: in the order of memory, which a row or two read
// faster than four columns at a time (MoE of 1 to 5 rows a group, H=512, 2 threads, cold: float 27.2 and 31.4 GB/s, 1
// or 2 bfloat16 rows 39 and 48).
template <int R, class T>
inline __attribute__((noinline)) void dot_line(const T* const* a, const T* b, int64_t depth, float* c) {
  constexpr int kLines = 4;
  vf acc[R][kLines];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kLines; ++j) acc[r][j] = vf{};
  int64_t k = 0;
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) {
    for (; k + kLines * 2 * VL <= depth; k += kLines * 2 * VL) {
#pragma GCC unroll 4
      for (int j = 0; j < kLines; ++j) {
        const T* at = b + k + j * 2 * VL;
        __builtin_prefetch(reinterpret_cast<const char*>(at) + kLineAhead, 0, 2);
        const __m512bh w = (__m512bh)_mm512_loadu_si512(at);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          acc[r][j] = (vf)_mm512_dpbf16_ps((__m512)acc[r][j], (__m512bh)_mm512_loadu_si512(a[r] + k + j * 2 * VL), w);
      }
    }
  }
#endif
  for (; k + kLines * VL <= depth; k += kLines * VL) {
#pragma GCC unroll 4
    for (int j = 0; j < kLines; ++j) {
      const T* at = b + k + j * VL;
      __builtin_prefetch(reinterpret_cast<const char*>(at) + kLineAhead, 0, 2);
      const vf w = load(at);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][j] += load(a[r] + k + j * VL) * w;
    }
  }
  for (; k < depth; k += VL) {
    const int64_t some = depth - k < VL ? depth - k : VL;
    const vf w = load_some(b + k, some);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r][0] += load_some(a[r] + k, some) * w;
  }
  for (int r = 0; r < R; ++r) c[r * NC] = sum((acc[r][0] + acc[r][1]) + (acc[r][2] + acc[r][3]));
}

}  // namespace dyncore::DYNCORE_ISA
