// What the grouped backward passes share: sums over slots for biases, and the gradient of scale.
#pragma once
#include "cpu/common/pieces.h"
#include "cpu/common/stored_rows.h"
#include "cpu/common/weight_gradient.h"

namespace dyncore::DYNCORE_ISA {

inline int64_t largest(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// A group's db[0:width] = sum of scale[r] * row r over its m slots; not scaled where scale is null.
template <class T>
inline void bias_gradient(T* db, int64_t width, const Left<T>& rows, const float* scale, int64_t m) {
  for (int64_t n0 = 0; n0 < width; n0 += NC) {
    const int n = panel_width(width, n0);
    const auto add_row = [=](Row& total, int64_t r) DYNCORE_INLINE_LAMBDA {
      const Row row = load_row(rows.row(r) + n0, n);
      const float factor = scale ? scale[r] : 1.0f;
      for (int j = 0; j < NV; ++j) total.v[j] += factor * row.v[j];
    };
    store_row(db + n0, pairwise_sum<Row>(0, m, add_row), n);
  }
}

// dscale[a] = partial sums [panels, A] + <grad of slot a, bias of its group>. `grad` names the gradient's row of each
// slot.
template <class T>
inline void finish_dscale(const Plan& plan, float* dscale, const Workspace<float>& partials, const Left<T>& grad,
                          const Matrix& bias, int64_t width, const Team& team) {
  const int64_t live = plan.live();
  const int64_t begin = plan.capacity * team.index / team.size, end = plan.capacity * (team.index + 1) / team.size;
  int64_t g = 0;
  for (int64_t a = begin; a < end; ++a) {
    if (a >= live) {
      dscale[a] = 0.0f;
      continue;
    }
    while (a >= plan.offsets[g + 1]) ++g;
    const auto add_panel = [=](float& total, int64_t panel) { total += partials.row(panel)[a]; };
    dscale[a] = pairwise_sum<float>(0, partials.rows, add_panel);
    if (bias.data) dscale[a] += dot_rows(grad.row(a), static_cast<const T*>(bias.data) + g * bias.stride, width);
  }
}

}  // namespace dyncore::DYNCORE_ISA
