#include "tests/numbers.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace dyncore::tests {

namespace {

// Mantissa bits, least exponent and greatest exponent of a dtype.
struct Format {
  int mantissa, least, greatest;
};

Format format_of(Dtype dtype) {
  if (dtype == Dtype::float16) return {10, -14, 15};
  return {dtype == Dtype::float32 ? 23 : 7, -126, 127};
}

void encode(double x, Dtype dtype, char* to) {
  const float value = static_cast<float>(rounded(x, dtype));
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == Dtype::float32) {
    std::memcpy(to, &bits, 4);
    return;
  }
  uint16_t narrow = static_cast<uint16_t>(bits >> 16);
  if (dtype == Dtype::float16) {
    const double magnitude = std::abs(static_cast<double>(value));
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t body = std::isnan(value)                  ? 0x7e00u
                          : std::isinf(value)                ? 0x7c00u
                          : magnitude < std::ldexp(1.0, -14) ? static_cast<uint32_t>(std::ldexp(magnitude, 24))
                                                             : (bits & 0x7fffffffu) / 0x2000u - (112u << 10);
    narrow = static_cast<uint16_t>(sign | body);
  }
  std::memcpy(to, &narrow, 2);
}

double decode(const char* from, Dtype dtype) {
  uint32_t bits;
  uint16_t narrow;
  if (dtype == Dtype::float16) {
    std::memcpy(&narrow, from, 2);
    const int exponent = narrow >> 10 & 31, mantissa = narrow & 1023;
    double x = std::ldexp(exponent ? 1024 + mantissa : mantissa, std::max(exponent, 1) - 25);
    if (exponent == 31) x = mantissa ? NAN : HUGE_VAL;
    return narrow & 0x8000 ? -x : x;
  }
  if (dtype == Dtype::float32) {
    std::memcpy(&bits, from, 4);
  } else {
    std::memcpy(&narrow, from, 2);
    bits = uint32_t{narrow} << 16;
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

std::string current_case;
int failure_count = 0;

struct Errors {
  double worst = 0.0, rms = 0.0;
};

// Worst error over max(rms, |want|), and RMS error over rms.
Errors errors(const Dense& got, const Dense& want) {
  double squares = 0.0, error_squares = 0.0;
  for (double x : want.values) squares += x * x;
  const double count = static_cast<double>(std::max<size_t>(want.values.size(), 1));
  // A few values may all cancel to less than one term of their sums, whose size is 1.
  const double rms = std::max(std::sqrt(squares / count), count < 16 ? 1.0 : 1e-30);
  Errors e;
  for (size_t i = 0; i < want.values.size(); ++i) {
    const double error = std::abs(got.values[i] - want.values[i]);
    if (!(error <= 1e30)) return {HUGE_VAL, HUGE_VAL};  // NaN and infinity
    e.worst = std::max(e.worst, error / std::max(rms, std::abs(want.values[i])));
    error_squares += error * error;
  }
  e.rms = std::sqrt(error_squares / count) / rms;
  return e;
}

void compare(const std::string& what, const Dense& got, const Dense& want, double worst, double rms) {
  expect(got.rows == want.rows && got.width == want.width, what + ": shape");
  const Errors e = errors(got, want);
  expect(e.worst <= worst && e.rms <= rms,
         what + ": worst error " + std::to_string(e.worst) + ", RMS " + std::to_string(e.rms));
}

}  // namespace

double rounded(double x, Dtype dtype) {
  if (x == 0.0 || !std::isfinite(x)) return x;
  const Format f = format_of(dtype);
  const double unit = std::ldexp(1.0, std::max(std::ilogb(x), f.least) - f.mantissa);
  const double result = std::nearbyint(x / unit) * unit;
  return std::abs(result) < std::ldexp(2.0, f.greatest) ? result : std::copysign(HUGE_VAL, x);
}

const char* name_of(Dtype dtype) {
  return dtype == Dtype::float32 ? "float32" : dtype == Dtype::bfloat16 ? "bfloat16" : "float16";
}

int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : 2;
}

