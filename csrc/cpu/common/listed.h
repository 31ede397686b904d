// Register tiles over listed rows of the right operand: their weighted sum for a row of the left one, and its dot
// products with them. The row's 16 vectors stay in registers, so every loaded vector is multiplied once: bound by
// reading the right operand from the L2 cache, at 50-60% of the rate of a dense tile (Zen 4, one thread, 512 rows of
// which 10% are listed: sums 56 GFLOP/s float, 93 bfloat16 pairs; dots 51 and 102).
#pragma once
#include "cpu/common/product.h"

namespace dyncore::DYNCORE_ISA {

#if defined(__AVX512F__)
constexpr int kListVectors = 16;
#else
constexpr int kListVectors = 8;  // of 16 registers
#endif

// What a list's values are multiplied as.
template <class T>
struct ListValue {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct ListValue<bf16> {
  using type = bf16;
};
#endif
template <class T>
using Value = typename ListValue<T>::type;

// Columns that one call takes at most: sums have an accumulator for each vector, dots hold the row's vectors, in which
// a pair is one lane.
constexpr int64_t kSumColumns = kListVectors * VL;
template <class T>
constexpr int64_t kDotColumns = kSumColumns * (kPairs<T> ? 2 : 1);

// Rows `index[0:count]` of a matrix, each with a value.
template <class T>
struct List {
  const int32_t* index;
  const Value<T>* value;
  int64_t count;
};

#if defined(__AVX512BF16__)
// Unpacking leaves the columns of a pair of vectors in the order 0-3, 8-11, 16-19, 24-27 | 4-7, 12-15, ...
DYNCORE_INLINE void order_unpacked(vf& a, vf& b) {
  const vf low = a, high = b;
  a = DYNCORE_SHUFFLE(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  b = DYNCORE_SHUFFLE(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
}
#endif

// c[0:V*VL] (+)= sum over the list of value * b[index]. What c held is added last, as in store_tile.
template <int V, class T>
inline __attribute__((noinline)) void add_listed(const List<T>& list, const T* b, int64_t ldb, float* c,
                                                 bool accumulate) {
  vf acc[V];
#pragma GCC unroll 16
  for (int j = 0; j < V; ++j) acc[j] = vf{};
  int64_t k = 0;
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) {
    static_assert(V % 2 == 0);
    const auto pair = [&](const T* first, const T* second, int32_t word) DYNCORE_INLINE_LAMBDA {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(word);
#pragma GCC unroll 16
      for (int j = 0; j < V; j += 2) {
        const __m512i p = _mm512_loadu_si512(first + j * VL);
        const __m512i q = second ? _mm512_loadu_si512(second + j * VL) : __m512i{};
        acc[j] = (vf)_mm512_dpbf16_ps((__m512)acc[j], a, (__m512bh)_mm512_unpacklo_epi16(p, q));
        acc[j + 1] = (vf)_mm512_dpbf16_ps((__m512)acc[j + 1], a, (__m512bh)_mm512_unpackhi_epi16(p, q));
      }
    };
    for (; k + 2 <= list.count; k += 2) {
      int32_t word;
      std::memcpy(&word, list.value + k, 4);
      pair(b + list.index[k] * ldb, b + list.index[k + 1] * ldb, word);
    }
    if (k < list.count) pair(b + list.index[k] * ldb, nullptr, list.value[k].bits);
#pragma GCC unroll 16
    for (int j = 0; j < V; j += 2) order_unpacked(acc[j], acc[j + 1]);
  }
#endif
  if constexpr (!kPairs<T>) {
    for (; k < list.count; ++k) {
      const T* row = b + list.index[k] * ldb;
      const vf a = splat(list.value[k]);
#pragma GCC unroll 16
      for (int j = 0; j < V; ++j) acc[j] += a * load(row + j * VL);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < V; ++j) store(c + j * VL, accumulate ? acc[j] + load(c + j * VL) : acc[j]);
}

// The same for fewer columns than a panel has.
template <class T>
inline __attribute__((noinline)) void add_listed_some(const List<T>& list, const T* b, int64_t ldb, float* c, int n,
                                                      bool accumulate) {
  Row acc = zero_row();
  for (int64_t k = 0; k < list.count; ++k) {
    const Row row = load_row(b + list.index[k] * ldb, n);
    const float a = to_float(list.value[k]);
    for (int j = 0; j < NV; ++j) acc.v[j] += a * row.v[j];
  }
  if (accumulate) acc = load_row(c, n) + acc;
  store_row(c, acc, n);
}

template <int V, class T>
DYNCORE_INLINE void add_listed_columns(const List<T>& list, const T* b, int64_t ldb, float* c, int64_t n,
                                       bool accumulate) {
  for (; n >= V * VL; n -= V * VL, b += V * VL, c += V * VL) add_listed<V>(list, b, ldb, c, accumulate);
  if constexpr (V * VL > NC) {
    add_listed_columns<V / 2>(list, b, ldb, c, n, accumulate);
  } else if (n > 0) {
    add_listed_some(list, b, ldb, c, static_cast<int>(n), accumulate);
  }
}

// Any number of columns.
template <class T>
inline void add_listed_rows(const List<T>& list, const T* b, int64_t ldb, float* c, int64_t n, bool accumulate) {
  if (accumulate && list.count == 0) return;
  add_listed_columns<kListVectors>(list, b, ldb, c, n, accumulate);
}

// So many listed rows are read side by side where one row's sum is all that they serve: as many streams from memory.
constexpr int kStreams = 8;

// c[0:n] += sum over kStreams entries of a list from `at` on, n a multiple of NC; rows of the kStreams after them are
// fetched.
template <class T>
inline __attribute__((noinline)) void stream_listed(const List<T>& list, int64_t at, const T* b, int64_t ldb, float* c,
                                                    int64_t n) {
  const T* rows[kStreams];
  uintptr_t next[kStreams];
#pragma GCC unroll 8
  for (int i = 0; i < kStreams; ++i) {
    const int64_t ahead = at + kStreams + i < list.count ? at + kStreams + i : list.count - 1;
    rows[i] = b + list.index[at + i] * ldb;
    next[i] = reinterpret_cast<uintptr_t>(b + list.index[ahead] * ldb);
  }
  const int64_t lines = NC * static_cast<int64_t>(sizeof(T)) / 64;
  for (int64_t j = 0; j < n; j += NC) {
#pragma GCC unroll 8
    for (int i = 0; i < kStreams; ++i)
      for (int64_t line = 0; line < lines; ++line)
        __builtin_prefetch(reinterpret_cast<const char*>(next[i] + j * sizeof(T)) + 64 * line, 0, 2);
    Row total = zero_row();
#if defined(__AVX512BF16__)
    if constexpr (kPairs<T>) {
      vf low = {}, high = {};
#pragma GCC unroll 4
      for (int i = 0; i < kStreams; i += 2) {
        int32_t word;
        std::memcpy(&word, list.value + at + i, 4);
        const __m512bh a = (__m512bh)_mm512_set1_epi32(word);
        const __m512i p = _mm512_loadu_si512(rows[i] + j), q = _mm512_loadu_si512(rows[i + 1] + j);
        low = (vf)_mm512_dpbf16_ps((__m512)low, a, (__m512bh)_mm512_unpacklo_epi16(p, q));
        high = (vf)_mm512_dpbf16_ps((__m512)high, a, (__m512bh)_mm512_unpackhi_epi16(p, q));
      }
      order_unpacked(low, high);
      total.v[0] = low;
      total.v[1] = high;
    }
#endif
    if constexpr (!kPairs<T>) {
#pragma GCC unroll 8
      for (int i = 0; i < kStreams; ++i) {
        const float a = list.value[at + i];
        for (int v = 0; v < NV; ++v) total.v[v] += a * load(rows[i] + j + v * VL);
      }
    }
    store_row(c + j, load_row(c + j, NC) + total, NC);
  }
}

// Entries that are added to one sum in groups of kStreams, and columns whose sums of later ones are kept beside. All of
// 65536 equal terms in one sum would err by 6.5e-5, more than float's tolerance; so, by 4e-6.
constexpr int64_t kStreamedAtOnce = kStreams * kChainDepth;
constexpr int64_t kStreamedColumns = 1024;

// c[0:n] = sum over at most kStreamedAtOnce entries, n a multiple of NC.
template <class T>
inline void sum_stream_once(const List<T>& list, const T* b, int64_t ldb, float* c, int64_t n) {
  const int64_t streamed = list.count / kStreams * kStreams;
  for (int64_t j = 0; j < n; j += NC) store_row(c + j, zero_row(), NC);
  for (int64_t k = 0; k < streamed; k += kStreams) stream_listed(list, k, b, ldb, c, n);
  const List<T> rest{list.index + streamed, list.value + streamed, list.count - streamed};
  add_listed_rows(rest, b, ldb, c, n, true);
}

// c[0:n] = sum over a list of rows that nothing else reads: bound by memory.
template <class T>
inline void sum_stream(const List<T>& list, const T* b, int64_t ldb, float* c, int64_t n) {
  const int64_t whole = n / NC * NC;
  const auto part = [&](int64_t k, int64_t most) {
    return List<T>{list.index + k, list.value + k, list.count - k < most ? list.count - k : most};
  };
  sum_stream_once(part(0, kStreamedAtOnce), b, ldb, c, whole);
  for (int64_t k = kStreamedAtOnce; k < list.count; k += kStreamedAtOnce)
    for (int64_t j = 0; j < whole; j += kStreamedColumns) {
      alignas(64) float later[kStreamedColumns];
      const int64_t width = whole - j < kStreamedColumns ? whole - j : kStreamedColumns;
      sum_stream_once(part(k, kStreamedAtOnce), b + j, ldb, later, width);
      for (int64_t i = 0; i < width; i += NC)
        store_row(c + j + i, load_row(c + j + i, NC) + load_row(later + i, NC), NC);
    }
  if (whole < n) store_row(c + whole, zero_row(), panel_width(n, whole));
  for (int64_t k = 0; k < list.count && whole < n; k += kChainDepth)
    add_listed_rows(part(k, kChainDepth), b + whole, ldb, c + whole, n - whole, true);
}

// The row a[0:V vectors] of dot_listed in registers.
template <int V, class T>
struct HeldRow {
#if defined(__AVX512BF16__)
  static constexpr bool kHoldsPairs = kPairs<T>;
#else
  static constexpr bool kHoldsPairs = false;
#endif
  vf v[V];

  DYNCORE_INLINE explicit HeldRow(const T* a) {
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) {
      if constexpr (kHoldsPairs) {
        std::memcpy(&v[j], a + j * 2 * VL, sizeof(vf));
      } else {
        v[j] = load(a + j * VL);
      }
    }
  }

  DYNCORE_INLINE vf dot(const T* b) const {
    vf even = vf{}, odd = vf{};
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) {
      vf& sum = j % 2 ? odd : even;
#if defined(__AVX512BF16__)
      if constexpr (kHoldsPairs) {
        sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)v[j], (__m512bh)_mm512_loadu_si512(b + j * 2 * VL));
        continue;
      }
#endif
      sum += v[j] * load(b + j * VL);
    }
    return even + odd;
  }
};

