// attention_backward: gradients of q, k and v, from the inputs, the result and its logarithm. With
//   P = exp(scale q k^T + bias - log denominator),  dS = P (grad v^T - <grad, out>)
// they are dq = scale dS k, dk = scale dS^T q and dv = P^T grad: five products for each block of keys and queries.
// A share of a head's queries belongs to one thread, which sums its part of dk and dv in memory of its own; the number
// of shares follows from shapes alone, and a last stage adds them up, so that the bits are those of one thread.
#include "cpu/common/attention.h"

namespace dyncore::DYNCORE_ISA {

namespace {

constexpr int64_t kQueries = 128;  // of a tile: as many terms of dk and dv are summed in registers
constexpr int64_t kPanels = kQueries / NC;
constexpr int64_t kShares = 16;             // that many items at least, where there are queries for them
constexpr int64_t kSharesBytes = 64 << 20;  // but no more of them than have room for their sums here
constexpr size_t kHeadsBytes = 32 << 20;    // kv heads in a turn, but enough of them to keep threads busy

template <class T>
struct Backward {
  using C = typename Multiplied<T>::C;

  const AttentionBackward& op;
  int64_t d_stride, e_stride;  // elements between copied rows of width D, E
  int64_t key_block;           // elements of a block of transposed keys
  int64_t shares, at_once;     // of a kv head's queries; kv heads in a turn
  C *keys, *values, *turned;   // [at_once][M][d_stride], [at_once][M][e_stride], [at_once][key blocks][D][kKeyStride]
  float* sums;                 // [at_once][shares][panels of D, then of E][M][32]
  float* biases;               // [B][M], in units of log 2, or null
  char* of_threads;
  size_t thread_bytes;
  Counter* counters;  // three for each turn

  int64_t panels() const { return panels_of(op.d) + panels_of(op.e); }
  float* sums_of(int64_t turn_head, int64_t share) const {
    return sums + (turn_head * shares + share) * panels() * op.keys * NC;
  }
};

// Elements between the rows of P and dS: [kKeys][queries].
template <class C>
constexpr int64_t kQueryStride = kQueries + 64 / static_cast<int64_t>(sizeof(C));

// What a thread needs for a tile of queries.
template <class C>
struct Tile {
  float *scores, *products;       // [kKeys][32]
  float* panel;                   // dS as a panel of pairs [kKeys / 2][32]
  float* dq;                      // [kPanels][D][32]
  float *q_turned, *grad_turned;  // panels of q^T [kPanels][D][32] and grad^T [kPanels][E][32]
  float *q_panels, *grad_panels;  // panels of q [panels of D][kQueries][32] and grad [panels of E][kQueries][32]
  C *q, *grad;                    // rows
  C *weights, *dscores;           // P and dS, [kKeys][kQueryStride]
  float *logarithm, *inner;       // [kQueries]: of each query, and <grad, out>

  // Places all of it; null asks for the number of bytes.
  template <class T>
  size_t place(const Backward<T>& f, char* at) {
    size_t used = 0;
    const auto take = [&](size_t bytes) {
      char* const taken = at ? at + used : nullptr;
      used += rounded_bytes(bytes);
      return taken;
    };
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count * sizeof(float))); };
    const auto elements = [&](int64_t count) { return reinterpret_cast<C*>(take(count * sizeof(C))); };
    const int64_t d = f.op.d, e = f.op.e;
    scores = floats(kKeys * NC);
    products = floats(kKeys * NC);
    panel = floats(kKeys / 2 * NC);
    dq = floats(kQueries * d);
    q_turned = floats(kQueries * d);
    grad_turned = floats(kQueries * e);
    q_panels = floats(panels_of(d) * kQueries * NC);
    grad_panels = floats(panels_of(e) * kQueries * NC);
    q = elements(kQueries * f.d_stride);
    grad = elements(kQueries * f.e_stride);
    weights = elements(kKeys * kQueryStride<C>);
    dscores = elements(kKeys * kQueryStride<C>);
    logarithm = floats(kQueries);
    inner = floats(kQueries);
    return used;
  }
};

