// The one product behind every grouped op: c[m][32] = rows[m][K] times a panel of 32 columns of the right operand.
// The result is float, for an epilogue to finish.
#pragma once
#include "cpu/common/micro.h"

namespace dyncore::DYNCORE_ISA {

// Below so many rows packing costs more than it saves, and the dot form reads the weights as they lie. Measured on Zen
// 4 (H = 1024, I = 4096, cold weights, dot against packed at 32, 48, 64 rows): float 145/145, 162/166, 169/181 GFLOP/s,
// bfloat16 pairs 314/298, 340/322, 345/367; in cache the dot form reaches 200 at 16 rows, the packed one 160. Without
// pairs the dot form converts every 16-bit weight for every 4 rows.
template <class T>
constexpr int64_t kDotRows = kIsFloat<T> || kPairs<T> ? 49 : 12;
// From so many rows on, panels that are packed already are used, where there are some. Measured on Zen 4 with 2 threads
// (H = 512, I = 2048, against the dot form in a cold and a warm cache): 1 row 0.97/0.98 float and 1.00/1.07 bfloat16
// pairs, 8 rows 1.05/1.12 and 1.22/1.05, 32 rows 1.09/1.11 and 1.15/1.13. Panels of 16-bit weights without pairs are
// float, twice the bytes to read.
template <class T>
constexpr int64_t kPackedRows = kIsFloat<T> || kPairs<T> ? 1 : 12;
// The rows are read again for every 4 columns, so a block of them along k must stay in the L2 cache.
constexpr int64_t kDotBytes = 512 << 10;
// How far ahead of their use weights are fetched into the L2 cache: further than memory's latency, and past the page at
// whose end the processor's own prefetching stops.
constexpr int64_t kAheadBytes = 16 << 10;
// Depth of a packed panel: 128 KB of float, an eighth of a common L2 cache, which holds the next weights too.
constexpr int64_t KC = 1024;
// A sum over k is made in chains of this many terms, which add up to panels, which add up to the whole: in one chain
// the roundings of 65536 equal terms come to 6e-4. Costs 1% of the time of a product.
constexpr int64_t kChainDepth = 512;
constexpr int64_t kDotDepth = 256 * VL;  // the dot form has a chain in every lane

// Left operand: row r is data + (index ? index[r] : r) * stride, contiguous along k.
template <class T>
struct Left {
  const T* data;
  int64_t stride;
  const int32_t* index;

  const T* row(int64_t r) const { return data + (index ? index[r] : r) * stride; }
  Left from(int64_t r) const { return index ? Left{data, stride, index + r} : Left{row(r), stride, nullptr}; }
};

// Right operand: element (k, n) is data + (index ? index[k] : k) * stride_k + n * stride_n. One stride is 1; an index
// goes with stride_n == 1.
template <class T>
struct Right {
  const T* data;
  int64_t stride_n, stride_k;
  const int32_t* index;
  const float* panels = nullptr;  // the columns packed already, or null
  int64_t panel = 0;              // words of a panel

