// sparse_linear and the gradient of its weight against plain loops in double.
#include <cmath>

#include "tests/sparse.h"

namespace dyncore::tests {

namespace {

struct Case {
  int64_t rows, k, n;
  Dtype dtype;
  Pattern pattern;
  Layout layout;
  float dense_from;
  bool biased;
  int64_t gap;
};

struct Problem {
  Dense h, weight, bias, grad;

  Problem(const Case& c, Random& random)
      : h(random_sparse(random, c.rows, c.k, c.pattern, c.dtype)),
        weight(random_dense(random, c.n, c.k, c.dtype, 1.0 / std::sqrt(double(c.k)))),
        bias(random_dense(random, 1, c.n, c.dtype)),
        grad(random_dense(random, c.rows, c.n, c.dtype)) {
    for (int64_t j = 0; j < c.k && c.dense_from > 1; ++j)  // zeros meet no weight
      if (j % 3 == 0 && !used(j))
        for (int64_t n = 0; n < c.n; ++n) weight(n, j) = NAN;
    for (int64_t r = 0; r < c.rows; ++r)  // nor a gradient
      if (of_row(c.pattern, r) == Pattern::nothing)
        for (int64_t n = 0; n < c.n; ++n) grad(r, n) = NAN;
  }

  bool used(int64_t column) const {
    for (int64_t r = 0; r < h.rows; ++r)
      if (h(r, column) != 0.0) return true;
    return false;
  }
};

struct Wanted {
  Dense out, dweight;

  Wanted(const Case& c, const Problem& p) : out(c.rows, c.n) {
    const Dense weight = turned(p.weight);
    Dense sums(c.k, c.n);
    for (int64_t r = 0; r < c.rows; ++r) {
      for (int64_t n = 0; c.biased && n < c.n; ++n) out(r, n) = p.bias(0, n);
      for (int64_t j = 0; j < c.k; ++j) {
        const double h = p.h(r, j);
        for (int64_t n = 0; h != 0.0 && n < c.n; ++n) {
          out(r, n) += h * weight(j, n);
          sums(j, n) += h * p.grad(r, n);
        }
      }
    }
    dweight = turned(sums);
  }
};

void run(const Case& c, Random& random) {
  const std::string name = std::string("sparse_linear ") + name_of(c.dtype) + ", T " + std::to_string(c.rows) + ", K " +
                           std::to_string(c.k) + ", N " + std::to_string(c.n) + ", " + name_of(c.pattern) +
                           ", layout " + std::to_string(int(c.layout)) + ", dense from " + std::to_string(c.dense_from);
  const Problem p(c, random);
  const Wanted want(c, p);
  const Image h(p.h, c.dtype, c.gap), bias(p.bias, c.dtype), grad(p.grad, c.dtype, c.gap);
  const WeightImage weight(p.weight, 1, c.dtype, c.layout);
  const auto forward = [&](const Kernels& kernels, int threads) {
    Outputs out;
    out.emplace_back(c.rows, c.n, c.dtype);
    kernels.sparse_linear({c.dtype, c.rows, c.n, c.k, h.matrix(), weight.weight(),
                           c.biased ? bias.matrix() : Matrix{nullptr, 0}, c.dense_from, out[0].data(), threads});
    return out;
  };
  on_every_isa(name, forward, [&](const Outputs& out) { expect_values("out", out[0].read(), want.out, c.dtype); });
  const bool by_column = c.layout == Layout::outputs_adjacent;
  const auto backward = [&](const Kernels& kernels, int threads) {
    Outputs out;
    out.push_back(gradient_image(p.weight, by_column, c.dtype));
    kernels.sparse_linear_backward(
        {c.dtype, c.rows, c.n, c.k, grad.matrix(), h.matrix(), gradient_of(p.weight, by_column, out[0]), threads});
    return out;
  };
  on_every_isa(name + " backward", backward, [&](const Outputs& out) {
    expect_gradients("dweight", by_column ? turned(out[0].read()) : out[0].read(), want.dweight, c.dtype);
  });
}

struct Shape {
  int64_t rows, k, n;
};

// On either side of: one row, the rows of a dense product, few rows (96), a segment of rows (512); a word, a vector, a
// segment of columns (128 of few rows, 512); a panel of outputs, the outputs of a register tile (256), of a part of the
// work (1024, 2048).
constexpr Shape kShapes[] = {{0, 5, 3},     {3, 0, 5},       {5, 3, 0},     {1, 1, 1},     {1, 100, 2100},
                             {1, 1100, 63}, {2, 513, 31},    {3, 63, 257},  {4, 300, 33},  {5, 31, 100},
                             {31, 1100, 8}, {64, 1100, 300}, {95, 33, 300}, {96, 140, 70}, {97, 97, 40},
                             {97, 1025, 7}, {130, 513, 32},  {520, 70, 33}, {1100, 33, 5}};

}  // namespace

void test_sparse_linear() {
  Random random;
  unsigned turn = 0;
  for (const Shape& s : kShapes)
    for (int i = 0; i < 8; ++i, ++turn)
      run({s.rows, s.k, s.n, kDtypes[turn % 3], kPatterns[turn % 5], kLayouts[turn / 2 % 3], kDenseFrom[turn / 15 % 3],
           turn % 4 > 0, turn % 7 / 2},
          random);
  // Blocks: of the forward pass 16 MB, but no fewer rows than 256, of the backward pass 16M elements, but 512 rows.
  run({260, 16500, 2, Dtype::float32, Pattern::mixed, Layout::inputs_adjacent, 0.3f, true, 0}, random);
  run({515, 32800, 1, Dtype::bfloat16, Pattern::little, Layout::outputs_adjacent, 0.3f, true, 0}, random);
  // All neurons of few rows listed: the list of what is to be fetched is as long as the room for it.
  run({64, 1100, 300, Dtype::float32, Pattern::everything, Layout::outputs_adjacent, 2.0f, true, 0}, random);
  // Dense rows 4096 bytes apart: in one set of the first cache.
  run({61, 1024, 40, Dtype::float32, Pattern::mixed, Layout::inputs_adjacent, 0.3f, false, 0}, random);
}

}  // namespace dyncore::tests
