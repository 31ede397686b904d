// out = rows W^T + bias for rows that are mostly 0, some thousand elements to some hundred rows at a time: bits are
// given, lists are made from them, and what a zero would multiply is not read. Rows with so many non-zeros that a dense
// product is faster get one. Neither the choice nor the order of a sum depends on the number of threads.
#pragma once
#include "cpu/common/listed_product.h"
#include "cpu/common/pieces.h"
#include "cpu/common/stored_rows.h"
#include "cpu/kernels.h"

namespace dyncore::DYNCORE_ISA {

// So few rows are never worth a dense product of their own.
constexpr int64_t kDenseRows = 4;
// Bytes of a block's rows, and its rows: the right operand is read again for every block.
constexpr int64_t kListedBlockBytes = 16 << 20;
constexpr int64_t kListedBlockRows = 256;

// Weights stored neuron by neuron are packed by so many panels at once: one panel is a line or two of each row, so that
// every row would cost a page walk for every panel. Rows are fetched so many ahead.
constexpr int64_t kWidePanels = 8;
constexpr int64_t kPackedAhead = 64;

template <class T>
class SkippingProduct {
 public:
  // At most `rows` rows at a time, of `columns` elements; `few`: of one block with few rows, for operands whose listed
  // rows are read where they lie. `packs`: panel() is needed for another operand.
  static SkippingProduct plan(int64_t rows, bool few, bool packs, int64_t columns, Right<T> weight, Matrix bias,
                              int64_t width, T* out, float dense_from, int threads) {
    SkippingProduct p;
    p.few_ = few;
    p.columns_ = columns;
    p.weight_ = weight;
    p.bias_ = bias;
    p.width_ = width;
    p.out_ = out;
    p.dense_from_ = dense_from;
    p.threads_ = threads;
    const int64_t segments = most_segments(columns);
    p.words = {rows, panels_of(columns)};
    p.counts = {1, rows};
    p.offsets_ = {rows, segments + 1};
    p.segment_first_ = {1, segments + 1};
    p.index_ = {1, rows * columns};
    p.value_ = {1, rows * columns};
    p.used_ = {1, few ? columns : 0};
    p.used_first_ = {1, few ? segments + 1 : 0};
    p.sparse_rows_ = {1, rows};
    p.dense_rows_ = {1, rows};
    if (!kIsFloat<T>) p.sums_ = {rows, workspace_stride(width)};
    const int64_t panel = packs || weight.stride_n != 1 ? kSegment * kListedColumns<T> * sizeof(T) : 0;
    p.panels_ = {threads, static_cast<int64_t>(rounded_bytes(panel))};
    const int64_t wide = weight.stride_n == 1 ? kWidePanels : 1;
    p.scratch_ = TeamScratch::plan<T>(threads, columns, wide * rows);
    if (wide > 1 && dense_from < 1)
      p.wide_ = {threads, static_cast<int64_t>(kWidePanels * panel_bytes<T>(columns) / 4)};
    p.sparse_items_ = p.dense_items_ = Items::plan(threads);
    return p;
  }

  // How many of `rows` rows a block has, the same for any number of threads.
  static int64_t block_rows(int64_t rows, int64_t columns) {
    const int64_t fit = kListedBlockBytes / (columns * static_cast<int64_t>(sizeof(T)) + 1);
    const int64_t most = fit > kListedBlockRows ? fit : kListedBlockRows;
    const int64_t blocks = rows > 0 ? (rows - 1) / most + 1 : 1;
    return (rows + blocks - 1) / blocks;
  }

  size_t bytes() const {
    return block_bytes(words, counts, offsets_, segment_first_, index_, value_, used_, used_first_, sparse_rows_,
                       dense_rows_, sums_, panels_, wide_, scratch_, sparse_items_, dense_items_);
  }
  void place(void* at) {
    char* next = static_cast<char*>(at);
    const auto put = [&](auto&... parts) {
      ((parts.place(next), next += rounded_bytes(parts.bytes()), fence_end(next)), ...);
    };
    put(words, counts, offsets_, segment_first_, index_, value_, used_, used_first_, sparse_rows_, dense_rows_, sums_,
        panels_, wide_, scratch_, sparse_items_, dense_items_);
  }

  // Set for a block before choose() by whoever knows: the bits of its rows, and how many each has.
  Workspace<uint32_t> words;
  Workspace<int64_t> counts;

