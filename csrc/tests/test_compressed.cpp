// A hidden activation without its zeros, and back.
#include "tests/sparse.h"

namespace dyncore::tests {

namespace {

// The least number of a dtype that is not 0.
double least(Dtype dtype) {
  return dtype == Dtype::float32 ? 0x1p-149 : dtype == Dtype::bfloat16 ? 0x1p-133 : 0x1p-24;
}

void run(int64_t rows, int64_t i, bool gated, Pattern pattern, Dtype dtype, int64_t gap, Random& random) {
  const std::string name = std::string(name_of(dtype)) + ", T " + std::to_string(rows) + ", I " + std::to_string(i) +
                           ", " + name_of(pattern) + (gated ? ", gated" : "");
  Dense gate = random_sparse(random, rows, i, pattern, dtype), up = random_dense(random, rows, i, dtype);
  for (double& x : gate.values)
    if (x != 0.0 && random.below(8) == 0) x = x < 0 ? -least(dtype) : random.below(2) ? least(dtype) : 0x1p1000;
  std::vector<const Dense*> halves = {&gate};
  if (gated) halves.push_back(&up);
  const int64_t width = i * static_cast<int64_t>(halves.size()), count = nonzeros(gate);
  Dense dense(rows, width), expanded(rows, width);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < i; ++j) {
      const bool on = gate(r, j) != 0.0;
      dense(r, j) = on || j % 2 == 0 ? gate(r, j) : -0.0;
      expanded(r, j) = on ? gate(r, j) : 0.0;
      if (gated) dense(r, i + j) = up(r, j);
      if (gated) expanded(r, i + j) = on ? up(r, j) : 0.0;
    }
  const Image image(dense, dtype, gap), want(expanded, dtype);
  const auto counted = [&](const Kernels& kernels, int threads) {
    Outputs out;
    out.push_back(words_image(1, 1, sizeof(int64_t)));
    *static_cast<int64_t*>(out[0].data()) =
        kernels.count_nonzeros({dtype, gated, rows, i, image.matrix(), {}, threads});
    return out;
  };
  on_every_isa("count_nonzeros " + name, counted,
               [&](const Outputs& out) { expect(*static_cast<int64_t*>(out[0].data()) == count, "count"); });
  const int64_t room = count + gap;
  const auto compress = [&](const Kernels& kernels, int threads) {
    Outputs out;
    CompressedImage to(rows, i, gated, room, dtype);
    kernels.compress({dtype, gated, rows, i, image.matrix(), to.view(), threads});
    append(out, std::move(to));
    return out;
  };
  on_every_isa("compress " + name, compress,
               [&](const Outputs& out) { expect_compressed(out, 0, halves, room, dtype); });
  const CompressedImage from(halves, gap, dtype);
  const auto expand = [&](const Kernels& kernels, int threads) {
    Outputs out;
    out.emplace_back(rows, width, dtype);
    kernels.expand({dtype, gated, rows, i, out[0].matrix(), from.view(), threads});
    return out;
  };
  on_every_isa("expand " + name, expand, [&](const Outputs& out) { expect(out[0].bytes() == want.bytes(), "values"); });
}

}  // namespace

void test_compressed() {
  Random random;
  unsigned turn = 0;
  for (int64_t rows : {0, 1, 2, 37})
    for (int64_t i : {0, 1, 15, 16, 31, 32, 33, 49, 100, 160})
      for (Pattern pattern : kPatterns)
        for (Dtype dtype : kDtypes) {
          run(rows, i, turn % 2 > 0, pattern, dtype, turn % 5, random);
          ++turn;
        }
}

}  // namespace dyncore::tests
