// tree_route: the leaf that each row reaches in a complete binary tree, whose node n sends it to node 2n + 2 where
// w[n] . x + b[n] > 0, else to 2n + 1. A dot product a level and row; the nodes that rows pass stay in cache.
#include "common/threads.h"
#include "cpu/common/dtype.h"

namespace dyncore::DYNCORE_ISA {

namespace {

constexpr int kChains = 4;                      // of sums: the processor adds while it waits for the last one
constexpr int64_t kTerms = 512 * kChains * VL;  // of a chain in every lane at most 512

template <class T>
DYNCORE_INLINE float dot(const T* x, const T* w, int64_t width) {
  float total = 0.0f;
  for (int64_t begin = 0; begin < width; begin += kTerms) {
    const int64_t end = begin + kTerms < width ? begin + kTerms : width;
    vf sums[kChains] = {};
    int64_t k = begin;
    for (; k + kChains * VL <= end; k += kChains * VL)
      for (int j = 0; j < kChains; ++j) sums[j] += load(x + k + j * VL) * load(w + k + j * VL);
    for (; k + VL <= end; k += VL) sums[0] += load(x + k) * load(w + k);
    if (k < end) sums[1] += load_some(x + k, end - k) * load_some(w + k, end - k);
    total += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return total;
}

template <class T>
void body(void* context, const Team& team) {
  const TreeRoute& op = *static_cast<const TreeRoute*>(context);
  const T* bias = static_cast<const T*>(op.bias);
  const int64_t nodes = (int64_t{1} << op.depth) - 1, end = op.rows * (team.index + 1) / team.size;
  for (int64_t t = op.rows * team.index / team.size; t < end; ++t) {
    const T* x = static_cast<const T*>(op.x.data) + t * op.x.stride;
    int64_t node = 0;
    while (node < nodes) {
      float score = dot(x, static_cast<const T*>(op.weight.data) + node * op.weight.stride, op.width);
      if (bias) score += to_float(bias[node]);
      node = 2 * node + 1 + (score > 0.0f);
    }
    op.leaves[t] = static_cast<int32_t>(node - nodes);
  }
}

template <class T>
void run(TreeRoute op) {
  const double products = double(op.rows) * op.depth * op.width;
  parallel(useful_threads(op.threads, 2 * products, sizeof(T) * products), body<T>, &op);
}

}  // namespace

void tree_route(const TreeRoute& op) {
  with_type(op.dtype, [&](auto type) { run<typename decltype(type)::T>(op); });
}

}  // namespace dyncore::DYNCORE_ISA
