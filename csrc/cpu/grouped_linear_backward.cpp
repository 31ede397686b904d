// Backward of grouped_linear. With dout the gradient of slot a (its row's, where the forward pass scattered):
//   dy[a] = scale dout act'(pre),  dx = W^T dy (combined into rows where the forward pass gathered),  dW = dy^T x.
// Without an activation dx is made from dout itself, unscaled, so that dscale[a] = <W^T dout, x[a]> + <dout, b> comes
// free; with one, dscale[a] = <dout, act(pre)>.
// Stage 1, by (panel of N, group): dy by slot, where there is an activation. Stage 2: dx by (group, panel of K), dW by
// (group, rows), and dx combined into rows.
#include "cpu/common/activations.h"
#include "cpu/common/backward.h"

namespace dyncore::DYNCORE_ISA {

namespace {

template <class T>
struct Backward {
  const GroupedLinearBackward& op;
  int threads;
  bool linear = op.activation == Activation::none;
  const float* scale = op.scatter ? op.plan.scale : nullptr;  // null where the forward pass did not scale
  Pieces pieces = {};                                         // the groups that have slots
  Workspace<T> dy = {};                                       // [A, N], for dx, dW and dbias
  Workspace<float> dslots = {};                               // [A, K], dx by slot where rows have several
  Workspace<float> partials = {};                             // [panels, A], for dscale
  TeamScratch scratch = {};
  GradientScratch gradient = {};
  Items dy_items = {}, dx_items = {}, dw_items = {};
  Counter dbias_items = {};

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
void make_dy(const Backward<T>& b, const Cut::Item& item) {
  const GroupedLinearBackward& op = b.op;
  const Left<T> grad = b.grad(item.piece.first);
  for (int64_t r = 0; r < item.piece.rows; ++r) {
    const int64_t a = item.piece.first + r;
    const float scale = b.scale ? b.scale[a] : 1.0f;
    Row dy = load_row(grad.row(r) + item.n0, item.n);
    const Row h = load_row(static_cast<const T*>(op.pre.data) + a * op.pre.stride + item.n0, item.n);
    vf products = {};
    for (int j = 0; j < NV; ++j) {
      const ValueAndDerivative act = evaluate<A>(h.v[j]);
      products += dy.v[j] * act.value;
      dy.v[j] *= scale * act.derivative;
    }
    if (b.partials) b.partials.row(item.n0 / NC)[a] = sum(products);
    if (b.dy) store_row(b.dy.row(a) + item.n0, dy, item.n);
  }
}

// dscale's products with x, where there is no activation.
template <class T>
void store_partials(const Backward<T>& b, const Cut::Item& item, const float* dx) {
  const Left<T> x = b.x(item.piece.first);
  for (int64_t r = 0; r < item.piece.rows; ++r) {
    // columns past n may hold NaN: infinity times the 0 of an absent column
    const Row d = load_row(dx + r * NC, item.n), xr = load_row(x.row(r) + item.n0, item.n);
    vf products = {};
    for (int j = 0; j < NV; ++j) products += d.v[j] * xr.v[j];
    b.partials.row(item.n0 / NC)[item.piece.first + r] = sum(products);
  }
}

// dx by slot, which is unscaled so far where there is no activation.
template <class T>
void dx_panel(const Backward<T>& b, const Cut::Item& item, int thread) {
  const GroupedLinearBackward& op = b.op;
  const int64_t first = item.piece.first, rows = item.piece.rows;
  const Left<T> dy = b.linear ? b.grad(first) : Left<T>{b.dy.row(first), b.dy.stride, nullptr};
  const Right<T> w = weight_of_group<T>(op.weight, item.piece.group, true).from_column(item.n0);
  float* dx = b.scratch.results(thread);
  weight_product(dx, dy, rows, op.n, w, item.n, b.scratch.buffers(thread),
                 {item.piece.group_rows, next_columns<T>(op.weight, item, true)});
  if (b.linear && b.partials) store_partials(b, item, dx);
  if (!op.dx) return;
  const float* scale = b.linear ? b.scale : nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t a = first + r;
    Row row = load_row(dx + r * NC, NC);
    if (b.dslots) {
      store_row(b.dslots.row(a) + item.n0, row, NC);
      continue;
    }
    const float factor = scale ? scale[a] : 1.0f;
    for (int j = 0; j < NV; ++j) row.v[j] *= factor;
    store_row(static_cast<T*>(op.dx) + (op.gather ? op.plan.rows[a] : a) * op.k + item.n0, row, item.n);
  }
}

template <class T>
void weight_gradients(Backward<T>& b, const Team& team) {
  const GroupedLinearBackward& op = b.op;
  const Plan& plan = op.plan;
  if (op.dweight) {
    const GradientBlocks blocks(plan.groups, op.n, b.threads);
    while (const Items::Item item = b.dw_items.take(team)) {
      const int64_t g = blocks.group(item.index), first = plan.offsets[g];
      const Left<T> x = b.x(first);
      weight_gradient_block(static_cast<T*>(op.dweight), op.n, op.k, blocks, item.index, b.scaled_grad(first),
                            Right<T>{x.data, 1, x.stride, x.index}, plan.offsets[g + 1] - first, b.gradient,
                            team.index);
    }
  }
  if (op.dbias) {
    for (int64_t g; (g = b.dbias_items.next()) < plan.groups;) {
      const ScaledLeft<T> dy = b.scaled_grad(plan.offsets[g]);
      bias_gradient(static_cast<T*>(op.dbias) + g * op.n, op.n, dy.rows, dy.scale,
                    plan.offsets[g + 1] - plan.offsets[g]);
    }
  }
}

template <class T>
void body(void* context, const Team& team) {
  Backward<T>& b = *static_cast<Backward<T>*>(context);
  const GroupedLinearBackward& op = b.op;
  const Cut outputs(b.pieces.all(), op.n, b.threads), inputs(b.pieces.all(), op.k, b.threads);
  T* dx = static_cast<T*>(op.dx);
  if (b.dy || (b.partials && !b.linear))
    while (const Items::Item taken = b.dy_items.take(team))
      with_activation(op.activation, [&](auto a) { make_dy<decltype(a)::value>(b, outputs.item(taken)); });
  team.barrier();
  if (dx && op.gather) fill_empty_rows(op.plan, Matrix{nullptr, 0}, dx, op.k, op.k, team);
  if (dx || (b.partials && b.linear))
    while (const Items::Item taken = b.dx_items.take(team)) dx_panel(b, inputs.item(taken), team.index);
  weight_gradients(b, team);
  if (!op.dscale && !b.dslots) return;
  team.barrier();
  if (op.dscale)
    finish_dscale(op.plan, op.dscale, b.partials, b.grad(0), b.linear ? op.bias : Matrix{nullptr, 0}, op.n, team);
  if (b.dslots)
    combine_slots(op.plan, b.dslots.data, b.dslots.stride, b.linear ? b.scale : nullptr, Matrix{nullptr, 0}, dx, op.k,
                  op.k, team);
}

template <class T>
void run(const GroupedLinearBackward& op) {
  const int64_t live = op.plan.live();
  const double products = double((op.dx ? 1 : 0) + (op.dweight ? 1 : 0)) * op.n * op.k;
  const int threads = useful_threads(op.threads, 2.0 * live * products,
                                     sizeof(T) * (double(op.plan.groups) * products + double(live) * (op.n + op.k)));
  Backward<T> b{op, threads};
  b.pieces = Pieces::plan(op.plan, largest(live, 1));
  if ((op.dx || op.dweight || op.dbias) && !b.linear) b.dy = {live, workspace_stride(op.n)};
  if (op.dx && op.gather && several_slots_in_a_row(op.plan)) b.dslots = {live, workspace_stride(op.k)};
  if (op.dscale) b.partials = {panels_of(b.linear ? op.k : op.n), live};
  b.scratch = TeamScratch::plan<T>(threads, op.n, largest_group(op.plan));
  if (op.dweight) b.gradient = GradientScratch::plan<T>(threads, largest_group(op.plan), op.k);
  b.dy_items = b.dx_items = b.dw_items = Items::plan(threads);
  Scratch block(
      block_bytes(b.pieces, b.dy, b.dslots, b.partials, b.scratch, b.gradient, b.dy_items, b.dx_items, b.dw_items));
  place_in(block, b.pieces, b.dy, b.dslots, b.partials, b.scratch, b.gradient, b.dy_items, b.dx_items, b.dw_items);
  b.dy_items.share(Cut(b.pieces.all(), op.n, threads).items());
  b.dx_items.share(Cut(b.pieces.all(), op.k, threads).items());
  b.dw_items.share(GradientBlocks(op.plan.groups, op.n, threads).count());
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
