// What the grouped backward passes share. Gradients of slots are made twice: as rows [A, N], the left operand of the
// gradient of x, and transposed [N, A], the left operand of the weight gradient, so that the same product serves both.
#pragma once
#include "cpu/common/team_scratch.h"

namespace dyncore::DYNCORE_ISA {

// out[j * stride + r] = tile[r][j] for m rows and n <= 32 columns.
template <class T>
inline void store_transposed(T* out, int64_t stride, const float* tile, int64_t m, int n) {
  int64_t r = 0;
  for (; r + VL <= m; r += VL) {
    for (int j0 = 0; j0 < n; j0 += VL) {
      vf v[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) v[i] = load(tile + (r + i) * NC + j0);
      transpose(v);
      const int have = n - j0 < VL ? n - j0 : VL;
#pragma GCC unroll 16
      for (int j = 0; j < VL; ++j)
        if (j < have) store(out + (j0 + j) * stride + r, v[j]);
    }
  }
  for (; r < m; ++r)
    for (int j = 0; j < n; ++j) out[j * stride + r] = from_float<T>(tile[r * NC + j]);
}

// out[0:n] = sum of the tile's m rows.
template <class T>
inline void store_column_sums(T* out, const float* tile, int64_t m, int n) {
  const auto add_row = [=](Row& total, int64_t r)
                           DYNCORE_INLINE_LAMBDA { total = total + load_row(tile + r * NC, NC); };
  store_row(out, pairwise_sum<Row>(0, m, add_row), n);
}

// dweight[g][:, k0:k0+32] = sum over the group's slots of dy[a] x[a]^T. dy_t is dy transposed [N, stride];
// right holds x's rows by slot. An empty group's gradient is 0.
template <class T>
inline void weight_gradient_panel(T* dweight, int64_t n_rows, int64_t k_columns, const T* dy_t, int64_t dy_stride,
                                  Right<T> right, int64_t m, int64_t k0, const PanelBuffers& buffers, float* results) {
  const int n = panel_width(k_columns, k0);
  if (m == 0) {
    for (int64_t r = 0; r < n_rows; ++r) std::memset(dweight + r * k_columns + k0, 0, n * sizeof(T));
    return;
  }
  product(results, Left<T>{dy_t, dy_stride, nullptr}, n_rows, m, right.from_column(k0), n, buffers);
  for (int64_t r = 0; r < n_rows; ++r) store_row(dweight + r * k_columns + k0, load_row(results + r * NC, NC), n);
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