// Rows of 32 elements.
DYNCORE_INLINE void put_row(float* to, const Row& r) {
  store_row(to, r, NC);
}
template <class C>
DYNCORE_INLINE void put_row(C* to, const Row& r) {
  for (int i = 0; i < NV; ++i) store(to + i * VL, r.v[i]);
}

// From scores and <grad, v> [count][32] to P and dS, and for products of pairs dS once more as their panel.
template <class C, bool masked>
inline __attribute__((noinline)) void differentiate(const Tile<C>& t, int64_t p, int64_t count, float factor,
                                                    const float* bias, const Lanes& lanes, int64_t k0) {
  Row logarithm, inner;
  for (int i = 0; i < NV; ++i) {
    logarithm.v[i] = load(t.logarithm + p * NC + i * VL);
    inner.v[i] = load(t.inner + p * NC + i * VL);
  }
  const auto make = [&](int64_t j) DYNCORE_INLINE_LAMBDA {
    const float plus = bias ? bias[j] : 0.0f;
    Row weight, dscore;
    for (int i = 0; i < NV; ++i) {
      const int64_t at = j * NC + i * VL;
      weight.v[i] = exp2(load(t.scores + at) * factor + plus - logarithm.v[i]);
      dscore.v[i] = weight.v[i] * (load(t.products + at) - inner.v[i]);
      if constexpr (masked) {
        const vi counts = (vi{} + static_cast<int32_t>(k0 + j)) < lanes.limits[i];
        weight.v[i] = counts ? weight.v[i] : vf{};
        dscore.v[i] = counts ? dscore.v[i] : vf{};
      }
    }
    put_row(t.weights + j * kQueryStride<C> + p * NC, weight);
    put_row(t.dscores + j * kQueryStride<C> + p * NC, dscore);
    return dscore;
  };
#if defined(__AVX512BF16__)
  if constexpr (kPairs<C>) {
    for (int64_t j = 0; j < count; j += 2) {
      const Row first = make(j), second = j + 1 < count ? make(j + 1) : zero_row();
      store_row(t.panel + j / 2 * NC, words_of(first, second), NC);
    }
  }
#endif
  if constexpr (!kPairs<C>)
    for (int64_t j = 0; j < count; ++j) make(j);
}

// Packs the queries of a tile and what belongs to them.
template <class T, class C>
void read_queries(const Backward<T>& f, const Tile<C>& t, int64_t b, int64_t head, const int32_t* queries, int count) {
  const AttentionBackward& op = f.op;
  const T *q = head_of<const T>(op.q, b, head), *grad = head_of<const T>(op.grad, b, head),
          *out = head_of<const T>(op.out, b, head);
  const float* logarithm = op.logarithm + (b * op.heads + head) * op.queries;
  for (int i = 0; i < kQueries; ++i) t.logarithm[i] = t.inner[i] = 0.0f;
  for (int i = 0; i < count; ++i) {
    const int64_t row = queries[i];
    copy_row(t.q + i * f.d_stride, q + row * op.q.stride_n, op.d);
    copy_row(t.grad + i * f.e_stride, grad + row * op.grad.stride_n, op.e);
    t.logarithm[i] = logarithm[row];
    t.inner[i] = dot_rows(grad + row * op.grad.stride_n, out + row * op.out.stride_n, op.e);
  }
  for (int p = 0; p * NC < count; ++p) {
    const int n = panel_width(count, p * NC);
    pack(t.q_turned + p * op.d * NC, Right<C>{t.q + p * NC * f.d_stride, f.d_stride, 1, nullptr}, 0, op.d, n);
    pack(t.grad_turned + p * op.e * NC, Right<C>{t.grad + p * NC * f.e_stride, f.e_stride, 1, nullptr}, 0, op.e, n);
  }
  for (int64_t c = 0; c < op.d; c += NC)
    pack(t.q_panels + c * kQueries, Right<C>{t.q + c, 1, f.d_stride, nullptr}, 0, count, panel_width(op.d, c));
  for (int64_t c = 0; c < op.e; c += NC)
    pack(t.grad_panels + c * kQueries, Right<C>{t.grad + c, 1, f.e_stride, nullptr}, 0, count, panel_width(op.e, c));
}

