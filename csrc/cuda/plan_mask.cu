// plan_mask: the slots of a mask [T, G]. Each pair is an item that goes to its own group or nowhere.
#include "cuda/common/counting_sort.h"

namespace dyncore::cuda {

namespace {

struct MaskKeys {
  const uint8_t* mask;
  int groups;

  __device__ unsigned operator()(int64_t item, int column) const {
    return static_cast<unsigned>(mask[item] != 0 ? column : groups);
  }
  __device__ int source(int64_t item) const { return static_cast<int>(item); }
};

}  // namespace

int64_t plan_mask_workspace(int64_t num_rows, int64_t groups) {
  return groups == 0 ? 0 : tile(num_rows, groups, groups).workspace(groups);
}

void plan_mask(const uint8_t* mask, int32_t* sources, const PlanBuffers& plan, int32_t* workspace, Stream stream) {
  if (plan.groups == 0) {
    clear("plan_mask", stream, plan.offsets, 1);
    clear("plan_mask", stream, plan.row_offsets, plan.num_rows + 1);
    clear("plan_mask", stream, plan.rows, plan.capacity);
    if (sources) clear("plan_mask", stream, sources, plan.capacity);
    return clear("plan_mask", stream, plan.row_slots, plan.capacity);
  }
  const Placement to{plan.rows, sources, plan.offsets, plan.row_offsets, plan.row_slots, plan.capacity, true};
  const MaskKeys keys{mask, static_cast<int>(plan.groups)};
  sort_items("plan_mask", keys, tile(plan.num_rows, plan.groups, plan.groups), plan.groups, workspace, to, stream);
}

}  // namespace dyncore::cuda