  // n is a multiple of 32, or where the second half of a gated weight begins: its panels follow those of the first.
  Right from_column(int64_t n) const {
    return {
        data + n * stride_n, stride_n, stride_k, index, panels ? panels + (n + NC - 1) / NC * panel : nullptr, panel};
  }
};

// What a thread needs to compute products.
struct PanelBuffers {
  float* panel;  // [KC][32]
  float* rows;   // [TR][KC + kWideGap], where rows of a narrower type are made float
};

// Words between widened rows: rows of 4096 bytes would share one set of the L1 cache.
constexpr int64_t kWideGap = 16;

template <class T>
constexpr bool kWidenRows = !kIsFloat<T> && !kPairs<T>;

template <class T>
inline size_t panel_bytes(int64_t depth) {
  const size_t k = depth < KC ? depth + 1 : KC;
  return k * NC * sizeof(float);
}

template <class T>
inline size_t rows_bytes(int64_t depth) {
  return kWidenRows<T> ? ((depth < KC ? depth : KC) + kWideGap) * TR * sizeof(float) : 0;
}

template <int R>
DYNCORE_INLINE void tile_dispatch(int rows, const float* const* a, const float* b, int64_t ldb, int64_t depth, float* c,
                                  bool accumulate, const Fetch& fetch) {
  if constexpr (R > 1) {
    if (rows < R) return tile_dispatch<R - 1>(rows, a, b, ldb, depth, c, accumulate, fetch);
  }
  tile<R>(a, b, ldb, depth, c, accumulate, fetch);
}

#if defined(__AVX512BF16__)
template <int R>
DYNCORE_INLINE void tile_pairs_dispatch(int rows, const bf16* const* a, const float* b, int64_t depth, float* c,
                                        bool accumulate, const Fetch& fetch) {
  if constexpr (R > 1) {
    if (rows < R) return tile_pairs_dispatch<R - 1>(rows, a, b, depth, c, accumulate, fetch);
  }
  tile_pairs<R>(a, b, depth, c, accumulate, fetch);
}
#endif

template <class T>
inline void pack(float* panel, Right<T> b, int64_t k0, int64_t depth, int n) {
  const int32_t* index = b.index ? b.index + k0 : nullptr;
  const T* data = b.index ? b.data : b.data + k0 * b.stride_k;
  if constexpr (kPairs<T>) {
    if (b.stride_n == 1) return pack_rows_pairs(panel, data, b.stride_k, index, depth, n);
    return pack_transposed_pairs(panel, data, b.stride_n, depth, n);
  } else {
    if (b.stride_n == 1) return pack_rows(panel, data, b.stride_k, index, depth, n);
    return pack_transposed(panel, data, b.stride_n, depth, n);
  }
}

template <class T>
inline const float* widen_row(float* to, const T* row, int64_t depth) {
  int64_t k = 0;
  for (; k + VL <= depth; k += VL) store(to + k, load(row + k));
  if (k < depth) store_some(to + k, load_some(row + k, depth - k), depth - k);
  return to;
}

// sums[r][0:32] = sum_k rows[r][k] * b[k][0:32] for at most MR rows; moves the pointers to the rows.
template <class T>
inline void multiply_chains(int rows, const T** at, const float* b, int64_t ldb, int64_t depth, float* sums,
                            Fetch fetch) {
  for (int64_t k = 0; k < depth; k += kChainDepth, fetch.advance(kPairs<T> ? kChainDepth / 2 : kChainDepth)) {
    const int64_t chain = depth - k < kChainDepth ? depth - k : kChainDepth;
    if constexpr (kIsFloat<T>) {
      tile_dispatch<MR>(rows, at, b + k * ldb, ldb, chain, sums, k > 0, fetch);
    } else {
#if defined(__AVX512BF16__)
      tile_pairs_dispatch<MR>(rows, at, b + k / 2 * NC, chain, sums, k > 0, fetch);
#endif
    }
    if (k + chain < depth)
      for (int r = 0; r < rows; ++r) at[r] += chain;
  }
}

// A walk to a page that the TLB does not hold stops the multiply-adds for some 130 ns; walks that begin together
// overlap. Begun before a panel's tiles fetch the next one, they take 5% off a MoE forward pass of 64 cold rows a
// group.
template <class T>
inline void walk_to_pages(const T* data, int64_t rows, int64_t stride) {
  const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(T)), step = row_bytes < 4096 ? 4096 : row_bytes;
  const uintptr_t first = reinterpret_cast<uintptr_t>(data);
  for (int64_t at = 0; at < rows * row_bytes; at += step)
    __builtin_prefetch(reinterpret_cast<const char*>(first + at), 0, 2);
}

// The weights that will be packed after a panel: 32 rows along k.
template <class T>
struct NextPanel {
  const T* data;  // null: unknown
  int64_t stride;

  // What tile t of `tiles` fetches of them.
  Fetch share(int64_t t, int64_t tiles, int step) const {
    if (!data) return {};
    const int64_t first = NC * t / tiles, row_bytes = stride * static_cast<int64_t>(sizeof(T));
    return {reinterpret_cast<uintptr_t>(data) + first * row_bytes, row_bytes,
            static_cast<int>(NC * (t + 1) / tiles - first), step};
  }
};

// Words that lie packed behind those of a panel: as many lines of them as the panel has.
struct NextWords {
  const float* data;  // null: none

  Fetch share(int64_t t, int64_t tiles, int) const {
    if (!data) return {};
    constexpr int64_t kLines = 16 * NC * sizeof(float) / 64;  // of 16 words along k
    const int64_t first = kLines * t / tiles;
    return {reinterpret_cast<uintptr_t>(data) + first * 64, 64, static_cast<int>(kLines * (t + 1) / tiles - first),
            static_cast<int>(kLines * 64)};
  }
};

