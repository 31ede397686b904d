// grouped_mlp: out[t] = residual[t] + sum over the row's slots of scale * (W_out act(W_in x[t] + b_in) + b_out).
// By blocks of slots, so that the hidden activation is consumed while it is in cache. Stage 1 makes it by panels of 32
// hidden columns, gathering rows of x as it reads them; stage 2 makes panels of 32 output columns, which go straight to
// their rows where no row has several slots, and else to a buffer of slots that is combined into rows at the end.
#include "cpu/common/activations.h"
#include "cpu/common/pieces.h"
#include "cpu/common/stored_rows.h"
#include "cpu/row_ranges.h"

namespace dyncore::DYNCORE_ISA {

namespace {

// Bytes of hidden activation in a block, for each thread: they are read again for every panel of the output. From 0.5
// to 4 MB makes no difference on Zen 4 with 32 MB of L3 cache (fp32 and bf16, 4096 rows); without blocks 6% are lost.
constexpr int64_t kBlockBytes = 4 << 20;
constexpr int64_t kBlockRows = 384;  // at least: weights are read again for every block

template <class T>
struct Forward {
  const GroupedMlp& op;
  int threads;
  bool gated = is_gated(op.activation);
  Pieces pieces = {};
  Workspace<T> hidden = {};     // [slots of a block, I]
  Workspace<float> slots = {};  // [A, H], where rows have several slots
  TeamScratch scratch = {};
  Items hidden_items = {}, out_items = {};
};

// Bias, activation and stores of a part's hidden panel; `up` is the second half's panel of a gated activation.
template <Activation A, class T>
void finish_hidden(const Forward<T>& f, const Cut::Item& item, T* hidden, const float* gate, const float* up) {
  const GroupedMlp& op = f.op;
  const Piece& piece = item.piece;
  const Row bias = bias_row<T>(op.b_in, piece.group, item.n0, item.n);
  const Row up_bias = up ? bias_row<T>(op.b_in, piece.group, op.i + item.n0, item.n) : zero_row();
  const int64_t pre_stride = up ? 2 * op.i : op.i;
  T* pre = op.pre ? static_cast<T*>(op.pre) + piece.first * pre_stride + item.n0 : nullptr;
  for (int64_t r = 0; r < piece.rows; ++r) {
    const Row h = load_row(gate + r * NC, NC) + bias;
    Row u;
    for (int j = 0; j < NV; ++j) u.v[j] = evaluate<A>(h.v[j]).value;
    if (pre) store_row(pre + r * pre_stride, h, item.n);
    if (up) {
      const Row v = load_row(up + r * NC, NC) + up_bias;
      for (int j = 0; j < NV; ++j) u.v[j] *= v.v[j];
      if (pre) store_row(pre + r * pre_stride + op.i, v, item.n);
    }
    store_row(hidden + r * f.hidden.stride, u, NC);
  }
}

template <class T>
void hidden_panel(const Forward<T>& f, const Pieces::Span& block, const Cut::Item& item, int thread) {
  const GroupedMlp& op = f.op;
  const Piece& piece = item.piece;
  const Left<T> x{static_cast<const T*>(op.x.data), op.x.stride, op.plan.rows + piece.first};
  const Right<T> w = weight_of_group<T>(op.w_in, piece.group, false).from_column(item.n0);
  const PanelBuffers buffers = f.scratch.buffers(thread);
  float* gate = f.scratch.results(thread);
  float* up = f.gated ? gate + piece.rows * NC : nullptr;
  const Right<T> second = f.gated ? w.from_column(op.i) : w;
  const T* next = next_columns<T>(op.w_in, item, false);
  weight_product(gate, x, piece.rows, op.h, w, item.n, buffers, {piece.group_rows, up ? second.data : next});
  if (up) weight_product(up, x, piece.rows, op.h, second, item.n, buffers, {piece.group_rows, next});
  T* hidden = f.hidden.row(piece.first - block.first_slot()) + item.n0;
  with_activation(op.activation, [&](auto a) { finish_hidden<decltype(a)::value>(f, item, hidden, gate, up); });
}

// To rows, where each has one slot: residual + scale y.
template <class T>
void store_in_rows(const GroupedMlp& op, const Cut::Item& item, const float* y) {
  const Row bias = bias_row<T>(op.b_out, item.piece.group, item.n0, item.n);
  const T* residual = static_cast<const T*>(op.residual.data);
  for (int64_t r = 0; r < item.piece.rows; ++r) {
    const int64_t a = item.piece.first + r, t = op.plan.rows[a];
    const float scale = op.plan.scale ? op.plan.scale[a] : 1.0f;
    Row total = load_row(y + r * NC, NC) + bias;
    for (int j = 0; j < NV; ++j) total.v[j] *= scale;
    if (residual) total = load_row(residual + t * op.residual.stride + item.n0, item.n) + total;
    store_row(static_cast<T*>(op.out) + t * op.h + item.n0, total, item.n);
  }
}

template <class T>
void out_panel(const Forward<T>& f, const Pieces::Span& block, const Cut::Item& item, int thread) {
  const GroupedMlp& op = f.op;
  const Piece& piece = item.piece;
  const Left<T> u{f.hidden.row(piece.first - block.first_slot()), f.hidden.stride, nullptr};
  const Right<T> w = weight_of_group<T>(op.w_out, piece.group, false).from_column(item.n0);
  float* y = f.scratch.results(thread);
  weight_product(y, u, piece.rows, op.i, w, item.n, f.scratch.buffers(thread),
                 {piece.group_rows, next_columns<T>(op.w_out, item, false)});
  if (!f.slots) return store_in_rows<T>(op, item, y);
  const Row bias = bias_row<T>(op.b_out, piece.group, item.n0, item.n);
  float* slots = f.slots.row(piece.first) + item.n0;
  for (int64_t r = 0; r < piece.rows; ++r) store_row(slots + r * f.slots.stride, load_row(y + r * NC, NC) + bias, NC);
}

template <class T>
void body(void* context, const Team& team) {
  Forward<T>& f = *static_cast<Forward<T>*>(context);
  const GroupedMlp& op = f.op;
  const Pieces& pieces = f.pieces;
  T* out = static_cast<T*>(op.out);
  fill_empty_rows(op.plan, op.residual, out, op.h, op.h, team);
  for (int64_t b = 0; b < pieces.blocks(); ++b) {
    const Pieces::Span block = pieces.block(b);
    const Cut hidden(block, op.i, f.threads), results(block, op.h, f.threads);
    while (const Items::Item taken = f.hidden_items.take(team)) hidden_panel(f, block, hidden.item(taken), team.index);
    f.out_items.share(results.items(), team);
    team.barrier();
    while (const Items::Item taken = f.out_items.take(team)) out_panel(f, block, results.item(taken), team.index);
    const bool last = b + 1 == pieces.blocks();
    if (!last) f.hidden_items.share(Cut(pieces.block(b + 1), op.i, f.threads).items(), team);
    if (!last || f.slots) team.barrier();
  }
  if (f.slots) combine_slots(op.plan, f.slots.data, f.slots.stride, op.plan.scale, op.residual, out, op.h, op.h, team);
}

template <class T>
void run(const GroupedMlp& op) {
  const bool gated = is_gated(op.activation);
  const int64_t live = op.plan.live(), products = (gated ? 3 : 2) * op.h * op.i;
  const int threads =
      useful_threads(op.threads, 2.0 * live * products,
                     sizeof(T) * (double(groups_with_slots(op.plan)) * products + double(op.plan.num_rows) * op.h));
  Forward<T> f{op, threads};
  const int64_t fits = threads * kBlockBytes / (op.i * static_cast<int64_t>(sizeof(T)) + 1);
  const int64_t limit = fits > kBlockRows ? fits : kBlockRows, slots = live < limit ? live : limit;
  f.pieces = Pieces::plan(op.plan, limit);
  f.hidden = {slots, workspace_stride(op.i)};
  if (several_slots_in_a_row(op.plan)) f.slots = {live, workspace_stride(op.h)};
  f.scratch = TeamScratch::plan<T>(threads, op.h > op.i ? op.h : op.i, f.gated ? 2 * slots : slots);
  f.hidden_items = f.out_items = Items::plan(threads);
  Scratch block(block_bytes(f.pieces, f.hidden, f.slots, f.scratch, f.hidden_items, f.out_items));
  place_in(block, f.pieces, f.hidden, f.slots, f.scratch, f.hidden_items, f.out_items);
  prefer_huge_pages(op.out, op.plan.num_rows * op.h * sizeof(T));
  prefer_huge_pages(op.pre, op.plan.capacity * (f.gated ? 2 * op.i : op.i) * sizeof(T));
  zero_slots_from(static_cast<T*>(op.pre), live, op.plan.capacity, f.gated ? 2 * op.i : op.i);
  if (f.pieces.blocks() > 0) f.hidden_items.share(Cut(f.pieces.block(0), op.i, threads).items());
  parallel(threads, body<T>, &f);
}

template <class T>
void run_by_ranges(const GroupedMlp& op) {
  // What is saved for a backward pass lies in the order of the whole plan's slots.
  RowRanges ranges(op.plan, op.pre ? 0 : workspace_stride(op.h) * sizeof(float));
  for (int64_t i = 0; i < ranges.count(); ++i) {
    const RowRanges::Range range = ranges.range(i);
    GroupedMlp part = op;
    part.plan = range.plan;
    part.x = rows_from<T>(op.x, range.first_row);
    part.residual = rows_from<T>(op.residual, range.first_row);
    part.out = static_cast<T*>(op.out) + range.first_row * op.h;
    run<T>(part);
  }
}

}  // namespace

void grouped_mlp(const GroupedMlp& op) {
  with_type(op.dtype, [&](auto type) { run_by_ranges<typename decltype(type)::T>(op); });
}

}  // namespace dyncore::DYNCORE_ISA
