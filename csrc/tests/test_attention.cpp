// attention and its gradients against a softmax in double, at sizes on either side of 32 queries, a block of keys and a
// tile of queries. What is left out holds NaN.
#include <cmath>

#include "cpu/attention_order.h"
#include "tests/tests.h"

namespace dyncore::tests {

namespace {

struct Case {
  int64_t batch, heads, kv_heads, queries, keys, d, e;
  Dtype dtype;
  bool causal, marked, biased;
};

struct Problem {
  Dense q, k, v, grad;  // rows: [B * heads * N] or [B * kv_heads * M]
  Buffer<int32_t> q_positions, k_positions;
  Buffer<uint8_t> q_live, k_live;
  Buffer<float> bias;

  Problem(const Case& c, Random& random)
      : q(random_dense(random, c.batch * c.heads * c.queries, c.d, c.dtype)),
        k(random_dense(random, c.batch * c.kv_heads * c.keys, c.d, c.dtype)),
        v(random_dense(random, c.batch * c.kv_heads * c.keys, c.e, c.dtype)),
        grad(random_dense(random, c.batch * c.heads * c.queries, c.e, c.dtype)),
        q_positions(c.batch * c.queries),
        k_positions(c.batch * c.keys),
        q_live(c.batch * c.queries),
        k_live(c.batch * c.keys),
        bias(c.batch * c.keys) {
    const int64_t length = c.queries + c.keys + 1;
    for (int64_t i = 0; i < q_positions.size(); ++i) {
      q_positions[i] = static_cast<int32_t>(random.below(length));
      q_live[i] = !c.marked || random.below(4) > 0;
    }
    for (int64_t i = 0; i < k_positions.size(); ++i) {
      k_positions[i] = static_cast<int32_t>(random.below(length));
      k_live[i] = !c.marked || random.below(4) > 0;
      bias[i] = static_cast<float>(random.below(3));
    }
    for (int64_t r = 0; r < q.rows; ++r)
      if (!q_live[r / (c.heads * c.queries) * c.queries + r % c.queries])
        for (int64_t j = 0; j < c.d + c.e; ++j) (j < c.d ? q(r, j) : grad(r, j - c.d)) = NAN;
    for (int64_t r = 0; r < k.rows; ++r)
      if (!k_live[r / (c.kv_heads * c.keys) * c.keys + r % c.keys])
        for (int64_t j = 0; j < c.d + c.e; ++j) (j < c.d ? k(r, j) : v(r, j - c.d)) = NAN;
  }
};

struct Wanted {
  Dense out, dq, dk, dv;

