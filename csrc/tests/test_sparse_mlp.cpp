// sparse_mlp, its first half alone, and its backward against plain loops in double. Every pre-activation is exact in
// float, so that which neurons are on, and what is saved of them, is known to the bit.
#include <cmath>

#include "tests/sparse.h"

namespace dyncore::tests {

namespace {

struct Case {
  int64_t rows, h, i;
  Dtype dtype;
  Activation activation;
  Pattern pattern;
  Layout in_layout, out_layout;
  float dense_from;
  bool biased;
  int64_t gap;

  bool gated() const { return activation == Activation::reglu; }
  int64_t width() const { return gated() ? 2 * i : i; }
  std::string name() const {
    return std::string(name_of(dtype)) + ", T " + std::to_string(rows) + ", H " + std::to_string(h) + ", I " +
           std::to_string(i) + ", activation " + std::to_string(int(activation)) + ", " + name_of(pattern) +
           ", layouts " + std::to_string(int(in_layout)) + std::to_string(int(out_layout)) + ", dense from " +
           std::to_string(dense_from);
  }
};

struct Problem {
  Dense x, w_in, w_out, b_in, b_out, grad;
  Dense gate, up;  // relu of one half of the pre-activation; the other half where that is not 0

  Problem(const Case& c, Random& random)
      : x(random_fractions(random, c.rows, c.h)),
        w_in(random_fractions(random, c.width(), c.h, std::exp2(-std::round(std::log2(double(c.h + 1)) / 2)))),
        w_out(random_dense(random, c.h, c.i, c.dtype, 1.0 / std::sqrt(double(c.i)))),
        b_in(random_fractions(random, 1, c.width())),
        b_out(random_dense(random, 1, c.h, c.dtype)),
        grad(random_dense(random, c.rows, c.h, c.dtype)),
        gate(c.rows, c.i),
        up(c.rows, c.i) {
    constexpr double kLevels[] = {-12.0, -2.5, 0.0, 12.0};
    for (int64_t r = 0; r < c.rows && c.h > 0; ++r) x(r, 0) = kLevels[static_cast<int>(of_row(c.pattern, r))];
    for (int64_t j = 0; j < c.i; ++j) {
      if (c.h > 0) w_in(j, 0) = 1.0;
      if (c.pattern == Pattern::mixed && is_hot(j)) b_in(0, j) = 10.0;
      if (c.pattern == Pattern::mixed && is_dead(j)) b_in(0, j) = -24.0;
    }
    for (int64_t r = 0; r < c.rows; ++r)
      for (int64_t j = 0; j < c.i; ++j) {
        gate(r, j) = std::fmax(pre(c, r, j), 0.0);
        if (c.gated() && gate(r, j) > 0.0) up(r, j) = pre(c, r, c.i + j);
      }
  }

  double pre(const Case& c, int64_t r, int64_t j) const {
    double sum = c.biased ? b_in(0, j) : 0.0;
    for (int64_t k = 0; k < c.h; ++k) sum += w_in(j, k) * x(r, k);
    return rounded(sum, c.dtype) + 0.0;  // no sum of a kernel is -0
  }
  double value(const Case& c, int64_t r, int64_t j) const {
    return gate(r, j) * (c.gated() ? up(r, j) : c.activation == Activation::relu2 ? gate(r, j) : 1.0);
  }
  std::vector<const Dense*> halves(const Case& c) const {
    return c.gated() ? std::vector<const Dense*>{&gate, &up} : std::vector<const Dense*>{&gate};
  }
  bool row_is_on(int64_t r) const {
    bool on = false;
    for (int64_t j = 0; j < gate.width; ++j) on = on || gate(r, j) > 0.0;
    return on;
  }

  // What nothing meets that is on is NaN: neurons' weights, but the gates', and, where the gradient of b_out is not
  // wanted, rows.
  void poison(const Case& c, bool rows) {
    for (int64_t j = 0; j < c.i; ++j) {
      bool on = false;
      for (int64_t r = 0; r < c.rows; ++r) on = on || gate(r, j) > 0.0;
      for (int64_t k = 0; !on && k < c.h; ++k) {
        w_out(k, j) = NAN;
        if (c.gated()) w_in(c.i + j, k) = NAN;
      }
    }
    for (int64_t r = 0; rows && r < c.rows; ++r)
      if (!row_is_on(r))
        for (int64_t k = 0; k < c.h; ++k) grad(r, k) = x(r, k) = NAN;
  }
};

Dense output(const Case& c, const Problem& p) {
  Dense out(c.rows, c.h);
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t k = 0; c.biased && k < c.h; ++k) out(r, k) = p.b_out(0, k);
    for (int64_t j = 0; j < c.i; ++j)
      if (const double u = p.value(c, r, j); p.gate(r, j) > 0.0)
        for (int64_t k = 0; k < c.h; ++k) out(r, k) += u * p.w_out(k, j);
  }
  return out;
}

