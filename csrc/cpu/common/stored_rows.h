// Products whose right operand is stored with its columns side by side, as the weights are in gradients of x: few rows
// of the left operand read it where it lies, many read packed panels. Either way the next 32 columns are fetched from
// the same rows meanwhile, since such a panel is a narrow strip of memory that nothing else would fetch in time.
// Bound by reading the weights where a group has few rows (26 of 28 GB/s with 2 threads), then by the multiply-adds.
#pragma once
#include "cpu/common/product.h"

namespace dyncore::DYNCORE_ISA {

// Cache lines in a row of 32 columns.
template <class T>
constexpr int kRowLines = NC * static_cast<int>(sizeof(T)) / 64;

// b's rows k and, for pairs, k + 1 as two vectors of words.
template <class T>
DYNCORE_INLINE void load_words(const T* b, int64_t ldb, bool second, vf& low, vf& high) {
  if constexpr (kPairs<T>) {
    interleave(b, second ? b + ldb : nullptr, low, high);
  } else {
    low = load(b);
    high = load(b + VL);
  }
}

// c[r][0:32] (+)= sum_k rows[r][k] * b[k][0:32], where b's rows lie ldb apart; `fetch`: 32 columns further on as well.
template <int R, class T, class E>
inline __attribute__((noinline)) void tile_in_place(const E* const* rows, const T* b, int64_t ldb, int64_t depth,
                                                    float* c, bool accumulate, bool fetch) {
  constexpr int kStep = kPairs<T> ? 2 : 1;
  for (int j0 = 0; j0 < NC; j0 += 2 * VL) {
    vf acc[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      acc[r][0] = vf{};
      acc[r][1] = vf{};
    }
    const T* bk = b + j0;
    for (int64_t k = 0; k < depth; k += kStep, bk += kStep * ldb) {
      if (fetch && j0 == 0) {
#pragma GCC unroll 2
        for (int i = 0; i < kStep; ++i)
#pragma GCC unroll 2
          for (int line = 0; line < kRowLines<T>; ++line)
            __builtin_prefetch(reinterpret_cast<const char*>(bk + i * ldb + NC) + 64 * line, 0, 2);
      }
      vf b0, b1;
      const bool second = k + 1 < depth;
      load_words(bk, ldb, second, b0, b1);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        if constexpr (kPairs<T>) {
#if defined(__AVX512BF16__)
          int32_t word;
          if (second) {
            std::memcpy(&word, rows[r] + k, 4);
          } else {
            word = rows[r][k].bits;
          }
          const __m512bh a = (__m512bh)_mm512_set1_epi32(word);
          acc[r][0] = (vf)_mm512_dpbf16_ps((__m512)acc[r][0], a, (__m512bh)b0);
          acc[r][1] = (vf)_mm512_dpbf16_ps((__m512)acc[r][1], a, (__m512bh)b1);
#endif
        } else {
          const vf a = splat(rows[r][k]);
          acc[r][0] += a * b0;
          acc[r][1] += a * b1;
        }
      }
    }
    store_tile<R>(c + j0, acc, accumulate);
  }
}

template <int R, class T, class E>
DYNCORE_INLINE void tile_in_place_dispatch(int count, const E* const* rows, const T* b, int64_t ldb, int64_t depth,
                                           float* c, bool accumulate, bool fetch) {
  if constexpr (R > 1) {
    if (count < R) return tile_in_place_dispatch<R - 1>(count, rows, b, ldb, depth, c, accumulate, fetch);
  }
  tile_in_place<R>(rows, b, ldb, depth, c, accumulate, fetch);
}

// At most TR rows; the same sums in the same order as of packed panels.
template <class T>
inline void multiply_in_place(float* c, Left<T> a, int m, int64_t depth, const T* b, int64_t ldb, float* widened,
                              bool fetch) {
  for (int64_t k0 = 0; k0 < depth; k0 += KC) {
    const int64_t block = depth - k0 < KC ? depth - k0 : KC;
    float block_sums[TR * NC];
    float* sums = k0 > 0 ? block_sums : c;
    const T* at[TR];
    const float* wide[TR];
    for (int r = 0; r < m; ++r) {
      at[r] = a.row(r) + k0;
      if constexpr (kWidenRows<T>) wide[r] = widen_row(widened + r * (block + kWideGap), at[r], block);
      if constexpr (kIsFloat<T>) wide[r] = at[r];
    }
    for (int64_t k = 0; k < block; k += kChainDepth) {
      const int64_t chain = block - k < kChainDepth ? block - k : kChainDepth;
      const T* bk = b + (k0 + k) * ldb;
      if constexpr (kPairs<T>) {
        tile_in_place_dispatch<TR>(m, at, bk, ldb, chain, sums, k > 0, fetch);
      } else {
        tile_in_place_dispatch<TR>(m, wide, bk, ldb, chain, sums, k > 0, fetch);
      }
      for (int r = 0; r < m && k + chain < block; ++r) {
        at[r] += chain;
        if constexpr (!kPairs<T>) wide[r] += chain;
      }
    }
    if (k0 > 0)
      for (int j = 0; j < m * NC; j += VL) store(c + j, load(c + j) + load(sums + j));
  }
}

// The next 32 columns of `depth` rows, fetched by the tiles of a panel in equal parts.
template <class T>
struct NextColumns {
  const T* data;  // null: none
  int64_t stride, depth;

  Fetch share(int64_t t, int64_t tiles, int) const {
    if (!data) return {};
    // A tile makes 16 words of depth between two fetches; tiles are shared out to the lines of a row first.
    const int64_t steps = ((kPairs<T> ? (depth + 1) / 2 : depth) + 15) / 16,
                  lines = kRowLines<T> < tiles ? kRowLines<T> : tiles;
    const int64_t line = t * lines / tiles, first = (line * tiles + lines - 1) / lines;
    const int64_t sharers = ((line + 1) * tiles + lines - 1) / lines - first;
    const int64_t rows = (depth + steps * sharers - 1) / (steps * sharers), row_bytes = stride * sizeof(T);
    return {reinterpret_cast<uintptr_t>(data) + line * 64 + (t - first) * rows * steps * row_bytes, row_bytes,
            static_cast<int>(rows), static_cast<int>(rows * row_bytes)};
  }
};

// c[m][32] = a[m][depth] b[depth][n] for a right operand of either layout without an index; see product.
template <class T>
inline void weight_product(float* c, Left<T> a, int64_t m, int64_t depth, Right<T> b, int n,
                           const PanelBuffers& buffers, const Place& place) {
  if (m == 0) return;  // a part of a piece with fewer rows than parts
  if (b.stride_n != 1 || b.panels || depth == 0) return product(c, a, m, depth, b, n, buffers, place);
  if (m <= TR && n == NC)
    return multiply_in_place(c, a, static_cast<int>(m), depth, b.data, b.stride_k, buffers.rows, place.next != nullptr);
  for (int64_t k0 = 0; k0 < depth; k0 += KC) {
    const int64_t block = depth - k0 < KC ? depth - k0 : KC;
    pack(buffers.panel, b, k0, block, n);
    const T* columns = static_cast<const T*>(place.next);
    const NextColumns<T> next{columns ? columns + k0 * b.stride_k : nullptr, b.stride_k, block};
    if (columns && columns != b.data + NC) walk_to_pages(next.data, block, b.stride_k);  // another group's
    multiply_panel(c, a, m, k0, block, buffers.panel, NC, buffers.rows, k0 > 0, next);
  }
}

}  // namespace dyncore::DYNCORE_ISA
