#include "tests/problem.h"

#include <algorithm>
#include <cmath>

namespace dyncore::tests {

Plan TestPlan::view(bool scaled) const {
  return {rows.data(), offsets.data(), scaled ? scale.data() : nullptr, row_offsets.data(), row_slots.data(), capacity,
          groups,      num_rows};
}

int64_t TestPlan::group_of(int64_t slot) const {
  int64_t g = 0;
  while (offsets[g + 1] <= slot) ++g;
  return g;
}

TestPlan make_plan(Random& random, const std::string& name, int64_t num_rows, const std::vector<int64_t>& sizes) {
  TestPlan plan;
  plan.name = name;
  plan.num_rows = num_rows;
  plan.groups = static_cast<int64_t>(sizes.size());
  plan.offsets = Buffer<int32_t>(plan.groups + 1);
  plan.offsets[0] = 0;
  std::vector<int32_t> rows;
  for (int64_t g = 0; g < plan.groups; ++g) {
    std::vector<int32_t> of_group;
    for (int64_t i = 0; i < sizes[static_cast<size_t>(g)]; ++i)
      of_group.push_back(static_cast<int32_t>(random.below(num_rows)));
    std::sort(of_group.begin(), of_group.end());
    rows.insert(rows.end(), of_group.begin(), of_group.end());
    plan.offsets[g + 1] = static_cast<int32_t>(rows.size());
  }
  plan.live = static_cast<int64_t>(rows.size());
  plan.capacity = plan.live + 2;
  plan.rows = Buffer<int32_t>(plan.capacity);
  plan.row_slots = Buffer<int32_t>(plan.capacity);
  plan.scale = Buffer<float>(plan.capacity);
  plan.row_offsets = Buffer<int32_t>(num_rows + 1);
  int32_t written = 0;
  for (int64_t t = 0; t < num_rows; ++t) {
    plan.row_offsets[t] = written;
    for (int64_t a = 0; a < plan.live; ++a)
      if (rows[static_cast<size_t>(a)] == t) plan.row_slots[written++] = static_cast<int32_t>(a);
  }
  plan.row_offsets[num_rows] = written;
  for (int64_t a = 0; a < plan.live; ++a) {
    plan.rows[a] = rows[static_cast<size_t>(a)];
    plan.scale[a] = static_cast<float>(random.normal());
  }
  return plan;
}

std::vector<TestPlan> plans_to_try(Random& random) {
  std::vector<TestPlan> plans;
  plans.push_back(make_plan(random, "no rows", 0, {0, 0}));
  plans.push_back(make_plan(random, "no slots", 7, {0, 0, 0}));
  plans.push_back(make_plan(random, "one row", 1, {1}));
  plans.push_back(make_plan(random, "few rows", 9, {2, 0, 3, 1, 4, 5}));
  plans.push_back(make_plan(random, "uneven", 40, {13, 0, 33, 6, 50, 0}));
  plans.push_back(make_plan(random, "all to one", 63, {0, 100, 0}));
  return plans;
}

ActivationAt activate(Activation a, double h) {
  const auto logistic = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  switch (a) {
    case Activation::none:
      return {h, 1.0};
    case Activation::relu:
    case Activation::reglu:
      return {std::max(h, 0.0), h > 0.0 ? 1.0 : 0.0};
    case Activation::relu2:
      return {h > 0.0 ? h * h : 0.0, 2.0 * std::max(h, 0.0)};
    case Activation::gelu:
    case Activation::geglu: {
      const double cdf = 0.5 * std::erfc(-h * std::sqrt(0.5));
      return {h * cdf, cdf + h * std::exp(-0.5 * h * h) * 0.3989422804014327};
    }
    case Activation::gelu_tanh: {
      const double root = 0.7978845608028654, s = std::tanh(root * (h + 0.044715 * h * h * h));
      return {0.5 * h * (1.0 + s), 0.5 * (1.0 + s) + 0.5 * h * (1.0 - s * s) * root * (1.0 + 3.0 * 0.044715 * h * h)};
    }
    case Activation::silu:
    case Activation::swiglu: {
      const double s = logistic(h);
      return {h * s, s * (1.0 + h * (1.0 - s))};
    }
  }
  return {};
}

}  // namespace dyncore::tests
