// plan_inverse: row_offsets and row_slots of slots given in any order of their rows. The slots are sorted by the digits
// of their rows, the lowest first; then each row finds its first slot by bisection. Not a part of any forward pass.
#include "cuda/common/counting_sort.h"

namespace dyncore::cuda {

namespace {

constexpr int kDigitBits = 10;
constexpr int kDigitCount = 1 << kDigitBits;
static_assert(kDigitCount <= kMostGroups, "a digit is a group of the sort");

struct Slots {
  const int32_t* rows;
  const int32_t* live;
  const int32_t* order;  // the slots in the order of the sorts so far, or null
  int capacity, last_row;

  __device__ int slot(int64_t item) const { return order ? order[item] : static_cast<int>(item); }
  __device__ int row(int64_t item) const { return max(0, min(rows[slot(item)], last_row)); }
};

struct DigitKeys {
  Slots slots;
  int shift;

  __device__ unsigned operator()(int64_t item, int) const {
    return static_cast<unsigned>(item < *slots.live ? (slots.row(item) >> shift) & (kDigitCount - 1) : kDigitCount);
  }
  __device__ int source(int64_t item) const { return slots.slot(item); }
};

// row_offsets[t] is the first place in row_slots whose row is not below t.
__global__ void __launch_bounds__(kSortThreads) find_rows(Slots sorted, int64_t num_rows, int32_t* row_offsets) {
  const int64_t t = int64_t{blockIdx.x} * kSortThreads + threadIdx.x;
  if (t > num_rows) return;
  int low = 0, high = min(*sorted.live, sorted.capacity);
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (sorted.row(middle) < t) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  row_offsets[t] = low;
}

// How many sorts the rows need: one a digit.
int passes(int64_t num_rows) {
  int count = 1;
  while ((num_rows - 1) >> (kDigitBits * count) > 0) ++count;
  return count;
}

}  // namespace

// Two orders of the slots, the offsets of a sort's digits, and what a sort takes.
int64_t plan_inverse_workspace(int64_t capacity) {
  return 2 * capacity + kDigitCount + 1 + tile(capacity, 1, kDigitCount).workspace(kDigitCount);
}

void plan_inverse(const PlanBuffers& plan, int32_t* workspace, Stream stream) {
  if (plan.capacity == 0 || plan.num_rows == 0) {
    clear("plan_inverse", stream, plan.row_offsets, plan.num_rows + 1);
    return clear("plan_inverse", stream, plan.row_slots, plan.capacity);
  }
  int32_t* const orders[] = {workspace, workspace + plan.capacity};
  int32_t* const offsets = workspace + 2 * plan.capacity;
  int32_t* const counts = offsets + kDigitCount + 1;
  const Tiling t = tile(plan.capacity, 1, kDigitCount);
  Slots slots{plan.rows, plan.offsets + plan.groups, nullptr, static_cast<int>(plan.capacity),
              static_cast<int>(plan.num_rows - 1)};
  const int sorts = passes(plan.num_rows);
  for (int i = 0; i < sorts; ++i) {
    int32_t* const order = i == sorts - 1 ? plan.row_slots : orders[i % 2];
    const Placement to{nullptr, order, offsets, nullptr, nullptr, plan.capacity, false};
    sort_items("plan_inverse", DigitKeys{slots, i * kDigitBits}, t, kDigitCount, counts, to, stream);
    slots.order = order;
  }
  launch("plan_inverse", stream, ceil_div<int64_t>(plan.num_rows + 1, kSortThreads), kSortThreads, 0, find_rows, slots,
         plan.num_rows, plan.row_offsets);
}

}  // namespace dyncore::cuda