// One tile of queries of one head: writes its dq, and adds to the sums of dk and dv.
template <class T, class C>
void differentiate_tile(const Backward<T>& f, const Tile<C>& t, int64_t b, int64_t head, int64_t turn_head,
                        int64_t tile, float* sums) {
  const AttentionBackward& op = f.op;
  const int64_t first = b * op.queries + tile * kQueries, rest = op.order.query_counts[b] - tile * kQueries;
  const int count = static_cast<int>(rest < kQueries ? rest : kQueries);
  const int32_t *queries = op.order.queries + first, *limits = op.order.limits + first;
  constexpr float kLog2e = 1.44269504088896341f;
  read_queries(f, t, b, head, queries, count);
  float *dk = sums, *dv = sums + panels_of(op.d) * op.keys * NC;
  for (int64_t k0 = 0; k0 < limits[0]; k0 += kKeys) {
    const int64_t keys = limits[0] - k0 < kKeys ? limits[0] - k0 : kKeys;
    const int64_t at = turn_head * op.keys + k0;
    const float* bias = f.biases ? f.biases + b * op.keys + k0 : nullptr;
    int depth = 0;  // queries, of the first in the tile, that attend to any of these keys
    for (; depth < count && limits[depth] > k0; depth += NC) {
      const int p = depth / NC;
      const Lanes lanes(limits + depth, panel_width(count, depth));
      multiply(t.scores, f.keys + at * f.d_stride, f.d_stride, keys, t.q_turned + p * op.d * NC, op.d, false);
      multiply(t.products, f.values + at * f.e_stride, f.e_stride, keys, t.grad_turned + p * op.e * NC, op.e, false);
      const auto make = k0 + keys <= lanes.fewest ? differentiate<C, false> : differentiate<C, true>;
      make(t, p, keys, op.scale * kLog2e, bias, lanes, k0);
      if (!op.dq.data) continue;
      const float* panel = t.panel;
      int64_t ldb = NC;
      if constexpr (kIsFloat<C>) {
        panel = t.dscores + p * NC;
        ldb = kQueryStride<C>;
      }
      const int64_t block = turn_head * key_blocks(op.keys) + k0 / kKeys;
      multiply(t.dq + p * op.d * NC, f.turned + block * f.key_block, kKeyStride<C>, op.d, panel, keys, k0 > 0, ldb);
    }
    if (depth > count) depth = count;
    for (int64_t c = 0; op.dv.data && c < op.e; c += NC)
      multiply(dv + c * op.keys + k0 * NC, t.weights, kQueryStride<C>, keys, t.grad_panels + c * kQueries, depth, true);
    for (int64_t c = 0; op.dk.data && c < op.d; c += NC)
      multiply(dk + c * op.keys + k0 * NC, t.dscores, kQueryStride<C>, keys, t.q_panels + c * kQueries, depth, true);
  }
  if (!op.dq.data) return;
  Row factor;
  for (int i = 0; i < NV; ++i) factor.v[i] = splat(op.scale);
  T* dq = head_of<T>(op.dq, b, head);
  for (int p = 0; p * NC < count; ++p)
    put_transposed(dq, op.dq.stride_n, queries + p * NC, panel_width(count, p * NC), t.dq + p * op.d * NC, op.d,
                   factor);
}

template <class T>
void prepare(const Backward<T>& f, int64_t b, int64_t kv_head, int64_t turn_head, int64_t block) {
  using C = typename Backward<T>::C;
  const AttentionBackward& op = f.op;
  const int64_t k0 = block * kKeys, live = op.order.key_counts[b];
  const int64_t count = live - k0 < kKeys ? live - k0 : kKeys;
  if (count <= 0) return;
  const int32_t* index = op.order.keys + b * op.keys + k0;
  const T *k = head_of<const T>(op.k, b, kv_head), *v = head_of<const T>(op.v, b, kv_head);
  const int64_t at = turn_head * op.keys + k0;
  for (int64_t j = 0; j < count; ++j) {
    copy_row(f.keys + (at + j) * f.d_stride, k + index[j] * op.k.stride_n, op.d);
    copy_row(f.values + (at + j) * f.e_stride, v + index[j] * op.v.stride_n, op.e);
  }
  C* turned = f.turned + (turn_head * key_blocks(op.keys) + block) * f.key_block;
  transpose_rows(turned, kKeyStride<C>, k, op.k.stride_n, index, count, op.d);
}