// dots[k] (+)= <a, b[index[k]]> over V vectors, 16 rows of b at a time, whose lanes are summed together.
template <int V, class T>
inline __attribute__((noinline)) void dot_listed(const List<T>& list, const T* a, const T* b, int64_t ldb, float* dots,
                                                 bool accumulate) {
  const HeldRow<V, T> row(a);
  for (int64_t k = 0; k < list.count; k += VL) {
    const int64_t have = list.count - k < VL ? list.count - k : VL;
    vf parts[VL];
    for (int64_t i = 0; i < have; ++i) parts[i] = row.dot(b + list.index[k + i] * ldb);
    for (int64_t i = have; i < VL; ++i) parts[i] = vf{};
    const vf sums = sum_each(parts);
    store_some(dots + k, accumulate ? load_some(dots + k, have) + sums : sums, have);
  }
}

// The same for fewer columns than a panel has.
template <class T>
inline __attribute__((noinline)) void dot_listed_some(const List<T>& list, const T* a, const T* b, int64_t ldb,
                                                      float* dots, int n, bool accumulate) {
  const Row row = load_row(a, n);
  for (int64_t k = 0; k < list.count; ++k) {
    const Row other = load_row(b + list.index[k] * ldb, n);
    vf products = {};
    for (int j = 0; j < NV; ++j) products += row.v[j] * other.v[j];
    dots[k] = accumulate ? dots[k] + sum(products) : sum(products);
  }
}

