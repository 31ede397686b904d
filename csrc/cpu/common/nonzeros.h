// Where a matrix is not zero: a bit for every element, 32 columns a word, and lists of columns and values made from
// the bits. The lists of a row are cut into segments of columns, for which the right operand's rows stay in cache.
#pragma once
#include "cpu/common/listed.h"
#include "cpu/common/team_scratch.h"

namespace dyncore::DYNCORE_ISA {

// Which lanes hold neither 0 nor less; NaN is neither.
DYNCORE_INLINE uint32_t positive_lanes(vf v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, __m512{}, _CMP_NLE_UQ);
#else
  const vi lanes = !(v <= 0.0f);
  uint32_t bits = 0;
  for (int j = 0; j < VL; ++j) bits |= static_cast<uint32_t>(lanes[j] & 1) << j;
  return bits;
#endif
}

// Which lanes are not 0.
DYNCORE_INLINE uint32_t nonzero_lanes(vf v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, __m512{}, _CMP_NEQ_UQ);
#else
  const vi lanes = v != 0.0f;
  uint32_t bits = 0;
  for (int j = 0; j < VL; ++j) bits |= static_cast<uint32_t>(lanes[j] & 1) << j;
  return bits;
#endif
}

DYNCORE_INLINE uint32_t lanes_of_width(int n) {
  return n >= NC ? ~0u : (1u << n) - 1;
}

inline int64_t count_bits(const uint32_t* words, int64_t count) {
  int64_t bits = 0;
  for (int64_t w = 0; w < count; ++w) bits += __builtin_popcount(words[w]);
  return bits;
}

// The bits of a row of any values, `words` of them null where they are to be counted alone; returns how many are set.
template <class T>
inline int64_t nonzero_bits(const T* row, int64_t columns, uint32_t* words) {
  int64_t count = 0;
  for (int64_t w = 0; w < panels_of(columns); ++w) {
    const Row r = load_row(row + w * NC, panel_width(columns, w * NC));
    uint32_t word = 0;
    for (int j = 0; j < NV; ++j) word |= nonzero_lanes(r.v[j]) << (j * VL);
    if (words) words[w] = word;
    count += __builtin_popcount(word);
  }
  return count;
}

// Lists of rows by segments: list (r, s) takes up offsets[at] to offsets[at + 1], at = r * row_step + s * segment_step.
template <class T>
struct Lists {
  const int64_t* offsets;
  int64_t row_step, segment_step, segments;
  const int32_t* segment_first;  // [segments + 1]: columns, those that lists of the segment name
  const int32_t* index;
  const Value<T>* value;

  int64_t first(int64_t r, int64_t s) const { return offsets[r * row_step + s * segment_step]; }
  List<T> at(int64_t r, int64_t s) const {
    const int64_t* bounds = offsets + r * row_step + s * segment_step;
    return {index + bounds[0], value + bounds[0], bounds[1] - bounds[0]};
  }
};

// Lanes of v whose bits are set, side by side; those behind them are of no meaning.
#if defined(__AVX512F__)
DYNCORE_INLINE vf chosen(vf v, uint32_t bits) {
  return (vf)_mm512_maskz_compress_ps(static_cast<__mmask16>(bits), (__m512)v);
}
#endif

// Writes the columns of a row's set bits, and hands each vector's chosen values on: store(at, values, count).
template <class T, class Store>
DYNCORE_INLINE int64_t list_word(uint32_t word, int64_t column, const T* row, int n, int32_t* index, int64_t at,
                                 Store store_values) {
#if defined(__AVX512F__)
  alignas(64) static constexpr int32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int j = 0; j < NV; ++j) {
    const uint32_t bits = word >> (j * VL) & 0xffffu;
    if (bits == 0) continue;
    const int count = __builtin_popcount(bits);
    const vi columns = *reinterpret_cast<const vi*>(kLanes) + static_cast<int32_t>(column + j * VL);
    store_some(reinterpret_cast<float*>(index + at), chosen((vf)columns, bits), count);
    if (row) {
      const T* from = row + j * VL;
      store_values(at, chosen(n >= (j + 1) * VL ? load(from) : load_some(from, n - j * VL), bits), count);
    }
    at += count;
  }
#else
  static_cast<void>(n);
  for (; word; word &= word - 1, ++at) {
    const int j = __builtin_ctz(word);
    index[at] = static_cast<int32_t>(column + j);
    if (row) store_values(at, splat(to_float(row[j])), 1);
  }
#endif
  return at;
}

