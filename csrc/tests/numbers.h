// Numbers of the tests: matrices of double, their image in memory in any dtype, random values, and comparison within
// the tolerances of the contract.
#pragma once
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "tests/buffer.h"

namespace dyncore::tests {

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
const char* name_of(Dtype dtype);
int64_t bytes_of(Dtype dtype);

// To the nearest number that the dtype has, ties to even.
double rounded(double x, Dtype dtype);

// The same numbers on every machine.
class Random {
 public:
  uint64_t next();
  int64_t below(int64_t limit) { return static_cast<int64_t>(next() % static_cast<uint64_t>(limit)); }
  double normal();

 private:
  uint64_t state_ = 0;
};

// rows x width, in double.
struct Dense {
  int64_t rows = 0, width = 0;
  std::vector<double> values;

  Dense() = default;
  Dense(int64_t r, int64_t w) : rows(r), width(w), values(static_cast<size_t>(r * w), 0.0) {}
  double& operator()(int64_t r, int64_t c) { return values[static_cast<size_t>(r * width + c)]; }
  double operator()(int64_t r, int64_t c) const { return values[static_cast<size_t>(r * width + c)]; }
};

// [G * N, K] of [G * K, N].
Dense turned(const Dense& d, int64_t groups = 1);

// Normal numbers times `size`, which the dtype holds exactly.
Dense random_dense(Random& random, int64_t rows, int64_t width, Dtype dtype, double size = 1.0);

// The same for rows that belong to slots: those of padding, from `live` on, are NaN.
Dense random_slots(Random& random, int64_t slots, int64_t live, int64_t width, Dtype dtype);

// A matrix as a kernel sees it. Between its rows lie `gap` elements that nobody may use.
class Image {
 public:
  Image() = default;
  Image(int64_t rows, int64_t width, Dtype dtype, int64_t gap = 0);
  Image(const Dense& values, Dtype dtype, int64_t gap = 0);
  // Every row is the first, once in memory.
  static Image of_equal_rows(const Dense& values, Dtype dtype);

  Matrix matrix() const { return {memory_.data(), stride_}; }
  void* data() const { return memory_.data(); }
  Dense read() const;
  std::string bytes() const { return {memory_.data(), memory_.bytes()}; }

 private:
  int64_t rows_ = 0, width_ = 0, stride_ = 0;
  Dtype dtype_ = Dtype::float32;
  Buffer<char> memory_;
};

// How a weight [G, N, K] lies in memory.
enum class Layout { inputs_adjacent, outputs_adjacent, gaps };
constexpr Layout kLayouts[] = {Layout::inputs_adjacent, Layout::outputs_adjacent, Layout::gaps};

class WeightImage {
 public:
  WeightImage(const Dense& values, int64_t groups, Dtype dtype, Layout layout);  // values: [G * N, K]
  Weight weight() const { return {image_.data(), stride_g_, stride_n_, stride_k_}; }

 private:
  Image image_;
  int64_t stride_g_, stride_n_, stride_k_;
};

// Failures are counted and printed with the case they belong to.
void set_case(const std::string& name);
void expect(bool good, const std::string& what);
void expect_values(const std::string& what, const Dense& got, const Dense& want, Dtype computed_in);
void expect_gradients(const std::string& what, const Dense& got, const Dense& want, Dtype computed_in);
int failures();

}  // namespace dyncore::tests
