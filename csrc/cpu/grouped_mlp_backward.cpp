// Backward of grouped_mlp. With dv[a] = W_out^T dout[row], u = act(pre):
//   dscale[a] = <dv, u> + <dout[row], b_out>,  dpre = scale dv act'(pre),  dx = combined dpre W_in,
//   dW_in = dpre^T x,  dW_out = (scale dout)^T u.
// Stage 1, by (group, panel of I): dv and its epilogue, which leaves dpre and u by slot. Stage 2, by (group, panel of
// H) and (group, rows): dx, which goes straight to its rows where no row has several slots and is combined at the end
// elsewhere, and the weight gradients.
#include "cpu/common/activations.h"
#include "cpu/common/backward.h"

namespace dyncore::DYNCORE_ISA {

namespace {

template <class T>
struct Backward {
  const GroupedMlpBackward& op;
  int threads;
  bool gated = is_gated(op.activation);
  int64_t width = gated ? 2 * op.i : op.i;         // of pre
  bool need_dpre = op.dx || op.dw_in || op.db_in;  // any gradient that is made from that of pre
  Pieces pieces = {};                              // the groups that have slots
  Workspace<T> dpre = {};                          // [A, width], for dx, dW_in and db_in
  Workspace<T> hidden = {};                        // [A, I], for dW_out
  Workspace<float> dslots = {};                    // [A, H], dx by slot where rows have several
  Workspace<float> partials = {};                  // [panels of I, A], for dscale
  TeamScratch scratch = {};
  GradientScratch gradient = {};
  Items hidden_items = {}, dx_items = {}, dw_in_items = {}, dw_out_items = {};
  Counter db_in_items = {}, db_out_items = {};

