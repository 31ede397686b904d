// attention: softmax(scale q k^T + bias) v over the pairs that count, which are a prefix of the ordered keys for each
// query. An online softmax: 32 queries pass over the keys that any of them attends to, a block at a time; keys that are
// not live are not read. A stage copies keys and transposes values, the next has an item for every 32 queries.
#include <math.h>

#include "cpu/common/attention.h"

namespace dyncore::DYNCORE_ISA {

namespace {

// Keys and values of as many heads at once as fit in this: scratch memory that a thread keeps between calls.
constexpr size_t kHeadsBytes = 24 << 20;

template <class T>
struct Forward {
  using C = typename Multiplied<T>::C;

  const Attention& op;
  int64_t k_stride, value_block, at_once;  // elements of a copied key, of a block of values; kv heads at once
  C *keys, *values;                        // [at_once][M][k_stride], [at_once][key blocks][E][kKeyStride]
  float* biases;                           // [B][M], in units of log 2, or null
  char* of_threads;
  size_t thread_bytes;
  Counter* counters;  // two for each turn of at_once

  // Of a thread: scores [kKeys][32], the result so far [E][32], packed queries [D][32], copied queries [32][k_stride].
  size_t scores_bytes() const { return rounded_bytes(kKeys * NC * sizeof(float)); }
  size_t result_bytes() const { return rounded_bytes(op.e * NC * sizeof(float)); }
  size_t panel_bytes() const { return rounded_bytes(op.d * NC * sizeof(float)); }
  size_t rows_bytes() const { return rounded_bytes(NC * k_stride * sizeof(C)); }
};

// Row j of a block's scores times the scale, plus the key's bias; -infinity where lanes do not attend to it.
template <bool masked>
DYNCORE_INLINE Row scaled_scores(const float* scores, int64_t j, float factor, float bias, const Lanes& lanes,
                                 int64_t key) {
  const vf minus = splat(-HUGE_VALF);
  Row r;
  for (int i = 0; i < NV; ++i) {
    r.v[i] = load(scores + j * NC + i * VL) * factor + bias;
    if constexpr (masked) r.v[i] = (vi{} + static_cast<int32_t>(key)) < lanes.limits[i] ? r.v[i] : minus;
  }
  return r;
}

// Scores of keys [k0, k0 + count) to their exponentials, in place, as a panel to multiply with. Moves the maximum and
// the sum so far along, and returns what results so far must be multiplied with.
template <class C, bool masked>
inline __attribute__((noinline)) Row exponentials(float* scores, int64_t count, float factor, const float* bias,
                                                  const Lanes& lanes, int64_t k0, Row& maximum, Row& sum) {
  Row most = maximum;
  for (int64_t j = 0; j < count; ++j) {
    const Row s = scaled_scores<masked>(scores, j, factor, bias ? bias[j] : 0.0f, lanes, k0 + j);
    for (int i = 0; i < NV; ++i) most.v[i] = s.v[i] > most.v[i] ? s.v[i] : most.v[i];
  }
  Row shift, alpha, total = zero_row();
  const vf none = splat(-HUGE_VALF);
  for (int i = 0; i < NV; ++i) {
    shift.v[i] = most.v[i] == none ? vf{} : most.v[i];
    alpha.v[i] = exp2(maximum.v[i] - shift.v[i]);
  }
  const auto power = [&](int64_t j) DYNCORE_INLINE_LAMBDA {
    Row p = scaled_scores<masked>(scores, j, factor, bias ? bias[j] : 0.0f, lanes, k0 + j);
    for (int i = 0; i < NV; ++i) {
      p.v[i] = exp2(p.v[i] - shift.v[i]);
      total.v[i] += p.v[i];
    }
    return p;
  };
#if defined(__AVX512BF16__)
  if constexpr (kPairs<C>) {
    for (int64_t j = 0; j < count; j += 2) {
      const Row first = power(j), second = j + 1 < count ? power(j + 1) : zero_row();
      store_row(scores + j / 2 * NC, words_of(first, second), NC);
    }
  }
#endif
  if constexpr (!kPairs<C>)
    for (int64_t j = 0; j < count; ++j) store_row(scores + j * NC, power(j), NC);
  for (int i = 0; i < NV; ++i) sum.v[i] = sum.v[i] * alpha.v[i] + total.v[i];
  maximum = most;
  return alpha;
}

template <class T>
void attend(const Forward<T>& f, int64_t b, int64_t head, int64_t turn_head, int64_t tile, char* scratch) {
  using C = typename Forward<T>::C;
  const Attention& op = f.op;
  float* scores = reinterpret_cast<float*>(scratch);
  float* result = reinterpret_cast<float*>(scratch += f.scores_bytes());
  float* panel = reinterpret_cast<float*>(scratch += f.result_bytes());
  C* rows = reinterpret_cast<C*>(scratch += f.panel_bytes());
  const int64_t first = b * op.queries + tile * NC, rest = op.order.query_counts[b] - tile * NC;
  const int32_t* queries = op.order.queries + first;
  const Lanes lanes(op.order.limits + first, static_cast<int>(rest < NC ? rest : NC));
  const T* q = head_of<const T>(op.q, b, head);
  for (int i = 0; i < lanes.count; ++i) copy_row(rows + i * f.k_stride, q + queries[i] * op.q.stride_n, op.d);
  pack(panel, Right<C>{rows, f.k_stride, 1, nullptr}, 0, op.d, lanes.count);

  constexpr float kLog2e = 1.44269504088896341f;
  Row maximum, sum = zero_row();
  for (int i = 0; i < NV; ++i) maximum.v[i] = splat(-HUGE_VALF);
  for (int64_t k0 = 0; k0 < lanes.most; k0 += kKeys) {
    const int64_t count = lanes.most - k0 < kKeys ? lanes.most - k0 : kKeys;
    const C* keys = f.keys + (turn_head * op.keys + k0) * f.k_stride;
    const C* values = f.values + (turn_head * key_blocks(op.keys) + k0 / kKeys) * f.value_block;
    const float* bias = f.biases ? f.biases + b * op.keys + k0 : nullptr;
    multiply(scores, keys, f.k_stride, count, panel, op.d, false);
    const auto make = k0 + count <= lanes.fewest ? exponentials<C, false> : exponentials<C, true>;
    const Row alpha = make(scores, count, op.scale * kLog2e, bias, lanes, k0, maximum, sum);
    for (int64_t i = 0; k0 > 0 && i < op.e * NC; i += NC)
      for (int j = 0; j < NV; ++j) store(result + i + j * VL, load(result + i + j * VL) * alpha.v[j]);
    multiply(result, values, kKeyStride<C>, op.e, scores, count, k0 > 0);
  }

  Row factor;
  float sums[NC], maxima[NC];
  store_row(sums, sum, NC);
  store_row(maxima, maximum, NC);
  for (int i = 0; i < NV; ++i) factor.v[i] = sum.v[i] == 0.0f ? vf{} : 1.0f / sum.v[i];
  const int64_t at = (b * op.heads + head) * op.queries;
  put_transposed(head_of<T>(op.out, b, head), op.out.stride_n, queries, lanes.count, result, op.e, factor);
  for (int i = 0; i < lanes.count; ++i)
    op.logarithm[at + queries[i]] = sums[i] == 0.0f ? HUGE_VALF : maxima[i] + log2f(sums[i]);
}

template <class T>
void prepare(const Forward<T>& f, int64_t b, int64_t kv_head, int64_t turn_head, int64_t block) {
  using C = typename Forward<T>::C;
  const Attention& op = f.op;
  const int64_t k0 = block * kKeys, live = op.order.key_counts[b];
  const int64_t count = live - k0 < kKeys ? live - k0 : kKeys;
  if (count <= 0) return;
  const int32_t* index = op.order.keys + b * op.keys + k0;
  const T* k = head_of<const T>(op.k, b, kv_head);
  C* keys = f.keys + (turn_head * op.keys + k0) * f.k_stride;
  for (int64_t j = 0; j < count; ++j) copy_row(keys + j * f.k_stride, k + index[j] * op.k.stride_n, op.d);
  transpose_rows(f.values + (turn_head * key_blocks(op.keys) + block) * f.value_block, kKeyStride<C>,
                 head_of<const T>(op.v, b, kv_head), op.v.stride_n, index, count, op.e);
}

// The queries that attend to nothing.
template <class T>
void put_zeros(const Attention& op, int64_t b, int64_t head) {
  const int64_t at = (b * op.heads + head) * op.queries;
  for (int64_t i = op.order.query_counts[b]; i < op.queries; ++i) {
    const int64_t row = op.order.queries[b * op.queries + i];
    std::memset(head_of<T>(op.out, b, head) + row * op.out.stride_n, 0, op.e * sizeof(T));
    op.logarithm[at + row] = HUGE_VALF;
  }
}

template <class T>
void body(void* context, const Team& team) {
  const Forward<T>& f = *static_cast<const Forward<T>*>(context);
  const Attention& op = f.op;
  const int64_t all = op.batch * op.kv_heads, blocks = key_blocks(op.keys), tiles = (op.queries + NC - 1) / NC;
  const int64_t group = op.heads / op.kv_heads;
  Counter* counter = f.counters;
  for (int64_t i = team.index; f.biases && i < op.batch * op.keys; i += team.size)
    f.biases[i] = op.bias[i - i % op.keys + op.order.keys[i]] * 1.44269504088896341f;
  for (int64_t begin = 0; begin < all; begin += f.at_once, counter += 2) {
    const int64_t now = all - begin < f.at_once ? all - begin : f.at_once;
    if (begin > 0) team.barrier();
    for (int64_t i; (i = counter[0].next()) < now * blocks;) {
      const int64_t head = begin + i / blocks;
      prepare(f, head / op.kv_heads, head % op.kv_heads, i / blocks, i % blocks);
    }
    team.barrier();
    for (int64_t i; (i = counter[1].next()) < now * group * tiles;) {
      const int64_t turn_head = i / tiles / group, kv_head = begin + turn_head, b = kv_head / op.kv_heads;
      const int64_t head = kv_head % op.kv_heads * group + i / tiles % group, tile = i % tiles;
      if (tile == 0) put_zeros<T>(op, b, head);
      if (tile * NC < op.order.query_counts[b])
        attend(f, b, head, turn_head, tile, f.of_threads + team.index * f.thread_bytes);
    }
  }
}

double pairs_of(const Attention& op) {
  double pairs = 0;
  for (int64_t i = 0; i < op.batch * op.queries; ++i) pairs += op.order.limits[i];
  return pairs;
}

template <class T>
void run(const Attention& op) {
  using C = typename Forward<T>::C;
  const int64_t all = op.batch * op.kv_heads, blocks = key_blocks(op.keys);
  if (all == 0 || op.heads == 0 || op.queries == 0) return;
  Forward<T> f{op, row_stride<C>(op.d), op.e * kKeyStride<C>, 0, nullptr, nullptr, nullptr, nullptr, 0, nullptr};
  const size_t head_bytes = (op.keys * f.k_stride + blocks * f.value_block) * sizeof(C);
  f.at_once = head_bytes == 0 ? all : static_cast<int64_t>(kHeadsBytes / head_bytes);
  if (f.at_once < 1) f.at_once = 1;
  if (f.at_once > all) f.at_once = all;
  const double products = 2.0 * pairs_of(op) * static_cast<double>(op.heads) * static_cast<double>(op.d + op.e);
  const int threads = useful_threads(op.threads, products,
                                     sizeof(T) * static_cast<double>(all * op.keys) * static_cast<double>(op.d + op.e));
  const int64_t turns = (all + f.at_once - 1) / f.at_once;
  const size_t keys_bytes = f.at_once * op.keys * f.k_stride * sizeof(C);
  const size_t values_bytes = f.at_once * blocks * f.value_block * sizeof(C);
  const size_t biases_bytes = op.bias ? op.batch * op.keys * sizeof(float) : 0;
  const size_t counters_bytes = 2 * turns * sizeof(Counter);
  f.thread_bytes = f.scores_bytes() + f.result_bytes() + f.panel_bytes() + f.rows_bytes();
  Scratch block(rounded_bytes(keys_bytes) + rounded_bytes(values_bytes) + rounded_bytes(biases_bytes) +
                rounded_bytes(counters_bytes) + rounded_bytes(threads * f.thread_bytes));
  f.keys = static_cast<C*>(block.take(keys_bytes));
  f.values = static_cast<C*>(block.take(values_bytes));
  void* biases = block.take(biases_bytes);
  if (op.bias) f.biases = static_cast<float*>(biases);
  f.counters = static_cast<Counter*>(block.take(counters_bytes));
  f.of_threads = static_cast<char*>(block.take(threads * f.thread_bytes));
  for (int64_t i = 0; i < 2 * turns; ++i) f.counters[i] = {};
  parallel(threads, body<T>, &f);
}

}  // namespace

void attention(const Attention& op) {
  with_type(op.dtype, [&](auto type) { run<typename decltype(type)::T>(op); });
}

}  // namespace dyncore::DYNCORE_ISA