  Wanted(const Case& c, const Problem& p, double scale)
      : out(p.grad.rows, c.e), dq(p.q.rows, c.d), dk(p.k.rows, c.d), dv(p.k.rows, c.e) {
    std::vector<double> weight(static_cast<size_t>(c.keys)), dweight(weight);
    for (int64_t i = 0; i < p.q.rows; ++i) {
      const int64_t b = i / (c.heads * c.queries), head = i / c.queries % c.heads,
                    query = b * c.queries + i % c.queries;
      const int64_t first = (b * c.kv_heads + head / (c.heads / c.kv_heads)) * c.keys;
      const auto counts = [&](int64_t j) {
        return p.q_live[query] && p.k_live[b * c.keys + j] &&
               (!c.causal || p.k_positions[b * c.keys + j] <= p.q_positions[query]);
      };
      double total = 0;
      for (int64_t j = 0; j < c.keys; ++j) {
        if (!counts(j)) continue;
        double score = 0;
        for (int64_t x = 0; x < c.d; ++x) score += p.q(i, x) * p.k(first + j, x);
        weight[j] = std::exp(scale * score + (c.biased ? p.bias[b * c.keys + j] : 0.0f));
        total += weight[j];
      }
      double inner = 0;
      for (int64_t j = 0; j < c.keys; ++j) {
        if (!counts(j)) continue;
        weight[j] /= total;
        dweight[j] = 0;
        for (int64_t x = 0; x < c.e; ++x) {
          out(i, x) += weight[j] * p.v(first + j, x);
          dweight[j] += p.grad(i, x) * p.v(first + j, x);
          dv(first + j, x) += weight[j] * p.grad(i, x);
        }
        inner += weight[j] * dweight[j];
      }
      for (int64_t j = 0; j < c.keys; ++j) {
        if (!counts(j)) continue;
        const double dscore = scale * weight[j] * (dweight[j] - inner);
        for (int64_t x = 0; x < c.d; ++x) {
          dq(i, x) += dscore * p.k(first + j, x);
          dk(first + j, x) += dscore * p.q(i, x);
        }
      }
    }
  }
};

// Rows of a matrix as heads.
Heads heads_of(const Image& image, int64_t heads, int64_t tokens) {
  const Matrix m = image.matrix();
  return {m.data, heads * tokens * m.stride, tokens * m.stride, m.stride};
}

void run(const Case& c, Random& random) {
  const std::string name = std::string("attention ") + name_of(c.dtype) + ", N " + std::to_string(c.queries) + ", M " +
                           std::to_string(c.keys) + ", D " + std::to_string(c.d) + ", E " + std::to_string(c.e);
  const Problem p(c, random);
  const float scale = 0.3f;
  const Wanted want(c, p, scale);
  const Image q(p.q, c.dtype, 3), k(p.k, c.dtype, 1), v(p.v, c.dtype), grad(p.grad, c.dtype, 5);
  const AttentionLists lists({c.batch, c.queries, c.keys, c.causal, p.q_positions.data(), p.k_positions.data(),
                              c.queries, c.keys, c.marked ? p.q_live.data() : nullptr,
                              c.marked ? p.k_live.data() : nullptr});
  const float* bias = c.biased ? p.bias.data() : nullptr;
  const Heads q_heads = heads_of(q, c.heads, c.queries), k_heads = heads_of(k, c.kv_heads, c.keys),
              v_heads = heads_of(v, c.kv_heads, c.keys);
  const auto make = [&](const Kernels& kernels, int threads) {
    Outputs out;
    out.emplace_back(p.grad.rows, c.e, c.dtype, 1);
    for (const Dense* input : {&p.q, &p.k, &p.v}) out.emplace_back(input->rows, input->width, c.dtype, 2);
    Buffer<float> logarithm(p.q.rows);
    const Heads result = heads_of(out[0], c.heads, c.queries);
    kernels.attention({c.dtype, c.batch, c.heads, c.kv_heads, c.queries, c.keys, c.d, c.e, q_heads, k_heads, v_heads,
                       bias, lists.order(), scale, result, logarithm.data(), threads});
    kernels.attention_backward({c.dtype,
                                c.batch,
                                c.heads,
                                c.kv_heads,
                                c.queries,
                                c.keys,
                                c.d,
                                c.e,
                                heads_of(grad, c.heads, c.queries),
                                q_heads,
                                k_heads,
                                v_heads,
                                result,
                                bias,
                                logarithm.data(),
                                lists.order(),
                                scale,
                                heads_of(out[1], c.heads, c.queries),
                                heads_of(out[2], c.kv_heads, c.keys),
                                heads_of(out[3], c.kv_heads, c.keys),
                                threads});
    return out;
  };
  on_every_isa(name, make, [&](const Outputs& out) {
    expect_values("out", out[0].read(), want.out, c.dtype);
    expect_gradients("dq", out[1].read(), want.dq, c.dtype);
    expect_gradients("dk", out[2].read(), want.dk, c.dtype);
    expect_gradients("dv", out[3].read(), want.dv, c.dtype);
  });
}

}  // namespace

void test_attention() {
  Random random;
  for (Dtype dtype : kDtypes) {
    run({1, 1, 1, 1, 1, 1, 1, dtype, false, false, false}, random);
    run({2, 4, 2, 31, 127, 17, 33, dtype, true, true, true}, random);
    run({1, 2, 2, 33, 129, 64, 16, dtype, true, false, false}, random);
    run({1, 2, 1, 130, 40, 7, 65, dtype, false, true, true}, random);
    run({1, 1, 1, 5, 0, 8, 8, dtype, true, false, false}, random);
    run({2, 2, 1, 0, 5, 8, 8, dtype, true, false, false}, random);
  }
}

}  // namespace dyncore::tests
