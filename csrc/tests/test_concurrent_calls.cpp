// Several threads of the caller run ops at once, each with threads of its own.
#include <thread>

#include "tests/tests.h"

namespace dyncore::tests {

void test_concurrent_calls() {
  set_case("concurrent calls");
  Random random;
  const TestPlan plan = make_plan(random, "concurrent", 40, {13, 0, 33, 6});
  const Dense x = random_dense(random, 40, 63, Dtype::float32),
              weight = random_dense(random, 4 * 45, 63, Dtype::float32);
  const Image x_image(x, Dtype::float32);
  const WeightImage weight_image(weight, 4, Dtype::float32, Layout::inputs_adjacent);
  const auto call = [&](Image& out, Image& dweight) {
    const Plan view = plan.view(true);
    const Matrix none{nullptr, 0};
    for (int repeat = 0; repeat < 20; ++repeat) {
      kernels().grouped_linear({view, Dtype::float32, Activation::none, true, true, 45, 63, x_image.matrix(),
                                weight_image.weight(), none, out.data(), nullptr, 2});
      kernels().grouped_linear_backward({view, Dtype::float32, Activation::none, true, true, 45, 63, out.matrix(),
                                         x_image.matrix(), weight_image.weight(), none, none, nullptr, dweight.data(),
                                         nullptr, nullptr, 2});
    }
  };
  std::vector<Image> outs, gradients;
  for (int i = 0; i < 3; ++i) {
    outs.emplace_back(40, 45, Dtype::float32);
    gradients.emplace_back(4 * 45, 63, Dtype::float32);
  }
  std::thread first(call, std::ref(outs[0]), std::ref(gradients[0]));
  std::thread second(call, std::ref(outs[1]), std::ref(gradients[1]));
  first.join();
  second.join();
  call(outs[2], gradients[2]);
  for (size_t i = 0; i < 2; ++i) {
    expect(outs[i].bytes() == outs[2].bytes(), "values");
    expect(gradients[i].bytes() == gradients[2].bytes(), "gradients");
  }
}

}  // namespace dyncore::tests