// One packed panel of `depth` (or, for float, rows of b read in place, ldb apart) against all m rows.
template <class T, class Next>
inline void multiply_panel(float* c, Left<T> a, int64_t m, int64_t k0, int64_t depth, const float* b, int64_t ldb,
                           float* widened, bool accumulate, const Next& next) {
  const int64_t tiles = (m + MR - 1) / MR;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t r0 = m * t / tiles;
    const int rows = static_cast<int>(m * (t + 1) / tiles - r0);
    const T* at[MR];
    for (int r = 0; r < rows; ++r) at[r] = a.row(r0 + r) + k0;
    float* out = c + r0 * NC;
    float panel_sums[MR * NC];
    float* sums = accumulate ? panel_sums : out;
    const Fetch fetch = next.share(t, tiles, kPairs<T> ? 64 : 16 * sizeof(T));
    if constexpr (kWidenRows<T>) {
      const float* wide[MR];
      for (int r = 0; r < rows; ++r) wide[r] = widen_row(widened + r * (depth + kWideGap), at[r], depth);
      multiply_chains(rows, wide, b, ldb, depth, sums, fetch);
    } else {
      multiply_chains(rows, at, b, ldb, depth, sums, fetch);
    }
    if (accumulate)
      for (int j = 0; j < rows * NC; j += VL) store(out + j, load(out + j) + load(sums + j));
  }
}

// dot_tile for any depth: the first chain's sums are c, those of the others are added to it.
template <int R, int C, class T>
inline void dot_chains(const T** a, const T* const* columns, int64_t depth, float* c, Ahead<T>& ahead) {
  dot_tile<R, C>(a, columns, depth < kDotDepth ? depth : kDotDepth, c, ahead);
  for (int64_t k = kDotDepth; k < depth; k += kDotDepth) {
    const T* b[C];
    for (int r = 0; r < R; ++r) a[r] += kDotDepth;
    for (int j = 0; j < C; ++j) b[j] = columns[j] + k;
    for (int j = 0; j < ahead.count; ++j) ahead.at[j] += kDotDepth * sizeof(T);
    float sums[R * NC];
    dot_tile<R, C>(a, b, depth - k < kDotDepth ? depth - k : kDotDepth, sums, ahead);
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < C; ++j) c[r * NC + j] += sums[r * NC + j];
  }
}

// All m rows against C columns. The weights of `next` columns are fetched in equal parts while each tile of rows is
// made.
template <int C, class T>
inline void dot_columns(float* c, Left<T> a, int64_t m, int64_t depth, const T* const* columns, const uintptr_t* next,
                        int next_count) {
  const int64_t tiles = (m + DR - 1) / DR;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t r = t * DR;
    const int rows = static_cast<int>(m - r < DR ? m - r : DR);
    const T* at[DR];
    for (int i = 0; i < rows; ++i) at[i] = a.row(r + i);
    Ahead<T> ahead{};
    for (int64_t i = next_count * t / tiles; i < next_count * (t + 1) / tiles; ++i) ahead.at[ahead.count++] = next[i];
    float* out = c + r * NC;
    switch (rows) {
      case 1:
        dot_chains<1, C>(at, columns, depth, out, ahead);
        break;
      case 2:
        dot_chains<2, C>(at, columns, depth, out, ahead);
        break;
      case 3:
        if constexpr (DR >= 3) dot_chains<3, C>(at, columns, depth, out, ahead);
        break;
      default:
        if constexpr (DR >= 4) dot_chains<4, C>(at, columns, depth, out, ahead);
    }
  }
}

// Rows that are read again for every column: half of the L1 cache.
constexpr int64_t kLineBytes = 16 << 10;

// One column after another, for at most DR rows.
template <class T>
inline void dot_lines(float* c, Left<T> a, int64_t m, int64_t depth, Right<T> b, int n) {
  const T* at[DR];
  for (int64_t r = 0; r < m; ++r) at[r] = a.row(r);
  for (int j = 0; j < n; ++j) {
    const T* column = b.data + j * b.stride_n;
    switch (m) {
      case 1:
        dot_line<1>(at, column, depth, c + j);
        break;
      case 2:
        dot_line<2>(at, column, depth, c + j);
        break;
      case 3:
        if constexpr (DR >= 3) dot_line<3>(at, column, depth, c + j);
        break;
      default:
        if constexpr (DR >= 4) dot_line<4>(at, column, depth, c + j);
    }
  }
}

