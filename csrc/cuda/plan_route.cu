// plan_route: the slots of top-k routing. Each entry of expert [T, k] is an item.
#include "cuda/common/route_keys.h"

namespace dyncore::cuda {

int64_t plan_route_workspace(int64_t num_rows, int64_t k, int64_t groups) {
  return k == 0 || groups == 0 ? 0 : tile(num_rows, k, groups).workspace(groups);
}

void plan_route(const void* expert, bool wide, int64_t k, int32_t* sources, const PlanBuffers& plan, int32_t* workspace,
                Stream stream) {
  if (k == 0 || plan.groups == 0) {
    clear("plan_route", stream, plan.offsets, plan.groups + 1);
    clear("plan_route", stream, plan.row_offsets, plan.num_rows + 1);
    for (int32_t* list : {plan.rows, plan.row_slots, sources}) clear("plan_route", stream, list, plan.capacity);
    return;
  }
  const Placement to{plan.rows, sources, plan.offsets, plan.row_offsets, plan.row_slots, plan.capacity, k == 1};
  const Tiling t = tile(plan.num_rows, k, plan.groups);
  const int groups = static_cast<int>(plan.groups);
  if (wide) {
    const RouteKeys<int64_t> keys{static_cast<const int64_t*>(expert), groups};
    sort_items("plan_route", keys, t, plan.groups, workspace, to, stream);
  } else {
    const RouteKeys<int32_t> keys{static_cast<const int32_t*>(expert), groups};
    sort_items("plan_route", keys, t, plan.groups, workspace, to, stream);
  }
}

}  // namespace dyncore::cuda
