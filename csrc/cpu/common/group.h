// Small helpers of the grouped ops: sizes of groups, panels and workspaces.
#pragma once
#include "common/scratch.h"
#include "cpu/common/combine.h"
#include "cpu/common/product.h"

namespace dyncore::DYNCORE_ISA {

inline int64_t largest_group(const Plan& plan) {
  int64_t largest = 0;
  for (int64_t g = 0; g < plan.groups; ++g) {
    const int64_t m = plan.offsets[g + 1] - plan.offsets[g];
    if (m > largest) largest = m;
  }
  return largest;
}

inline int64_t groups_with_slots(const Plan& plan) {
  int64_t count = 0;
  for (int64_t g = 0; g < plan.groups; ++g) count += plan.offsets[g + 1] > plan.offsets[g];
  return count;
}

// Row length of a workspace: whole panels, and in no dtype a multiple of 4096 bytes, which would map all rows of a
// register tile to the same cache set.
inline int64_t workspace_stride(int64_t columns) {
  const int64_t stride = (columns + NC - 1) / NC * NC + NC;
  return stride % (4096 / sizeof(float)) == 0 ? stride + NC : stride;
}

inline size_t panel_buffer_bytes(int64_t rows) {
  return rounded_bytes(rows * NC * sizeof(float));
}

template <class T>
inline Right<T> weight_of_group(const Weight& w, int64_t g, bool transposed) {
  const T* data = static_cast<const T*>(w.data) + g * w.stride_g;
  // The right operand's columns are the weight's N (forward) or K (backward).
  if (transposed) return {data, w.stride_k, w.stride_n, nullptr};
  return {data, w.stride_n, w.stride_k, nullptr, w.panels ? w.panels + g * w.panels_g : nullptr, w.panel};
}

template <class T>
inline Row bias_row(const Matrix& bias, int64_t g, int64_t n0, int n) {
  if (!bias.data) return zero_row();
  return load_row(static_cast<const T*>(bias.data) + g * bias.stride + n0, n);
}

// The rows of a matrix from `first` on.
template <class T>
inline Matrix rows_from(const Matrix& m, int64_t first) {
  return {m.data ? static_cast<T*>(m.data) + first * m.stride : nullptr, m.stride};
}

// Padding slots hold 0: rows [live, capacity) of a slot-major matrix, where there is one.
template <class T>
inline void zero_slots_from(T* slots, int64_t live, int64_t capacity, int64_t width) {
  if (slots) std::memset(slots + live * width, 0, (capacity - live) * width * sizeof(T));
}

}  // namespace dyncore::DYNCORE_ISA