  // After words and counts are there, on one thread: how the block's rows are computed. `first`: its first row in out.
  void choose(int64_t first, int64_t rows) {
    first_ = first;
    sparse_ = dense_ = 0;
    const float limit = dense_from_ * columns_;
    for (int64_t r = 0; r < rows; ++r)
      if (counts.data[r] > limit) dense_rows_.data[dense_++] = static_cast<int32_t>(r);
    const bool worth = dense_ >= (rows < kDenseRows ? rows : kDenseRows);
    if (!worth) dense_ = 0;
    int64_t at = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (worth && counts.data[r] > limit) continue;
      offsets_.row(sparse_)[0] = at;
      at += counts.data[r];
      sparse_rows_.data[sparse_++] = static_cast<int32_t>(r);
    }
    segments_ = few_ ? union_segments(words, rows, columns_, segment_first_.data, used_.data, used_first_.data)
                     : fixed_segments(columns_, segment_first_.data);
    sparse_cut_ = ColumnCut(width_, sparse_, threads_);
    sparse_items_.share(sparse_cut_.items());
    dense_items_.share(dense_ > 0 ? (panels_of(width_) + at_once() - 1) / at_once() : 0);
  }

  // Each thread lists its share of the rows; `from` has the block's.
  void list(const Left<T>& from, const Team& team) {
    const int64_t end = sparse_ * (team.index + 1) / team.size;
    for (int64_t i = sparse_ * team.index / team.size; i < end; ++i) {
      const int64_t r = sparse_rows_.data[i];
      int64_t* offsets = offsets_.row(i);
      Value<T>* values = value_.data;
      list_row(words.row(r), columns_, from.row(r), segment_first_.data, segments_, offsets[0], offsets, index_.data,
               [=](int64_t at, vf v, int count) DYNCORE_INLINE_LAMBDA { store_some(values + at, v, count); });
    }
  }

  // The lists of the block's sparse rows, i of which is row sparse_rows()[i] of the block.
  Lists<T> lists() const {
    return {offsets_.data, offsets_.stride, 1, segments_, segment_first_.data, index_.data, value_.data};
  }
  int64_t sparse() const { return sparse_; }
  int64_t dense() const { return dense_; }
  const int32_t* sparse_rows() const { return sparse_rows_.data; }
  const int32_t* dense_rows() const { return dense_rows_.data; }
  Value<T>* values() { return value_.data; }  // of the lists
  T* panel(int thread) const { return reinterpret_cast<T*>(panels_.row(thread)); }

  // After the lists are made: the products, by whichever thread is free.
  void multiply(const Left<T>& from, const Team& team) {
    while (const Items::Item taken = dense_items_.take(team)) dense_panel(from, taken, team.index);
    while (const Items::Item taken = sparse_items_.take(team)) sparse_part(sparse_cut_.item(taken.index), team.index);
  }

  // Elements of the right operand that are read, at least.
  int64_t elements() const { return (few_ ? used_first_.data[segments_] : columns_) * width_; }

 private:
  // Columns of the result by parts of a page or so, and rows by parts where threads are many.
  class ColumnCut {
   public:
    ColumnCut() = default;
    ColumnCut(int64_t width, int64_t rows, int threads) : width_(width), rows_(rows) {
      const int64_t tiles = (width + kSumColumns - 1) / kSumColumns, page = 4096 / static_cast<int64_t>(sizeof(T));
      int64_t wide = (tiles + threads - 1) / threads;
      if (wide * kSumColumns > page && page >= kSumColumns) wide = page / kSumColumns;
      if (wide < 1) wide = 1;
      columns_ = wide * kSumColumns;
      column_parts_ = (width + columns_ - 1) / columns_;
      row_parts_ = column_parts_ > 0 && threads > column_parts_ ? 2 * threads / column_parts_ : 1;
      if (row_parts_ > rows / 32 + 1) row_parts_ = rows / 32 + 1;
    }
    struct Item {
      int64_t r0, r1, n0, n1;
    };
    int64_t items() const { return rows_ > 0 ? column_parts_ * row_parts_ : 0; }
    Item item(int64_t i) const {
      const int64_t n0 = i / row_parts_ * columns_, part = i % row_parts_;
      return {rows_ * part / row_parts_, rows_ * (part + 1) / row_parts_, n0,
              width_ - n0 < columns_ ? width_ : n0 + columns_};
    }

   private:
    int64_t width_ = 0, rows_ = 0, columns_ = 0, column_parts_ = 0, row_parts_ = 1;
  };

  void finish(int64_t row, const float* sums, int64_t n0, int64_t n1) {
    for (int64_t n = n0; n < n1; n += NC) {
      const int width = panel_width(n1, n);
      const Row total = load_row(sums + n - n0, width) + bias_row<T>(bias_, 0, n, width);
      store_row(out_ + (first_ + row) * width_ + n, total, width);
    }
  }

