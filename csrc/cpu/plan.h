// Making plans and checking them. Counting passes over a few bytes a slot: one thread, no instruction set of its own.
#pragma once
#include "common/types.h"

namespace dyncore {

// Throws std::invalid_argument or std::out_of_range unless every index that a kernel will follow is in bounds:
// offsets rise from 0 to at most the capacity, live rows lie in [0, row_limit), and the inverse map is that of the
// rows.
void check_plan(const Plan& plan, int64_t row_limit, bool uses_inverse);

// A mask is read as bytes, and any but 0 is true: memory that others made bool may hold 255.
int64_t count_mask(const uint8_t* mask, int64_t size);
int64_t count_route(const void* expert, bool wide, int64_t size, int64_t num_groups);

// Slots in the order of (group, row). Throws std::invalid_argument where the mask has more slots than the capacity.
// sources[a] = t*groups + g of slot a, for masks that an int32 can index, or null.
void plan_mask(const uint8_t* mask, int32_t* sources, const PlanBuffers& plan);

// expert[T][k], int32 or (wide) int64; negative means nowhere; an index >= groups throws std::out_of_range.
// sources[a] = t*k + j of slot a.
void plan_route(const void* expert, bool wide, int64_t k, int32_t* sources, const PlanBuffers& plan);

// The k highest of each of `batch` sequences, float or (wide) double: NaN ranks highest, ties go to the lower index.
void plan_topk(const void* scores, bool wide, int64_t batch, int64_t sequence, int64_t k, const PlanBuffers& plan);

// Fills row_offsets and row_slots from rows and offsets, which must have passed check_plan.
void plan_inverse(const PlanBuffers& plan);

}  // namespace dyncore
