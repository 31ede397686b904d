// Plans to try and the activations, in the plainest way.
#pragma once
#include "tests/numbers.h"

namespace dyncore::tests {

// A plan's lists; padding slots hold what no kernel may follow.
struct TestPlan {
  std::string name;
  int64_t num_rows = 0, groups = 0, live = 0, capacity = 0;
  Buffer<int32_t> rows, offsets, row_offsets, row_slots;
  Buffer<float> scale;

  Plan view(bool scaled) const;
  int64_t group_of(int64_t slot) const;
  double scale_of(int64_t slot, bool scaled) const { return scaled ? double{scale[slot]} : 1.0; }
};

// Group g gets sizes[g] slots of random rows, duplicates included.
TestPlan make_plan(Random& random, const std::string& name, int64_t num_rows, const std::vector<int64_t>& sizes);

// No rows, no slots, one row, groups on either side of every form's range, empty groups, one group for all.
std::vector<TestPlan> plans_to_try(Random& random);

struct ActivationAt {
  double value, derivative;
};
ActivationAt activate(Activation a, double h);  // of a gated activation: the gate's

// Widths that are odd, whole vectors, whole panels and neither: (N, K) or (I, H).
struct Size {
  int64_t n, k;
};
constexpr Size kSizes[] = {{1, 1}, {3, 31}, {33, 63}, {32, 64}, {100, 33}, {63, 100}};

}  // namespace dyncore::tests
