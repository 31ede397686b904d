// Packing a [K, 32] block of the right-hand operand into a panel that the register tile reads in order.
// Panels: float [K][32]; where the processor multiplies bfloat16 pairs, words [ceil(K/2)][32] of two bfloat16 of
// consecutive k (the second 0 where K is odd). Absent columns are 0.
#pragma once
#include <utility>

#include "cpu/common/vec.h"

namespace dyncore::DYNCORE_ISA {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DYNCORE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#if !defined(DYNCORE_SHUFFLE)
#define DYNCORE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

// One butterfly of a VL x VL transpose: exchanges the off-diagonal S x S blocks of rows a and b, S apart.
template <int S, int... J>
DYNCORE_INLINE void exchange(vf& a, vf& b, std::integer_sequence<int, J...>) {
  const vf low = DYNCORE_SHUFFLE(a, b, ((J & S) ? VL + J - S : J)...);
  const vf high = DYNCORE_SHUFFLE(a, b, ((J & S) ? VL + J : J + S)...);
  a = low;
  b = high;
}

template <int S>
DYNCORE_INLINE void transpose_from(vf (&r)[VL]) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i)
      if ((i & S) == 0) exchange<S>(r[i], r[i + S], std::make_integer_sequence<int, VL>{});
    transpose_from<S / 2>(r);
  }
}

DYNCORE_INLINE void transpose(vf (&r)[VL]) {
  transpose_from<VL / 2>(r);
}

// panel[k][j] = row j's word k, for j < n. `Word` is what a panel's element is made of: float, or a narrower type that
// becomes float, or a pair of bfloat16 (passed as float: only moved, never computed with).
template <class Word>
inline void pack_transposed(float* panel, const Word* b, int64_t stride_words, int64_t words, int n) {
  for (int j0 = 0; j0 < NC; j0 += VL) {
    const int have = n - j0 < VL ? n - j0 : VL;
    int64_t k = 0;
    for (; k + VL <= words; k += VL) {
      vf r[VL];
#pragma GCC unroll 16
      for (int j = 0; j < VL; ++j) r[j] = j < have ? load(b + (j0 + j) * stride_words + k) : vf{};
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) store(panel + (k + i) * NC + j0, r[i]);
    }
    for (; k < words; ++k)
      for (int j = 0; j < VL; ++j) panel[k * NC + j0 + j] = j < have ? to_float(b[(j0 + j) * stride_words + k]) : 0.0f;
  }
}

// The same for bfloat16 pairs; stride in bfloat16, which need not be even.
inline void pack_transposed_pairs(float* panel, const bf16* b, int64_t stride, int64_t depth, int n) {
  const int64_t words = depth / 2;
  for (int j0 = 0; j0 < NC; j0 += VL) {
    const int have = n - j0 < VL ? n - j0 : VL;
    int64_t k = 0;
    for (; k + VL <= words; k += VL) {
      vf r[VL];
#pragma GCC unroll 16
      for (int j = 0; j < VL; ++j) {
        r[j] = vf{};
        if (j < have) std::memcpy(&r[j], b + (j0 + j) * stride + 2 * k, sizeof(vf));
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) store(panel + (k + i) * NC + j0, r[i]);
    }
    for (; 2 * k < depth; ++k) {
      for (int j = 0; j < VL; ++j) {
        bf16 pair[2] = {};
        if (j < have) {
          const bf16* at = b + (j0 + j) * stride + 2 * k;
          pair[0] = at[0];
          if (2 * k + 1 < depth) pair[1] = at[1];
        }
        std::memcpy(panel + k * NC + j0 + j, pair, 4);
      }
    }
  }
}

// panel[k] = row k of b, or row index[k] where an index is given; rows of n <= 32 columns.
template <class T>
inline void pack_rows(float* panel, const T* b, int64_t stride, const int32_t* index, int64_t depth, int n) {
  for (int64_t k = 0; k < depth; ++k) store_row(panel + k * NC, load_row(b + (index ? index[k] : k) * stride, n), NC);
}

#if defined(__AVX512BF16__)
// The words of 32 columns of two rows; the second is 0 where there is none.
DYNCORE_INLINE void interleave(const bf16* first, const bf16* second, vf& low, vf& high) {
  alignas(64) static constexpr uint16_t kOrder[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                                      16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                      24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i a = _mm512_loadu_si512(first), b = second ? _mm512_loadu_si512(second) : __m512i{};
  low = (vf)_mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder), b);
  high = (vf)_mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder + 32), b);
}
#endif

inline void pack_rows_pairs(float* panel, const bf16* b, int64_t stride, const int32_t* index, int64_t depth, int n) {
  for (int64_t k = 0; k < depth; k += 2) {
    const bf16* first = b + (index ? index[k] : k) * stride;
    const bf16* second = k + 1 < depth ? b + (index ? index[k + 1] : k + 1) * stride : nullptr;
    Row words;
#if defined(__AVX512BF16__)
    if (n == NC) {
      interleave(first, second, words.v[0], words.v[1]);
      store_row(panel + k / 2 * NC, words, NC);
      continue;
    }
#endif
    const Row low = load_row(first, n), high = second ? load_row(second, n) : zero_row();
    for (int j = 0; j < NV; ++j) words.v[j] = (vf)(((vu)low.v[j] >> 16) | (vu)high.v[j]);
    store_row(panel + k / 2 * NC, words, NC);
  }
}

}  // namespace dyncore::DYNCORE_ISA
