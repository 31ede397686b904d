// Weight gradients, dW[n][k] = sum over a group's slots a of left[a][n] * right[a][k]. Both operands are read where
// they lie, by slot: a block of rows of dW packs its columns of the left one and then, block by block, those of the
// right one, so that nothing is transposed or gathered in memory and every row of dW is written in one place.
// Bound by writing dW where a group has few slots, by the multiply-adds where it has many.
#pragma once
#include "cpu/common/team_scratch.h"

namespace dyncore::DYNCORE_ISA {

// Rows of dW that share a packed block of the right operand: packing it costs 1% of their products.
constexpr int64_t kGradientRows = 16 * TR;
// Slots whose products are summed before they are added to those of the slots before: the packed rows and columns of so
// many stay in the L2 cache together.
template <class T>
constexpr int64_t kGradientSlots = kPairs<T> ? 1024 : 512;
// Packed columns of the right operand; the next ones come into the L2 cache beside them.
constexpr int64_t kGradientBytes = 128 << 10;

template <class T>
inline int64_t slot_words(int64_t slots) {
  return kPairs<T> ? (slots + 1) / 2 : slots;
}

// The left operand: row r times scale[r]; not scaled where scale is null. What becomes pairs is rounded to T.
template <class T>
struct ScaledLeft {
  Left<T> rows;
  const float* scale;

  DYNCORE_INLINE Row load(int64_t r, int64_t column, int n) const {
    Row row = load_row(rows.row(r) + column, n);
    if (!scale) return row;
    for (int j = 0; j < NV; ++j) row.v[j] *= scale[r];
    if constexpr (kPairs<T>) {
      T rounded[NC];
      store_row(rounded, row, NC);
      row = load_row(rounded, NC);
    }
    return row;
  }
};

// Per thread: [rows][slots] words of the left operand, [columns][slots] of the right one, and, where a group has more
// slots than are summed at once, the float sums of a block of a 16-bit dW.
class GradientScratch {
 public:
  template <class T>
  static GradientScratch plan(int threads, int64_t largest_group, int64_t columns) {
    GradientScratch s;
    const int64_t words = slot_words<T>(largest_group < kGradientSlots<T> ? largest_group : kGradientSlots<T>);
    const int64_t panel = words * NC * sizeof(float), all = panels_of(columns) * panel;
    s.left_size_ = rounded_bytes(words * kGradientRows * sizeof(float));
    s.right_size_ = rounded_bytes(all < kGradientBytes ? all : (panel > kGradientBytes ? panel : kGradientBytes));
    if (!kIsFloat<T> && largest_group > kGradientSlots<T>)
      s.sums_size_ = rounded_bytes(kGradientRows * panels_of(columns) * NC * sizeof(float));
    s.threads_ = threads;
    return s;
  }

  size_t bytes() const { return threads_ * (left_size_ + right_size_ + sums_size_); }
  void place(void* at) { at_ = static_cast<char*>(at); }

  float* left(int thread) const {
    return reinterpret_cast<float*>(at_ + thread * (left_size_ + right_size_ + sums_size_));
  }
  float* right(int thread) const {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(left(thread)) + left_size_);
  }
  float* sums(int thread) const {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(right(thread)) + right_size_);
  }

 private:
  char* at_ = nullptr;
  size_t left_size_ = 0, right_size_ = 0, sums_size_ = 0, threads_ = 0;
};

// to[tile][word][TR] = the words of columns n0:n0+n of slots a0:a0+slots; columns past n are 0.
template <class T>
inline void pack_left(float* to, const ScaledLeft<T>& left, int64_t a0, int64_t slots, int64_t n0, int64_t n) {
  const int64_t words = slot_words<T>(slots), tiles = (n + TR - 1) / TR;
  float line[kGradientRows + NC];
  for (int64_t w = 0; w < words; ++w) {
    for (int64_t j = 0; j < tiles * TR; j += NC) {
      const int have = n - j < NC ? static_cast<int>(n > j ? n - j : 0) : NC;
      Row row;
      if constexpr (kPairs<T>) {
        row = left.load(a0 + 2 * w, n0 + j, have);
        const Row second = 2 * w + 1 < slots ? left.load(a0 + 2 * w + 1, n0 + j, have) : zero_row();
        for (int v = 0; v < NV; ++v) row.v[v] = (vf)(((vu)row.v[v] >> 16) | (vu)second.v[v]);
      } else {
        row = left.load(a0 + w, n0 + j, have);
      }
      store_row(line + j, row, NC);
    }
    for (int64_t t = 0; t < tiles; ++t) std::memcpy(to + (t * words + w) * TR, line + t * TR, TR * sizeof(float));
  }
}

