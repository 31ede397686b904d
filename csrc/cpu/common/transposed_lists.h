// Lists by row, transposed: for every column its rows, in ascending order, by segments of rows. What a gradient of
// weights is summed by: its right operand is a segment of rows of the gradient or of the input.
#pragma once
#include "cpu/common/group.h"
#include "cpu/common/listed_product.h"

namespace dyncore::DYNCORE_ISA {

constexpr int kMostValues = 3;  // that go with an entry

template <class T>
class TransposedLists {
 public:
  // Of at most `rows` rows, `columns` columns and `entries` entries with `values` values each.
  static TransposedLists plan(int64_t rows, int64_t columns, int64_t entries, int values) {
    TransposedLists t;
    t.columns_ = columns;
    const int64_t segments = (rows + kSegment - 1) / kSegment;
    t.offsets_ = {segments, columns + 1};
    t.segment_first_ = {1, segments + 1};
    t.index_ = {1, entries};
    t.values_ = {values, entries};
    return t;
  }

  size_t bytes() const { return block_bytes(offsets_, segment_first_, index_, values_); }
  void place(void* at) {
    char* next = static_cast<char*>(at);
    const auto put = [&](auto&... parts) {
      ((parts.place(next), next += rounded_bytes(parts.bytes()), fence_end(next)), ...);
    };
    put(offsets_, segment_first_, index_, values_);
  }

  // On one thread, before the items: `rows` rows are to be transposed.
  void begin(int64_t rows) {
    rows_ = rows;
    segments_ = fixed_segments(rows, segment_first_.data);
  }

  // Items of lists that have `segments` segments of columns.
  int64_t items(int64_t segments) const { return segments_ * segments; }

  // One segment of rows and one of columns. values[v][at] goes with entry `at` of the lists.
  void make(const Lists<T>& lists, const Value<T>* const* values, int64_t item) {
    const int64_t ts = item / lists.segments, s = item % lists.segments;
    const int64_t t0 = segment_first_.data[ts], t1 = segment_first_.data[ts + 1];
    const int64_t first = lists.segment_first[s], end = lists.segment_first[s + 1];
    int64_t cursor[kSegment] = {}, at = lists.first(t0, 0);
    for (int64_t t = t0; t < t1; ++t) {
      at += lists.first(t, s) - lists.first(t, 0);
      const List<T> list = lists.at(t, s);
      for (int64_t k = 0; k < list.count; ++k) ++cursor[list.index[k] - first];
    }
    int64_t* offsets = offsets_.row(ts);
    for (int64_t i = first; i < end; ++i) {
      const int64_t count = cursor[i - first];
      offsets[i] = cursor[i - first] = at;
      at += count;
    }
    if (end == columns_) offsets[columns_] = at;
    for (int64_t t = t0; t < t1; ++t) {
      const List<T> list = lists.at(t, s);
      const int64_t from = lists.first(t, s);
      for (int64_t k = 0; k < list.count; ++k) {
        const int64_t to = cursor[list.index[k] - first]++;
        index_.data[to] = static_cast<int32_t>(t);
        for (int64_t v = 0; v < values_.rows; ++v) values_.row(v)[to] = values[v][from + k];
      }
    }
  }

  // By column, with one of the values.
  Lists<T> lists(int value) const {
    return {offsets_.data, 1, offsets_.stride, segments_, segment_first_.data, index_.data, values_.row(value)};
  }

 private:
  int64_t columns_ = 0, rows_ = 0, segments_ = 0;
  Workspace<int64_t> offsets_ = {};  // [segments of rows, columns + 1]
  Workspace<int32_t> segment_first_ = {}, index_ = {};
  Workspace<Value<T>> values_ = {};
};

// The gradient [columns, width] of weights of any layout, summed in float: where they are float and lie so, in place.
template <class T>
class WeightSums {
 public:
  // stride_c, stride_n: of a column's (neuron's) row, and of neighbouring elements in it. data is null where the
  // gradient is not asked for.
  static WeightSums plan(void* data, int64_t columns, int64_t width, int64_t stride_c, int64_t stride_n) {
    WeightSums w;
    w.data_ = static_cast<T*>(data);
    w.columns_ = columns;
    w.width_ = width;
    w.stride_c_ = stride_c;
    w.stride_n_ = stride_n;
    if (data && !w.in_place()) w.sums_ = {columns, workspace_stride(width)};
    return w;
  }
  explicit operator bool() const { return data_ != nullptr; }
  size_t bytes() const { return sums_.bytes(); }
  void place(void* at) { sums_.place(at); }

  // Parts of columns times parts of the width, so many that threads share them well.
  struct Part {
    int64_t c0, c1, n0, n1;
  };
  int64_t items(int threads) const { return data_ ? column_parts(threads) * width_parts() : 0; }
  Part part(int64_t item, int threads) const {
    const int64_t parts = column_parts(threads), c = item % parts, n0 = item / parts * kSumColumns;
    return {columns_ * c / parts, columns_ * (c + 1) / parts, n0,
            n0 + kSumColumns < width_ ? n0 + kSumColumns : width_};
  }

  void add(const Lists<T>& lists, const Part& part, const Right<T>& right, bool accumulate) {
    float* sums = sums_.data;
    if constexpr (kIsFloat<T>)
      if (!sums) sums = data_;
    const int64_t stride = sums_.data ? sums_.stride : stride_c_;
    sum_listed(lists, part.c0, part.c1, right, part.n0, part.n1, sums, stride, nullptr, {}, static_cast<T*>(nullptr),
               accumulate);
  }

  // After the last sums: each thread stores its share.
  void finish(const Team& team) {
    if (!data_ || in_place()) return;
    if (stride_n_ == 1) {
      const int64_t end = columns_ * (team.index + 1) / team.size;
      for (int64_t c = columns_ * team.index / team.size; c < end; ++c)
        for (int64_t n = 0; n < width_; n += NC)
          store_row(data_ + c * stride_c_ + n, load_row(sums_.row(c) + n, NC), panel_width(width_, n));
      return;
    }
    const int64_t panels = panels_of(width_), end = panels * (team.index + 1) / team.size;
    for (int64_t panel = panels * team.index / team.size; panel < end; ++panel)
      for (int64_t c = 0; c < columns_; c += VL) store_transposed(panel * NC, c);
  }

 private:
  bool in_place() const { return kIsFloat<T> && stride_n_ == 1; }
  int64_t width_parts() const { return (width_ + kSumColumns - 1) / kSumColumns; }
  int64_t column_parts(int threads) const {
    const int64_t wanted = (4 * threads + width_parts() - 1) / (width_parts() > 0 ? width_parts() : 1);
    const int64_t most = columns_ / 64 + 1;
    return wanted < most ? wanted : most;
  }
  void store_transposed(int64_t n0, int64_t c0) {
    const int64_t columns = columns_ - c0 < VL ? columns_ - c0 : VL;
    for (int64_t n = n0; n < n0 + NC && n < width_; n += VL) {
      vf lines[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) lines[i] = i < columns ? load(sums_.row(c0 + i) + n) : vf{};
      transpose(lines);
      for (int64_t i = 0; i < VL && n + i < width_; ++i)
        store_some(data_ + (n + i) * stride_n_ + c0, lines[i], columns);
    }
  }

  T* data_ = nullptr;
  int64_t columns_ = 0, width_ = 0, stride_c_ = 0, stride_n_ = 0;
  Workspace<float> sums_ = {};
};

}  // namespace dyncore::DYNCORE_ISA
