// grouped_linear and its backward against plain loops in double.
#include <cmath>

#include "tests/tests.h"

namespace dyncore::tests {

namespace {

struct Case {
  const TestPlan& plan;
  Size size;
  Dtype dtype;
  Activation activation;
  Layout layout;
  bool gather, scatter, scaled, biased;
  int64_t gap;  // between rows of x
};

struct Problem {
  Dense x, weight, bias, grad, pre;

  Problem(const Case& c, Random& random)
      : x(c.gather ? random_dense(random, c.plan.num_rows, c.size.k, c.dtype)
                   : random_slots(random, c.plan.capacity, c.plan.live, c.size.k, c.dtype)),
        weight(random_dense(random, c.plan.groups * c.size.n, c.size.k, c.dtype, 1.0 / std::sqrt(double(c.size.k)))),
        bias(random_dense(random, c.plan.groups, c.size.n, c.dtype)),
        grad(c.scatter ? random_dense(random, c.plan.num_rows, c.size.n, c.dtype)
                       : random_slots(random, c.plan.capacity, c.plan.live, c.size.n, c.dtype)),
        pre(random_slots(random, c.plan.capacity, c.plan.live, c.size.n, c.dtype)) {}
};

// [slots, N]
Dense pre_activation(const Case& c, const Problem& p) {
  Dense h(c.plan.capacity, c.size.n);
  for (int64_t a = 0; a < c.plan.live; ++a) {
    const int64_t g = c.plan.group_of(a), row = c.gather ? c.plan.rows[a] : a;
    for (int64_t n = 0; n < c.size.n; ++n) {
      double sum = c.biased ? p.bias(g, n) : 0.0;
      for (int64_t k = 0; k < c.size.k; ++k) sum += p.weight(g * c.size.n + n, k) * p.x(row, k);
      h(a, n) = sum;
    }
  }
  return h;
}

Dense values(const Case& c, const Dense& pre) {
  Dense out(c.scatter ? c.plan.num_rows : c.plan.capacity, c.size.n);
  for (int64_t a = 0; a < c.plan.live; ++a) {
    const int64_t to = c.scatter ? c.plan.rows[a] : a;
    const double scale = c.plan.scale_of(a, c.scatter && c.scaled);
    for (int64_t n = 0; n < c.size.n; ++n) out(to, n) += scale * activate(c.activation, pre(a, n)).value;
  }
  return out;
}

struct Gradients {
  Dense x, weight, bias, scale;
};

Gradients gradients(const Case& c, const Problem& p, const Dense& pre) {
  Gradients d{Dense(p.x.rows, p.x.width), Dense(p.weight.rows, p.weight.width), Dense(p.bias.rows, p.bias.width),
              Dense(c.plan.capacity, 1)};
  for (int64_t a = 0; a < c.plan.live; ++a) {
    const int64_t g = c.plan.group_of(a), row = c.gather ? c.plan.rows[a] : a, from = c.scatter ? c.plan.rows[a] : a;
    const double scale = c.plan.scale_of(a, c.scatter && c.scaled);
    for (int64_t n = 0; n < c.size.n; ++n) {
      const ActivationAt act = activate(c.activation, pre(a, n));
      const double dy = scale * p.grad(from, n) * act.derivative;
      d.scale(a, 0) += p.grad(from, n) * act.value;
      d.bias(g, n) += dy;
      for (int64_t k = 0; k < c.size.k; ++k) {
        d.weight(g * c.size.n + n, k) += dy * p.x(row, k);
        d.x(row, k) += dy * p.weight(g * c.size.n + n, k);
      }
    }
  }
  return d;
}

void forward(const std::string& name, const Case& c, const Problem& p, const Dense& pre) {
  const Image x(p.x, c.dtype, c.gap), bias(p.bias, c.dtype);
  const WeightImage weight(p.weight, c.plan.groups, c.dtype, c.layout);
  const bool save = c.activation != Activation::none;
  const auto make = [&](const Kernels& kernels, int threads) {
    Outputs out;
    out.emplace_back(c.scatter ? c.plan.num_rows : c.plan.capacity, c.size.n, c.dtype);
    if (save) out.emplace_back(c.plan.capacity, c.size.n, c.dtype);
    kernels.grouped_linear({c.plan.view(c.scaled), c.dtype, c.activation, c.gather, c.scatter, c.size.n, c.size.k,
                            x.matrix(), weight.weight(), c.biased ? bias.matrix() : Matrix{nullptr, 0}, out[0].data(),
                            save ? out[1].data() : nullptr, threads});
    return out;
  };
  on_every_isa(name + " forward", make, [&](const Outputs& out) {
    expect_values("out", out[0].read(), values(c, pre), c.dtype);
    if (save) expect_values("pre", out[1].read(), pre, c.dtype);
  });
}

// `needs` has a bit for each of x, weight, bias, scale.
void backward(const std::string& name, const Case& c, const Problem& p, const Gradients& want, unsigned needs) {
  const Image x(p.x, c.dtype, c.gap), bias(p.bias, c.dtype), grad(p.grad, c.dtype, c.gap), pre(p.pre, c.dtype);
  const WeightImage weight(p.weight, c.plan.groups, c.dtype, c.layout);
  const bool linear = c.activation == Activation::none;
  const auto make = [&](const Kernels& kernels, int threads) {
    Outputs out;
    out.emplace_back(p.x.rows, p.x.width, c.dtype);
    out.emplace_back(p.weight.rows, p.weight.width, c.dtype);
    out.emplace_back(p.bias.rows, p.bias.width, c.dtype);
    out.emplace_back(c.plan.capacity, 1, Dtype::float32);
    const auto wanted = [&](unsigned i) { return needs >> i & 1 ? out[i].data() : nullptr; };
    kernels.grouped_linear_backward({c.plan.view(c.scaled), c.dtype, c.activation, c.gather, c.scatter, c.size.n,
                                     c.size.k, grad.matrix(), x.matrix(), weight.weight(),
                                     c.biased ? bias.matrix() : Matrix{nullptr, 0},
                                     linear ? Matrix{nullptr, 0} : pre.matrix(), wanted(0), wanted(1), wanted(2),
                                     static_cast<float*>(wanted(3)), threads});
    return out;
  };
  on_every_isa(name + " backward " + std::to_string(needs), make, [&](const Outputs& out) {
    if (needs & 1) expect_gradients("dx", out[0].read(), want.x, c.dtype);
    if (needs & 2) expect_gradients("dweight", out[1].read(), want.weight, c.dtype);
    if (needs & 4) expect_gradients("dbias", out[2].read(), want.bias, c.dtype);
    if (needs & 8) expect_gradients("dscale", out[3].read(), want.scale, c.dtype);
  });
}

void run(const Case& c, Random& random, unsigned needs) {
  const std::string name = std::string("grouped_linear ") + name_of(c.dtype) + ", plan: " + c.plan.name + ", N " +
                           std::to_string(c.size.n) + ", K " + std::to_string(c.size.k) + ", activation " +
                           std::to_string(int(c.activation)) + ", layout " + std::to_string(int(c.layout)) +
                           (c.gather ? ", gather" : "") + (c.scatter ? ", scatter" : "");
  const Problem p(c, random);
  const Dense pre = pre_activation(c, p);
  forward(name, c, p, pre);
  const unsigned all = (c.biased ? 7u : 3u) | (c.scatter && c.scaled ? 8u : 0u);
  const Gradients want = gradients(c, p, c.activation == Activation::none ? pre : p.pre);
  backward(name, c, p, want, all);
  if (needs & all) backward(name, c, p, want, needs & all);
}

}  // namespace

void test_grouped_linear() {
  Random random;
  unsigned turn = 0;
  for (const TestPlan& plan : plans_to_try(random)) {
    for (const Size& size : kSizes) {
      for (Dtype dtype : kDtypes) {
        for (int form = 0; form < 4; ++form, ++turn) {
          run({plan, size, dtype, Activation(turn % 6), kLayouts[turn % 3], form % 2 == 0, form / 2 == 0, turn % 5 > 0,
               turn % 4 > 0, turn % 7},
              random, 1 + turn % 15);
        }
      }
    }
  }
  // Deeper than one packed panel, in inputs, outputs and slots; deeper than the cache that the rows of the dot form
  // stay in; groups that are cut into pieces; no inputs, no outputs.
  const TestPlan few_and_many = make_plan(random, "few and many", 30, {2, 60});
  const TestPlan dot = make_plan(random, "dot form", 20, {48, 11}),
                 long_group = make_plan(random, "long", 50, {3, 2500}),
                 pieces = make_plan(random, "pieces", 50, {3, 900});
  const Layout adjacent = Layout::inputs_adjacent;
  for (Dtype dtype : kDtypes) {
    for (Layout layout : kLayouts) {
      run({few_and_many, {35, 4133}, dtype, Activation::none, layout, true, true, true, true, 0}, random, 0);
      run({few_and_many, {2100, 33}, dtype, Activation::gelu, layout, true, true, true, true, 0}, random, 0);
    }
    run({dot, {3, 24001}, dtype, Activation::none, adjacent, true, true, true, true, 0}, random, 0);
    run({long_group, {9, 35}, dtype, Activation::silu, adjacent, true, false, true, true, 0}, random, 0);
    run({pieces, {2, 2600}, dtype, Activation::relu, adjacent, true, true, true, true, 0}, random, 0);
    run({dot, {5, 0}, dtype, Activation::none, adjacent, true, true, true, true, 0}, random, 0);
    run({dot, {0, 5}, dtype, Activation::none, adjacent, true, true, true, true, 0}, random, 0);
  }
  // Rows 4096 bytes apart: in one set of the first cache.
  run({few_and_many, {1024, 1024}, Dtype::float32, Activation::none, adjacent, true, true, true, true, 0}, random, 0);
}

}  // namespace dyncore::tests
