// Backward of sparse_mlp, from the non-zeros alone. With r = relu(pre), u = act(pre), on the neurons that are on:
//   dv[t, i] = <dout[t], W_out[:, i]>,  dpre = dv act'(pre),  dx[t] = sum of dpre W_in[i],
//   dW_out[:, i] = sum over t of u dout[t],  dW_in[i] = sum over t of dpre x[t].
// By blocks of rows: their lists, the dot products, the lists transposed, then all sums. A gated activation has the
// other half beside: u = r v, dgate = dv v, dup = dv r.
#include "cpu/common/backward.h"
#include "cpu/common/dtype.h"
#include "cpu/common/transposed_lists.h"
#include "cpu/kernels.h"

namespace dyncore::DYNCORE_ISA {

namespace {

// Non-zeros of a block: some 30 bytes of scratch each.
constexpr int64_t kBlockNonZeros = 8 << 20;
// Rows whose dot products are an item, and whose sums are one.
constexpr int64_t kDotRowsAtOnce = 512;

template <class T>
struct Backward {
  const SparseMlpBackward& op;
  int threads;
  bool gated = op.activation == Activation::reglu;
  bool need_dpre = op.dx || op.dw_in.data || op.db_in;
  int64_t block_rows = 0, most = 0;  // rows of a block at most, and non-zeros
  Workspace<int64_t> offsets = {};   // [rows, segments + 1]
  Workspace<int32_t> segment_first = {}, index = {};
  Workspace<float> dots = {};       // dv
  Workspace<Value<T>> values = {};  // [u, dpre, dup][non-zeros]
  TransposedLists<T> transposed = {};
  WeightSums<T> dw_gate = {}, dw_up = {}, dw_out = {};
  Workspace<float> dx_sums = {};    // [rows, H], where dx is not float
  Workspace<float> bias_sums = {};  // [I or 2I]
  Workspace<char> panels = {};
  Items dot_items = {}, transpose_items = {}, dx_items = {}, gate_items = {}, up_items = {}, out_items = {};
  int64_t first = 0, rows = 0, segments = 0;  // of the block

