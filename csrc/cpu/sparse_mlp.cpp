// sparse_mlp: out = W_out act(W_in x + b_in) + b_out, where the zeros that act makes are not multiplied. By blocks of
// rows: the hidden activation is made by dense products, whose epilogue marks what is not 0; that is listed while it is
// in cache, and saved for the backward pass; then W_out's rows are added up by the lists. Of a gated activation the
// gates are made so, and the other half where they are open alone.
#include "cpu/common/activations.h"
#include "cpu/common/skipping_product.h"

namespace dyncore::DYNCORE_ISA {

namespace {

// Entries of a list that one thread takes at a time, of a single row.
constexpr int64_t kDotsAtOnce = 32;

template <class T>
struct Forward {
  const SparseMlp& op;
  int threads;
  bool gated = op.activation == Activation::reglu, squared = op.activation == Activation::relu2;
  bool packs = gated && op.w_in.stride_k != 1;  // the other half's weights
  bool few = op.rows <= kFewRows && op.w_out.stride_n == 1 && !packs;
  int32_t bounds[2] = {0, static_cast<int32_t>(op.rows)};
  Plan plan = {nullptr, bounds, nullptr, nullptr, nullptr, op.rows, 1, op.rows};  // all rows are one group
  int64_t block_rows = SkippingProduct<T>::block_rows(op.rows, op.i);
  Workspace<T> hidden = {};    // [rows of a block, I]: act, or the gates and then their products with the other half
  Workspace<T> up = {};        // the same of the other half, in dense rows
  Workspace<float> dots = {};  // the other half by the lists
  TeamScratch scratch = {};
  Items hidden_items = {}, up_items = {};
  SkippingProduct<T> product = {};