  Left<T> grad(int64_t first) const {
    return {static_cast<const T*>(op.grad.data), op.grad.stride, op.plan.rows + first};
  }
};

// From dv: u, the gradient of the pre-activation and the products that make dscale.
template <Activation A, class T>
void finish_hidden(const Backward<T>& b, const Cut::Item& item, const float* dv_at) {
  const GroupedMlpBackward& op = b.op;
  const int64_t n0 = item.n0;
  const int n = item.n;
  const T* pre = static_cast<const T*>(op.pre.data) + item.piece.first * op.pre.stride + n0;
  for (int64_t r = 0; r < item.piece.rows; ++r, pre += op.pre.stride) {
    const int64_t a = item.piece.first + r;
    const float scale = op.plan.scale ? op.plan.scale[a] : 1.0f;
    const Row dv = load_row(dv_at + r * NC, n), h = load_row(pre, n);  // past n: infinity times 0 may have been added
    const Row v = b.gated ? load_row(pre + op.i, n) : zero_row();
    Row u, dgate, dup;
    vf products = {};
    for (int j = 0; j < NV; ++j) {
      const ValueAndDerivative act = evaluate<A>(h.v[j]);
      const vf du = scale * dv.v[j];
      u.v[j] = b.gated ? act.value * v.v[j] : act.value;
      dgate.v[j] = b.gated ? du * v.v[j] * act.derivative : du * act.derivative;
      dup.v[j] = du * act.value;
      products += dv.v[j] * u.v[j];
    }
    if (b.dpre) {
      store_row(b.dpre.row(a) + n0, dgate, n);
      if (b.gated) store_row(b.dpre.row(a) + op.i + n0, dup, n);
    }
    if (b.hidden) store_row(b.hidden.row(a) + n0, u, n);
    if (b.partials) b.partials.row(n0 / NC)[a] = sum(products);
  }
}

// u alone, for dW_out.
template <Activation A, class T>
void store_hidden(const Backward<T>& b, const Cut::Item& item) {
  const GroupedMlpBackward& op = b.op;
  for (int64_t a = item.piece.first; a < item.piece.first + item.piece.rows; ++a) {
    const T* pre = static_cast<const T*>(op.pre.data) + a * op.pre.stride + item.n0;
    Row u = load_row(pre, item.n);
    for (int j = 0; j < NV; ++j) u.v[j] = evaluate<A>(u.v[j]).value;
    if (b.gated) {
      const Row v = load_row(pre + op.i, item.n);
      for (int j = 0; j < NV; ++j) u.v[j] *= v.v[j];
    }
    store_row(b.hidden.row(a) + item.n0, u, item.n);
  }
}

template <class T>
void hidden_panel(const Backward<T>& b, const Cut::Item& item, int thread) {
  const GroupedMlpBackward& op = b.op;
  if (!b.need_dpre && !b.partials) {
    with_activation(op.activation, [&](auto a) { store_hidden<decltype(a)::value>(b, item); });
    return;
  }
  float* dv = b.scratch.results(thread);
  const Right<T> w = weight_of_group<T>(op.w_out, item.piece.group, true).from_column(item.n0);
  weight_product(dv, b.grad(item.piece.first), item.piece.rows, op.h, w, item.n, b.scratch.buffers(thread),
                 {item.piece.group_rows, next_columns<T>(op.w_out, item, true)});
  with_activation(op.activation, [&](auto a) { finish_hidden<decltype(a)::value>(b, item, dv); });
}

template <class T>
void dx_panel(const Backward<T>& b, const Cut::Item& item, int thread) {
  const GroupedMlpBackward& op = b.op;
  const Piece& piece = item.piece;
  const Left<T> dpre{b.dpre.row(piece.first), b.dpre.stride, nullptr};
  const Right<T> w = weight_of_group<T>(op.w_in, piece.group, true).from_column(item.n0);
  float* dx = b.scratch.results(thread);
  weight_product(dx, dpre, piece.rows, b.width, w, item.n, b.scratch.buffers(thread),
                 {piece.group_rows, next_columns<T>(op.w_in, item, true)});
  for (int64_t r = 0; r < piece.rows; ++r) {
    const Row row = load_row(dx + r * NC, NC);
    if (b.dslots) {
      store_row(b.dslots.row(piece.first + r) + item.n0, row, NC);
    } else {
      store_row(static_cast<T*>(op.dx) + op.plan.rows[piece.first + r] * op.h + item.n0, row, item.n);
    }
  }
}

template <class T>
void weight_gradients(Backward<T>& b, const Team& team) {
  const GroupedMlpBackward& op = b.op;
  const Plan& plan = op.plan;
  if (op.dw_in) {
    const GradientBlocks blocks(plan.groups, b.width, b.threads);
    while (const Items::Item item = b.dw_in_items.take(team)) {
      const int64_t g = blocks.group(item.index), first = plan.offsets[g];
      const ScaledLeft<T> dpre{{b.dpre.row(first), b.dpre.stride, nullptr}, nullptr};
      const Right<T> x{static_cast<const T*>(op.x.data), 1, op.x.stride, plan.rows + first};
      weight_gradient_block(static_cast<T*>(op.dw_in), b.width, op.h, blocks, item.index, dpre, x,
                            plan.offsets[g + 1] - first, b.gradient, team.index);
    }
  }
  if (op.dw_out) {
    const GradientBlocks blocks(plan.groups, op.dw_out_by_neuron ? op.i : op.h, b.threads);
    while (const Items::Item item = b.dw_out_items.take(team)) {
      const int64_t g = blocks.group(item.index), first = plan.offsets[g];
      if (op.dw_out_by_neuron) {
        const ScaledLeft<T> u{{b.hidden.row(first), b.hidden.stride, nullptr},
                              plan.scale ? plan.scale + first : nullptr};
        const Right<T> dy{static_cast<const T*>(op.grad.data), 1, op.grad.stride, plan.rows + first};
        weight_gradient_block(static_cast<T*>(op.dw_out), op.i, op.h, blocks, item.index, u, dy,
                              plan.offsets[g + 1] - first, b.gradient, team.index);
        continue;
      }
      const ScaledLeft<T> dy{b.grad(first), plan.scale ? plan.scale + first : nullptr};
      const Right<T> u{b.hidden.row(first), 1, b.hidden.stride, nullptr};
      weight_gradient_block(static_cast<T*>(op.dw_out), op.h, op.i, blocks, item.index, dy, u,
                            plan.offsets[g + 1] - first, b.gradient, team.index);
    }
  }
}

template <class T>
void bias_gradients(Backward<T>& b) {
  const GroupedMlpBackward& op = b.op;
  const Plan& plan = op.plan;
  if (op.db_in)
    for (int64_t g; (g = b.db_in_items.next()) < plan.groups;)
      bias_gradient(static_cast<T*>(op.db_in) + g * b.width, b.width,
                    Left<T>{b.dpre.row(plan.offsets[g]), b.dpre.stride, nullptr}, nullptr,
                    plan.offsets[g + 1] - plan.offsets[g]);
  if (op.db_out)
    for (int64_t g; (g = b.db_out_items.next()) < plan.groups;)
      bias_gradient(static_cast<T*>(op.db_out) + g * op.h, op.h, b.grad(plan.offsets[g]),
                    plan.scale ? plan.scale + plan.offsets[g] : nullptr, plan.offsets[g + 1] - plan.offsets[g]);
}

template <class T>
void body(void* context, const Team& team) {
  Backward<T>& b = *static_cast<Backward<T>*>(context);
  const GroupedMlpBackward& op = b.op;
  T* dx = static_cast<T*>(op.dx);
  const Cut hidden(b.pieces.all(), op.i, b.threads), results(b.pieces.all(), op.h, b.threads);
  if (b.need_dpre || b.hidden || b.partials)
    while (const Items::Item taken = b.hidden_items.take(team)) hidden_panel(b, hidden.item(taken), team.index);
  if (dx) fill_empty_rows(op.plan, Matrix{nullptr, 0}, dx, op.h, op.h, team);
  team.barrier();
  if (op.dscale) {
    // Rows by absolute slot: the plan's own list from slot 0.
    finish_dscale(op.plan, op.dscale, b.partials, b.grad(0), op.b_out, op.h, team);
  }
  if (dx)
    while (const Items::Item taken = b.dx_items.take(team)) dx_panel(b, results.item(taken), team.index);
  weight_gradients(b, team);
  bias_gradients(b);
  if (!b.dslots) return;
  team.barrier();
  combine_slots(op.plan, b.dslots.data, b.dslots.stride, nullptr, Matrix{nullptr, 0}, dx, op.h, op.h, team);
}

template <class T>
void run(const GroupedMlpBackward& op) {
  const int64_t live = op.plan.live(), width = is_gated(op.activation) ? 2 * op.i : op.i;
  const double products = 2.0 * double(width + op.i) * op.h;  // an estimate: all gradients needed
  const int threads = useful_threads(op.threads, 2.0 * live * products,
                                     sizeof(T) * (double(op.plan.groups) * products + double(op.plan.num_rows) * op.h));
  Backward<T> b{op, threads};
  b.pieces = Pieces::plan(op.plan, largest(live, 1));
  if (b.need_dpre) b.dpre = {live, workspace_stride(width)};
  if (op.dw_out) b.hidden = {live, workspace_stride(op.i)};
  if (op.dx && several_slots_in_a_row(op.plan)) b.dslots = {live, workspace_stride(op.h)};
  if (op.dscale) b.partials = {panels_of(op.i), live};
  const int64_t group = largest_group(op.plan);
  b.scratch = TeamScratch::plan<T>(threads, largest(op.h, width), group);
  if (op.dw_in || op.dw_out) b.gradient = GradientScratch::plan<T>(threads, group, largest(op.h, op.i));
  b.hidden_items = b.dx_items = b.dw_in_items = b.dw_out_items = Items::plan(threads);

  Scratch block(block_bytes(b.pieces, b.dpre, b.hidden, b.dslots, b.partials, b.scratch, b.gradient, b.hidden_items,
                            b.dx_items, b.dw_in_items, b.dw_out_items));
  place_in(block, b.pieces, b.dpre, b.hidden, b.dslots, b.partials, b.scratch, b.gradient, b.hidden_items, b.dx_items,
           b.dw_in_items, b.dw_out_items);
  b.hidden_items.share(Cut(b.pieces.all(), op.i, threads).items());
  b.dx_items.share(Cut(b.pieces.all(), op.h, threads).items());
  b.dw_in_items.share(GradientBlocks(op.plan.groups, width, threads).count());
  b.dw_out_items.share(GradientBlocks(op.plan.groups, op.dw_out_by_neuron ? op.i : op.h, threads).count());
  prefer_huge_pages(op.dx, op.plan.num_rows * op.h * sizeof(T));
  prefer_huge_pages(op.dw_in, op.plan.groups * width * op.h * sizeof(T));
  prefer_huge_pages(op.dw_out, op.plan.groups * op.h * op.i * sizeof(T));
  parallel(threads, body<T>, &b);
}

}  // namespace

void grouped_mlp_backward(const GroupedMlpBackward& op) {
  with_type(op.dtype, [&](auto type) { run<typename decltype(type)::T>(op); });
}

}  // namespace dyncore::DYNCORE_ISA