// One share of a kv head's queries.
template <class T>
void work(const Backward<T>& f, int64_t b, int64_t kv_head, int64_t turn_head, int64_t share, char* scratch) {
  const AttentionBackward& op = f.op;
  Tile<typename Backward<T>::C> t;
  t.place(f, scratch);
  float* sums = f.sums_of(turn_head, share);
  std::memset(sums, 0, f.panels() * op.keys * NC * sizeof(float));
  const int64_t group = op.heads / op.kv_heads, tiles = (op.order.query_counts[b] + kQueries - 1) / kQueries;
  for (int64_t i = share; i < group * tiles; i += f.shares)
    differentiate_tile(f, t, b, kv_head * group + i / tiles, turn_head, i % tiles, sums);
}

// Rows [k0, k0 + kKeys) of the ordered keys: the sum of the shares, and 0 for keys that are not live.
template <class T>
void put_keys(const Backward<T>& f, const Heads& to, int64_t width, int64_t first_panel, float factor, int64_t b,
              int64_t kv_head, int64_t turn_head, int64_t k0) {
  const AttentionBackward& op = f.op;
  if (!to.data) return;
  const int32_t* index = op.order.keys + b * op.keys;
  const int64_t end = k0 + kKeys < op.keys ? k0 + kKeys : op.keys;
  for (int64_t j = k0; j < end; ++j) {
    T* row = head_of<T>(to, b, kv_head) + index[j] * to.stride_n;
    if (j >= op.order.key_counts[b]) {
      std::memset(row, 0, width * sizeof(T));
      continue;
    }
    for (int64_t c = 0; c < width; c += NC) {
      const int64_t at = ((first_panel + c / NC) * op.keys + j) * NC;
      Row sum = load_row(f.sums_of(turn_head, 0) + at, NC);
      for (int64_t s = 1; s < f.shares; ++s) sum = sum + load_row(f.sums_of(turn_head, s) + at, NC);
      for (int i = 0; i < NV; ++i) sum.v[i] *= factor;
      store_row(row + c, sum, panel_width(width, c));
    }
  }
}

// The queries that attend to nothing.
template <class T>
void put_zeros(const AttentionBackward& op, int64_t b, int64_t kv_head) {
  const int64_t group = op.heads / op.kv_heads;
  const int32_t* index = op.order.queries + b * op.queries;
  for (int64_t g = 0; op.dq.data && g < group; ++g) {
    T* const dq = head_of<T>(op.dq, b, kv_head * group + g);
    for (int64_t i = op.order.query_counts[b]; i < op.queries; ++i)
      std::memset(dq + index[i] * op.dq.stride_n, 0, op.d * sizeof(T));
  }
}

template <class T>
void body(void* context, const Team& team) {
  const Backward<T>& f = *static_cast<const Backward<T>*>(context);
  const AttentionBackward& op = f.op;
  const int64_t all = op.batch * op.kv_heads, blocks = key_blocks(op.keys);
  char* const scratch = f.of_threads + team.index * f.thread_bytes;
  Counter* counter = f.counters;
  for (int64_t i = team.index; f.biases && i < op.batch * op.keys; i += team.size)
    f.biases[i] = op.bias[i - i % op.keys + op.order.keys[i]] * 1.44269504088896341f;
  for (int64_t begin = 0; begin < all; begin += f.at_once, counter += 3) {
    const int64_t now = all - begin < f.at_once ? all - begin : f.at_once;
    if (begin > 0) team.barrier();
    for (int64_t i; (i = counter[0].next()) < now * blocks;) {
      const int64_t head = begin + i / blocks;
      prepare(f, head / op.kv_heads, head % op.kv_heads, i / blocks, i % blocks);
    }
    team.barrier();
    for (int64_t i; (i = counter[1].next()) < now * f.shares;) {
      const int64_t turn_head = i / f.shares, head = begin + turn_head;
      if (i % f.shares == 0) put_zeros<T>(op, head / op.kv_heads, head % op.kv_heads);
      work(f, head / op.kv_heads, head % op.kv_heads, turn_head, i % f.shares, scratch);
    }
    team.barrier();
    for (int64_t i; (i = counter[2].next()) < now * blocks;) {
      const int64_t turn_head = i / blocks, head = begin + turn_head, k0 = i % blocks * kKeys;
      const int64_t b = head / op.kv_heads, kv_head = head % op.kv_heads;
      put_keys<T>(f, op.dk, op.d, 0, op.scale, b, kv_head, turn_head, k0);
      put_keys<T>(f, op.dv, op.e, panels_of(op.d), 1.0f, b, kv_head, turn_head, k0);
    }
  }
}

