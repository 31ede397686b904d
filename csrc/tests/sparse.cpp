#include "tests/sparse.h"

#include <algorithm>
#include <cmath>

namespace dyncore::tests {

const char* name_of(Pattern pattern) {
  const char* names[] = {"nothing", "little", "half", "everything", "mixed"};
  return names[static_cast<int>(pattern)];
}

Pattern of_row(Pattern pattern, int64_t row) {
  constexpr Pattern kMixed[] = {Pattern::everything, Pattern::nothing, Pattern::little, Pattern::half};
  return pattern == Pattern::mixed ? kMixed[row % 4] : pattern;
}

bool is_hot(int64_t column) {
  return column % 11 == 1;
}

bool is_dead(int64_t column) {
  return column % 11 == 5;
}

Dense random_sparse(Random& random, int64_t rows, int64_t width, Pattern pattern, Dtype dtype) {
  constexpr int64_t kPerMille[] = {0, 30, 500, 1000};
  Dense d(rows, width);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t share = kPerMille[static_cast<int>(of_row(pattern, r))];
    const bool mixed = pattern == Pattern::mixed && share > 0;
    for (int64_t j = 0; j < width; ++j) {
      if (mixed && is_dead(j)) continue;
      if (random.below(1000) >= share && !(mixed && is_hot(j))) continue;
      const double x = rounded(random.normal(), dtype);
      d(r, j) = x == 0.0 ? 1.0 : x;
    }
  }
  return d;
}

Dense random_fractions(Random& random, int64_t rows, int64_t width, double size) {
  Dense d(rows, width);
  for (double& x : d.values) x = size * std::clamp(std::nearbyint(8.0 * random.normal()), -24.0, 24.0) / 8.0;
  return d;
}

Image words_image(int64_t rows, int64_t width, int64_t bytes) {
  return Image(rows, width * bytes / bytes_of(Dtype::float32), Dtype::float32);
}

CompressedImage::CompressedImage(int64_t rows, int64_t i, bool gated, int64_t room, Dtype dtype)
    : mask(words_image(rows, (i + 31) / 32, sizeof(uint32_t))),
      row_offsets(words_image(rows + 1, 1, sizeof(int64_t))),
      values(gated ? 2 : 1, room, dtype),
      capacity(room) {}

CompressedImage::CompressedImage(const std::vector<const Dense*>& halves, int64_t spare, Dtype dtype)
    : CompressedImage(halves[0]->rows, halves[0]->width, halves.size() > 1, nonzeros(*halves[0]) + spare, dtype) {
  const Dense& first = *halves[0];
  const int64_t count = nonzeros(first), words = (first.width + 31) / 32;
  const Compressed to = view();
  Dense kept(static_cast<int64_t>(halves.size()), count);
  int64_t at = 0;
  if (to.mask) std::memset(to.mask, 0, static_cast<size_t>(first.rows * words) * sizeof(uint32_t));
  for (int64_t r = 0; r < first.rows; ++r) {
    to.row_offsets[r] = at;
    for (int64_t j = 0; j < first.width; ++j) {
      if (first(r, j) == 0.0) continue;
      to.mask[r * words + j / 32] |= 1u << (j % 32);
      for (int64_t half = 0; half < kept.rows; ++half) kept(half, at) = (*halves[static_cast<size_t>(half)])(r, j);
      ++at;
    }
  }
  to.row_offsets[first.rows] = at;
  const Image packed(kept, dtype);
  const int64_t row = count * bytes_of(dtype);
  for (int64_t half = 0; row > 0 && half < kept.rows; ++half)
    std::memcpy(static_cast<char*>(to.values) + half * capacity * bytes_of(dtype),
                static_cast<char*>(packed.data()) + half * row, static_cast<size_t>(row));
}

Compressed CompressedImage::view() const {
  return {static_cast<uint32_t*>(mask.data()), static_cast<int64_t*>(row_offsets.data()), values.data(), capacity};
}

void append(Outputs& out, CompressedImage&& got) {
  out.push_back(std::move(got.mask));
  out.push_back(std::move(got.row_offsets));
  out.push_back(std::move(got.values));
}

void expect_compressed(const Outputs& out, size_t first, const std::vector<const Dense*>& halves, int64_t capacity,
                       Dtype dtype) {
  const CompressedImage want(halves, capacity - nonzeros(*halves[0]), dtype);
  expect(out[first].bytes() == want.mask.bytes(), "mask");
  expect(out[first + 1].bytes() == want.row_offsets.bytes(), "row_offsets");
  expect(out[first + 2].bytes() == want.values.bytes(), "values");
}

int64_t nonzeros(const Dense& d) {
  return std::count_if(d.values.begin(), d.values.end(), [](double x) { return x != 0.0; });
}

Image gradient_image(const Dense& like, bool by_column, Dtype dtype) {
  return by_column ? Image(like.width, like.rows, dtype) : Image(like.rows, like.width, dtype);
}

WeightGradient gradient_of(const Dense& like, bool by_column, const Image& image) {
  if (by_column) return {image.data(), 1, like.rows};
  return {image.data(), like.width, 1};
}

}  // namespace dyncore::tests
