// plan_route_topk: the router of a mixture of experts in two launches. The first chooses, a warp to a row, and counts
// the groups of each tile; the second places the slots (common/counting_sort.h). Bound by the latency of k maxima over
// a warp, hence many warps a block.
#include "cuda/common/elements.h"
#include "cuda/common/route_keys.h"

namespace dyncore::cuda {

namespace {

// Of a block whose lanes hold so many logits each: with 32 of them a thread needs more than 64 registers.
__host__ __device__ constexpr int threads_for(int values) {
  return values > 8 ? 512 : 1024;
}

// The greatest key of the warp's lanes and values; *group becomes its group, the lowest of equal ones.
template <int kValues>
__device__ unsigned greatest(const unsigned (&keys)[kValues], int* group) {
  unsigned key = 0;
  int mine = lane();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    mine = keys[i] > key ? i * kWarp + lane() : mine;
    key = keys[i] > key ? keys[i] : key;
  }
  const unsigned best = __reduce_max_sync(kAllLanes, key);
  *group = __reduce_min_sync(kAllLanes, key == best ? mine : static_cast<int>(kMostGroups));
  return best;
}

// kValues logits a lane.
template <int kValues>
__global__ void __launch_bounds__(threads_for(kValues), 1)
    choose_groups(const float* logits, Tiling t, int groups, bool normalize, int32_t* expert, float* weight,
                  int32_t* table) {
  constexpr int kThreads = threads_for(kValues);
  int* const counts = shared_memory<int>();
  const int thread = static_cast<int>(threadIdx.x), tile = static_cast<int>(blockIdx.x), k = t.width;
  for (int g = thread; g < groups; g += kThreads) counts[g] = 0;
  __syncthreads();
  const int64_t rows_per_tile = t.chunks_per_tile * t.rows_per_chunk;
  const int64_t end = min((tile + 1) * rows_per_tile, t.rows);
  for (int64_t row = tile * rows_per_tile + warp(); row < end; row += kThreads / kWarp) {
    unsigned keys[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int g = i * kWarp + lane();
      keys[i] = g < groups ? ordered(logits[row * groups + g]) : 0;
    }
    float highest = 0.0f, total = 0.0f, mine = 0.0f;
    int chosen = 0;
    for (int j = 0; j < k; ++j) {
      int group;
      const float logit = value_of(greatest(keys, &group));
      if (j == 0) {
        highest = logit;
        if (!normalize) {
#pragma unroll
          for (int i = 0; i < kValues; ++i) total += keys[i] ? expf(value_of(keys[i]) - highest) : 0.0f;
          total = sum_of_warp(total);
        }
      }
      const float exponential = expf(logit - highest);
      if (normalize) total += exponential;
      if (lane() == j) {
        mine = exponential;
        chosen = group;
      }
#pragma unroll
      for (int i = 0; i < kValues; ++i) keys[i] = group == i * kWarp + lane() ? 0 : keys[i];
    }
    if (lane() < k) {
      expert[row * k + lane()] = chosen;
      weight[row * k + lane()] = mine / total;
      atomicAdd(counts + chosen, 1);
    }
  }
  if (!t.counts_first) return;
  __syncthreads();
  for (int g = thread; g < groups; g += kThreads) table[int64_t{g} * t.tiles + tile] = counts[g];
}

}  // namespace

// The weights of the items, and what the sort takes.
int64_t plan_route_topk_workspace(int64_t num_rows, int64_t k, int64_t groups) {
  return num_rows * k + plan_route_workspace(num_rows, k, groups);
}

void plan_route_topk(const float* logits, int64_t k, bool normalize, int32_t* expert, int32_t* sources, float* scale,
                     const PlanBuffers& plan, int32_t* workspace, Stream stream) {
  const char* const name = "plan_route_topk";
  if (plan.capacity == 0) {
    clear(name, stream, plan.offsets, plan.groups + 1);
    return clear(name, stream, plan.row_offsets, plan.num_rows + 1);
  }
  const Tiling t = tile(plan.num_rows, k, plan.groups);
  const int groups = static_cast<int>(plan.groups);
  float* const weights = reinterpret_cast<float*>(workspace);
  int32_t* const table = workspace + plan.capacity;
  const auto choose = [&](auto kernel, int values) {
    launch(name, stream, t.tiles, threads_for(values), groups * int64_t{sizeof(int)}, kernel, logits, t, groups,
           normalize, expert, weights, table);
  };
  constexpr int kMostValues = kMostGroups / kWarp;
  if (groups <= 2 * kWarp) {
    choose(choose_groups<2>, 2);
  } else if (groups <= 8 * kWarp) {
    choose(choose_groups<8>, 8);
  } else {
    choose(choose_groups<kMostValues>, kMostValues);
  }
  Placement to{plan.rows, sources, plan.offsets, plan.row_offsets, plan.row_slots, plan.capacity, k == 1};
  to.weights = weights;
  to.scale = scale;
  place(name, RouteKeys<int32_t>{expert, groups}, t, plan.groups, table, to, stream);
}

}  // namespace dyncore::cuda