template <class T>
inline void dot_product(float* c, Left<T> a, int64_t m, int64_t all, int64_t depth, Right<T> b, int n, bool continues) {
  for (int64_t r = 0; n < NC && r < m; ++r)
    for (int j = n; j < NC; ++j) c[r * NC + j] = 0.0f;
  // by the group's rows, since the number of threads decides how many of them are m
  if (all <= DR && all * depth * static_cast<int64_t>(sizeof(T)) <= kLineBytes) return dot_lines(c, a, m, depth, b, n);
  const int64_t ahead = (kAheadBytes / (DC * depth * static_cast<int64_t>(sizeof(T))) + 1) * DC;
  for (int j = 0; j < n; j += DC) {
    const T* columns[DC];
    uintptr_t next[DC];
    const int have = n - j < DC ? n - j : DC;
    for (int i = 0; i < have; ++i) columns[i] = b.data + (j + i) * b.stride_n;
    int next_count = 0;
    for (int i = 0; i < DC; ++i)
      if (continues || j + ahead + i < n)
        next[next_count++] = reinterpret_cast<uintptr_t>(columns[0]) + (ahead + i) * b.stride_n * sizeof(T);
    if (have == DC) {
      dot_columns<DC>(c + j, a, m, depth, columns, next, next_count);
    } else {
      for (int i = 0; i < have; ++i) dot_columns<1>(c + j + i, a, m, depth, columns + i, next, 0);
    }
  }
}

// The same for any depth, in blocks of it for which `all` rows, those of the group, stay in the L2 cache.
template <class T>
inline void dot_blocks(float* c, Left<T> a, int64_t m, int64_t all, int64_t depth, Right<T> b, int n, bool continues) {
  const int64_t fit = kDotBytes / (all * static_cast<int64_t>(sizeof(T))) / NC * NC;
  if (depth <= fit) return dot_product(c, a, m, all, depth, b, n, continues);
  const int64_t blocks = (depth - 1) / fit + 1, block = ((depth - 1) / blocks / NC + 1) * NC;
  float sums[kDotRows<T> * NC];
  for (int64_t k0 = 0; k0 < depth; k0 += block) {
    const Left<T> ak{a.data + k0, a.stride, a.index};
    const Right<T> bk{b.data + k0, b.stride_n, b.stride_k, nullptr};
    dot_product(k0 ? sums : c, ak, m, all, depth - k0 < block ? depth - k0 : block, bk, n, continues);
    for (int64_t j = 0; k0 && j < m * NC; j += VL) store(c + j, load(c + j) + load(sums + j));
  }
}

// How a product stands among others.
struct Place {
  int64_t group_rows = 0;      // rows of the whole group, where the product is made of a part of them; 0: m
  const void* next = nullptr;  // the columns that the same thread needs next, which are fetched meanwhile, or null
};

// c[m][32] = a[m][depth] b[depth][n], columns from n on 0. c must have room for m rows of 32.
template <class T>
inline void product(float* c, Left<T> a, int64_t m, int64_t depth, Right<T> b, int n, const PanelBuffers& buffers,
                    const Place& place = {}) {
  if (m == 0) return;
  if (depth == 0) {
    std::memset(c, 0, m * NC * sizeof(float));
    return;
  }
  const int64_t all = place.group_rows ? place.group_rows : m;
  if (b.panels && all >= kPackedRows<T>) {
    for (int64_t k0 = 0; k0 < depth; k0 += KC) {
      const int64_t block = depth - k0 < KC ? depth - k0 : KC;
      const float* panel = b.panels + (kPairs<T> ? k0 / 2 : k0) * NC;
      const bool more = place.next || k0 + block < depth;
      const NextWords next{more ? panel + (kPairs<T> ? (block + 1) / 2 : block) * NC : nullptr};
      multiply_panel(c, a, m, k0, block, panel, NC, buffers.rows, k0 > 0, next);
    }
    return;
  }
  if (all < kDotRows<T> && b.stride_k == 1 && !b.index)
    return dot_blocks(c, a, m, all, depth, b, n, place.next != nullptr);
  for (int64_t k0 = 0; k0 < depth; k0 += KC) {
    const int64_t block = depth - k0 < KC ? depth - k0 : KC;
    pack(buffers.panel, b, k0, block, n);
    NextPanel<T> next{};
    if (b.stride_k == 1 && !b.index) {
      if (k0 + block < depth) {
        next = {b.data + k0 + block, b.stride_n};
      } else if (place.next) {
        next = {static_cast<const T*>(place.next), b.stride_n};
      }
      if (next.data) walk_to_pages(next.data, NC, next.stride);
    }
    multiply_panel(c, a, m, k0, block, buffers.panel, NC, buffers.rows, k0 > 0, next);
  }
}

}  // namespace dyncore::DYNCORE_ISA
