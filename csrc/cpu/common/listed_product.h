// Products of which one operand is listed: sums of the right operand's rows for lists, and dot products with them. A
// segment of the right operand, some columns at a time, comes into the L2 cache and is used for all rows that are
// given, while the one after it is fetched.
#pragma once
#include "cpu/common/nonzeros.h"

namespace dyncore::DYNCORE_ISA {

// The right operand's rows that the lists name, some columns of them: where they lie, or, where it is stored with its
// rows side by side, in a packed panel.
template <class T>
struct ListedRows {
  const T* data;  // of row 0, even where the panel has later ones alone
  int64_t stride;
};

// How many columns of a segment are packed at once.
template <class T>
constexpr int64_t kListedColumns = kDotColumns<T>;

// panel[k][j] = b's element (k, n0 + j) for k in [first, end), j < n.
template <class T>
inline void pack_segment(T* panel, const Right<T>& b, int64_t first, int64_t end, int64_t n0, int64_t n) {
  for (int64_t j = 0; j < n; j += VL) {
    const int64_t have = n - j < VL ? n - j : VL;
    const T* source = b.data + (n0 + j) * b.stride_n + first;
    for (int64_t k = 0; k < end - first; k += VL) {
      const int64_t depth = end - first - k < VL ? end - first - k : VL;
      vf lines[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) lines[i] = i < have ? load_some(source + i * b.stride_n + k, depth) : vf{};
      transpose(lines);
      for (int i = 0; i < depth; ++i) store(panel + (k + i) * kListedColumns<T> + j, lines[i]);
    }
  }
}

template <class T>
inline ListedRows<T> listed_rows(const Right<T>& b, int64_t first, int64_t end, int64_t n0, int64_t n, T* panel) {
  if (b.stride_n == 1) return {b.data + n0, b.stride_k};
  pack_segment(panel, b, first, end, n0, n);
  const auto row_0 = reinterpret_cast<uintptr_t>(panel) - first * kListedColumns<T> * sizeof(T);
  return {reinterpret_cast<const T*>(row_0), kListedColumns<T>};
}

// Some rows' columns, fetched into the L2 cache in equal parts, one with each step of other work.
template <class T>
class FetchRows {
 public:
  FetchRows() = default;
  // Rows used[0:count], or first + 0 ... count-1 where used is null, in columns [n0, n0 + n).
  FetchRows(const Right<T>& b, const int32_t* used, int64_t first, int64_t count, int64_t n0, int64_t n, int64_t steps)
      : base_(reinterpret_cast<uintptr_t>(b.data + n0)),
        row_bytes_(b.stride_k * sizeof(T)),
        used_(used),
        first_(first),
        lines_((n * sizeof(T) + 63) / 64),
        all_(b.stride_n == 1 ? count * lines_ : 0),
        steps_(steps) {
    if (all_ > 0) find();
  }

  DYNCORE_INLINE void step() {
    const int64_t end = all_ * ++step_ / steps_;
    for (; at_ < end; ++at_, ++line_) {
      if (line_ == lines_) {
        ++row_;
        line_ = 0;
        find();
      }
      __builtin_prefetch(reinterpret_cast<const char*>(row_at_ + 64 * line_), 0, 2);
    }
  }

 private:
  void find() { row_at_ = base_ + (used_ ? used_[row_] : first_ + row_) * row_bytes_; }

  uintptr_t base_ = 0, row_at_ = 0;  // addresses: rows may end behind the operand
  int64_t row_bytes_ = 0;
  const int32_t* used_ = nullptr;
  int64_t first_ = 0, lines_ = 0, all_ = 0, steps_ = 1, step_ = 0, at_ = 0, row_ = 0, line_ = 0;
};

// The columns that any row has, by segments; null where all are taken to be used.
struct Used {
  const int32_t* columns = nullptr;
  const int64_t* first = nullptr;  // [segments + 1]
  int64_t rows = 0;
};

// sums[r][n0:n1] = sum over row r's lists of value * b's row, for rows [r0, r1); `sums` rows are `stride` apart, that
// of list r is rows[r], or r. What an earlier call left there is added to where `accumulate`.
template <class T>
inline void sum_listed(const Lists<T>& lists, int64_t r0, int64_t r1, const Right<T>& b, int64_t n0, int64_t n1,
                       float* sums, int64_t stride, const int32_t* rows, const Used& used, T* panel, bool accumulate) {
  if (used.columns && used.rows == 1 && b.stride_n == 1) {
    const int64_t at = lists.first(r0, 0);
    const List<T> list{lists.index + at, lists.value + at, lists.first(r0, lists.segments) - at};
    return sum_stream(list, b.data + n0, b.stride_k, sums + (rows ? rows[r0] : r0) * stride + n0, n1 - n0);
  }
  const auto columns = [&](int64_t n) { return n1 - n < kSumColumns ? n1 - n : kSumColumns; };
  const int64_t parts = (n1 - n0 + kSumColumns - 1) / kSumColumns, steps = r1 - r0;
  for (int64_t s = 0; s < lists.segments; ++s) {
    const int64_t first = lists.segment_first[s], end = lists.segment_first[s + 1];
    FetchRows<T> next;                             // nothing after the last
    if (used.columns && s + 1 < lists.segments) {  // whole rows, so that each page of them is looked up once
      const int64_t at = used.first[s + 1];
      next = FetchRows<T>(b, used.columns + at, 0, used.first[s + 2] - at, n0, n1 - n0, steps * parts);
    }
    for (int64_t n = n0; n < n1; n += kSumColumns) {
      const int64_t width = columns(n);
      if (!used.columns) {
        next = {};
        if (n + width < n1) {
          next = FetchRows<T>(b, nullptr, first, end - first, n + width, columns(n + width), steps);
        } else if (s + 1 < lists.segments) {
          next = FetchRows<T>(b, nullptr, end, lists.segment_first[s + 2] - end, n0, columns(n0), steps);
        }
      }
      const ListedRows<T> at = listed_rows(b, first, end, n, width, panel);
      for (int64_t r = r0; r < r1; ++r) {
        next.step();
        add_listed_rows(lists.at(r, s), at.data, at.stride, sums + (rows ? rows[r] : r) * stride + n, width,
                        s > 0 || accumulate);
      }
    }
  }
}

// dots[at] = <row r of a, b's row index[at]> over `depth` columns, for every entry of segment s of rows [r0, r1).
template <class T>
inline void dot_lists(const Lists<T>& lists, int64_t s, int64_t r0, int64_t r1, const Left<T>& a, const Right<T>& b,
                      int64_t depth, float* dots, const int32_t* rows, T* panel) {
  for (int64_t n = 0; n == 0 || n < depth; n += kDotColumns<T>) {
    const int64_t width = depth - n < kDotColumns<T> ? depth - n : kDotColumns<T>;
    const ListedRows<T> at = listed_rows(b, lists.segment_first[s], lists.segment_first[s + 1], n, width, panel);
    for (int64_t r = r0; r < r1; ++r)
      dot_listed_rows(lists.at(r, s), a.row(rows ? rows[r] : r) + n, at.data, at.stride, dots + lists.first(r, s),
                      width, n > 0);
  }
}

}  // namespace dyncore::DYNCORE_ISA
