// What attention's two directions share. Queries stand in the lanes, 32 at a time, and keys in the rows of a register
// tile: scores come out as [keys][32 queries], so that the softmax needs no sums across lanes, and they are the packed
// panel of the next product, with V transposed, as they lie.
// Bound by the multiply-adds: keys and values are read once for 32 queries, 2 bytes a cycle.
#pragma once
#include "common/threads.h"
#include "cpu/common/dtype.h"
#include "cpu/common/group.h"
#include "cpu/common/sums.h"

namespace dyncore::DYNCORE_ISA {

// What elements are multiplied as.
template <class T, bool pairs = kPairs<T>>
struct Multiplied {
  using C = float;
};
template <class T>
struct Multiplied<T, true> {
  using C = T;
};

// Keys that are worked on at a time; a chain of roundings is no longer.
constexpr int64_t kKeys = 128;
// Transposed rows of so many keys: 64 bytes apart from a power of two, which would crowd one set of the L1 cache.
template <class C>
constexpr int64_t kKeyStride = kKeys + 64 / static_cast<int64_t>(sizeof(C));

inline int64_t key_blocks(int64_t keys) {
  return (keys + kKeys - 1) / kKeys;
}

// Rows in scratch memory: whole vectors, and no power of two apart.
template <class C>
inline int64_t row_stride(int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(C);
  const int64_t lines = (width + kLine - 1) / kLine;
  return (lines + (lines % 8 == 0)) * kLine;
}

// 2^x for x <= 128 with relative error below 1e-7; 0 below -125. NaN stays NaN.
DYNCORE_INLINE vf exp2(vf x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low mantissa bits
  const vf low = splat(-125.0f);
  const vf clamped = x < low ? low : x;
  const vf shifted = clamped + kRound;
  const vf r = clamped - (shifted - kRound);
  // fitted on |r| <= 1/2 to 2e-9
  vf p = r * 1.534581097e-04f + 1.339993090e-03f;
  p = p * r + 9.618489072e-03f;
  p = p * r + 5.550328642e-02f;
  p = p * r + 2.402264625e-01f;
  p = p * r + 6.931471825e-01f;
  p = p * r + 1.0f;
  const vf power = p * (vf)(((vi)shifted + 127) << 23);
  return x < low ? vf{} : power;
}

// Two rows of 32 floats as the words of one row of a panel of pairs.
#if defined(__AVX512BF16__)
DYNCORE_INLINE Row words_of(const Row& first, const Row& second) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  Row words;
  for (int j = 0; j < NV; ++j) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second.v[j], (__m512)first.v[j]);
    words.v[j] = (vf)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
  }
  return words;
}
#endif

template <class T, class C>
DYNCORE_INLINE void copy_row(C* to, const T* from, int64_t width) {
  if constexpr (sizeof(T) == sizeof(C)) {
    std::memcpy(to, from, width * sizeof(C));
  } else {
    widen_row(to, from, width);
  }
}

// to[e][j] = rows[index[j]][e] for count rows of `width`, 0 for those up to the next multiple of VL.
template <class T, class C>
inline void transpose_rows(C* to, int64_t to_stride, const T* rows, int64_t stride, const int32_t* index, int64_t count,
                           int64_t width) {
  for (int64_t j = 0; j < count; j += VL) {
    const int have = static_cast<int>(count - j < VL ? count - j : VL);
    for (int64_t e = 0; e < width; e += VL) {
      const int wide = static_cast<int>(width - e < VL ? width - e : VL);
      vf r[VL];
      for (int i = 0; i < VL; ++i) {
        r[i] = vf{};
        if (i < have) {
          const T* from = rows + index[j + i] * stride + e;
          r[i] = wide == VL ? load(from) : load_some(from, wide);
        }
      }
      transpose(r);
      for (int i = 0; i < wide; ++i) store(to + (e + i) * to_stride + j, r[i]);
    }
  }
}

// A block [rows][32 queries] of floats times `factor` of each query, to row index[q] of `to` for the first n queries.
template <class T>
inline void put_transposed(T* to, int64_t stride, const int32_t* index, int n, const float* block, int64_t rows,
                           const Row& factor) {
  for (int q0 = 0; q0 < n; q0 += VL) {
    for (int64_t e = 0; e < rows; e += VL) {
      const int wide = static_cast<int>(rows - e < VL ? rows - e : VL);
      vf r[VL];
      for (int i = 0; i < VL; ++i) r[i] = i < wide ? load(block + (e + i) * NC + q0) * factor.v[q0 / VL] : vf{};
      transpose(r);
      for (int i = 0; i < VL && q0 + i < n; ++i) {
        T* at = to + index[q0 + i] * stride + e;
        if (wide == VL) {
          store(at, r[i]);
        } else {
          store_some(at, r[i], wide);
        }
      }
    }
  }
}

// Rows of one head.
template <class T>
DYNCORE_INLINE T* head_of(const Heads& h, int64_t b, int64_t head) {
  return static_cast<T*>(h.data) + b * h.stride_b + head * h.stride_h;
}

// c[m][32] = rows[m][depth] times a panel.
template <class C>
DYNCORE_INLINE void multiply(float* c, const C* rows, int64_t stride, int64_t m, const float* panel, int64_t depth,
                             bool accumulate, int64_t ldb = NC) {
  multiply_panel(c, Left<C>{rows, stride, nullptr}, m, 0, depth, panel, ldb, nullptr, accumulate, NextPanel<C>{});
}

// Queries that stand in the lanes together.
struct Lanes {
  int count;       // at most 32
  int64_t most;    // keys that any of them attends to
  int64_t fewest;  // keys that all of them attend to
  vi limits[NV];

  // The first is `limits[0]`, and they fall; lanes without a query attend to what the first does, for nobody.
  Lanes(const int32_t* falling, int n) : count(n), most(falling[0]), fewest(falling[n - 1]) {
    int32_t lanes[NC];
    for (int i = 0; i < NC; ++i) lanes[i] = i < n ? falling[i] : falling[0];
    std::memcpy(limits, lanes, sizeof lanes);
  }
};

}  // namespace dyncore::DYNCORE_ISA