template <class T>
void run(const AttentionBackward& op) {
  using C = typename Backward<T>::C;
  const int64_t all = op.batch * op.kv_heads, blocks = key_blocks(op.keys);
  if (all == 0) return;
  Backward<T> f{op,
                row_stride<C>(op.d),
                row_stride<C>(op.e),
                op.d * kKeyStride<C>,
                1,
                1,
                nullptr,
                nullptr,
                nullptr,
                nullptr,
                nullptr,
                nullptr,
                0,
                nullptr};
  const int64_t tiles = op.heads / op.kv_heads * ((op.queries + kQueries - 1) / kQueries);
  const int64_t share_bytes = f.panels() * op.keys * NC * static_cast<int64_t>(sizeof(float));
  f.shares = (kShares + all - 1) / all;
  if (f.shares > tiles) f.shares = tiles;
  if (f.shares * share_bytes > kSharesBytes) f.shares = kSharesBytes / share_bytes;
  if (f.shares < 1) f.shares = 1;
  const size_t keys_bytes = op.keys * f.d_stride * sizeof(C), values_bytes = op.keys * f.e_stride * sizeof(C);
  const size_t turned_bytes = blocks * f.key_block * sizeof(C);
  const size_t sums_bytes = f.shares * share_bytes;
  const size_t head_bytes = keys_bytes + values_bytes + turned_bytes + sums_bytes;
  const int64_t busy = (2 * op.threads + f.shares - 1) / f.shares;
  f.at_once = head_bytes == 0 ? all : static_cast<int64_t>(kHeadsBytes / head_bytes);
  if (f.at_once < busy) f.at_once = busy;
  if (f.at_once < 1) f.at_once = 1;
  if (f.at_once > all) f.at_once = all;
  double pairs = 0;
  for (int64_t i = 0; i < op.batch * op.queries; ++i) pairs += op.order.limits[i];
  const double width = static_cast<double>(op.d + op.e);
  const int threads = useful_threads(op.threads, 5 * pairs * static_cast<double>(op.heads) * width,
                                     2 * sizeof(T) * static_cast<double>(all * op.keys) * width);
  const int64_t turns = (all + f.at_once - 1) / f.at_once;
  const size_t biases_bytes = op.bias ? op.batch * op.keys * sizeof(float) : 0;
  const size_t counters_bytes = 3 * turns * sizeof(Counter);
  f.thread_bytes = Tile<C>{}.place(f, nullptr);
  Scratch block(rounded_bytes(f.at_once * keys_bytes) + rounded_bytes(f.at_once * values_bytes) +
                rounded_bytes(f.at_once * turned_bytes) + rounded_bytes(f.at_once * sums_bytes) +
                rounded_bytes(biases_bytes) + rounded_bytes(counters_bytes) + rounded_bytes(threads * f.thread_bytes));
  f.keys = static_cast<C*>(block.take(f.at_once * keys_bytes));
  f.values = static_cast<C*>(block.take(f.at_once * values_bytes));
  f.turned = static_cast<C*>(block.take(f.at_once * turned_bytes));
  f.sums = static_cast<float*>(block.take(f.at_once * sums_bytes));
  void* biases = block.take(biases_bytes);
  if (op.bias) f.biases = static_cast<float*>(biases);
  f.counters = static_cast<Counter*>(block.take(counters_bytes));
  f.of_threads = static_cast<char*>(block.take(threads * f.thread_bytes));
  for (int64_t i = 0; i < 3 * turns; ++i) f.counters[i] = {};
  parallel(threads, body<T>, &f);
}

}  // namespace

void attention_backward(const AttentionBackward& op) {
  with_type(op.dtype, [&](auto type) { run<typename decltype(type)::T>(op); });
}

}  // namespace dyncore::DYNCORE_ISA
