// What the tests of the sparse kernels share: which elements are 0, hidden activations and what is left of them
// without their zeros.
#pragma once
#include "tests/tests.h"

namespace dyncore::tests {

// How much of a matrix is not 0. Rows of `mixed` differ; it has columns that are never 0, and some that always are.
enum class Pattern { nothing, little, half, everything, mixed };
constexpr Pattern kPatterns[] = {Pattern::nothing, Pattern::little, Pattern::half, Pattern::everything, Pattern::mixed};
const char* name_of(Pattern pattern);

// The pattern of a row: itself, of `mixed` another for each of four rows.
Pattern of_row(Pattern pattern, int64_t row);
bool is_hot(int64_t column);   // of `mixed`
bool is_dead(int64_t column);  // of `mixed`

// From which share of non-zeros a row may get a dense product: none, some rows of `mixed`, all.
constexpr float kDenseFrom[] = {__builtin_inff(), 0.3f, 0.0f};

// Normal numbers times `pattern`.
Dense random_sparse(Random& random, int64_t rows, int64_t width, Pattern pattern, Dtype dtype);

// Normal numbers to the nearest eighth, within 3, times `size`: sums of products of a hundred have no rounding.
Dense random_fractions(Random& random, int64_t rows, int64_t width, double size = 1.0);

// A matrix of what no dtype of the tests is: words of `bytes` bytes, a multiple of 4.
Image words_image(int64_t rows, int64_t width, int64_t bytes);

// What is left of a hidden activation [rows, i] without its zeros.
struct CompressedImage {
  Image mask, row_offsets, values;
  int64_t capacity;

  // Nothing yet.
  CompressedImage(int64_t rows, int64_t i, bool gated, int64_t capacity, Dtype dtype);
  // Of `halves`, [T, I] each: where the first is not 0. `spare` values more are not written.
  CompressedImage(const std::vector<const Dense*>& halves, int64_t spare, Dtype dtype);

  Compressed view() const;
};

// Moves the images of `got` to the end of `out`.
void append(Outputs& out, CompressedImage&& got);

// That images out[first], ... hold what is left of `halves`, in buffers of `capacity` values, and nothing behind it.
void expect_compressed(const Outputs& out, size_t first, const std::vector<const Dense*>& halves, int64_t capacity,
                       Dtype dtype);

int64_t nonzeros(const Dense& d);

// The gradient of a weight like `like`, [N, K], or where `by_column` [K, N].
Image gradient_image(const Dense& like, bool by_column, Dtype dtype);
WeightGradient gradient_of(const Dense& like, bool by_column, const Image& image);

}  // namespace dyncore::tests