// Lists a row's set bits from `at` on, by segments, and sets offsets[0:segments + 1].
template <class T, class Store>
DYNCORE_INLINE void list_row(const uint32_t* words, int64_t columns, const T* row, const int32_t* segment_first,
                             int64_t segments, int64_t at, int64_t* offsets, int32_t* index, Store store_values) {
  for (int64_t s = 0; s < segments; ++s) {
    offsets[s] = at;
    const int64_t end = panels_of(segment_first[s + 1]);
    for (int64_t w = segment_first[s] / NC; w < end; ++w)
      if (words[w])
        at = list_word(words[w], w * NC, row ? row + w * NC : nullptr, panel_width(columns, w * NC), index, at,
                       store_values);
  }
  offsets[segments] = at;
}

// The values of a row's set bits, side by side.
template <class T>
inline void choose_values(const uint32_t* words, int64_t columns, const T* row, T* values) {
  int64_t at = 0;
  for (int64_t w = 0; w < panels_of(columns); ++w) {
    const int n = panel_width(columns, w * NC);
#if defined(__AVX512F__)
    for (int j = 0; j < NV; ++j) {
      const uint32_t bits = words[w] >> (j * VL) & 0xffffu;
      if (bits == 0) continue;
      const T* from = row + w * NC + j * VL;
      const int count = __builtin_popcount(bits);
      store_some(values + at, chosen(n >= (j + 1) * VL ? load(from) : load_some(from, n - j * VL), bits), count);
      at += count;
    }
#else
    static_cast<void>(n);
    for (uint32_t word = words[w]; word; word &= word - 1) values[at++] = row[w * NC + __builtin_ctz(word)];
#endif
  }
}

// Puts a row's values where its bits are, and 0 elsewhere.
template <class T>
inline void spread_values(const uint32_t* words, int64_t columns, const T* values, T* row) {
  int64_t at = 0;
  for (int64_t w = 0; w < panels_of(columns); ++w) {
#if defined(__AVX512F__)
    Row r;
    for (int j = 0; j < NV; ++j) {
      const uint32_t bits = words[w] >> (j * VL) & 0xffffu;
      const int count = __builtin_popcount(bits);
      r.v[j] = (vf)_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), (__m512)load_some(values + at, count));
      at += count;
    }
    store_row(row + w * NC, r, panel_width(columns, w * NC));
#else
    store_row(row + w * NC, zero_row(), panel_width(columns, w * NC));
    for (uint32_t word = words[w]; word; word &= word - 1) row[w * NC + __builtin_ctz(word)] = values[at++];
#endif
  }
}

// Columns of a segment: of 256 columns of the right operand, so many rows take half of the L2 cache in float.
constexpr int64_t kSegment = 512;
// With few rows a segment has about so many columns that any of the rows has: all of their weights, up to a page a
// row and thread, stay in the L2 cache beside those of the next segment.
constexpr int64_t kFewSegment = 128;
// Up to so many rows are few: reading the right operand from memory is what takes the time.
constexpr int64_t kFewRows = 96;

// Segments of [0, columns), the same for all rows; every one begins at a word. Returns how many.
inline int64_t fixed_segments(int64_t columns, int32_t* first) {
  int64_t count = 0;
  for (int64_t c = 0; c < columns; c += kSegment) first[count++] = static_cast<int32_t>(c);
  first[count] = static_cast<int32_t>(columns);
  return count;
}

// The same by the union of all rows' bits, which it lists too: used[0:result of union_first[count]].
inline int64_t union_segments(const Workspace<uint32_t>& words, int64_t rows, int64_t columns, int32_t* first,
                              int32_t* used, int64_t* used_first) {
  int64_t count = 0, at = 0, in_segment = 0;
  first[0] = 0;
  used_first[0] = 0;
  for (int64_t w = 0; w < panels_of(columns); ++w) {
    uint32_t any = 0;
    for (int64_t r = 0; r < rows; ++r) any |= words.row(r)[w];
    if (in_segment >= kFewSegment) {
      first[++count] = static_cast<int32_t>(w * NC);
      used_first[count] = at;
      in_segment = 0;
    }
    in_segment += __builtin_popcount(any);
    for (; any; any &= any - 1) used[at++] = static_cast<int32_t>(w * NC + __builtin_ctz(any));
  }
  first[++count] = static_cast<int32_t>(columns);
  used_first[count] = at;
  return count;
}

inline int64_t most_segments(int64_t columns) {
  return columns / kFewSegment + 2;  // the most of either kind
}

}  // namespace dyncore::DYNCORE_ISA
