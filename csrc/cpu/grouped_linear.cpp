// grouped_linear: y[a] = act(W[g] x[row or slot a] + b[g]), stored by slot or scaled and summed into rows.
// By panels of 32 output columns: by slot, every (panel, group) is independent work; by row, a panel owns all groups.
#include "cpu/common/activations.h"
#include "cpu/common/team_scratch.h"

namespace dyncore::DYNCORE_ISA {

namespace {

template <class T>
struct Forward {
  const GroupedLinear& op;
  TeamScratch scratch = {};
  Counter items = {};
};

// y[m][32] of one group, bias and activation included; saves the pre-activation.
template <Activation A, class T>
void finish(const GroupedLinear& op, int64_t g, int64_t n0, int n, float* y) {
  const int64_t first = op.plan.offsets[g], m = op.plan.offsets[g + 1] - first;
  const Row bias = bias_row<T>(op.bias, g, n0, n);
  T* pre = op.pre ? static_cast<T*>(op.pre) + first * op.n + n0 : nullptr;
  for (int64_t r = 0; r < m; ++r) {
    Row h = load_row(y + r * NC, NC) + bias;
    if (pre) store_row(pre + r * op.n, h, n);
    for (int j = 0; j < NV; ++j) h.v[j] = evaluate<A>(h.v[j]).value;
    store_row(y + r * NC, h, NC);
  }
}

template <class T>
void group_panel(const Forward<T>& f, int64_t panel, int64_t g, float* y, int thread) {
  const GroupedLinear& op = f.op;
  const int64_t first = op.plan.offsets[g], m = op.plan.offsets[g + 1] - first;
  const int64_t n0 = panel * NC;
  const int n = panel_width(op.n, n0);
  const T* data = static_cast<const T*>(op.x.data);
  const Left<T> x = op.gather ? Left<T>{data, op.x.stride, op.plan.rows + first}
                              : Left<T>{data + first * op.x.stride, op.x.stride, nullptr};
  const Right<T> w = weight_of_group<T>(op.weight, g, false).from_column(n0);
  product(y, x, m, op.k, w, n, f.scratch.buffers(thread));
  with_activation(op.activation, [&](auto a) { finish<decltype(a)::value, T>(op, g, n0, n, y); });
}

template <class T>
void by_rows(Forward<T>& f, const Team& team) {
  const GroupedLinear& op = f.op;
  T* out = static_cast<T*>(op.out);
  const Matrix no_base{nullptr, 0};
  fill_empty_rows(op.plan, no_base, out, op.n, op.n, team);
  for (int64_t panel; (panel = f.items.next()) < panels_of(op.n);) {
    float* y = f.scratch.results(team.index);
    for (int64_t g = 0; g < op.plan.groups; ++g)
      if (op.plan.offsets[g] < op.plan.offsets[g + 1])
        group_panel(f, panel, g, y + op.plan.offsets[g] * NC, team.index);
    const int64_t n0 = panel * NC;
    combine_panel(op.plan, y, op.plan.scale, no_base, out, op.n, n0, panel_width(op.n, n0));
  }
}

template <class T>
void by_slots(Forward<T>& f, const Team& team) {
  const GroupedLinear& op = f.op;
  const int64_t items = panels_of(op.n) * op.plan.groups;
  for (int64_t item; (item = f.items.next()) < items;) {
    const int64_t panel = item / op.plan.groups, g = item % op.plan.groups, n0 = panel * NC;
    const int64_t first = op.plan.offsets[g], m = op.plan.offsets[g + 1] - first;
    if (m == 0) continue;
    float* y = f.scratch.results(team.index);
    group_panel(f, panel, g, y, team.index);
    T* out = static_cast<T*>(op.out) + first * op.n + n0;
    for (int64_t r = 0; r < m; ++r) store_row(out + r * op.n, load_row(y + r * NC, NC), panel_width(op.n, n0));
  }
}

template <class T>
void body(void* context, const Team& team) {
  Forward<T>& f = *static_cast<Forward<T>*>(context);
  f.op.scatter ? by_rows(f, team) : by_slots(f, team);
}

template <class T>
void run(const GroupedLinear& op) {
  const int64_t live = op.plan.live();
  const int threads = useful_threads(op.threads, 2.0 * live * op.n * op.k,
                                     sizeof(T) * (double(groups_with_slots(op.plan)) * op.n * op.k +
                                                  double(op.scatter ? op.plan.num_rows : op.plan.capacity) * op.n));
  Forward<T> f{op};
  f.scratch = TeamScratch::plan<T>(threads, op.k, op.scatter ? live : largest_group(op.plan));
  Scratch block(block_bytes(f.scratch));
  place_in(block, f.scratch);
  prefer_huge_pages(op.out, (op.scatter ? op.plan.num_rows : op.plan.capacity) * op.n * sizeof(T));
  prefer_huge_pages(op.pre, op.plan.capacity * op.n * sizeof(T));
  zero_slots_from(static_cast<T*>(op.pre), live, op.plan.capacity, op.n);
  if (!op.scatter) zero_slots_from(static_cast<T*>(op.out), live, op.plan.capacity, op.n);
  parallel(threads, body<T>, &f);
}

}  // namespace

void grouped_linear(const GroupedLinear& op) {
  with_type(op.dtype, [&](auto type) { run<typename decltype(type)::T>(op); });
}

}  // namespace dyncore::DYNCORE_ISA