uint64_t Random::next() {  // splitmix64 (Steele, Lea, Flood 2014)
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

double Random::normal() {
  double sum = 0.0;
  for (int i = 0; i < 12; ++i) sum += std::ldexp(static_cast<double>(next() >> 32), -32);
  return sum - 6.0;
}

Dense turned(const Dense& d, int64_t groups) {
  const int64_t n = d.width, k = groups == 0 ? 0 : d.rows / groups;
  Dense t(groups * n, k);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) t(g * n + i, j) = d(g * k + j, i);
  return t;
}

Dense random_dense(Random& random, int64_t rows, int64_t width, Dtype dtype, double size) {
  Dense d(rows, width);
  for (double& x : d.values) x = rounded(size * random.normal(), dtype);
  return d;
}

Dense random_slots(Random& random, int64_t slots, int64_t live, int64_t width, Dtype dtype) {
  Dense d = random_dense(random, slots, width, dtype);
  for (int64_t a = live; a < slots; ++a)
    for (int64_t j = 0; j < width; ++j) d(a, j) = NAN;
  return d;
}

Image::Image(int64_t rows, int64_t width, Dtype dtype, int64_t gap)
    : rows_(rows),
      width_(width),
      stride_(width + gap),
      dtype_(dtype),
      memory_(rows == 0 ? 0 : ((rows - 1) * stride_ + width) * bytes_of(dtype)) {}

Image::Image(const Dense& values, Dtype dtype, int64_t gap) : Image(values.rows, values.width, dtype, gap) {
  for (int64_t r = 0; r < rows_; ++r)
    for (int64_t c = 0; c < width_; ++c)
      encode(values(r, c), dtype, memory_.data() + (r * stride_ + c) * bytes_of(dtype));
}

Image Image::of_equal_rows(const Dense& values, Dtype dtype) {
  Image image(values.rows, values.width, dtype, -values.width);
  for (int64_t c = 0; values.rows > 0 && c < values.width; ++c)
    encode(values(0, c), dtype, image.memory_.data() + c * bytes_of(dtype));
  return image;
}

Dense Image::read() const {
  Dense d(rows_, width_);
  for (int64_t r = 0; r < rows_; ++r)
    for (int64_t c = 0; c < width_; ++c)
      d(r, c) = decode(memory_.data() + (r * stride_ + c) * bytes_of(dtype_), dtype_);
  return d;
}

WeightImage::WeightImage(const Dense& values, int64_t groups, Dtype dtype, Layout layout) {
  const int64_t n = values.rows / groups, k = values.width;
  if (layout == Layout::outputs_adjacent) {
    image_ = Image(turned(values, groups), dtype);
    stride_g_ = n * k, stride_n_ = 1, stride_k_ = n;
  } else {
    image_ = Image(values, dtype, layout == Layout::gaps ? 3 : 0);
    stride_n_ = image_.matrix().stride, stride_k_ = 1, stride_g_ = n * stride_n_;
  }
}

void set_case(const std::string& name) {
  current_case = name;
}

void expect(bool good, const std::string& what) {
  if (good) return;
  if (++failure_count <= 50) std::printf("FAILED %s: %s\n", current_case.c_str(), what.c_str());
}

int failures() {
  return failure_count;
}

void expect_values(const std::string& what, const Dense& got, const Dense& want, Dtype computed_in) {
  const double worst = computed_in == Dtype::float32 ? 5e-5 : computed_in == Dtype::bfloat16 ? 2.5e-2 : 5e-3;
  compare(what, got, want, worst, worst / 4);
}

void expect_gradients(const std::string& what, const Dense& got, const Dense& want, Dtype computed_in) {
  if (computed_in == Dtype::float32) return expect_values(what, got, want, computed_in);
  compare(what, got, want, HUGE_VAL, computed_in == Dtype::bfloat16 ? 1e-2 : 4e-3);
}

}  // namespace dyncore::tests
