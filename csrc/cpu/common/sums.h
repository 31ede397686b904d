// Sums of any length without the error of one long chain: chains of at most 64 terms, added up in pairs. The order
// depends on the number of terms alone.
#pragma once
#include "cpu/common/vec.h"

namespace dyncore::DYNCORE_ISA {

constexpr int64_t kChain = 64;

template <class Sum, class AddTerm>
Sum sum_of_halves(int64_t begin, int64_t end, AddTerm add_term);

// Sum over i in [begin, end) of what add_term(total, i) adds to its total, a Row, a vector or a float. Terms capture by
// value and are passed so, and the sum of the halves is added to a total and not returned: otherwise the short sums
// would be made in memory too.
template <class Sum, class AddTerm>
DYNCORE_INLINE Sum pairwise_sum(int64_t begin, int64_t end, AddTerm add_term) {
  Sum total{};
  if (end - begin > kChain) {
    total = total + sum_of_halves<Sum>(begin, end, add_term);
  } else {
    for (int64_t i = begin; i < end; ++i) add_term(total, i);
  }
  return total;
}

template <class Sum, class AddTerm>
__attribute__((noinline)) Sum sum_of_halves(int64_t begin, int64_t end, AddTerm add_term) {
  const int64_t middle = begin + (end - begin) / 2;
  return pairwise_sum<Sum>(begin, middle, add_term) + pairwise_sum<Sum>(middle, end, add_term);
}

// <x, y> of two rows.
template <class T>
inline float dot_rows(const T* x, const T* y, int64_t width) {
  const auto add_products = [=](vf& total, int64_t panel) DYNCORE_INLINE_LAMBDA {
    const int n = panel_width(width, panel * NC);
    const Row a = load_row(x + panel * NC, n), b = load_row(y + panel * NC, n);
    for (int j = 0; j < NV; ++j) total += a.v[j] * b.v[j];
  };
  return sum(pairwise_sum<vf>(0, panels_of(width), add_products));
}

}  // namespace dyncore::DYNCORE_ISA
