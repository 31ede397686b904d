// grouped_mlp and its backward against plain loops in double.
#include <cmath>

#include "tests/tests.h"

namespace dyncore::tests {

namespace {

struct Case {
  const TestPlan& plan;
  Size size;  // (I, H)
  Dtype dtype;
  Activation activation;
  Layout layout;
  bool scaled, biased, residual;
  int64_t gap;

  int64_t i() const { return size.n; }
  int64_t h() const { return size.k; }
  int64_t width() const { return is_gated(activation) ? 2 * size.n : size.n; }
};

struct Problem {
  Dense x, w_in, w_out, b_in, b_out, residual, grad, pre;

  Problem(const Case& c, Random& random)
      : x(random_dense(random, c.plan.num_rows, c.h(), c.dtype)),
        w_in(random_dense(random, c.plan.groups * c.width(), c.h(), c.dtype, 1.0 / std::sqrt(double(c.h())))),
        w_out(random_dense(random, c.plan.groups * c.h(), c.i(), c.dtype, 1.0 / std::sqrt(double(c.i())))),
        b_in(random_dense(random, c.plan.groups, c.width(), c.dtype)),
        b_out(random_dense(random, c.plan.groups, c.h(), c.dtype)),
        residual(random_dense(random, c.plan.num_rows, c.h(), c.dtype)),
        grad(random_dense(random, c.plan.num_rows, c.h(), c.dtype)),
        pre(random_slots(random, c.plan.capacity, c.plan.live, c.width(), c.dtype)) {}
};

// [slots, I or 2I]
Dense pre_activation(const Case& c, const Problem& p) {
  Dense pre(c.plan.capacity, c.width());
  for (int64_t a = 0; a < c.plan.live; ++a) {
    const int64_t g = c.plan.group_of(a);
    for (int64_t j = 0; j < c.width(); ++j) {
      double sum = c.biased ? p.b_in(g, j) : 0.0;
      for (int64_t k = 0; k < c.h(); ++k) sum += p.w_in(g * c.width() + j, k) * p.x(c.plan.rows[a], k);
      pre(a, j) = sum;
    }
  }
  return pre;
}

double hidden(const Case& c, const Dense& pre, int64_t a, int64_t j) {
  return activate(c.activation, pre(a, j)).value * (is_gated(c.activation) ? pre(a, c.i() + j) : 1.0);
}

Dense values(const Case& c, const Problem& p, const Dense& pre) {
  Dense out(c.plan.num_rows, c.h());
  if (c.residual) out = p.residual;
  std::vector<double> u(static_cast<size_t>(c.i()));
  for (int64_t a = 0; a < c.plan.live; ++a) {
    const int64_t g = c.plan.group_of(a);
    for (int64_t j = 0; j < c.i(); ++j) u[static_cast<size_t>(j)] = hidden(c, pre, a, j);
    for (int64_t k = 0; k < c.h(); ++k) {
      double y = c.biased ? p.b_out(g, k) : 0.0;
      for (int64_t j = 0; j < c.i(); ++j) y += p.w_out(g * c.h() + k, j) * u[static_cast<size_t>(j)];
      out(c.plan.rows[a], k) += c.plan.scale_of(a, c.scaled) * y;
    }
  }
  return out;
}

struct Gradients {
  Dense x, w_in, w_out, b_in, b_out, scale;
};

// One slot's gradient of pre[j] and, for a gated activation, of pre[I + j], given that of the hidden value.
void add_through_input(const Case& c, const Problem& p, int64_t a, int64_t column, double dpre, Gradients& d) {
  const int64_t g = c.plan.group_of(a), row = c.plan.rows[a];
  d.b_in(g, column) += dpre;
  for (int64_t k = 0; k < c.h(); ++k) {
    d.w_in(g * c.width() + column, k) += dpre * p.x(row, k);
    d.x(row, k) += dpre * p.w_in(g * c.width() + column, k);
  }
}

Gradients gradients(const Case& c, const Problem& p) {
  Gradients d{Dense(p.x.rows, p.x.width),       Dense(p.w_in.rows, p.w_in.width),   Dense(p.w_out.rows, p.w_out.width),
              Dense(p.b_in.rows, p.b_in.width), Dense(p.b_out.rows, p.b_out.width), Dense(c.plan.capacity, 1)};
  for (int64_t a = 0; a < c.plan.live; ++a) {
    const int64_t g = c.plan.group_of(a), row = c.plan.rows[a];
    const double scale = c.plan.scale_of(a, c.scaled);
    for (int64_t k = 0; k < c.h(); ++k) {
      d.b_out(g, k) += scale * p.grad(row, k);
      if (c.biased) d.scale(a, 0) += p.grad(row, k) * p.b_out(g, k);
    }
    for (int64_t j = 0; j < c.i(); ++j) {
      const double u = hidden(c, p.pre, a, j);
      double dv = 0.0;  // without the scale
      for (int64_t k = 0; k < c.h(); ++k) {
        d.w_out(g * c.h() + k, j) += scale * p.grad(row, k) * u;
        dv += p.w_out(g * c.h() + k, j) * p.grad(row, k);
      }
      d.scale(a, 0) += dv * u;
      const ActivationAt act = activate(c.activation, p.pre(a, j));
      const double up = is_gated(c.activation) ? p.pre(a, c.i() + j) : 1.0;
      add_through_input(c, p, a, j, scale * dv * up * act.derivative, d);
      if (is_gated(c.activation)) add_through_input(c, p, a, c.i() + j, scale * dv * act.value, d);
    }
  }
  return d;
}

Matrix where(bool present, const Image& image) {
  return present ? image.matrix() : Matrix{nullptr, 0};
}

// A weight [G, parts * N, K] that has panels in `memory`, where `packed`.
Weight pack(const Kernels& kernels, Dtype dtype, int64_t groups, int64_t parts, Size size, Weight weight, bool packed,
            int threads, Buffer<float>& memory) {
  if (!packed) return weight;
  weight.panel = 32 * (dtype == Dtype::bfloat16 && kernels.pairs ? (size.k + 1) / 2 : size.k);
  weight.panels_g = parts * ((size.n + 31) / 32) * weight.panel;
  memory = Buffer<float>(groups * weight.panels_g);
  kernels.pack_weight({dtype, groups, parts, parts * size.n, size.k, weight, memory.data(), threads});
  weight.panels = memory.data();
  return weight;
}

void forward(const std::string& name, const Case& c, const Problem& p, const Dense& pre, const Dense& want, bool save,
             bool packed) {
  const Image x(p.x, c.dtype, c.gap), b_in(p.b_in, c.dtype), b_out(p.b_out, c.dtype), residual(p.residual, c.dtype);
  const WeightImage w_in(p.w_in, c.plan.groups, c.dtype, c.layout), w_out(p.w_out, c.plan.groups, c.dtype, c.layout);
  const auto make = [&](const Kernels& kernels, int threads) {
    Outputs out;
    out.emplace_back(c.plan.num_rows, c.h(), c.dtype);
    if (save) out.emplace_back(c.plan.capacity, c.width(), c.dtype);
    Buffer<float> in_panels, out_panels;
    const Weight in = pack(kernels, c.dtype, c.plan.groups, is_gated(c.activation) ? 2 : 1, {c.i(), c.h()},
                           w_in.weight(), packed, threads, in_panels);
    const Weight back =
        pack(kernels, c.dtype, c.plan.groups, 1, {c.h(), c.i()}, w_out.weight(), packed, threads, out_panels);
    kernels.grouped_mlp({c.plan.view(c.scaled), c.dtype, c.activation, c.h(), c.i(), x.matrix(), in, back,
                         where(c.biased, b_in), where(c.biased, b_out), where(c.residual, residual), out[0].data(),
                         save ? out[1].data() : nullptr, threads});
    return out;
  };
  on_every_isa(name + (packed ? " forward, packed" : " forward"), make, [&](const Outputs& out) {
    expect_values("out", out[0].read(), want, c.dtype);
    if (save) expect_values("pre", out[1].read(), pre, c.dtype);
  });
}

// `needs` has a bit for each of x, w_in, w_out, b_in, b_out, scale.
void backward(const std::string& name, const Case& c, const Problem& p, const Gradients& want, unsigned needs) {
  const Image x(p.x, c.dtype, c.gap), b_out(p.b_out, c.dtype), grad(p.grad, c.dtype, c.gap), pre(p.pre, c.dtype);
  const WeightImage w_in(p.w_in, c.plan.groups, c.dtype, c.layout), w_out(p.w_out, c.plan.groups, c.dtype, c.layout);
  const bool by_neuron = c.layout == Layout::outputs_adjacent;  // dw_out
  const auto make = [&](const Kernels& kernels, int threads) {
    Outputs out;
    for (const Dense* like : {&p.x, &p.w_in, &p.w_out, &p.b_in, &p.b_out})
      out.emplace_back(like->rows, like->width, c.dtype);
    if (by_neuron) out[2] = Image(c.plan.groups * c.i(), c.h(), c.dtype);
    out.emplace_back(c.plan.capacity, 1, Dtype::float32);
    const auto wanted = [&](unsigned i) { return needs >> i & 1 ? out[i].data() : nullptr; };
    kernels.grouped_mlp_backward({c.plan.view(c.scaled), c.dtype, c.activation, c.h(), c.i(), grad.matrix(), x.matrix(),
                                  w_in.weight(), w_out.weight(), where(c.biased, b_out), pre.matrix(), wanted(0),
                                  wanted(1), wanted(2), by_neuron, wanted(3), wanted(4), static_cast<float*>(wanted(5)),
                                  threads});
    return out;
  };
  on_every_isa(name + " backward " + std::to_string(needs), make, [&](const Outputs& out) {
    const Dense* wants[] = {&want.x, &want.w_in, &want.w_out, &want.b_in, &want.b_out, &want.scale};
    const char* names[] = {"dx", "dw_in", "dw_out", "db_in", "db_out", "dscale"};
    for (unsigned i = 0; i < 6; ++i)
      if (needs >> i & 1)
        expect_gradients(names[i], i == 2 && by_neuron ? turned(out[i].read(), c.plan.groups) : out[i].read(),
                         *wants[i], c.dtype);
  });
}

void run(const Case& c, Random& random, unsigned needs) {
  const std::string name = std::string("grouped_mlp ") + name_of(c.dtype) + ", plan: " + c.plan.name + ", H " +
                           std::to_string(c.h()) + ", I " + std::to_string(c.i()) + ", activation " +
                           std::to_string(int(c.activation)) + ", layout " + std::to_string(int(c.layout));
  const Problem p(c, random);
  const Dense pre = pre_activation(c, p), out = values(c, p, pre);
  for (bool packed : {false, true}) forward(name, c, p, pre, out, needs % 2 == 0, packed);
  const unsigned all = (c.biased ? 31u : 7u) | (c.scaled ? 32u : 0u);
  const Gradients want = gradients(c, p);
  backward(name, c, p, want, all);
  if (needs & all) backward(name, c, p, want, needs & all);
}

}  // namespace

void test_grouped_mlp() {
  Random random;
  unsigned turn = 0;
  for (const TestPlan& plan : plans_to_try(random)) {
    for (const Size& size : kSizes) {
      for (Dtype dtype : kDtypes) {
        for (int i = 0; i < 2; ++i, ++turn) {
          run({plan, size, dtype, Activation(1 + turn % 8), kLayouts[turn % 3], turn % 5 > 0, turn % 4 > 0,
               turn % 3 > 0, turn % 7},
              random, 1 + turn % 63);
        }
      }
    }
  }
  // Deeper than one packed panel, in inputs, outputs and slots; hidden activations in several blocks; no inputs, no
  // hidden columns.
  const TestPlan few_and_many = make_plan(random, "few and many", 30, {2, 60});
  const TestPlan long_group = make_plan(random, "long", 50, {3, 2500});
  const TestPlan blocks = make_plan(random, "blocks", 50, {3, 900});
  const Layout adjacent = Layout::inputs_adjacent;
  for (Dtype dtype : kDtypes) {
    run({few_and_many, {35, 2100}, dtype, Activation::swiglu, adjacent, true, true, true, 0}, random, 4);
    run({few_and_many, {2100, 33}, dtype, Activation::gelu, adjacent, true, true, true, 0}, random, 0);
    run({long_group, {9, 35}, dtype, Activation::reglu, adjacent, true, true, true, 0}, random, 0);
    run({blocks, {3000, 2}, dtype, Activation::silu, adjacent, true, true, true, 0}, random, 0);
    run({few_and_many, {5, 0}, dtype, Activation::geglu, adjacent, true, true, true, 0}, random, 0);
    run({few_and_many, {0, 5}, dtype, Activation::geglu, adjacent, true, true, true, 0}, random, 0);
  }
  // Rows 4096 bytes apart: in one set of the first cache.
  run({few_and_many, {1056, 1024}, Dtype::float32, Activation::gelu, adjacent, true, true, true, 0}, random, 0);
}

}  // namespace dyncore::tests