enum class Save { nothing, compressed, dense, half };  // half: compressed, without the output

void forward(const Case& c, const Problem& p, Save save) {
  const Image x(p.x, c.dtype, c.gap), b_in(p.b_in, c.dtype), b_out(p.b_out, c.dtype);
  const WeightImage w_in(p.w_in, 1, c.dtype, c.in_layout), w_out(p.w_out, 1, c.dtype, c.out_layout);
  const Matrix none{nullptr, 0};
  const bool compressed = save == Save::compressed || save == Save::half;
  const int64_t room = nonzeros(p.gate) + c.gap;
  const Dense want = output(c, p);
  const auto make = [&](const Kernels& kernels, int threads) {
    Outputs out;
    out.emplace_back(c.rows, save == Save::half ? 0 : c.h, c.dtype);
    Compressed saved{};
    void* pre = nullptr;
    if (compressed) {
      CompressedImage to(c.rows, c.i, c.gated(), room, c.dtype);
      saved = to.view();
      append(out, std::move(to));
    } else if (save == Save::dense) {
      out.emplace_back(c.rows, c.width(), c.dtype);
      pre = out[1].data();
    }
    kernels.sparse_mlp({c.dtype, c.activation, c.rows, c.h, c.i, x.matrix(), w_in.weight(),
                        save == Save::half ? Weight{} : w_out.weight(), c.biased ? b_in.matrix() : none,
                        c.biased ? b_out.matrix() : none, c.dense_from, save == Save::half ? nullptr : out[0].data(),
                        saved, pre, threads});
    return out;
  };
  on_every_isa("sparse_mlp " + c.name() + ", save " + std::to_string(int(save)), make, [&](const Outputs& out) {
    if (save != Save::half) expect_values("out", out[0].read(), want, c.dtype);
    if (compressed) expect_compressed(out, 1, p.halves(c), room, c.dtype);
    if (save != Save::dense) return;
    const Dense pre = out[1].read();
    bool equal = true;
    for (int64_t r = 0; r < c.rows; ++r)
      for (int64_t j = 0; j < c.width(); ++j) equal = equal && pre(r, j) == (j < c.i ? p.gate(r, j) : p.up(r, j - c.i));
    expect(equal, "pre");
  });
}

struct Gradients {
  Dense x, w_in, w_out, b_in, b_out;
};

Gradients gradients(const Case& c, const Problem& p) {
  Gradients d{Dense(c.rows, c.h), Dense(c.width(), c.h), Dense(c.h, c.i), Dense(1, c.width()), Dense(1, c.h)};
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t k = 0; k < c.h; ++k) d.b_out(0, k) += p.grad(r, k);
    for (int64_t j = 0; j < c.i; ++j) {
      const double gate = p.gate(r, j), u = p.value(c, r, j);
      if (gate == 0.0) continue;
      double dv = 0.0;
      for (int64_t k = 0; k < c.h; ++k) {
        d.w_out(k, j) += u * p.grad(r, k);
        dv += p.w_out(k, j) * p.grad(r, k);
      }
      const auto through = [&](int64_t column, double dpre) {
        d.b_in(0, column) += dpre;
        for (int64_t k = 0; k < c.h; ++k) {
          d.w_in(column, k) += dpre * p.x(r, k);
          d.x(r, k) += dpre * p.w_in(column, k);
        }
      };
      if (c.gated()) {
        through(j, dv * p.up(r, j));
        through(c.i + j, dv * gate);
      } else {
        through(j, c.activation == Activation::relu2 ? 2.0 * gate * dv : dv);
      }
    }
  }
  return d;
}