// to[panel][word][32] = the words of columns k0:end of slots a0:a0+slots.
template <class T>
inline void pack_right(float* to, const Right<T>& right, int64_t a0, int64_t slots, int64_t k0, int64_t end) {
  const int64_t words = slot_words<T>(slots), step = kPairs<T> ? 2 : 1;
  for (int64_t w = 0; w < words; ++w) {
    const int64_t a = a0 + w * step, have = slots - w * step < step ? 1 : step;
    for (int64_t k = k0; k < end; k += NC)
      pack(to + (k - k0) * words + w * NC, right.from_column(k), a, have, panel_width(end, k));
  }
}

// What the right operand's next columns lie in, fetched while tiles are made: some slots with every 16 words.
template <class T>
struct NextRight {
  Right<T> right;  // from the first of the columns
  int64_t slot, end, step;
  int64_t lines;

  DYNCORE_INLINE void operator()() {
    for (int64_t s = slot; s < slot + step && s < end; ++s) {
      const char* row = reinterpret_cast<const char*>(right.data + (right.index ? right.index[s] : s) * right.stride_k);
      for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(row + 64 * line, 0, 2);
    }
    slot += step;
  }
};

// out[r][0:32] (+)= sum over words w of left[w][r] * right[w][0:32], for the first `rows` of TR rows.
template <class T, class Out>
inline __attribute__((noinline)) void gradient_tile(const float* left, const float* right, int64_t words, Out* out,
                                                    int64_t stride, int rows, bool accumulate, NextRight<T>& next) {
  for (int j0 = 0; j0 < NC; j0 += 2 * VL) {
    vf acc[TR][2];
#pragma GCC unroll 12
    for (int r = 0; r < TR; ++r) {
      acc[r][0] = vf{};
      acc[r][1] = vf{};
    }
    const float* a = left;
    const float* b = right + j0;
    for (int64_t w = 0; w < words; ++w, a += TR, b += NC) {
      if (w % 16 == 0 && j0 == 0) next();
      const vf b0 = load(b), b1 = load(b + VL);
#pragma GCC unroll 12
      for (int r = 0; r < TR; ++r) {
        if constexpr (kPairs<T>) {
#if defined(__AVX512BF16__)
          int32_t word;
          std::memcpy(&word, a + r, 4);
          const __m512bh x = (__m512bh)_mm512_set1_epi32(word);
          acc[r][0] = (vf)_mm512_dpbf16_ps((__m512)acc[r][0], x, (__m512bh)b0);
          acc[r][1] = (vf)_mm512_dpbf16_ps((__m512)acc[r][1], x, (__m512bh)b1);
#endif
        } else {
          const vf x = splat(a[r]);
          acc[r][0] += x * b0;
          acc[r][1] += x * b1;
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < TR; ++r) {
      if (r >= rows) break;
      Out* to = out + r * stride + j0;
      store(to, accumulate ? acc[r][0] + load(to) : acc[r][0]);
      store(to + VL, accumulate ? acc[r][1] + load(to + VL) : acc[r][1]);
    }
  }
}

// Rows n0:n0+n of dW, n <= kGradientRows, from the group's m > 0 slots.
template <class T>
inline void weight_gradient_rows(T* dw, int64_t columns, int64_t n0, int64_t n, const ScaledLeft<T>& left,
                                 const Right<T>& right, int64_t m, const GradientScratch& scratch, int thread) {
  float* const packed_left = scratch.left(thread);
  float* const packed_right = scratch.right(thread);
  const int64_t chain = slot_words<T>(kChainDepth);
  for (int64_t a0 = 0; a0 < m; a0 += kGradientSlots<T>) {
    const bool last = m - a0 <= kGradientSlots<T>;
    const int64_t slots = last ? m - a0 : kGradientSlots<T>, words = slot_words<T>(slots);
    const bool direct = m <= kChainDepth;
    pack_left(packed_left, left, a0, slots, n0, n);
    const int64_t fit = kGradientBytes / (words * NC * static_cast<int64_t>(sizeof(float)));
    const int64_t block = (fit > 1 ? fit : 1) * NC;
    for (int64_t k0 = 0; k0 < columns; k0 += block) {
      const int64_t end = columns - k0 < block ? columns : k0 + block;
      pack_right(packed_right, right, a0, slots, k0, end);
      const int64_t calls = (n + TR - 1) / TR * panels_of(end - k0) * ((words + 15) / 16);
      const int64_t after = columns - end < block ? columns - end : block;
      NextRight<T> next{right.from_column(end), a0, a0 + (after > 0 ? slots : 0), (slots + calls - 1) / calls,
                        (after * static_cast<int64_t>(sizeof(T)) + 63) / 64};
      for (int64_t r0 = 0; r0 < n; r0 += TR) {
        const int rows = static_cast<int>(n - r0 < TR ? n - r0 : TR);
        const float* a = packed_left + r0 * words;
        for (int64_t k = k0; k < end; k += NC) {
          const float* b = packed_right + (k - k0) * words;
          const int width = panel_width(columns, k);
          T* to = dw + (n0 + r0) * columns + k;
          if (direct && width == NC) {
            gradient_tile<T>(a, b, words, to, columns, rows, false, next);
            continue;
          }
          float tile[TR * NC];
          for (int64_t w = 0; w < words; w += chain)
            gradient_tile<T>(a + w * TR, b + w * NC, words - w < chain ? words - w : chain, tile, NC, TR, w > 0, next);
          for (int r = 0; r < rows; ++r) {
            Row row = load_row(tile + r * NC, NC);
            if constexpr (kIsFloat<T>) {
              if (a0 > 0) row = load_row(to + r * columns, width) + row;
            } else {
              float* sums = scratch.sums(thread) + (r0 + r) * panels_of(columns) * NC + k;
              if (a0 > 0) row = load_row(sums, NC) + row;
              if (!last) {
                store_row(sums, row, NC);
                continue;
              }
            }
            store_row(to + r * columns, row, width);
          }
        }
      }
    }
  }
}

// The gradient [G, rows, columns] by blocks of some rows of a group, so that threads have enough of them.
class GradientBlocks {
 public:
  GradientBlocks(int64_t groups, int64_t rows, int threads) : groups_(groups), rows_(rows) {
    while (block_ > 2 * TR && count() < 8 * threads) block_ /= 2;
  }
  int64_t count() const { return groups_ * per_group(); }
  int64_t group(int64_t block) const { return block / per_group(); }
  int64_t first_row(int64_t block) const { return block % per_group() * block_; }
  int64_t rows(int64_t block) const {
    const int64_t rest = rows_ - first_row(block);
    return rest < block_ ? rest : block_;
  }

 private:
  int64_t per_group() const { return (rows_ + block_ - 1) / block_; }
  int64_t groups_, rows_, block_ = kGradientRows;
};

// memset would go round the cache, in which a fresh page's lines are: 10 GB/s against 15.
template <class T>
inline void zero_fill(T* to, int64_t count) {
  int64_t j = 0;
  for (; j + NC <= count; j += NC) store_row(to + j, zero_row(), NC);
  store_row(to + j, zero_row(), static_cast<int>(count - j));
}

// One block of the gradient. left and right hold the slots of its group. An empty group's
// gradient is 0.
template <class T>
inline void weight_gradient_block(T* dweight, int64_t rows, int64_t columns, const GradientBlocks& blocks,
                                  int64_t block, const ScaledLeft<T>& left, const Right<T>& right, int64_t m,
                                  const GradientScratch& scratch, int thread) {
  T* dw = dweight + blocks.group(block) * rows * columns;
  const int64_t n0 = blocks.first_row(block), n = blocks.rows(block);
  if (m == 0) {
    zero_fill(dw + n0 * columns, n * columns);
  } else {
    weight_gradient_rows(dw, columns, n0, n, left, right, m, scratch, thread);
  }
}

}  // namespace dyncore::DYNCORE_ISA
