// scatter_rows: out[t] = base[t] + sum over the row's slots of scale * y, and its backward. Bound by memory. A thread
// owns columns of a row, so that each sum is made in the order of the slots, in float; the backward's dot products are
// made by the lanes of a warp, in an order that depends on the width alone.
#include "cuda/common/block.h"
#include "cuda/common/launch.h"
#include "cuda/common/rows.h"

namespace dyncore::cuda {

namespace {

constexpr int kWordsInFlight = 2;

template <class Pack>
__device__ Pack load(const void* row, int64_t word) {
  Pack p;
  p.word = static_cast<const typename Pack::Word*>(row)[word];
  return p;
}

template <class Pack>
__device__ void store(void* row, int64_t word, const Pack& p) {
  static_cast<typename Pack::Word*>(row)[word] = p.word;
}

template <class Pack>
__device__ typename Pack::Element* row_of(const Matrix& m, int64_t row) {
  return static_cast<typename Pack::Element*>(m.data) + row * m.stride;
}

template <class Pack>
__global__ void __launch_bounds__(kRowThreads) combine(ScatterRows op, Team team) {
  const int64_t t = team.row(), words = op.width / Pack::count, step = team.lanes();
  if (t >= op.plan.num_rows) return;
  const int begin = op.plan.row_offsets[t], end = op.plan.row_offsets[t + 1];
  const auto* const base = op.base.data ? row_of<Pack>(op.base, t) : nullptr;
  auto* const out = row_of<Pack>(op.out, t);
  for (int64_t w0 = team.lane(); w0 < words; w0 += kWordsInFlight * step) {
    float sums[kWordsInFlight][Pack::count] = {};
    const int64_t last = words - 1;  // a word past the end is this one again, and not stored
#pragma unroll 4
    for (int s = begin; s < end; ++s) {
      const int slot = op.plan.row_slots[s];
      const float scale = op.plan.scale ? op.plan.scale[slot] : 1.0f;
      const auto* const y = row_of<Pack>(op.y, slot);
#pragma unroll
      for (int i = 0; i < kWordsInFlight; ++i) {
        const Pack p = load<Pack>(y, min(w0 + i * step, last));
#pragma unroll
        for (int j = 0; j < Pack::count; ++j) sums[i][j] += scale * p.elements[j].value();
      }
    }
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i) {
      const int64_t w = w0 + i * step;
      if (w > last) continue;
      Pack p{};
      if (base) p = load<Pack>(base, w);
      if (begin < end) {
#pragma unroll
        for (int j = 0; j < Pack::count; ++j)
          p.elements[j] = Pack::Element::of(base ? p.elements[j].value() + sums[i][j] : sums[i][j]);
      }
      store(out, w, p);
    }
  }
}

template <class Pack>
__global__ void __launch_bounds__(kRowThreads) combine_backward(ScatterRowsBackward op, Team team) {
  const int64_t a = team.row(), words = op.width / Pack::count;
  const bool live = a < op.plan.capacity && a < op.plan.offsets[op.plan.groups];
  const auto* const grad = live ? row_of<Pack>(op.grad, op.plan.rows[a]) : nullptr;
  const float scale = live && op.plan.scale ? op.plan.scale[a] : 1.0f;
  const auto* const y = live && op.dscale ? row_of<Pack>(op.y, a) : nullptr;
  auto* const dy = op.dy && a < op.plan.capacity ? static_cast<typename Pack::Element*>(op.dy) + a * op.width : nullptr;
  float sums[Pack::count] = {};
  const int64_t step = team.lanes();
  for (int64_t w0 = team.lane(); w0 < words; w0 += kWordsInFlight * step) {
    Pack g[kWordsInFlight] = {}, held[kWordsInFlight] = {};
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i) {
      if (w0 + i * step >= words) continue;
      if (live) g[i] = load<Pack>(grad, w0 + i * step);
      if (y) held[i] = load<Pack>(y, w0 + i * step);
    }
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i) {
      if (w0 + i * step >= words) continue;
#pragma unroll
      for (int j = 0; j < Pack::count; ++j) {
        const float gradient = g[i].elements[j].value();
        sums[j] += gradient * held[i].elements[j].value();
        if (op.plan.scale) g[i].elements[j] = Pack::Element::of(scale * gradient);
      }
      if (dy) store(dy, w0 + i * step, g[i]);
    }
  }
  if (!op.dscale) return;
  float dot = 0.0f;
#pragma unroll
  for (int j = 0; j < Pack::count; ++j) dot += sums[j];
  for (int apart = team.lanes() / 2; apart > 0; apart /= 2) dot += __shfl_xor_sync(kAllLanes, dot, apart);
  if (team.lane() == 0 && a < op.plan.capacity) op.dscale[a] = dot;
}

}  // namespace

void scatter_rows(const ScatterRows& op, Stream stream) {
  if (op.width == 0 || op.plan.num_rows == 0) return;
  const int64_t bytes = element_bytes(op.dtype);
  with_pack(op.dtype,
            {address(op.y.data), address(op.base.data), address(op.out.data), op.y.stride * bytes,
             op.base.stride * bytes, op.out.stride * bytes, op.width * bytes},
            [&](auto pack) {
              using Pack = decltype(pack);
              const Team team = team_for(op.width / Pack::count, kWordsInFlight, kRowThreads);
              launch("scatter_rows", stream, ceil_div<int64_t>(op.plan.num_rows, team.rows_per_block()), kRowThreads, 0,
                     combine<Pack>, op, team);
            });
}

void scatter_rows_backward(const ScatterRowsBackward& op, Stream stream) {
  if (op.plan.capacity == 0 || !(op.dy || op.dscale)) return;
  const int64_t bytes = element_bytes(op.dtype);
  with_pack(op.dtype,
            {address(op.grad.data), address(op.y.data), address(op.dy), op.grad.stride * bytes, op.y.stride * bytes,
             op.width * bytes},
            [&](auto pack) {
              using Pack = decltype(pack);
              const Team team = team_for(op.width / Pack::count, 1, kWarp);
              launch("scatter_rows_backward", stream, ceil_div<int64_t>(op.plan.capacity, team.rows_per_block()),
                     kRowThreads, 0, combine_backward<Pack>, op, team);
            });
}

}  // namespace dyncore::cuda
