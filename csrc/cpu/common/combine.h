// Slots back to rows: slot results are summed through the inverse map, in ascending slot order (pairwise where a row
// has many), in float, and rounded once. A thread owns its rows, so there are no atomics and the bits do not depend on
// the thread count.
#pragma once
#include "common/threads.h"
#include "cpu/common/dtype.h"
#include "cpu/common/sums.h"

namespace dyncore::DYNCORE_ISA {

// Sum over row t's slots a of scale[a] * slots[a * stride : ...+n]; not scaled where scale is null.
template <class T>
DYNCORE_INLINE Row combine_row(const Plan& plan, int64_t t, const T* slots, int64_t stride, const float* scale, int n) {
  const int32_t* row_slots = plan.row_slots;
  const auto add_slot = [=](Row& total, int64_t s) DYNCORE_INLINE_LAMBDA {
    const int64_t a = row_slots[s];
    const Row y = load_row(slots + a * stride, n);
    const float factor = scale ? scale[a] : 1.0f;
    for (int j = 0; j < NV; ++j) total.v[j] += factor * y.v[j];
  };
  return pairwise_sum<Row>(plan.row_offsets[t], plan.row_offsets[t + 1], add_slot);
}

inline bool several_slots_in_a_row(const Plan& plan) {
  bool several = false;
  for (int64_t t = 0; t < plan.num_rows; ++t) several |= plan.row_offsets[t + 1] - plan.row_offsets[t] > 1;
  return several;
}

// out[t] = base + sum of scale * slots[a] over the row's slots, for each thread's share of the rows that have some;
// rows of `slots` are `slots_stride` apart and end in a whole panel.
template <class T>
inline void combine_slots(const Plan& plan, const float* slots, int64_t slots_stride, const float* scale,
                          const Matrix& base, T* out, int64_t stride, int64_t width, const Team& team) {
  const T* base_at = static_cast<const T*>(base.data);
  const int64_t end = plan.num_rows * (team.index + 1) / team.size;
  for (int64_t t = plan.num_rows * team.index / team.size; t < end; ++t) {
    if (plan.row_offsets[t] == plan.row_offsets[t + 1]) continue;
    for (int64_t n0 = 0; n0 < width; n0 += NC) {
      const int n = panel_width(width, n0);
      Row total = combine_row(plan, t, slots + n0, slots_stride, scale, NC);
      if (base_at) total = load_row(base_at + t * base.stride + n0, n) + total;
      store_row(out + t * stride + n0, total, n);
    }
  }
}

// Rows without a slot are exactly their base, or 0, whatever it holds. Each thread fills its share of the rows.
template <class T>
inline void fill_empty_rows(const Plan& plan, const Matrix& base, T* out, int64_t stride, int64_t width,
                            const Team& team) {
  if (width == 0) return;
  const T* base_at = static_cast<const T*>(base.data);
  const int64_t end = plan.num_rows * (team.index + 1) / team.size;
  for (int64_t t = plan.num_rows * team.index / team.size; t < end; ++t) {
    if (plan.row_offsets[t] != plan.row_offsets[t + 1]) continue;
    if (base_at) {
      std::memcpy(out + t * stride, base_at + t * base.stride, width * sizeof(T));
    } else {
      std::memset(out + t * stride, 0, width * sizeof(T));
    }
  }
}

}  // namespace dyncore::DYNCORE_ISA
