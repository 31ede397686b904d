// scatter_rows: out[t] = base[t] + sum over the row's slots of scale * y, and its backward. Bound by memory; rows are
// shared out among threads, so each sum is made by one thread in ascending slot order.
#include "common/threads.h"
#include "cpu/common/combine.h"

namespace dyncore::DYNCORE_ISA {

namespace {

template <class T>
void forward(void* context, const Team& team) {
  const ScatterRows& op = *static_cast<const ScatterRows*>(context);
  const Plan& plan = op.plan;
  const T* y = static_cast<const T*>(op.y.data);
  const T* base = static_cast<const T*>(op.base.data);
  T* out = static_cast<T*>(op.out.data);
  fill_empty_rows(plan, op.base, out, op.width, op.width, team);
  const int64_t end = plan.num_rows * (team.index + 1) / team.size;
  for (int64_t t = plan.num_rows * team.index / team.size; t < end; ++t) {
    if (plan.row_offsets[t] == plan.row_offsets[t + 1]) continue;
    for (int64_t n0 = 0; n0 < op.width; n0 += NC) {
      const int n = panel_width(op.width, n0);
      Row total = combine_row(plan, t, y + n0, op.y.stride, plan.scale, n);
      if (base) total = load_row(base + t * op.base.stride + n0, n) + total;
      store_row(out + t * op.width + n0, total, n);
    }
  }
}

template <class T>
void backward(void* context, const Team& team) {
  const ScatterRowsBackward& op = *static_cast<const ScatterRowsBackward*>(context);
  const Plan& plan = op.plan;
  const int64_t live = plan.live();
  const T* y = static_cast<const T*>(op.y.data);
  T* dy = static_cast<T*>(op.dy);
  const int64_t end = plan.capacity * (team.index + 1) / team.size;
  for (int64_t a = plan.capacity * team.index / team.size; a < end; ++a) {
    if (a >= live) {
      if (dy) std::memset(dy + a * op.width, 0, op.width * sizeof(T));
      if (op.dscale) op.dscale[a] = 0.0f;
      continue;
    }
    const T* grad = static_cast<const T*>(op.grad.data) + plan.rows[a] * op.grad.stride;
    if (op.dscale) op.dscale[a] = dot_rows(grad, y + a * op.y.stride, op.width);
    if (!dy) continue;
    const float factor = plan.scale ? plan.scale[a] : 1.0f;
    for (int64_t n0 = 0; n0 < op.width; n0 += NC) {
      const int n = panel_width(op.width, n0);
      Row g = load_row(grad + n0, n);
      for (int j = 0; j < NV; ++j) g.v[j] *= factor;
      store_row(dy + a * op.width + n0, g, n);
    }
  }
}

}  // namespace

void scatter_rows(const ScatterRows& op) {
  const double bytes = 4.0 * (op.plan.num_rows + op.plan.capacity) * op.width;
  ScatterRows context = op;
  const int threads = useful_threads(op.threads, 0, bytes);
  with_type(op.dtype, [&](auto type) { parallel(threads, forward<typename decltype(type)::T>, &context); });
}

void scatter_rows_backward(const ScatterRowsBackward& op) {
  const double bytes = 8.0 * op.plan.capacity * op.width;
  ScatterRowsBackward context = op;
  const int threads = useful_threads(op.threads, 0, bytes);
  with_type(op.dtype, [&](auto type) { parallel(threads, backward<typename decltype(type)::T>, &context); });
}

}  // namespace dyncore::DYNCORE_ISA
