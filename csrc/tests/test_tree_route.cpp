// tree_route against a walk in double, at sizes on either side of a vector, several vectors and a chain's length.
#include <cmath>

#include "tests/tests.h"

namespace dyncore::tests {

namespace {

void walk(int64_t rows, int64_t width, int depth, bool biased, Dtype dtype, Random& random) {
  const std::string name = std::string("tree_route ") + name_of(dtype) + ", rows " + std::to_string(rows) + ", width " +
                           std::to_string(width) + ", depth " + std::to_string(depth);
  const int64_t nodes = (int64_t{1} << depth) - 1;
  const Dense x = random_dense(random, rows, width, dtype), weight = random_dense(random, nodes, width, dtype),
              bias = random_dense(random, 1, nodes, dtype);
  const Image x_image(x, dtype, 3), weight_image(weight, dtype, 5), bias_image(bias, dtype);
  for (const std::string& isa : supported_isas()) {
    select_isa(isa);
    set_case(name + " on " + isa);
    for (int threads : kThreads) {
      Buffer<int32_t> leaves(rows);
      kernels().tree_route({dtype, rows, width, depth, x_image.matrix(), weight_image.matrix(),
                            biased ? bias_image.data() : nullptr, leaves.data(), threads});
      for (int64_t t = 0; t < rows; ++t) {
        expect(0 <= leaves[t] && leaves[t] <= nodes, "a leaf outside the tree");
        int64_t node = leaves[t] + nodes;  // from the leaf up: each turn must be one that double allows
        while (node > 0) {
          const int64_t parent = (node - 1) / 2;
          double score = biased ? bias(0, parent) : 0.0, size = 1e-12;
          for (int64_t k = 0; k < width; ++k) {
            score += x(t, k) * weight(parent, k);
            size += 1e-5 * std::fabs(x(t, k) * weight(parent, k));
          }
          const bool right = node == 2 * parent + 2;
          expect(right ? score > -size : score < size, "a turn that the score does not say");
          node = parent;
        }
      }
    }
  }
  select_isa("");
}

}  // namespace

void test_tree_route() {
  Random random;
  for (int64_t width : {0, 1, 15, 16, 33, 64, 100, 40000})
    for (int depth : {0, 1, 2, 5})
      for (Dtype dtype : kDtypes)
        if (width < 1000 || depth == 2)
          walk(width < 1000 ? 17 : 2, width, depth, (width + depth) % 2 == 0, dtype, random);
  walk(0, 8, 3, true, Dtype::float32, random);
}

}  // namespace dyncore::tests
