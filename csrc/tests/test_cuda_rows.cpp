// The CUDA kernels that move rows, run on the host (tests/cuda): aligned and not, wide and narrow.
#include "cuda/common/rows.h"
#include "cuda/kernels.h"
#include "tests/tests.h"

namespace dyncore::tests {

namespace {

// 8 elements are 16 bytes or 32, 1096 more than the threads of a block hold at once.
constexpr int64_t kWidths[] = {0, 1, 3, 8, 33, 64, 1096};

void gather(const TestPlan& plan, int64_t width, int64_t gap, Random& random) {
  for (int element_bytes : {1, 2, 4, 8, 16}) {
    set_case("cuda::gather_rows, plan: " + plan.name + ", width " + std::to_string(width) + " of " +
             std::to_string(element_bytes) + " bytes");
    const int64_t row_bytes = width * element_bytes, stride = row_bytes + gap * element_bytes;
    Buffer<char> x(plan.num_rows == 0 ? 0 : (plan.num_rows - 1) * stride + row_bytes), out(plan.capacity * row_bytes);
    for (int64_t i = 0; i < x.size(); ++i) x[i] = static_cast<char>(random.next());
    cuda::gather_rows({plan.view(false), {x.data(), width + gap}, {out.data(), width}, width, element_bytes}, nullptr);
    bool equal = true;
    for (int64_t a = 0; a < plan.capacity; ++a)
      for (int64_t i = 0; i < row_bytes; ++i)
        equal = equal && out[a * row_bytes + i] == (a < plan.live ? x[plan.rows[a] * stride + i] : 0);
    expect(equal, "rows");
  }
}

void scatter(const TestPlan& plan, int64_t width, Dtype dtype, unsigned turn, Random& random) {
  set_case(std::string("cuda::scatter_rows ") + name_of(dtype) + ", plan: " + plan.name + ", width " +
           std::to_string(width) + ", turn " + std::to_string(turn));
  const bool with_base = turn % 2 == 0, scaled = turn % 3 > 0, need_dy = turn % 7 != 1, need_dscale = turn % 7 != 2;
  const int64_t gap = turn % 5 < 2 ? 0 : turn % 5 == 2 ? 8 : 1;  // rows aligned to 16 bytes but in the last case
  const Dense y = random_slots(random, plan.capacity, plan.live, width, dtype);
  const Dense base = random_dense(random, plan.num_rows, width, dtype);
  const Dense grad = random_dense(random, plan.num_rows, width, dtype);
  Dense want = with_base ? base : Dense(plan.num_rows, width), dy(plan.capacity, width), dscale(plan.capacity, 1);
  for (int64_t a = 0; a < plan.live; ++a) {
    for (int64_t j = 0; j < width; ++j) {
      want(plan.rows[a], j) += plan.scale_of(a, scaled) * y(a, j);
      dy(a, j) = plan.scale_of(a, scaled) * grad(plan.rows[a], j);
      dscale(a, 0) += grad(plan.rows[a], j) * y(a, j);
    }
  }
  const Image y_image(y, dtype, gap), base_image(base, dtype, gap), grad_image(grad, dtype, gap);
  const Image out(plan.num_rows, width, dtype), dy_out(plan.capacity, width, dtype);
  const Image dscale_out(plan.capacity, 1, Dtype::float32);
  cuda::scatter_rows({plan.view(scaled), dtype, y_image.matrix(), with_base ? base_image.matrix() : Matrix{nullptr, 0},
                      out.matrix(), width},
                     nullptr);
  expect_values("out", out.read(), want, dtype);
  cuda::scatter_rows_backward(
      {plan.view(scaled), dtype, grad_image.matrix(), y_image.matrix(), need_dy ? dy_out.data() : nullptr,
       need_dscale ? static_cast<float*>(dscale_out.data()) : nullptr, width},
      nullptr);
  if (need_dy) expect_gradients("dy", dy_out.read(), dy, dtype);
  if (need_dscale) expect_gradients("dscale", dscale_out.read(), dscale, dtype);
}

void geometry() {
  set_case("cuda::team_for");
  for (int64_t words : {int64_t{0}, int64_t{1}, int64_t{4}, int64_t{5}, int64_t{512}, int64_t{1} << 40}) {
    for (int most : {32, 256}) {
      const cuda::Team team = cuda::team_for(words, 4, most);
      expect(team.lanes() >= 1 && team.lanes() <= most && team.lanes() * team.rows_per_block() == cuda::kRowThreads,
             "threads");
      expect(team.lanes() == most || team.lanes() * 4 >= words, "enough lanes");
      expect(team.lanes() == 1 || team.lanes() * 2 < words, "no lane too many");
    }
  }
  set_case("cuda::word_bytes");
  expect(cuda::word_bytes({0, 0}) == 16 && cuda::word_bytes({4096, 48}) == 16, "aligned");
  expect(cuda::word_bytes({4096, 40}) == 8 && cuda::word_bytes({12, 4096}) == 4, "words");
  expect(cuda::word_bytes({4096, 6}) == 2 && cuda::word_bytes({int64_t{1} << 40, 7}) == 1, "less than words");
}

}  // namespace

void test_cuda_rows() {
  Random random;
  geometry();
  unsigned turn = 0;
  for (const TestPlan& plan : plans_to_try(random)) {
    for (int64_t width : kWidths) {
      gather(plan, width, turn % 3, random);
      for (Dtype dtype : kDtypes) scatter(plan, width, dtype, turn++, random);
    }
  }
}

}  // namespace dyncore::tests
