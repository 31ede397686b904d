// grouped_mlp: out[t] = residual[t] + sum over the row's slots of scale * (W_out act(W_in x[t] + b_in) + b_out).
// Stage 1 makes the hidden activation by panels of 32 hidden columns, gathering rows of x as it reads them; stage 2
// makes panels of 32 output columns for all slots and combines them into rows.
#include "cpu/common/activations.h"
#include "cpu/common/team_scratch.h"

namespace dyncore::DYNCORE_ISA {

namespace {

template <class T>
struct Forward {
  const GroupedMlp& op;
  bool gated = is_gated(op.activation);
  Workspace<T> hidden = {};  // [A, I]
  TeamScratch scratch = {};
  Counter hidden_items = {}, out_items = {};
};

// Bias, activation and stores of one group's hidden panel; `up` is the second half's panel of a gated activation.
template <Activation A, class T>
void finish_hidden(const Forward<T>& f, int64_t g, int64_t n0, int n, const float* gate, const float* up) {
  const GroupedMlp& op = f.op;
  const int64_t first = op.plan.offsets[g], m = op.plan.offsets[g + 1] - first;
  const Row bias = bias_row<T>(op.b_in, g, n0, n);
  const Row up_bias = up ? bias_row<T>(op.b_in, g, op.i + n0, n) : zero_row();
  const int64_t pre_stride = up ? 2 * op.i : op.i;
  T* pre = op.pre ? static_cast<T*>(op.pre) + first * pre_stride + n0 : nullptr;
  for (int64_t r = 0; r < m; ++r) {
    const Row h = load_row(gate + r * NC, NC) + bias;
    Row u;
    for (int j = 0; j < NV; ++j) u.v[j] = evaluate<A>(h.v[j]).value;
    if (pre) store_row(pre + r * pre_stride, h, n);
    if (up) {
      const Row v = load_row(up + r * NC, NC) + up_bias;
      for (int j = 0; j < NV; ++j) u.v[j] *= v.v[j];
      if (pre) store_row(pre + r * pre_stride + op.i, v, n);
    }
    store_row(f.hidden.row(first + r) + n0, u, NC);
  }
}

template <class T>
void hidden_panel(const Forward<T>& f, int64_t panel, int64_t g, int thread) {
  const GroupedMlp& op = f.op;
  const int64_t first = op.plan.offsets[g], m = op.plan.offsets[g + 1] - first;
  if (m == 0) return;
  const int64_t n0 = panel * NC;
  const int n = panel_width(op.i, n0);
  const Left<T> x{static_cast<const T*>(op.x.data), op.x.stride, op.plan.rows + first};
  const Right<T> w = weight_of_group<T>(op.w_in, g, false);
  float* gate = f.scratch.results(thread);
  float* up = f.gated ? gate + m * NC : nullptr;
  product(gate, x, m, op.h, w.from_column(n0), n, f.scratch.buffers(thread));
  if (up) product(up, x, m, op.h, w.from_column(op.i + n0), n, f.scratch.buffers(thread));
  with_activation(op.activation, [&](auto a) { finish_hidden<decltype(a)::value>(f, g, n0, n, gate, up); });
}

template <class T>
void out_panel(const Forward<T>& f, int64_t panel, int thread) {
  const GroupedMlp& op = f.op;
  const int64_t n0 = panel * NC;
  const int n = panel_width(op.h, n0);
  float* y = f.scratch.results(thread);
  for (int64_t g = 0; g < op.plan.groups; ++g) {
    const int64_t first = op.plan.offsets[g], m = op.plan.offsets[g + 1] - first;
    if (m == 0) continue;
    const Left<T> u{f.hidden.row(first), f.hidden.stride, nullptr};
    float* yg = y + first * NC;
    product(yg, u, m, op.i, weight_of_group<T>(op.w_out, g, false).from_column(n0), n, f.scratch.buffers(thread));
    if (op.b_out.data) {
      const Row bias = bias_row<T>(op.b_out, g, n0, n);
      for (int64_t r = 0; r < m; ++r) store_row(yg + r * NC, load_row(yg + r * NC, NC) + bias, NC);
    }
  }
  combine_panel(op.plan, y, op.plan.scale, op.residual, static_cast<T*>(op.out), op.h, n0, n);
}

template <class T>
void body(void* context, const Team& team) {
  Forward<T>& f = *static_cast<Forward<T>*>(context);
  const GroupedMlp& op = f.op;
  const int64_t hidden_panels = panels_of(op.i) * op.plan.groups;
  for (int64_t item; (item = f.hidden_items.next()) < hidden_panels;)
    hidden_panel(f, item / op.plan.groups, item % op.plan.groups, team.index);
  fill_empty_rows(op.plan, op.residual, static_cast<T*>(op.out), op.h, op.h, team);
  team.barrier();
  for (int64_t panel; (panel = f.out_items.next()) < panels_of(op.h);) out_panel(f, panel, team.index);
}

template <class T>
void run(const GroupedMlp& op) {
  Forward<T> f{op};
  const bool gated = f.gated;
  const int64_t live = op.plan.live();
  const int64_t products = (gated ? 3 : 2) * op.h * op.i;
  const int threads =
      useful_threads(op.threads, 2.0 * live * products,
                     sizeof(T) * (double(groups_with_slots(op.plan)) * products + double(op.plan.num_rows) * op.h));
  const int64_t results = gated && 2 * largest_group(op.plan) > live ? 2 * largest_group(op.plan) : live;
  f.hidden = {live, workspace_stride(op.i)};
  f.scratch = TeamScratch::plan<T>(threads, op.h > op.i ? op.h : op.i, results);
  Scratch block(block_bytes(f.hidden, f.scratch));
  place_in(block, f.hidden, f.scratch);
  prefer_huge_pages(op.out, op.plan.num_rows * op.h * sizeof(T));
  prefer_huge_pages(op.pre, op.plan.capacity * (gated ? 2 * op.i : op.i) * sizeof(T));
  zero_slots_from(static_cast<T*>(op.pre), live, op.plan.capacity, gated ? 2 * op.i : op.i);
  parallel(threads, body<T>, &f);
}

}  // namespace

void grouped_mlp(const GroupedMlp& op) {
  with_type(op.dtype, [&](auto type) { run<typename decltype(type)::T>(op); });
}

}  // namespace dyncore::DYNCORE_ISA
