// Backward of grouped_linear. With dout the gradient of slot a (its row's, where the forward pass scattered):
//   dy[a] = scale dout act'(pre),  dx = W^T dy (combined into rows where the forward pass gathered),  dW = dy^T x.
// Without an activation dx is made from dout itself, unscaled, so that dscale[a] = <W^T dout, x[a]> + <dout, b> comes
// free; with one, dscale[a] = <dout, act(pre)>.
// Stage 1, by (panel of N, group): dy by slot, where there is an activation. Stage 2: dx by panels of K, dW by (group,
// rows).
#include "cpu/common/activations.h"
#include "cpu/common/backward.h"

namespace dyncore::DYNCORE_ISA {

namespace {

template <class T>
struct Backward {
  const GroupedLinearBackward& op;
  bool linear = op.activation == Activation::none;
  const float* scale = op.scatter ? op.plan.scale : nullptr;  // null where the forward pass did not scale
  Workspace<T> dy = {};                                       // [A, N], for dx and dW
  Workspace<float> partials = {};                             // [panels, A], for dscale
  TeamScratch scratch = {};
  GradientScratch gradient = {};
  Counter dy_items = {}, dx_items = {}, dw_items = {};

  Left<T> grad(int64_t first) const {
    const T* data = static_cast<const T*>(op.grad.data);
    if (op.scatter) return {data, op.grad.stride, op.plan.rows + first};
    return {data + first * op.grad.stride, op.grad.stride, nullptr};
  }
  // dy: made in stage 1, or, without an activation, where it is needed.
  ScaledLeft<T> scaled_grad(int64_t first) const {
    if (!linear) return {{dy.row(first), dy.stride, nullptr}, nullptr};
    return {grad(first), scale ? scale + first : nullptr};
  }
  Left<T> x(int64_t first) const {
    const T* data = static_cast<const T*>(op.x.data);
    if (op.gather) return {data, op.x.stride, op.plan.rows + first};
    return {data + first * op.x.stride, op.x.stride, nullptr};
  }
};

template <Activation A, class T>
void make_dy(const Backward<T>& b, int64_t g, int64_t panel, int n, float* tile) {
  const GroupedLinearBackward& op = b.op;
  const int64_t first = op.plan.offsets[g], m = op.plan.offsets[g + 1] - first, n0 = panel * NC;
  const Left<T> grad = b.grad(first);
  for (int64_t r = 0; r < m; ++r) {
    const int64_t a = first + r;
    Row dy = load_row(grad.row(r) + n0, n);
    const float scale = b.scale ? b.scale[a] : 1.0f;
    if (A == Activation::none) {
      for (int j = 0; j < NV; ++j) dy.v[j] *= scale;
    } else {
      const Row h = load_row(static_cast<const T*>(op.pre.data) + a * op.pre.stride + n0, n);
      vf products = {};
      for (int j = 0; j < NV; ++j) {
        const ValueAndDerivative act = evaluate<A>(h.v[j]);
        products += dy.v[j] * act.value;
        dy.v[j] *= scale * act.derivative;
      }
      if (b.partials) b.partials.row(panel)[a] = sum(products);
    }
    store_row(tile + r * NC, dy, NC);
    if (b.dy) store_row(b.dy.row(a) + n0, dy, n);
  }
}

template <class T>
void dy_panel(const Backward<T>& b, int64_t panel, int64_t g, int thread) {
  const GroupedLinearBackward& op = b.op;
  const int64_t first = op.plan.offsets[g], m = op.plan.offsets[g + 1] - first, n0 = panel * NC;
  const int n = panel_width(op.n, n0);
  float* tile = b.scratch.results(thread);
  with_activation(op.activation, [&](auto a) { make_dy<decltype(a)::value>(b, g, panel, n, tile); });
  if (op.dbias) store_column_sums(static_cast<T*>(op.dbias) + g * op.n + n0, tile, m, n);
}

// One group's panel of dx by slot; leaves it in `tile`, unscaled where there is no activation.
template <class T>
void dx_group_panel(const Backward<T>& b, int64_t panel, int64_t g, float* tile, int thread) {
  const GroupedLinearBackward& op = b.op;
  const int64_t first = op.plan.offsets[g], m = op.plan.offsets[g + 1] - first, n0 = panel * NC;
  const int n = panel_width(op.k, n0);
  const Left<T> dy = b.linear ? b.grad(first) : Left<T>{b.dy.row(first), b.dy.stride, nullptr};
  const Right<T> w = weight_of_group<T>(op.weight, g, true).from_column(n0);
  product(tile, dy, m, op.n, w, n, b.scratch.buffers(thread));
  if (!b.linear || !b.partials) return;
  const Left<T> x = b.x(first);
  for (int64_t r = 0; r < m; ++r) {
    const Row d = load_row(tile + r * NC, NC), xr = load_row(x.row(r) + n0, n);
    vf products = {};
    for (int j = 0; j < NV; ++j) products += d.v[j] * xr.v[j];
    b.partials.row(panel)[first + r] = sum(products);
  }
}

template <class T>
void dx_panel(const Backward<T>& b, int64_t panel, int thread) {
  const GroupedLinearBackward& op = b.op;
  const int64_t n0 = panel * NC;
  const int n = panel_width(op.k, n0);
  T* dx = static_cast<T*>(op.dx);
  const float* scale = b.linear ? b.scale : nullptr;
  float* dslots = b.scratch.results(thread);
  for (int64_t g = 0; g < op.plan.groups; ++g)
    if (op.plan.offsets[g] < op.plan.offsets[g + 1])
      dx_group_panel(b, panel, g, dslots + op.plan.offsets[g] * NC, thread);
  if (!dx) return;
  if (op.gather) return combine_panel(op.plan, dslots, scale, Matrix{nullptr, 0}, dx, op.k, n0, n);
  for (int64_t a = 0; a < op.plan.live(); ++a) {
    Row row = load_row(dslots + a * NC, NC);
    const float factor = scale ? scale[a] : 1.0f;
    for (int j = 0; j < NV; ++j) row.v[j] *= factor;
    store_row(dx + a * op.k + n0, row, n);
  }
}

template <class T>
void body(void* context, const Team& team) {
  Backward<T>& b = *static_cast<Backward<T>*>(context);
  const GroupedLinearBackward& op = b.op;
  const int64_t groups = op.plan.groups;
  if (b.dy || op.dbias || (b.partials && !b.linear))
    for (int64_t item; (item = b.dy_items.next()) < panels_of(op.n) * groups;)
      dy_panel(b, item / groups, item % groups, team.index);
  team.barrier();
  if (op.dx && op.gather) fill_empty_rows(op.plan, Matrix{nullptr, 0}, static_cast<T*>(op.dx), op.k, op.k, team);
  if (op.dx || (b.partials && b.linear))
    for (int64_t panel; (panel = b.dx_items.next()) < panels_of(op.k);) dx_panel(b, panel, team.index);
  if (op.dweight) {
    const GradientItems items(groups, op.n, team.size);
    for (int64_t item; (item = b.dw_items.next()) < items.count();) {
      const int64_t g = items.group(item), first = op.plan.offsets[g];
      const Left<T> x = b.x(first);
      weight_gradient_item(static_cast<T*>(op.dweight), op.n, op.k, items, item, b.scaled_grad(first),
                           Right<T>{x.data, 1, x.stride, x.index}, op.plan.offsets[g + 1] - first, b.gradient,
                           team.index);
    }
  }
  if (op.dscale) {
    team.barrier();
    finish_dscale(op.plan, op.dscale, b.partials, b.grad(0), b.linear ? op.bias : Matrix{nullptr, 0}, op.n, team);
  }
}

template <class T>
void run(const GroupedLinearBackward& op) {
  const int64_t live = op.plan.live();
  Backward<T> b{op};
  if ((op.dx || op.dweight) && !b.linear) b.dy = {live, workspace_stride(op.n)};
  if (op.dscale) b.partials = {panels_of(b.linear ? op.k : op.n), live};

  const double products = double((op.dx ? 1 : 0) + (op.dweight ? 1 : 0)) * op.n * op.k;
  const int threads = useful_threads(op.threads, 2.0 * live * products,
                                     sizeof(T) * (double(op.plan.groups) * products + double(live) * (op.n + op.k)));
  b.scratch = TeamScratch::plan<T>(threads, op.n, live);
  if (op.dweight) b.gradient = GradientScratch::plan<T>(threads, largest_group(op.plan), op.k);
  Scratch block(block_bytes(b.dy, b.partials, b.scratch, b.gradient));
  place_in(block, b.dy, b.partials, b.scratch, b.gradient);
  if (!op.gather) zero_slots_from(static_cast<T*>(op.dx), live, op.plan.capacity, op.k);
  prefer_huge_pages(op.dx, (op.gather ? op.plan.num_rows : op.plan.capacity) * op.k * sizeof(T));
  prefer_huge_pages(op.dweight, op.plan.groups * op.n * op.k * sizeof(T));
  parallel(threads, body<T>, &b);
}

}  // namespace

void grouped_linear_backward(const GroupedLinearBackward& op) {
  with_type(op.dtype, [&](auto type) { run<typename decltype(type)::T>(op); });
}

}  // namespace dyncore::DYNCORE_ISA
