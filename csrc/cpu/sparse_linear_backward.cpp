// The gradient of sparse_linear's weight, dW = dout^T h, without the products of h's zeros: blocks of rows of h are
// listed, the lists transposed, and rows of dout are added up by them.
#include "cpu/common/dtype.h"
#include "cpu/common/transposed_lists.h"
#include "cpu/common/weight_gradient.h"
#include "cpu/kernels.h"

namespace dyncore::DYNCORE_ISA {

namespace {

// Elements of h in a block, each of which may be a non-zero with 16 bytes of scratch.
constexpr int64_t kBlockElements = 16 << 20;

template <class T>
struct Backward {
  const SparseLinearBackward& op;
  int threads;
  int64_t block_rows;
  Workspace<uint32_t> words = {};
  Workspace<int64_t> offsets = {};
  Workspace<int32_t> segment_first = {}, index = {};
  Workspace<Value<T>> values = {};
  TransposedLists<T> transposed = {};
  WeightSums<T> dweight = {};
  Items transpose_items = {}, sum_items = {};
  int64_t segments = 0;

  const T* h(int64_t r) const { return static_cast<const T*>(op.h.data) + r * op.h.stride; }
};

template <class T>
void body(void* context, const Team& team) {
  Backward<T>& b = *static_cast<Backward<T>*>(context);
  const SparseLinearBackward& op = b.op;
  for (int64_t first = 0; first < op.rows; first += b.block_rows) {
    const int64_t rows = op.rows - first < b.block_rows ? op.rows - first : b.block_rows;
    const int64_t begin = rows * team.index / team.size, end = rows * (team.index + 1) / team.size;
    for (int64_t r = begin; r < end; ++r) b.offsets.row(r)[0] = nonzero_bits(b.h(first + r), op.k, b.words.row(r));
    team.barrier();
    if (team.index == 0) {
      int64_t at = 0;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t count = b.offsets.row(r)[0];
        b.offsets.row(r)[0] = at;
        at += count;
      }
      b.segments = fixed_segments(op.k, b.segment_first.data);
      b.transposed.begin(rows);
      b.transpose_items.share(b.transposed.items(b.segments));
      b.sum_items.share(b.dweight.items(b.threads));
    }
    team.barrier();
    Value<T>* values = b.values.data;
    for (int64_t r = begin; r < end; ++r)
      list_row(b.words.row(r), op.k, b.h(first + r), b.segment_first.data, b.segments, b.offsets.row(r)[0],
               b.offsets.row(r), b.index.data,
               [=](int64_t at, vf v, int count) DYNCORE_INLINE_LAMBDA { store_some(values + at, v, count); });
    team.barrier();
    const Lists<T> lists{b.offsets.data, b.offsets.stride, 1, b.segments, b.segment_first.data, b.index.data, values};
    const Value<T>* all[] = {values};
    while (const Items::Item taken = b.transpose_items.take(team)) b.transposed.make(lists, all, taken.index);
    team.barrier();
    const T* grad = static_cast<const T*>(op.grad.data) + first * op.grad.stride;
    while (const Items::Item taken = b.sum_items.take(team))
      b.dweight.add(b.transposed.lists(0), b.dweight.part(taken.index, b.threads), {grad, 1, op.grad.stride, nullptr},
                    first > 0);
    team.barrier();
  }
  b.dweight.finish(team);
}

template <class T>
void run(const SparseLinearBackward& op) {
  if (op.rows == 0) return zero_fill(static_cast<T*>(op.dweight.data), op.n * op.k);
  const int threads = useful_threads(op.threads, 0, sizeof(T) * (double(op.n) * op.k + double(op.rows) * op.k));
  const int64_t fit = kBlockElements / (op.k + 1) / kSegment * kSegment, most = fit > kSegment ? fit : kSegment;
  Backward<T> b{op, threads, op.rows < most ? op.rows : most};
  const int64_t segments = (op.k + kSegment - 1) / kSegment;
  b.words = {b.block_rows, panels_of(op.k)};
  b.offsets = {b.block_rows, segments + 1};
  b.segment_first = {1, segments + 1};
  b.index = {1, b.block_rows * op.k};
  b.values = {1, b.block_rows * op.k};
  b.transposed = TransposedLists<T>::plan(b.block_rows, op.k, b.block_rows * op.k, 1);
  b.dweight = WeightSums<T>::plan(op.dweight.data, op.k, op.n, op.dweight.stride_k, op.dweight.stride_n);
  b.transpose_items = b.sum_items = Items::plan(threads);
  Scratch scratch(block_bytes(b.words, b.offsets, b.segment_first, b.index, b.values, b.transposed, b.dweight,
                              b.transpose_items, b.sum_items));
  place_in(scratch, b.words, b.offsets, b.segment_first, b.index, b.values, b.transposed, b.dweight, b.transpose_items,
           b.sum_items);
  prefer_huge_pages(op.dweight.data, op.n * op.k * sizeof(T));
  parallel(threads, body<T>, &b);
}

}  // namespace

void sparse_linear_backward(const SparseLinearBackward& op) {
  with_type(op.dtype, [&](auto type) { run<typename decltype(type)::T>(op); });
}

}  // namespace dyncore::DYNCORE_ISA