  void sparse_part(const typename ColumnCut::Item& item, int thread) {
    const Used used{few_ ? used_.data : nullptr, used_first_.data, sparse_};
    float* sums;
    int64_t stride;
    if constexpr (kIsFloat<T>) {
      sums = out_ + first_ * width_;
      stride = width_;
    } else {
      sums = sums_.data;
      stride = sums_.stride;
    }
    sum_listed(lists(), item.r0, item.r1, weight_, item.n0, item.n1, sums, stride, sparse_rows_.data, used,
               panel(thread), false);
    if (kIsFloat<T> && !bias_.data && segments_ > 0) return;
    for (int64_t i = item.r0; i < item.r1; ++i) {
      const int64_t r = sparse_rows_.data[i];
      if (segments_ == 0)
        for (int64_t n = item.n0; n < item.n1; ++n) sums[r * stride + n] = 0.0f;
      finish(r, sums + r * stride + item.n0, item.n0, item.n1);
    }
  }

  void dense_panel(const Left<T>& from, Items::Item taken, int thread) {
    float* y = scratch_.results(thread);
    const Left<T> rows{from.data, from.stride, dense_rows_.data};
    if (wide_) return wide_panels(rows, taken.index * at_once() * NC, y, thread);
    const int64_t n0 = taken.index * NC;
    const int n = panel_width(width_, n0);
    weight_product(y, rows, dense_, columns_, weight_.from_column(n0), n, scratch_.buffers(thread),
                   {dense_, taken.continues ? weight_.from_column(n0 + NC).data : nullptr});
    for (int64_t i = 0; i < dense_; ++i) finish(dense_rows_.data[i], y + i * NC, n0, n0 + n);
  }

  // The same for at_once() panels from column n0 on, of weights stored neuron by neuron.
  void wide_panels(const Left<T>& rows, int64_t n0, float* y, int thread) {
    const int64_t n1 = width_ - n0 < at_once() * NC ? width_ : n0 + at_once() * NC, panels = panels_of(n1 - n0);
    const int64_t lines = ((n1 - n0) * sizeof(T) + 63) / 64, panel_words = wide_.stride / kWidePanels;
    for (int64_t k0 = 0; k0 < columns_; k0 += KC) {
      const int64_t block = columns_ - k0 < KC ? columns_ - k0 : KC;
      for (int64_t k = 0; k < block; k += kPackedAhead) {
        const int64_t depth = block - k < kPackedAhead ? block - k : kPackedAhead;
        for (int64_t i = k0 + k + depth; i < k0 + k + depth + kPackedAhead && i < columns_; ++i)
          for (int64_t line = 0; line < lines; ++line)
            __builtin_prefetch(reinterpret_cast<const char*>(weight_.data + i * weight_.stride_k + n0) + 64 * line, 0,
                               2);
        for (int64_t j = 0; j < panels; ++j)
          pack(wide_.row(thread) + j * panel_words + (kPairs<T> ? k / 2 : k) * NC, weight_.from_column(n0 + j * NC),
               k0 + k, depth, panel_width(n1, n0 + j * NC));
      }
      for (int64_t j = 0; j < panels; ++j)
        multiply_panel(y + j * dense_ * NC, rows, dense_, k0, block, wide_.row(thread) + j * panel_words, NC,
                       scratch_.buffers(thread).rows, k0 > 0, NextWords{nullptr});
    }
    for (int64_t j = 0; j < panels; ++j)
      for (int64_t i = 0; i < dense_; ++i)
        finish(dense_rows_.data[i], y + (j * dense_ + i) * NC, n0 + j * NC, n0 + j * NC + panel_width(n1, n0 + j * NC));
  }

  int64_t at_once() const {
    const int64_t share = panels_of(width_) / threads_;
    return !wide_ || share < 1 ? 1 : (share < kWidePanels ? share : kWidePanels);
  }

  bool few_ = false;
  int64_t columns_ = 0, width_ = 0;
  Right<T> weight_ = {};
  Matrix bias_ = {};
  T* out_ = nullptr;
  float dense_from_ = 0;
  int threads_ = 1;
  int64_t first_ = 0, sparse_ = 0, dense_ = 0, segments_ = 0;  // of the block
  Workspace<int64_t> offsets_ = {};                            // [sparse rows, segments + 1]
  Workspace<int32_t> segment_first_ = {}, index_ = {}, used_ = {};
  Workspace<Value<T>> value_ = {};
  Workspace<int64_t> used_first_ = {};
  Workspace<int32_t> sparse_rows_ = {}, dense_rows_ = {};  // rows of the block by how they are computed
  Workspace<float> sums_ = {};                             // [rows, width], where out is not float
  Workspace<char> panels_ = {};
  Workspace<float> wide_ = {};  // packed panels, where weights are stored neuron by neuron
  TeamScratch scratch_ = {};
  Items sparse_items_ = {}, dense_items_ = {};
  ColumnCut sparse_cut_ = {};
};

}  // namespace dyncore::DYNCORE_ISA
