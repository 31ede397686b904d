// Backward of grouped_mlp. With dv[a] = W_out^T dout[row], u = act(pre):
//   dscale[a] = <dv, u> + <dout[row], b_out>,  dpre = scale dv act'(pre),  dx = combined dpre W_in,
//   dW_in = dpre^T x,  dW_out = (scale dout)^T u.
// Stage 1, by (panel, group): dv and its epilogue, which leaves dpre and u by slot. Stage 2: dx by panels of H for all
// groups, the weight gradients by (group, rows), db_out by (panel, group).
#include "cpu/common/activations.h"
#include "cpu/common/backward.h"

namespace dyncore::DYNCORE_ISA {

namespace {

template <class T>
struct Backward {
  const GroupedMlpBackward& op;
  bool gated = is_gated(op.activation);
  int64_t width = gated ? 2 * op.i : op.i;         // of pre
  bool need_dpre = op.dx || op.dw_in || op.db_in;  // any gradient that is made from that of pre
  Workspace<T> dpre = {};                          // [A, width], for dx and dW_in
  Workspace<T> hidden = {};                        // [A, I], for dW_out
  Workspace<float> partials = {};                  // [panels of I, A], for dscale
  TeamScratch scratch = {};
  GradientScratch gradient = {};
  Counter stage1 = {}, dx_items = {}, dw_in_items = {}, dw_out_items = {}, db_out_items = {};