  Left<T> x_rows(int64_t first) const {
    return {static_cast<const T*>(op.x.data) + first * op.x.stride, op.x.stride, nullptr};
  }
};

// A part of some rows, and a panel of 32 hidden columns.
struct Block {
  Piece piece;
  Pieces::Span span() const { return {&piece, 1}; }
};

template <class T>
DYNCORE_INLINE Row rounded(Row r) {
  if constexpr (!kIsFloat<T>)
    for (int j = 0; j < NV; ++j) r.v[j] = widen<T>(narrow<T>(r.v[j]));
  return r;
}

// Stage 1: relu of a panel, and its bits.
template <class T>
void hidden_panel(Forward<T>& f, const Block& block, const Cut::Item& item, int thread) {
  const SparseMlp& op = f.op;
  const Piece& piece = item.piece;
  float* y = f.scratch.results(thread);
  weight_product(y, f.x_rows(piece.first), piece.rows, op.h, weight_of_group<T>(op.w_in, 0, false).from_column(item.n0),
                 item.n, f.scratch.buffers(thread), {item.piece.group_rows, next_columns<T>(op.w_in, item, false)});
  const Row bias = bias_row<T>(op.b_in, 0, item.n0, item.n);
  const uint32_t width = lanes_of_width(item.n);
  const int64_t pre_stride = f.gated ? 2 * op.i : op.i;
  T* pre = op.pre ? static_cast<T*>(op.pre) + piece.first * pre_stride + item.n0 : nullptr;
  for (int64_t r = 0; r < piece.rows; ++r) {
    const int64_t at = piece.first - block.piece.first + r;
    Row u = rounded<T>(load_row(y + r * NC, NC) + bias);
    uint32_t bits = 0;
    for (int j = 0; j < NV; ++j) {
      bits |= positive_lanes(u.v[j]) << (j * VL);
      u.v[j] = u.v[j] <= 0.0f ? vf{} : u.v[j];
    }
    f.product.words.row(at)[item.n0 / NC] = bits & width;
    store_row(f.hidden.row(at) + item.n0, u, item.n);
    if (pre) store_row(pre + r * pre_stride, u, item.n);
  }
}

// Each thread counts its share of the rows' bits.
template <class T>
void count(Forward<T>& f, int64_t rows, const Team& team) {
  const int64_t end = rows * (team.index + 1) / team.size, words = panels_of(f.op.i);
  for (int64_t r = rows * team.index / team.size; r < end; ++r)
    f.product.counts.data[r] = count_bits(f.product.words.row(r), words);
}

// Each thread saves the bits and the relu of its share of the rows, and squares it.
template <class T>
void save(Forward<T>& f, int64_t first, int64_t rows, const Team& team) {
  const SparseMlp& op = f.op;
  const int64_t end = rows * (team.index + 1) / team.size, words = panels_of(op.i);
  for (int64_t r = rows * team.index / team.size; r < end; ++r) {
    T* hidden = f.hidden.row(r);
    if (op.saved.row_offsets && words > 0) {
      const uint32_t* bits = f.product.words.row(r);
      std::memcpy(op.saved.mask + (first + r) * words, bits, words * sizeof(uint32_t));
      choose_values(bits, op.i, hidden, static_cast<T*>(op.saved.values) + op.saved.row_offsets[first + r]);
    }
    if (!f.squared) continue;
    for (int64_t w = 0; w < words; ++w) {
      const int n = panel_width(op.i, w * NC);
      Row u = load_row(hidden + w * NC, n);
      for (int j = 0; j < NV; ++j) u.v[j] *= u.v[j];
      store_row(hidden + w * NC, u, n);
    }
  }
}

// Stage 2 of a gated activation: the other half, of dense rows by panels, of the others by their lists.
template <class T>
void up_part(Forward<T>& f, const Block& block, int64_t item, int thread) {
  const SparseMlp& op = f.op;
  SkippingProduct<T>& p = f.product;
  const Right<T> w = weight_of_group<T>(op.w_in, 0, false).from_column(op.i);
  const int64_t panels = p.dense() > 0 ? panels_of(op.i) : 0;
  const Left<T> x = f.x_rows(block.piece.first);
  if (item < panels) {
    const int64_t n0 = item * NC;
    const int n = panel_width(op.i, n0);
    float* y = f.scratch.results(thread);
    weight_product(y, Left<T>{x.data, x.stride, p.dense_rows()}, p.dense(), op.h, w.from_column(n0), n,
                   f.scratch.buffers(thread), {p.dense()});
    const Row bias = bias_row<T>(op.b_in, 0, op.i + n0, n);
    for (int64_t i = 0; i < p.dense(); ++i)
      store_row(f.up.row(p.dense_rows()[i]) + n0, load_row(y + i * NC, NC) + bias, n);
    return;
  }
  const Right<T> rows{w.data, w.stride_k, w.stride_n, nullptr};  // neuron by neuron
  const Lists<T> lists = p.lists();
  item -= panels;
  if (p.sparse() == 1 && !f.packs) {
    const int64_t at = item * kDotsAtOnce, left = lists.first(0, lists.segments) - at;
    const List<T> list{lists.index + at, lists.value + at, left < kDotsAtOnce ? left : kDotsAtOnce};
    return dot_listed_rows(list, x.row(p.sparse_rows()[0]), rows.data, rows.stride_k, f.dots.data + at, op.h, false);
  }
  dot_lists(lists, item, 0, p.sparse(), x, rows, op.h, f.dots.data, p.sparse_rows(), p.panel(thread));
}

// How many items stage 2 has; the lists need not be there yet.
template <class T>
int64_t up_parts(const Forward<T>& f) {
  const SkippingProduct<T>& p = f.product;
  const int64_t panels = p.dense() > 0 ? panels_of(f.op.i) : 0;
  if (p.sparse() == 0) return panels;
  if (p.sparse() == 1 && !f.packs) return panels + (p.counts.data[p.sparse_rows()[0]] + kDotsAtOnce - 1) / kDotsAtOnce;
  return panels + p.lists().segments;
}

// Each thread multiplies the halves of its share of the rows, and saves the other one.
template <class T>
void gate(Forward<T>& f, int64_t first, const Team& team) {
  const SparseMlp& op = f.op;
  SkippingProduct<T>& p = f.product;
  const Lists<T> lists = p.lists();
  T* const saved = op.saved.row_offsets ? static_cast<T*>(op.saved.values) + op.saved.capacity : nullptr;
  T* const pre = static_cast<T*>(op.pre);
  const T* const bias = op.b_in.data ? static_cast<const T*>(op.b_in.data) + op.i : nullptr;
  for (int64_t i = p.sparse() * team.index / team.size; i < p.sparse() * (team.index + 1) / team.size; ++i) {
    const int64_t t = first + p.sparse_rows()[i], begin = lists.first(i, 0), end = lists.first(i, lists.segments);
    T* up = saved ? saved + op.saved.row_offsets[t] - begin : nullptr;
    T* line = pre ? pre + t * 2 * op.i + op.i : nullptr;
    if (line) std::memset(line, 0, op.i * sizeof(T));
    for (int64_t k = begin; k < end; ++k) {
      const float value = f.dots.data[k] + (bias ? to_float(bias[lists.index[k]]) : 0.0f);
      p.values()[k] = from_float<Value<T>>(to_float(lists.value[k]) * value);
      if (up) up[k] = from_float<T>(value);
      if (line) line[lists.index[k]] = from_float<T>(value);
    }
  }
  for (int64_t i = p.dense() * team.index / team.size; i < p.dense() * (team.index + 1) / team.size; ++i) {
    const int64_t r = p.dense_rows()[i], t = first + r;
    const uint32_t* bits = p.words.row(r);
    if (saved) choose_values(bits, op.i, f.up.row(r), saved + op.saved.row_offsets[t]);
    for (int64_t w = 0; w < panels_of(op.i); ++w) {
      const int n = panel_width(op.i, w * NC);
      Row up = load_row(f.up.row(r) + w * NC, n), u = load_row(f.hidden.row(r) + w * NC, n);
      for (int j = 0; j < NV; ++j) {
        up.v[j] = u.v[j] <= 0.0f ? vf{} : up.v[j];
        u.v[j] *= up.v[j];
      }
      if (pre) store_row(pre + t * 2 * op.i + op.i + w * NC, up, n);
      store_row(f.hidden.row(r) + w * NC, u, n);
    }
  }
}

template <class T>
void body(void* context, const Team& team) {
  Forward<T>& f = *static_cast<Forward<T>*>(context);
  const SparseMlp& op = f.op;
  SkippingProduct<T>& p = f.product;
  for (int64_t first = 0; first < op.rows; first += f.block_rows) {
    const int64_t rows = op.rows - first < f.block_rows ? op.rows - first : f.block_rows;
    const Block block{{0, first, rows, op.rows}};
    const Cut cut(block.span(), op.i, f.threads);
    while (const Items::Item taken = f.hidden_items.take(team)) hidden_panel(f, block, cut.item(taken), team.index);
    team.barrier();
    count(f, rows, team);
    team.barrier();
    if (team.index == 0) {
      p.choose(first, rows);
      for (int64_t r = 0; op.saved.row_offsets && r < rows; ++r)
        op.saved.row_offsets[first + r + 1] = op.saved.row_offsets[first + r] + p.counts.data[r];
      if (f.gated) f.up_items.share(up_parts(f));
      const int64_t next = first + rows, after = op.rows - next < f.block_rows ? op.rows - next : f.block_rows;
      if (after > 0) f.hidden_items.share(Cut(Block{{0, next, after, op.rows}}.span(), op.i, f.threads).items());
    }
    team.barrier();
    const Left<T> hidden{f.hidden.data, f.hidden.stride, nullptr};
    save(f, first, rows, team);
    if (f.squared) team.barrier();
    if (op.out || f.gated) p.list(hidden, team);
    team.barrier();
    if (f.gated) {
      while (const Items::Item taken = f.up_items.take(team)) up_part(f, block, taken.index, team.index);
      team.barrier();
      gate(f, first, team);
      team.barrier();
    }
    if (op.out) p.multiply(hidden, team);
    if (first + rows < op.rows) team.barrier();
  }
}

template <class T>
void run(const SparseMlp& op) {
  const double products = 2.0 * op.h * op.i;
  const int threads = useful_threads(op.threads, 2.0 * op.rows * products, sizeof(T) * products);
  Forward<T> f{op, threads};
  f.hidden = {f.block_rows, workspace_stride(op.i)};
  if (f.gated) f.up = f.hidden;
  if (f.gated) f.dots = {1, f.block_rows * op.i};
  f.scratch = TeamScratch::plan<T>(threads, op.h, f.block_rows);
  f.hidden_items = f.up_items = Items::plan(threads);
  f.product = SkippingProduct<T>::plan(f.block_rows, f.few, f.packs, op.i, weight_of_group<T>(op.w_out, 0, false),
                                       op.b_out, op.h, static_cast<T*>(op.out), op.dense_from, threads);
  Scratch scratch(rounded_bytes(f.product.bytes()) +
                  block_bytes(f.hidden, f.up, f.dots, f.scratch, f.hidden_items, f.up_items));
  f.product.place(scratch.take(f.product.bytes()));
  place_in(scratch, f.hidden, f.up, f.dots, f.scratch, f.hidden_items, f.up_items);
  prefer_huge_pages(op.out, op.rows * op.h * sizeof(T));
  if (op.saved.row_offsets) op.saved.row_offsets[0] = 0;
  const int64_t rows = op.rows < f.block_rows ? op.rows : f.block_rows;
  f.hidden_items.share(Cut(Block{{0, 0, rows, op.rows}}.span(), op.i, threads).items());
  parallel(threads, body<T>, &f);
}

}  // namespace

void sparse_mlp(const SparseMlp& op) {
  with_type(op.dtype, [&](auto type) { run<typename decltype(type)::T>(op); });
}

}  // namespace dyncore::DYNCORE_ISA
