// grouped_linear: y[a] = act(W[g] x[row or slot a] + b[g]), stored by slot or scaled and summed into rows.
// By panels of 32 output columns for each piece of a group's slots. Results go straight to their slots, or to their
// rows where none has several slots, and else to a buffer of slots that is combined into rows at the end.
#include "cpu/common/activations.h"
#include "cpu/common/pieces.h"
#include "cpu/common/stored_rows.h"
#include "cpu/row_ranges.h"

namespace dyncore::DYNCORE_ISA {

namespace {

// Bytes of x in a block, for each thread: they are read again for every panel of the output.
constexpr int64_t kBlockBytes = 4 << 20;
constexpr int64_t kBlockRows = 384;  // at least: weights are packed again for every block

template <class T>
struct Forward {
  const GroupedLinear& op;
  int threads;
  Pieces pieces = {};
  Workspace<float> slots = {};  // [A, N], where rows have several slots
  TeamScratch scratch = {};
  Items items = {};
};

// Bias, activation and stores of an item's results y.
template <Activation A, class T>
void finish(const Forward<T>& f, const Cut::Item& item, const float* y) {
  const GroupedLinear& op = f.op;
  const Row bias = bias_row<T>(op.bias, item.piece.group, item.n0, item.n);
  T* out = static_cast<T*>(op.out) + item.n0;
  T* pre = static_cast<T*>(op.pre);
  for (int64_t r = 0; r < item.piece.rows; ++r) {
    const int64_t a = item.piece.first + r;
    Row h = load_row(y + r * NC, NC) + bias;
    if (pre) store_row(pre + a * op.n + item.n0, h, item.n);
    for (int j = 0; j < NV; ++j) h.v[j] = evaluate<A>(h.v[j]).value;
    if (!op.scatter) {
      store_row(out + a * op.n, h, item.n);
    } else if (f.slots) {
      store_row(f.slots.row(a) + item.n0, h, NC);
    } else {
      const float scale = op.plan.scale ? op.plan.scale[a] : 1.0f;
      for (int j = 0; j < NV; ++j) h.v[j] *= scale;
      store_row(out + op.plan.rows[a] * op.n, h, item.n);
    }
  }
}

template <class T>
void out_panel(const Forward<T>& f, const Cut::Item& item, int thread) {
  const GroupedLinear& op = f.op;
  const Left<T> all{static_cast<const T*>(op.x.data), op.x.stride, op.gather ? op.plan.rows : nullptr};
  const Left<T> x = all.from(item.piece.first);
  const Right<T> w = weight_of_group<T>(op.weight, item.piece.group, false).from_column(item.n0);
  float* y = f.scratch.results(thread);
  weight_product(y, x, item.piece.rows, op.k, w, item.n, f.scratch.buffers(thread),
                 {item.piece.group_rows, next_columns<T>(op.weight, item, false)});
  with_activation(op.activation, [&](auto a) { finish<decltype(a)::value>(f, item, y); });
}

template <class T>
void body(void* context, const Team& team) {
  Forward<T>& f = *static_cast<Forward<T>*>(context);
  const GroupedLinear& op = f.op;
  T* out = static_cast<T*>(op.out);
  const Matrix no_base{nullptr, 0};
  if (op.scatter) fill_empty_rows(op.plan, no_base, out, op.n, op.n, team);
  for (int64_t b = 0; b < f.pieces.blocks(); ++b) {
    const Pieces::Span block = f.pieces.block(b);
    const Cut cut(block, op.n, f.threads);
    if (b > 0) {
      f.items.share(cut.items(), team);
      team.barrier();
    }
    while (const Items::Item taken = f.items.take(team)) out_panel(f, cut.item(taken), team.index);
    if (b + 1 < f.pieces.blocks()) team.barrier();
  }
  if (!f.slots) return;
  team.barrier();
  combine_slots(op.plan, f.slots.data, f.slots.stride, op.plan.scale, no_base, out, op.n, op.n, team);
}

template <class T>
void run(const GroupedLinear& op) {
  const int64_t live = op.plan.live(), out_rows = op.scatter ? op.plan.num_rows : op.plan.capacity;
  const int threads =
      useful_threads(op.threads, 2.0 * live * op.n * op.k,
                     sizeof(T) * (double(groups_with_slots(op.plan)) * op.n * op.k + double(out_rows) * op.n));
  Forward<T> f{op, threads};
  const int64_t fits = threads * kBlockBytes / (op.k * static_cast<int64_t>(sizeof(T)) + 1);
  const int64_t limit = fits > kBlockRows ? fits : kBlockRows, slots = live < limit ? live : limit;
  f.pieces = Pieces::plan(op.plan, limit);
  if (op.scatter && several_slots_in_a_row(op.plan)) f.slots = {live, workspace_stride(op.n)};
  f.scratch = TeamScratch::plan<T>(threads, op.k, slots);
  f.items = Items::plan(threads);
  Scratch block(block_bytes(f.pieces, f.slots, f.scratch, f.items));
  place_in(block, f.pieces, f.slots, f.scratch, f.items);
  prefer_huge_pages(op.out, out_rows * op.n * sizeof(T));
  prefer_huge_pages(op.pre, op.plan.capacity * op.n * sizeof(T));
  zero_slots_from(static_cast<T*>(op.pre), live, op.plan.capacity, op.n);
  if (!op.scatter) zero_slots_from(static_cast<T*>(op.out), live, op.plan.capacity, op.n);
  if (f.pieces.blocks() > 0) f.items.share(Cut(f.pieces.block(0), op.n, threads).items());
  parallel(threads, body<T>, &f);
}

template <class T>
void run_by_ranges(const GroupedLinear& op) {
  // Slots that the caller gives, or is given, lie in the order of the whole plan.
  const bool in_rows = op.gather && op.scatter && !op.pre;
  RowRanges ranges(op.plan, in_rows ? workspace_stride(op.n) * sizeof(float) : 0);
  for (int64_t i = 0; i < ranges.count(); ++i) {
    const RowRanges::Range range = ranges.range(i);
    GroupedLinear part = op;
    part.plan = range.plan;
    part.x = rows_from<T>(op.x, range.first_row);
    part.out = static_cast<T*>(op.out) + range.first_row * op.n;
    run<T>(part);
  }
}

}  // namespace

void grouped_linear(const GroupedLinear& op) {
  with_type(op.dtype, [&](auto type) { run_by_ranges<typename decltype(type)::T>(op); });
}

}  // namespace dyncore::DYNCORE_ISA