template <int V, class T>
DYNCORE_INLINE void dot_listed_columns(const List<T>& list, const T* a, const T* b, int64_t ldb, float* dots, int64_t n,
                                       bool accumulate) {
  constexpr int64_t kColumns = V * VL * (kPairs<T> ? 2 : 1);
  for (; n >= kColumns; n -= kColumns, a += kColumns, b += kColumns, accumulate = true)
    dot_listed<V>(list, a, b, ldb, dots, accumulate);
  if constexpr (kColumns > NC) {
    dot_listed_columns<V / 2>(list, a, b, ldb, dots, n, accumulate);
  } else if (n > 0) {
    dot_listed_some(list, a, b, ldb, dots, static_cast<int>(n), accumulate);
  }
}

// dots[k] (+)= <a, b[index[k]]> over n columns, for the whole list; its values are not read.
template <class T>
inline void dot_listed_rows(const List<T>& list, const T* a, const T* b, int64_t ldb, float* dots, int64_t n,
                            bool accumulate) {
  if (list.count == 0) return;
  if (n == 0 && !accumulate) std::memset(dots, 0, list.count * sizeof(float));
  dot_listed_columns<kListVectors>(list, a, b, ldb, dots, n, accumulate);
}

}  // namespace dyncore::DYNCORE_ISA
