// gather_rows, scatter_rows and their gradients.
#include "tests/tests.h"

namespace dyncore::tests {

namespace {

constexpr int64_t kWidths[] = {0, 1, 3, 31, 32, 33, 63, 100};

void gather(const TestPlan& plan, int64_t width, int64_t gap, Random& random) {
  for (int element_bytes : {1, 2, 4, 8, 16}) {
    const int64_t row_bytes = width * element_bytes, stride = row_bytes + gap * element_bytes;
    Buffer<char> x(plan.num_rows == 0 ? 0 : (plan.num_rows - 1) * stride + row_bytes);
    for (int64_t i = 0; i < x.size(); ++i) x[i] = static_cast<char>(random.next());
    for (int threads : kThreads) {
      for (const std::string& isa : supported_isas()) {
        select_isa(isa);
        set_case("gather_rows, plan: " + plan.name + ", width " + std::to_string(width) + " of " +
                 std::to_string(element_bytes) + " bytes on " + isa);
        Buffer<char> out(plan.capacity * row_bytes);
        kernels().gather_rows(
            {plan.view(false), {x.data(), width + gap}, {out.data(), width}, width, element_bytes, threads});
        bool equal = true;
        for (int64_t a = 0; a < plan.capacity; ++a)
          for (int64_t i = 0; i < row_bytes; ++i)
            equal = equal && out[a * row_bytes + i] == (a < plan.live ? x[plan.rows[a] * stride + i] : 0);
        expect(equal, "rows");
      }
    }
  }
}

void scatter(const TestPlan& plan, int64_t width, Dtype dtype, unsigned turn, Random& random) {
  const bool with_base = turn % 2 == 0, scaled = turn % 3 > 0;
  const int64_t gap = turn % 4;
  const std::string name =
      std::string("scatter_rows ") + name_of(dtype) + ", plan: " + plan.name + ", width " + std::to_string(width);
  const Dense y = random_slots(random, plan.capacity, plan.live, width, dtype);
  Dense base = random_dense(random, plan.num_rows, width, dtype);
  Dense grad = random_dense(random, plan.num_rows, width, dtype);
  for (int64_t t = 1; turn % 5 == 0 && t < plan.num_rows; ++t)
    for (int64_t j = 0; j < width; ++j) base(t, j) = base(0, j), grad(t, j) = grad(0, j);
  const bool shared = turn % 5 == 0;
  const Image y_image(y, dtype, gap), base_image = shared ? Image::of_equal_rows(base, dtype) : Image(base, dtype, gap),
                                      grad_image = shared ? Image::of_equal_rows(grad, dtype) : Image(grad, dtype, gap);
  Dense want(plan.num_rows, width), want_dy(plan.capacity, width), want_dscale(plan.capacity, 1);
  if (with_base) want = base;
  for (int64_t a = 0; a < plan.live; ++a) {
    for (int64_t j = 0; j < width; ++j) {
      want(plan.rows[a], j) += plan.scale_of(a, scaled) * y(a, j);
      want_dy(a, j) = plan.scale_of(a, scaled) * grad(plan.rows[a], j);
      want_dscale(a, 0) += grad(plan.rows[a], j) * y(a, j);
    }
  }
  const auto make = [&](const Kernels& kernels, int threads) {
    Outputs out;
    out.emplace_back(plan.num_rows, width, dtype);
    kernels.scatter_rows({plan.view(scaled), dtype, y_image.matrix(),
                          with_base ? base_image.matrix() : Matrix{nullptr, 0}, out[0].matrix(), width, threads});
    return out;
  };
  on_every_isa(name, make, [&](const Outputs& out) { expect_values("out", out[0].read(), want, dtype); });
  const bool need_dy = turn % 7 != 1, need_dscale = turn % 7 != 2;
  const auto make_gradients = [&](const Kernels& kernels, int threads) {
    Outputs out;
    out.emplace_back(plan.capacity, width, dtype);
    out.emplace_back(plan.capacity, 1, Dtype::float32);
    kernels.scatter_rows_backward({plan.view(scaled), dtype, grad_image.matrix(), y_image.matrix(),
                                   need_dy ? out[0].data() : nullptr,
                                   need_dscale ? static_cast<float*>(out[1].data()) : nullptr, width, threads});
    return out;
  };
  on_every_isa(name + " backward", make_gradients, [&](const Outputs& out) {
    if (need_dy) expect_gradients("dy", out[0].read(), want_dy, dtype);
    if (need_dscale) expect_gradients("dscale", out[1].read(), want_dscale, dtype);
  });
}

}  // namespace

void test_rows() {
  Random random;
  unsigned turn = 0;
  for (const TestPlan& plan : plans_to_try(random)) {
    for (int64_t width : kWidths) {
      gather(plan, width, turn % 3, random);
      for (Dtype dtype : kDtypes) scatter(plan, width, dtype, turn++, random);
    }
  }
}

}  // namespace dyncore::tests