// `needs` has a bit for each of x, w_in, w_out, b_in, b_out.
void backward(const Case& c, const Problem& p, const Gradients& want, unsigned needs) {
  const Image x(p.x, c.dtype, c.gap), grad(p.grad, c.dtype, c.gap);
  const WeightImage w_in(p.w_in, 1, c.dtype, c.in_layout), w_out(p.w_out, 1, c.dtype, c.out_layout);
  const CompressedImage saved(p.halves(c), c.gap, c.dtype);
  const bool in_by_column = c.in_layout == Layout::outputs_adjacent,
             out_by_column = c.out_layout == Layout::outputs_adjacent;
  const auto make = [&](const Kernels& kernels, int threads) {
    Outputs out;
    out.emplace_back(c.rows, c.h, c.dtype);
    out.push_back(gradient_image(p.w_in, in_by_column, c.dtype));
    out.push_back(gradient_image(p.w_out, out_by_column, c.dtype));
    out.emplace_back(1, c.width(), c.dtype);
    out.emplace_back(1, c.h, c.dtype);
    const auto wanted = [&](unsigned i) { return needs >> i & 1 ? out[i].data() : nullptr; };
    WeightGradient dw_in = gradient_of(p.w_in, in_by_column, out[1]),
                   dw_out = gradient_of(p.w_out, out_by_column, out[2]);
    dw_in.data = wanted(1), dw_out.data = wanted(2);
    kernels.sparse_mlp_backward({c.dtype, c.activation, c.rows, c.h, c.i, grad.matrix(), x.matrix(), w_in.weight(),
                                 w_out.weight(), saved.view(), wanted(0), dw_in, dw_out, wanted(3), wanted(4),
                                 threads});
    return out;
  };
  on_every_isa("sparse_mlp_backward " + c.name() + ", needs " + std::to_string(needs), make, [&](const Outputs& out) {
    const Dense* wants[] = {&want.x, &want.w_in, &want.w_out, &want.b_in, &want.b_out};
    const char* names[] = {"dx", "dw_in", "dw_out", "db_in", "db_out"};
    for (unsigned i = 0; i < 5; ++i)
      if (needs >> i & 1)
        expect_gradients(names[i],
                         (i == 1 && in_by_column) || (i == 2 && out_by_column) ? turned(out[i].read()) : out[i].read(),
                         *wants[i], c.dtype);
  });
}

constexpr unsigned kAll = 31, kAllButOutBias = 15;

void run(const Case& c, Random& random, Save save, unsigned needs) {
  Problem p(c, random);
  const Gradients want = gradients(c, p);
  const Problem whole = p;
  p.poison(c, false);
  forward(c, c.dense_from > 1 ? p : whole, save);
  backward(c, p, want, kAll);
  p.poison(c, true);
  backward(c, p, want, needs & kAllButOutBias);
}

struct Shape {
  int64_t rows, h, i;
};

// On either side of: one row, the rows of a dense product, few rows (96), a segment of rows (512), rows of which dot
// products are an item (512); a word, a vector, a segment of neurons (128 of few rows, 512); a panel of H, the columns
// of a register tile (128 to 512).
constexpr Shape kShapes[] = {{0, 5, 3},    {3, 0, 5},     {5, 3, 0},     {1, 1, 1},     {1, 520, 33}, {1, 63, 1100},
                             {2, 31, 513}, {3, 257, 40},  {4, 33, 300},  {5, 100, 31},  {31, 8, 700}, {95, 33, 140},
                             {96, 64, 97}, {97, 40, 130}, {97, 7, 1025}, {130, 32, 50}, {520, 9, 70}, {1100, 5, 33}};

}  // namespace

void test_sparse_mlp() {
  Random random;
  unsigned turn = 0;
  constexpr Activation kActivations[] = {Activation::relu, Activation::relu2, Activation::reglu};
  for (const Shape& s : kShapes)
    for (int i = 0; i < 8; ++i, ++turn)
      run({s.rows, s.h, s.i, kDtypes[turn % 3], kActivations[turn / 3 % 3], kPatterns[turn % 5], kLayouts[turn / 2 % 3],
           kLayouts[turn / 4 % 3], kDenseFrom[turn / 15 % 3], turn % 4 > 0, turn % 7 / 2},
          random, Save(turn / 7 % 4), turn % 16);
  const Layout rows = Layout::inputs_adjacent, neurons = Layout::outputs_adjacent;
  // Blocks of the forward pass: 16 MB of a hidden activation, but no fewer rows than 256.
  for (Activation a : {Activation::relu2, Activation::reglu}) {
    const Case c{260, 2, 16500, Dtype::float32, a, Pattern::mixed, rows, neurons, 0.3f, true, 0};
    forward(c, Problem(c, random), Save::compressed);
  }
  // Rows 4096 bytes apart: in one set of the first cache.
  const Case c{61, 1024, 1030, Dtype::float32, Activation::relu, Pattern::little, rows, rows, 0.3f, false, 0};
  forward(c, Problem(c, random), Save::dense);
}

}  // namespace dyncore::tests
