// A hidden activation of which most is 0, to bits and the values of the rest, and back. Bound by memory.
#include "common/scratch.h"
#include "common/threads.h"
#include "cpu/common/dtype.h"
#include "cpu/common/nonzeros.h"
#include "cpu/kernels.h"

namespace dyncore::DYNCORE_ISA {

namespace {

template <class T>
struct Context {
  const Compression& op;
  int64_t* counts;  // of each thread

  const T* dense(int64_t r) const { return static_cast<const T*>(op.dense.data) + r * op.dense.stride; }
};

template <class T>
void count_body(void* context, const Team& team) {
  const Context<T>& c = *static_cast<const Context<T>*>(context);
  const int64_t end = c.op.rows * (team.index + 1) / team.size;
  int64_t count = 0;
  for (int64_t r = c.op.rows * team.index / team.size; r < end; ++r) count += nonzero_bits(c.dense(r), c.op.i, nullptr);
  c.counts[team.index] = count;
}

template <class T>
void compress_body(void* context, const Team& team) {
  const Context<T>& c = *static_cast<const Context<T>*>(context);
  const Compressed& to = c.op.compressed;
  const int64_t words = panels_of(c.op.i), end = c.op.rows * (team.index + 1) / team.size;
  for (int64_t r = c.op.rows * team.index / team.size; r < end; ++r)
    to.row_offsets[r + 1] = nonzero_bits(c.dense(r), c.op.i, to.mask + r * words);
  team.barrier();
  if (team.index == 0)
    for (int64_t r = 0; r < c.op.rows; ++r) to.row_offsets[r + 1] += to.row_offsets[r];
  team.barrier();
  T* values = static_cast<T*>(to.values);
  for (int64_t r = c.op.rows * team.index / team.size; r < end; ++r) {
    choose_values(to.mask + r * words, c.op.i, c.dense(r), values + to.row_offsets[r]);
    if (c.op.gated)
      choose_values(to.mask + r * words, c.op.i, c.dense(r) + c.op.i, values + to.capacity + to.row_offsets[r]);
  }
}

template <class T>
void expand_body(void* context, const Team& team) {
  const Context<T>& c = *static_cast<const Context<T>*>(context);
  const Compressed& from = c.op.compressed;
  const int64_t words = panels_of(c.op.i), end = c.op.rows * (team.index + 1) / team.size;
  for (int64_t r = c.op.rows * team.index / team.size; r < end; ++r)
    for (int half = 0; half < (c.op.gated ? 2 : 1); ++half) {
      const T* values = static_cast<const T*>(from.values) + half * from.capacity + from.row_offsets[r];
      spread_values(from.mask + r * words, c.op.i, values, const_cast<T*>(c.dense(r)) + half * c.op.i);
    }
}

template <class T>
int64_t run(const Compression& op, void (*body)(void*, const Team&)) {
  const int threads = useful_threads(op.threads, 0, double(sizeof(T)) * op.rows * op.i * (op.gated ? 2 : 1));
  Scratch scratch(rounded_bytes(threads * sizeof(int64_t)));
  Context<T> c{op, static_cast<int64_t*>(scratch.take(threads * sizeof(int64_t)))};
  std::memset(c.counts, 0, threads * sizeof(int64_t));
  parallel(threads, body, &c);
  int64_t count = 0;
  for (int t = 0; t < threads; ++t) count += c.counts[t];
  return count;
}

}  // namespace

int64_t count_nonzeros(const Compression& op) {
  int64_t count = 0;
  with_type(op.dtype, [&](auto type) {
    using T = typename decltype(type)::T;
    count = run<T>(op, count_body<T>);
  });
  return count;
}

void compress(const Compression& op) {
  op.compressed.row_offsets[0] = 0;
  with_type(op.dtype, [&](auto type) {
    using T = typename decltype(type)::T;
    run<T>(op, compress_body<T>);
  });
}

void expand(const Compression& op) {
  with_type(op.dtype, [&](auto type) {
    using T = typename decltype(type)::T;
    run<T>(op, expand_body<T>);
  });
}

}  // namespace dyncore::DYNCORE_ISA
