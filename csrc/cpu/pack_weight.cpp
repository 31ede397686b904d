// pack_weight: a weight in the layout that the register tiles read, made once for many calls of grouped_mlp.
// Bound by memory: reads the weight, writes as much (16-bit types whose panels are float: twice as much).
#include "common/scratch.h"
#include "common/threads.h"
#include "cpu/common/dtype.h"
#include "cpu/common/product.h"

namespace dyncore::DYNCORE_ISA {

namespace {

template <class T>
void body(void* context, const Team& team) {
  const PackWeight& op = *static_cast<const PackWeight*>(context);
  const Weight& w = op.weight;
  const int64_t columns = op.n / op.parts, panels = panels_of(columns), words = kPairs<T> ? (op.k + 1) / 2 : op.k;
  const int64_t items = op.groups * op.parts * panels, end = items * (team.index + 1) / team.size;
  for (int64_t item = items * team.index / team.size; item < end; ++item) {
    const int64_t part = item / panels % op.parts, g = item / panels / op.parts, n0 = item % panels * NC;
    const T* data = static_cast<const T*>(w.data) + g * w.stride_g + (part * columns + n0) * w.stride_n;
    pack<T>(op.panels + item * words * NC, {data, w.stride_n, w.stride_k, nullptr}, 0, op.k, panel_width(columns, n0));
  }
}

}  // namespace

void pack_weight(const PackWeight& op) {
  PackWeight context = op;
  const double bytes = 2.0 * sizeof(float) * op.groups * op.n * op.k;
  const int threads = useful_threads(op.threads, 0, bytes);
  prefer_huge_pages(op.panels, static_cast<size_t>(bytes / 2));
  with_type(op.dtype, [&](auto type) { parallel(threads, body<typename decltype(type)::T>, &context); });
}

}  // namespace dyncore::DYNCORE_ISA