  Left<T> grad(int64_t first) const {
    return {static_cast<const T*>(op.grad.data), op.grad.stride, op.plan.rows + first};
  }
};

// Turns dv (in `gate`) into the gradient of the gate's or only half (in `gate`) and of the up half (in `up`).
template <Activation A, class T>
void finish_hidden(const Backward<T>& b, int64_t g, int64_t panel, int n, float* gate, float* up) {
  const GroupedMlpBackward& op = b.op;
  const int64_t first = op.plan.offsets[g], m = op.plan.offsets[g + 1] - first, n0 = panel * NC;
  const T* pre = static_cast<const T*>(op.pre.data) + first * op.pre.stride + n0;
  for (int64_t r = 0; r < m; ++r, pre += op.pre.stride) {
    const int64_t a = first + r;
    const float scale = op.plan.scale ? op.plan.scale[a] : 1.0f;
    const Row dv = load_row(gate + r * NC, NC), h = load_row(pre, n);
    const Row v = up ? load_row(pre + op.i, n) : zero_row();
    Row u, dgate, dup;
    vf products = {};
    for (int j = 0; j < NV; ++j) {
      const ValueAndDerivative act = evaluate<A>(h.v[j]);
      const vf du = scale * dv.v[j];
      u.v[j] = up ? act.value * v.v[j] : act.value;
      dgate.v[j] = up ? du * v.v[j] * act.derivative : du * act.derivative;
      dup.v[j] = du * act.value;
      products += dv.v[j] * u.v[j];
    }
    store_row(gate + r * NC, dgate, NC);
    if (up) store_row(up + r * NC, dup, NC);
    if (b.dpre) {
      store_row(b.dpre.row(a) + n0, dgate, n);
      if (up) store_row(b.dpre.row(a) + op.i + n0, dup, n);
    }
    if (b.hidden) store_row(b.hidden.row(a) + n0, u, n);
    if (b.partials) b.partials.row(panel)[a] = sum(products);
  }
}

// u alone, for dW_out.
template <Activation A, class T>
void store_hidden(const Backward<T>& b, int64_t g, int64_t panel, int n) {
  const GroupedMlpBackward& op = b.op;
  const int64_t n0 = panel * NC;
  for (int64_t a = op.plan.offsets[g]; a < op.plan.offsets[g + 1]; ++a) {
    const T* pre = static_cast<const T*>(op.pre.data) + a * op.pre.stride + n0;
    Row u = load_row(pre, n);
    for (int j = 0; j < NV; ++j) u.v[j] = evaluate<A>(u.v[j]).value;
    if (b.gated) {
      const Row v = load_row(pre + op.i, n);
      for (int j = 0; j < NV; ++j) u.v[j] *= v.v[j];
    }
    store_row(b.hidden.row(a) + n0, u, n);
  }
}

template <class T>
void hidden_panel(const Backward<T>& b, int64_t panel, int64_t g, int thread) {
  const GroupedMlpBackward& op = b.op;
  const int64_t first = op.plan.offsets[g], m = op.plan.offsets[g + 1] - first, n0 = panel * NC;
  const int n = panel_width(op.i, n0);
  if (!b.need_dpre && !b.partials) {
    with_activation(op.activation, [&](auto a) { store_hidden<decltype(a)::value>(b, g, panel, n); });
    return;
  }
  float* gate = b.scratch.results(thread);
  float* up = b.gated ? gate + m * NC : nullptr;
  if (m > 0) {
    const Right<T> w = weight_of_group<T>(op.w_out, g, true).from_column(n0);
    product(gate, b.grad(first), m, op.h, w, n, b.scratch.buffers(thread));
    with_activation(op.activation, [&](auto a) { finish_hidden<decltype(a)::value>(b, g, panel, n, gate, up); });
  }
  if (op.db_in) {
    T* db_in = static_cast<T*>(op.db_in) + g * b.width + n0;
    store_column_sums(db_in, gate, m, n);
    if (up) store_column_sums(db_in + op.i, up, m, n);
  }
}

template <class T>
void dx_panel(const Backward<T>& b, int64_t panel, int thread) {
  const GroupedMlpBackward& op = b.op;
  const int64_t n0 = panel * NC;
  const int n = panel_width(op.h, n0);
  float* dslots = b.scratch.results(thread);
  for (int64_t g = 0; g < op.plan.groups; ++g) {
    const int64_t first = op.plan.offsets[g], m = op.plan.offsets[g + 1] - first;
    if (m == 0) continue;
    const Left<T> dpre{b.dpre.row(first), b.dpre.stride, nullptr};
    const Right<T> w = weight_of_group<T>(op.w_in, g, true).from_column(n0);
    product(dslots + first * NC, dpre, m, b.width, w, n, b.scratch.buffers(thread));
  }
  combine_panel(op.plan, dslots, nullptr, Matrix{nullptr, 0}, static_cast<T*>(op.dx), op.h, n0, n);
}

template <class T>
void weight_gradients(Backward<T>& b, const Team& team) {
  const GroupedMlpBackward& op = b.op;
  const Plan& plan = op.plan;
  if (op.dw_in) {
    const GradientItems items(plan.groups, b.width, team.size);
    for (int64_t item; (item = b.dw_in_items.next()) < items.count();) {
      const int64_t g = items.group(item), first = plan.offsets[g];
      const ScaledLeft<T> dpre{{b.dpre.row(first), b.dpre.stride, nullptr}, nullptr};
      const Right<T> x{static_cast<const T*>(op.x.data), 1, op.x.stride, plan.rows + first};
      weight_gradient_item(static_cast<T*>(op.dw_in), b.width, op.h, items, item, dpre, x, plan.offsets[g + 1] - first,
                           b.gradient, team.index);
    }
  }
  if (op.dw_out) {
    const GradientItems items(plan.groups, op.h, team.size);
    for (int64_t item; (item = b.dw_out_items.next()) < items.count();) {
      const int64_t g = items.group(item), first = plan.offsets[g];
      const ScaledLeft<T> dy{b.grad(first), plan.scale ? plan.scale + first : nullptr};
      const Right<T> u{b.hidden.row(first), 1, b.hidden.stride, nullptr};
      weight_gradient_item(static_cast<T*>(op.dw_out), op.h, op.i, items, item, dy, u, plan.offsets[g + 1] - first,
                           b.gradient, team.index);
    }
  }
  if (op.db_out) {
    for (int64_t item; (item = b.db_out_items.next()) < panels_of(op.h) * plan.groups;) {
      const int64_t g = item / panels_of(op.h), n0 = item % panels_of(op.h) * NC, first = plan.offsets[g];
      store_scaled_column_sums(static_cast<T*>(op.db_out) + g * op.h + n0, b.grad(first),
                               plan.scale ? plan.scale + first : nullptr, plan.offsets[g + 1] - first, n0,
                               panel_width(op.h, n0));
    }
  }
}

template <class T>
void body(void* context, const Team& team) {
  Backward<T>& b = *static_cast<Backward<T>*>(context);
  const GroupedMlpBackward& op = b.op;
  const int64_t groups = op.plan.groups;
  if (b.need_dpre || b.hidden || b.partials)
    for (int64_t item; (item = b.stage1.next()) < panels_of(op.i) * groups;)
      hidden_panel(b, item / groups, item % groups, team.index);
  team.barrier();
  if (op.dscale) {
    // Rows by absolute slot: the plan's own list from slot 0.
    finish_dscale(op.plan, op.dscale, b.partials, b.grad(0), op.b_out, op.h, team);
  }
  if (op.dx) {
    fill_empty_rows(op.plan, Matrix{nullptr, 0}, static_cast<T*>(op.dx), op.h, op.h, team);
    for (int64_t panel; (panel = b.dx_items.next()) < panels_of(op.h);) dx_panel(b, panel, team.index);
  }
  weight_gradients(b, team);
}

int64_t largest(int64_t a, int64_t b) {
  return a > b ? a : b;
}

template <class T>
void run(const GroupedMlpBackward& op) {
  Backward<T> b{op};
  const int64_t live = op.plan.live();
  if (op.dx || op.dw_in) b.dpre = {live, workspace_stride(b.width)};
  if (op.dw_out) b.hidden = {live, workspace_stride(op.i)};
  if (op.dscale) b.partials = {panels_of(op.i), live};

  const double products = double(b.width + 2 * op.i + b.width) * op.h;  // an estimate: all gradients needed
  const int threads = useful_threads(op.threads, 2.0 * live * products,
                                     sizeof(T) * (double(op.plan.groups) * products + double(op.plan.num_rows) * op.h));
  const int64_t group = largest_group(op.plan);
  int64_t results = b.gated ? 2 * group : group;
  if (op.dx) results = largest(results, live);
  b.scratch = TeamScratch::plan<T>(threads, largest(op.h, b.width), results);
  if (op.dw_in || op.dw_out) b.gradient = GradientScratch::plan<T>(threads, group, largest(op.h, op.i));

  Scratch block(block_bytes(b.dpre, b.hidden, b.partials, b.scratch, b.gradient));
  place_in(block, b.dpre, b.hidden, b.partials, b.scratch, b.gradient);
  prefer_huge_pages(op.dx, op.plan.num_rows * op.h * sizeof(T));
  prefer_huge_pages(op.dw_in, op.plan.groups * b.width * op.h * sizeof(T));
  prefer_huge_pages(op.dw_out, op.plan.groups * op.h * op.i * sizeof(T));
  parallel(threads, body<T>, &b);
}

}  // namespace

void grouped_mlp_backward(const GroupedMlpBackward& op) {
  with_type(op.dtype, [&](auto type) { run<typename decltype(type)::T>(op); });
}

}  // namespace dyncore::DYNCORE_ISA
