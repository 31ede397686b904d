// sparse_linear: out = h W^T + bias without the products of h's zeros. Blocks of rows of h are searched for non-zeros,
// which are listed; see common/skipping_product.h.
#include "common/scratch.h"
#include "cpu/common/dtype.h"
#include "cpu/common/skipping_product.h"

namespace dyncore::DYNCORE_ISA {

namespace {

// Elements of h that one thread searches before others are woken.
constexpr int64_t kSearchedAlone = 64 << 10;

template <class T>
struct Forward {
  const SparseLinear& op;
  Left<T> h;
  int64_t block_rows;
  bool ready;  // the only block is listed
  SkippingProduct<T> product = {};

  Left<T> block(int64_t first) const { return h.from(first); }
};

template <class T>
void find(Forward<T>& f, int64_t first, int64_t rows, const Team& team) {
  const int64_t end = rows * (team.index + 1) / team.size;
  for (int64_t r = rows * team.index / team.size; r < end; ++r)
    f.product.counts.data[r] = nonzero_bits(f.h.row(first + r), f.op.k, f.product.words.row(r));
}

template <class T>
void body(void* context, const Team& team) {
  Forward<T>& f = *static_cast<Forward<T>*>(context);
  for (int64_t first = 0; first < f.op.rows; first += f.block_rows) {
    const int64_t rows = f.op.rows - first < f.block_rows ? f.op.rows - first : f.block_rows;
    const Left<T> block = f.h.from(first);
    if (!f.ready) {
      find(f, first, rows, team);
      team.barrier();
      if (team.index == 0) f.product.choose(first, rows);
      team.barrier();
      f.product.list(block, team);
      team.barrier();
    }
    f.product.multiply(block, team);
    if (first + rows < f.op.rows) team.barrier();
  }
}

template <class T>
void run(const SparseLinear& op) {
  const bool few = op.rows <= kFewRows && op.weight.stride_n == 1;
  Forward<T> f{op,
               {static_cast<const T*>(op.h.data), op.h.stride, nullptr},
               SkippingProduct<T>::block_rows(op.rows, op.k),
               false};
  f.product = SkippingProduct<T>::plan(f.block_rows, few, false, op.k, weight_of_group<T>(op.weight, 0, false), op.bias,
                                       op.n, static_cast<T*>(op.out), op.dense_from, op.threads);
  Scratch block(rounded_bytes(f.product.bytes()));
  f.product.place(block.take(f.product.bytes()));
  int threads = op.threads;
  if (op.rows * op.k <= kSearchedAlone && op.rows <= f.block_rows) {
    const Team alone{0, 1};
    find(f, 0, op.rows, alone);
    f.product.choose(0, op.rows);
    f.product.list(f.block(0), alone);
    f.ready = true;
    threads = useful_threads(op.threads, 0, double(sizeof(T)) * f.product.elements());
  }
  parallel(threads, body<T>, &f);
}

}  // namespace

void sparse_linear(const SparseLinear& op) {
  if (op.rows > 0 && op.n > 0) with_type(op.dtype, [&](auto type) { run<typename decltype(type)::T>(op); });
}

}  // namespace dyncore::DYNCORE_ISA