  int kinds() const { return gated ? 3 : 2; }
  T* panel(int thread) const { return reinterpret_cast<T*>(panels.row(thread)); }
  Lists<T> lists(int value) const {
    return {offsets.data, offsets.stride, 1, segments, segment_first.data, index.data, values.row(value)};
  }
  Left<T> rows_of(const Matrix& m) const {
    return {static_cast<const T*>(m.data) + first * m.stride, m.stride, nullptr};
  }
  Right<T> as_right(const Matrix& m) const {
    const Left<T> l = rows_of(m);
    return {l.data, 1, l.stride, nullptr};
  }
  // Neuron by neuron.
  Right<T> w_in(bool up) const {
    const Weight& w = op.w_in;
    return {static_cast<const T*>(w.data) + (up ? op.i * w.stride_n : 0), w.stride_k, w.stride_n, nullptr};
  }
  Right<T> w_out() const {
    return {static_cast<const T*>(op.w_out.data), op.w_out.stride_n, op.w_out.stride_k, nullptr};
  }
  int64_t end_of(int64_t begin) const {  // of the block that begins there
    const int64_t* at = op.saved.row_offsets;
    int64_t end = begin + 1;
    while (end < op.rows && at[end + 1] - at[begin] <= kBlockNonZeros) ++end;
    return end;
  }
  int64_t row_parts() const { return (rows + kDotRowsAtOnce - 1) / kDotRowsAtOnce; }
  int64_t column_parts() const { return (op.h + kSumColumns - 1) / kSumColumns; }
};

// On one thread: the next block and its items.
template <class T>
void begin_block(Backward<T>& b, int64_t first) {
  b.first = first;
  b.rows = b.end_of(first) - first;
  b.segments = fixed_segments(b.op.i, b.segment_first.data);
  b.transposed.begin(b.rows);
  b.dot_items.share(b.need_dpre ? b.segments * b.row_parts() : 0);
  b.transpose_items.share(b.transposed.items(b.segments));
  b.dx_items.share(b.op.dx ? b.row_parts() * b.column_parts() : 0);
  b.gate_items.share(b.dw_gate.items(b.threads));
  b.up_items.share(b.dw_up.items(b.threads));
  b.out_items.share(b.dw_out.items(b.threads));
}

// Each thread lists its share of the rows.
template <class T>
void list(Backward<T>& b, const Team& team) {
  const int64_t words = panels_of(b.op.i), *at = b.op.saved.row_offsets + b.first;
  const int64_t end = b.rows * (team.index + 1) / team.size;
  for (int64_t r = b.rows * team.index / team.size; r < end; ++r)
    list_row(b.op.saved.mask + (b.first + r) * words, b.op.i, static_cast<const T*>(nullptr), b.segment_first.data,
             b.segments, at[r] - at[0], b.offsets.row(r), b.index.data, [](int64_t, vf, int) {});
}

// Each thread: u, and the gradients of what it was made of, for its share of the non-zeros.
template <class T>
void differentiate(Backward<T>& b, const Team& team) {
  const int64_t* at = b.op.saved.row_offsets + b.first;
  const int64_t count = at[b.rows] - at[0], end = count * (team.index + 1) / team.size;
  const T* kept = static_cast<const T*>(b.op.saved.values) + at[0];
  for (int64_t k = count * team.index / team.size; k < end; k += VL) {
    const int64_t n = end - k < VL ? end - k : VL;
    const vf r = load_some(kept + k, n);
    const vf dv = b.need_dpre ? load_some(b.dots.data + k, n) : vf{};
    const auto put = [&](int kind, vf v) { store_some(b.values.row(kind) + k, v, n); };
    if (b.gated) {
      const vf up = load_some(kept + b.op.saved.capacity + k, n);
      put(0, r * up);
      put(1, dv * up);
      put(2, dv * r);
    } else if (b.op.activation == Activation::relu2) {
      put(0, r * r);
      put(1, 2.0f * r * dv);
    } else {
      put(0, r);
      put(1, dv);
    }
  }
}

template <class T>
void dx_part(Backward<T>& b, int64_t item, int thread) {
  const int64_t r0 = item / b.column_parts() * kDotRowsAtOnce, n0 = item % b.column_parts() * kSumColumns;
  const int64_t r1 = r0 + kDotRowsAtOnce < b.rows ? r0 + kDotRowsAtOnce : b.rows;
  const int64_t n1 = n0 + kSumColumns < b.op.h ? n0 + kSumColumns : b.op.h;
  T* dx = static_cast<T*>(b.op.dx) + b.first * b.op.h;
  float* sums = b.dx_sums.data;
  int64_t stride = b.dx_sums.stride;
  if constexpr (kIsFloat<T>) {
    sums = dx;
    stride = b.op.h;
  }
  for (int64_t r = r0; r < r1 && b.segments == 0; ++r)
    for (int64_t n = n0; n < n1; ++n) sums[r * stride + n] = 0.0f;
  sum_listed(b.lists(1), r0, r1, b.w_in(false), n0, n1, sums, stride, nullptr, {}, b.panel(thread), false);
  if (b.gated) sum_listed(b.lists(2), r0, r1, b.w_in(true), n0, n1, sums, stride, nullptr, {}, b.panel(thread), true);
  if constexpr (!kIsFloat<T>)
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t n = n0; n < n1; n += NC)
        store_row(dx + r * b.op.h + n, load_row(sums + r * stride + n, NC), panel_width(n1, n));
}

// Each thread adds up the gradient of its share of the neurons' biases.
template <class T>
void add_bias_gradient(Backward<T>& b, int value, float* sums, bool accumulate, const Team& team) {
  const Lists<T> lists = b.transposed.lists(value);
  const int64_t end = b.op.i * (team.index + 1) / team.size;
  for (int64_t i = b.op.i * team.index / team.size; i < end; ++i) {
    float total = accumulate ? sums[i] : 0.0f;
    for (int64_t s = 0; s < lists.segments; ++s) {
      const List<T> list = lists.at(i, s);
      float part = 0.0f;
      for (int64_t k = 0; k < list.count; ++k) part += to_float(list.value[k]);
      total += part;
    }
    sums[i] = total;
  }
}

template <class T>
void block_sums(Backward<T>& b, const Team& team) {
  const bool later = b.first > 0;
  const SparseMlpBackward& op = b.op;
  while (const Items::Item taken = b.dx_items.take(team)) dx_part(b, taken.index, team.index);
  while (const Items::Item taken = b.out_items.take(team))
    b.dw_out.add(b.transposed.lists(0), b.dw_out.part(taken.index, b.threads), b.as_right(op.grad), later);
  while (const Items::Item taken = b.gate_items.take(team))
    b.dw_gate.add(b.transposed.lists(1), b.dw_gate.part(taken.index, b.threads), b.as_right(op.x), later);
  while (const Items::Item taken = b.up_items.take(team))
    b.dw_up.add(b.transposed.lists(2), b.dw_up.part(taken.index, b.threads), b.as_right(op.x), later);
  if (op.db_in) {
    add_bias_gradient(b, 1, b.bias_sums.data, later, team);
    if (b.gated) add_bias_gradient(b, 2, b.bias_sums.data + op.i, later, team);
  }
}

template <class T>
void body(void* context, const Team& team) {
  Backward<T>& b = *static_cast<Backward<T>*>(context);
  const SparseMlpBackward& op = b.op;
  for (int64_t first = 0; first < op.rows;) {
    if (team.index == 0) begin_block(b, first);
    team.barrier();
    list(b, team);
    team.barrier();
    while (const Items::Item taken = b.dot_items.take(team)) {
      const int64_t s = taken.index / b.row_parts(), r0 = taken.index % b.row_parts() * kDotRowsAtOnce;
      const int64_t r1 = r0 + kDotRowsAtOnce < b.rows ? r0 + kDotRowsAtOnce : b.rows;
      dot_lists(b.lists(0), s, r0, r1, b.rows_of(op.grad), b.w_out(), op.h, b.dots.data, nullptr, b.panel(team.index));
    }
    team.barrier();
    differentiate(b, team);
    team.barrier();
    const Value<T>* values[kMostValues];
    for (int v = 0; v < b.kinds(); ++v) values[v] = b.values.row(v);
    const Lists<T> lists = b.lists(0);
    while (const Items::Item taken = b.transpose_items.take(team)) b.transposed.make(lists, values, taken.index);
    team.barrier();
    block_sums(b, team);
    first += b.rows;
    team.barrier();
  }
  b.dw_gate.finish(team);
  b.dw_up.finish(team);
  b.dw_out.finish(team);
  const int64_t width = b.gated ? 2 * op.i : op.i;
  if (op.db_in && team.index == 0)
    for (int64_t n = 0; n < width; n += NC)
      store_row(static_cast<T*>(op.db_in) + n, load_row(b.bias_sums.data + n, panel_width(width, n)),
                panel_width(width, n));
  if (op.db_out) {
    const int64_t panels = panels_of(op.h), begin = panels * team.index / team.size * NC;
    const int64_t end = panels * (team.index + 1) / team.size * NC;
    const Left<T> grad{static_cast<const T*>(op.grad.data) + begin, op.grad.stride, nullptr};
    bias_gradient(static_cast<T*>(op.db_out) + begin, (end < op.h ? end : op.h) - begin, grad, nullptr, op.rows);
  }
}

template <class T>
void zero(const WeightGradient& g, int64_t elements) {
  if (g.data) zero_fill(static_cast<T*>(g.data), elements);
}

template <class T>
void run(const SparseMlpBackward& op) {
  const int64_t width = op.activation == Activation::reglu ? 2 * op.i : op.i;
  const double nonzeros = op.saved.row_offsets[op.rows];
  if (op.rows == 0) {
    zero<T>(op.dw_in, width * op.h);
    zero<T>(op.dw_out, op.i * op.h);
  }
  const int threads = useful_threads(op.threads, 8.0 * nonzeros * op.h, sizeof(T) * 2.0 * op.i * op.h);
  Backward<T> b{op, threads};
  for (int64_t first = 0; first < op.rows;) {
    const int64_t end = b.end_of(first), count = op.saved.row_offsets[end] - op.saved.row_offsets[first];
    if (end - first > b.block_rows) b.block_rows = end - first;
    if (count > b.most) b.most = count;
    first = end;
  }
  const int64_t segments = (op.i + kSegment - 1) / kSegment;
  b.offsets = {b.block_rows, segments + 1};
  b.segment_first = {1, segments + 1};
  b.index = {1, b.most};
  b.dots = {1, b.most};
  b.values = {b.kinds(), b.most};
  b.transposed = TransposedLists<T>::plan(b.block_rows, op.i, b.most, b.kinds());
  const WeightGradient &in = op.dw_in, &out = op.dw_out;
  const auto up = in.data ? static_cast<T*>(in.data) + op.i * in.stride_n : nullptr;
  if (op.rows > 0) {
    b.dw_gate = WeightSums<T>::plan(in.data, op.i, op.h, in.stride_n, in.stride_k);
    if (b.gated) b.dw_up = WeightSums<T>::plan(up, op.i, op.h, in.stride_n, in.stride_k);
    b.dw_out = WeightSums<T>::plan(out.data, op.i, op.h, out.stride_k, out.stride_n);
  }
  if (op.dx && !kIsFloat<T>) b.dx_sums = {b.block_rows, workspace_stride(op.h)};
  b.bias_sums = {1, op.db_in ? width : 0};
  const bool packs = op.w_out.stride_n != 1 || op.w_in.stride_k != 1;
  b.panels = {threads, packs ? static_cast<int64_t>(kSegment * kListedColumns<T> * sizeof(T)) : 0};
  b.dot_items = b.transpose_items = b.dx_items = b.gate_items = b.up_items = b.out_items = Items::plan(threads);
  Scratch scratch(block_bytes(b.offsets, b.segment_first, b.index, b.dots, b.values, b.transposed, b.dw_gate, b.dw_up,
                              b.dw_out, b.dx_sums, b.bias_sums, b.panels, b.dot_items, b.transpose_items, b.dx_items,
                              b.gate_items, b.up_items, b.out_items));
  place_in(scratch, b.offsets, b.segment_first, b.index, b.dots, b.values, b.transposed, b.dw_gate, b.dw_up, b.dw_out,
           b.dx_sums, b.bias_sums, b.panels, b.dot_items, b.transpose_items, b.dx_items, b.gate_items, b.up_items,
           b.out_items);
  if (op.rows == 0 && op.db_in) std::memset(b.bias_sums.data, 0, b.bias_sums.bytes());
  prefer_huge_pages(op.dx, op.rows * op.h * sizeof(T));
  prefer_huge_pages(in.data, width * op.h * sizeof(T));
  prefer_huge_pages(out.data, op.i * op.h * sizeof(T));
  parallel(threads, body<T>, &b);
}

}  // namespace

void sparse_mlp_backward(const SparseMlpBackward& op) {
  with_type(op.dtype, [&](auto type) { run<typename decltype(type)::T>(op); });
}

}  // namespace dyncore::DYNCORE_ISA
